"""`gatelet bench estimators`: what each estimator costs beside the same thing written by hand in plain PyTorch.

The objective is cheap on purpose, Σ_i (h_i − 0.45)²/N per example, so that the estimator is what is timed. Before a
pair is timed, both sides must give the same gradient from the same seed: speeds are compared only where results are
equal.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import gatelet
from gatelet._checks import check_choice, check_count, check_logits
from gatelet.estimators import ALL, Estimator
from gatelet_lab.bench.by_hand import HAND, Hand, Objective, by_hand
from gatelet_lab.files import write_json

SHAPES: Mapping[str, tuple[int, int]] = {"32x2000": (32, 2000), "256x200": (256, 200)}
GOALS: Mapping[str, float] = {"path": 1.2, "loss": 1.5}
_TARGET = 0.45


@dataclass(frozen=True)
class BenchEstimators:
    """Time forward and backward of each estimator against the same thing written by hand."""

    estimators: tuple[str, ...] = tuple(ALL)
    """Names of gatelet.estimators.ALL."""
    shapes: tuple[str, ...] = tuple(SHAPES)
    """Batch × units: these two, or one of them."""
    rounds: int = 60
    """Interleaved rounds; the report has the medians over them."""
    threads: int = 1
    """Threads of PyTorch."""
    out: Path | None = None
    """A JSON file for the figures."""


@dataclass
class Row:
    """One estimator at one shape; medians in milliseconds."""

    estimator: str
    needs: str
    batch: int
    units: int
    samples: int
    surrogate_ms: float
    module_ms: float | None
    """StochasticUnit (with a Tape where the estimator needs the loss); None where the objective is needed."""
    hand_ms: float | None
    """None where there is no short hand-written form."""
    surrogate_ratio: float | None
    """Over the hand-written one: the median of the rounds' ratios."""
    module_ratio: float | None
    goal: float | None
    check_ms: float
    """The part of both times that checks the logits for NaN and infinity, as every call does on the CPU."""

    @property
    def missed(self) -> bool:
        """Whether one of the two ways is above the goal."""
        ratios = [ratio for ratio in (self.surrogate_ratio, self.module_ratio) if ratio is not None]
        return self.goal is not None and max(ratios, default=0.0) > self.goal


# -------------------------------------------------------------------- the library's two ways


def _objective(gates: Tensor) -> Tensor:
    return (gates - _TARGET).square().mean(-1)


def by_surrogate(method: Estimator) -> Hand:
    """Return the estimator, called through ``gatelet.surrogate``."""
    return lambda a, objective: gatelet.surrogate(objective, a, method, samples=method.replicas).mean()


def by_module(method: Estimator) -> Hand:
    """Return the estimator, called through ``StochasticUnit`` and, where it needs the loss, a ``Tape``."""
    unit = gatelet.StochasticUnit(method)

    def path(a: Tensor, objective: Objective) -> Tensor:
        return objective(unit(a)).mean()

    def taped(a: Tensor, objective: Objective) -> Tensor:
        with gatelet.Tape() as tape:
            loss = objective(unit(tape.replicate(a, method.replicas) if method.replicas > 1 else a))
        return tape.surrogate(loss).mean()

    return path if method.needs == "path" else taped


def gradient(way: Hand, logits: Tensor, seed: int = 0) -> Tensor:
    """Return the gradient that one way gives from this seed."""
    a = logits.clone().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        way(a, _objective).backward()
    assert a.grad is not None
    return a.grad


# -------------------------------------------------------------------- timing


def run(options: BenchEstimators, console: Console) -> None:
    """Check that each pair agrees, time it, and show the table."""
    rows = measure(options)
    if options.out is not None:
        machine = {"torch": torch.__version__, "threads": options.threads, "rounds": options.rounds}
        write_json(options.out, {"version": version("gatelet"), **machine, "rows": [asdict(row) for row in rows]})
    show(rows, options, console)


def measure(options: BenchEstimators) -> list[Row]:
    """Return the figures of every estimator at every shape."""
    for name in options.estimators:
        check_choice(name, ALL, "estimator")
    for shape in options.shapes:
        check_choice(shape, SHAPES, "shape")
    check_count(options.rounds, "--rounds")
    check_count(options.threads, "--threads")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [
                _measure(name, *SHAPES[shape], options.rounds)
                for shape in options.shapes
                for name in options.estimators
                if "bernoulli" in ALL[name].kinds and name not in _TOO_DEAR
            ]
    finally:
        torch.set_num_threads(before)


_TOO_DEAR = ("enumeration", "local_expectation", "finite_differences")  # 2^N, or N, evaluations at N = 2000


def _measure(name: str, batch: int, units: int, rounds: int) -> Row:
    logits = torch.randn(batch, units)
    method = ALL[name]()
    ways = {"surrogate": by_surrogate(method)}
    if method.needs != "objective":
        ways["module"] = by_module(ALL[name]())
    if name in HAND:
        ways["hand"] = by_hand(name)
        check_same(name, logits)
    a = logits.clone().requires_grad_()
    calls: dict[str, Callable[[], object]] = {way: partial(_both_passes, call, a) for way, call in ways.items()}
    calls["check"] = partial(check_logits, a)
    times: dict[str, list[float]] = {way: [] for way in calls}
    order = list(calls.items())
    gc.collect()
    gc.disable()
    try:
        for turn in range(-5, rounds):
            for way, call in (
                order[turn % len(order) :] + order[: turn % len(order)]
            ):  # so that neither way is always first
                a.grad = None
                began = time.perf_counter()
                call()
                if turn >= 0:
                    times[way].append(1e3 * (time.perf_counter() - began))
    finally:
        gc.enable()
    medians = {way: statistics.median(values) for way, values in times.items()}

    def ratio(way: str) -> float | None:
        if way not in times or "hand" not in times:
            return None
        return statistics.median(ours / hand for ours, hand in zip(times[way], times["hand"], strict=True))

    return Row(
        estimator=name,
        needs=method.needs,
        batch=batch,
        units=units,
        samples=method.replicas,
        surrogate_ms=medians["surrogate"],
        module_ms=medians.get("module"),
        hand_ms=medians.get("hand"),
        surrogate_ratio=ratio("surrogate"),
        module_ratio=ratio("module"),
        goal=GOALS.get(method.needs) if "hand" in times else None,
        check_ms=medians["check"],
    )


def _both_passes(way: Hand, a: Tensor) -> None:
    way(a, _objective).backward()


def check_same(name: str, logits: Tensor) -> None:
    """Raise unless the hand-written estimator has the library's gradient, in both ways of calling it.

    Compared in float64, where rounding does not look like a difference.
    """
    exact = logits.double()
    wanted = gradient(by_hand(name), exact)
    for way in (by_surrogate(ALL[name]()), by_module(ALL[name]())):
        off = (gradient(way, exact) - wanted).abs().max().item()
        if not off <= 1e-9 * wanted.abs().max().item():
            raise RuntimeError(f"{name}: the hand-written gradient is off by {off:.2g}; only equal results are timed")


# -------------------------------------------------------------------- the table


def show(rows: Sequence[Row], options: BenchEstimators, console: Console) -> None:
    """Print the table."""
    title = f"forward + backward, medians of {options.rounds} interleaved rounds, {options.threads} thread(s)"
    grid = Table(title=title, box=box.SIMPLE_HEAD)
    heads = (
        "estimator",
        "B × N",
        "samples",
        "hand ms",
        "surrogate ms",
        "×",
        "module ms",
        "×",
        "goal",
        "of it check ms",
    )
    for index, head in enumerate(heads):
        grid.add_column(head, justify="left" if index == 0 else "right")
    for row in rows:
        cells = [row.estimator, f"{row.batch} × {row.units}", str(row.samples), _cell(row.hand_ms, ".3f")]
        cells += [_cell(row.surrogate_ms, ".3f"), _cell(row.surrogate_ratio, ".2f")]
        cells += [_cell(row.module_ms, ".3f"), _cell(row.module_ratio, ".2f"), _cell(row.goal, "g")]
        cells += [_cell(row.check_ms, ".3f")]
        grid.add_row(*cells, style="bold red" if row.missed else None)
    console.print(grid)


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
