"""`gatelet bench kernels`: how much time closed units save, beside dense products and other sparse ways."""

import functools
import itertools
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from gatelet._checks import check_count
from gatelet.kernels import Choice, choose, explain, gated_ffn, gated_linear
from gatelet.kernels.backends import Layer
from gatelet.nn import ConditionalLinear, Gater, conditional_linear
from gatelet_lab import data
from gatelet_lab.bench.busy import show_busy
from gatelet_lab.bench.lists import show_lists
from gatelet_lab.bench.rows import show_rows
from gatelet_lab.files import write_atomically, write_json
from gatelet_lab.training.paper import PaperTrainer
from gatelet_lab.training.recipes import recipe

RATE = 0.1
BATCHES = (1, 32, 256, 1024)
QUIET = 0.05
"""A measurement counts as undisturbed while other processes use less of a core than this."""


@dataclass(frozen=True)
class BenchKernels:
    """Time the kernels that skip closed units, and their peers, on this machine."""

    quick: bool = False
    """Fewer and shorter measurements: half a minute in place of five."""
    shape: tuple[int, int] | None = None
    """Time this shape, D and N, instead of the table's."""
    auto: bool = False
    """Instead of the table: how much slower backend="auto" is than the faster of its choices, over a grid of layers."""
    step: bool = False
    """Instead of the table: where the time of a training step of the paper's network goes."""
    bottleneck: int = 400
    """Width of the gater's hidden layer, with --step."""
    lists: bool = False
    """Instead of the table: few open units given as lists, beside embedding_bag, sampled_addmm and CSR products."""
    rows: bool = False
    """Instead of the table: inference over bfloat16 and int8 weights, beside dense layers of the same format."""
    busy: int | None = None
    """Instead of the table: how long single calls take beside so many processes that never wait."""
    plot: Path | None = None
    """Directory for the sweeps' plot and the numbers as JSON."""
    patience: float = 10.0
    """Seconds to wait, per line, for a measurement that other processes do not disturb."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    title: str
    width: int
    units: int
    group: int = 1
    op: str = "linear"
    backward: bool = False
    batches: tuple[int, ...] = BATCHES


ROWS = (
    Row("1024→4096 units", 1024, 4096),
    Row("784→2000 units", 784, 2000),
    Row("4096→11008 units", 4096, 11008, batches=(1, 32, 256)),
    Row("1024→4096 units f+b", 1024, 4096, backward=True),
    Row("1024→4096 groups of 64", 1024, 4096, group=64),
    Row("FFN 1024→4096→1024", 1024, 4096, op="ffn"),
    Row("FFN 1024→4096→1024 f+b", 1024, 4096, op="ffn", backward=True),
)
COLUMNS = {
    "numba": "ours",
    "auto": "auto",
    "dense × mask": "mask",
    "sampled_addmm": "addmm",
    "grouped_mm": "grouped",
    "loop over groups": "loop",
}
"""Head of the column of each way."""
Ways = Mapping[Any, Callable[[], Any]]


def run(options: BenchKernels, console: Console) -> None:
    """Check, time, show; sweeps only when they are to be plotted."""
    if options.plot is not None and options.plot.exists() and not options.plot.is_dir():
        raise ValueError(f"--plot {options.plot}: exists and is not a directory")
    about = machine()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    budget = 0.2 if options.quick else 1.0
    if options.lists or options.rows:

        def seconds(ways: Ways) -> dict[Any, float]:
            return interleaved(ways, budget, options.patience)[0]

        if options.lists:
            show_lists(options.quick, seconds, console)
        if options.rows:
            show_rows(options.quick, RATE, seconds, console)
        return
    if options.busy is not None:
        if options.busy < 0:
            raise ValueError(f"--busy {options.busy}: a number of processes is at least 0")
        show_busy(options.busy, RATE, 2.0 if options.quick else 8.0, console)
        return
    if options.step:
        show_steps(budget, options.patience, check_count(options.bottleneck, "--bottleneck"), console)
        return
    rows: tuple[Row, ...] = ROWS
    shapes: Sequence[tuple[int, int]] = AUTO_SHAPES
    if options.shape is not None:
        width, units = options.shape
        if width < 1 or units < 1:
            raise ValueError(f"--shape: D and N must be at least 1, not {width} {units}")
        shapes = (options.shape,)
        rows = (
            Row(f"{width}→{units} units", width, units),
            Row(f"{width}→{units} units f+b", width, units, backward=True),
        )
    if options.auto:
        check_auto(shapes, options, console)
        return
    results = []
    console.print(head(), highlight=False)
    for row in rows:
        for batch in (each for each in row.batches if each in ((1, 32, 256) if options.quick else BATCHES)):
            results.append(measure(row, batch, RATE, budget, options.patience))
            console.print(line(results[-1]), highlight=False)
    console.print(
        f"time / dense at {RATE:.0%} open; f+b: forward and backward; speed-up of at most {1 / RATE:.0f}×; others: CPU "
        "of other processes",
        highlight=False,
    )
    report: dict[str, Any] = {"machine": about, "results": results}
    if options.plot is not None:
        report["rates"] = sweep_rate(budget / 2, options.patience)
        report["units"] = sweep_units(budget / 2, options.patience)
        options.plot.mkdir(parents=True, exist_ok=True)
        plot(report, options.plot / "kernels.png")
        write_json(options.plot / "kernels.json", report)
        console.print(f"kernels.png and kernels.json are in {options.plot}")


def machine() -> dict[str, Any]:
    """Describe what the numbers hold for."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "date": date.today().isoformat(),
        "cpu": name,
        "vector": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# -------------------------------------------------------------------- what is timed


def measure(
    row: Row, batch: int, rate: float, budget: float, patience: float = 0.0, peers: bool = True
) -> dict[str, Any]:
    """Return the medians of a row's ways, after their results were compared."""
    ways = prepare(row, batch, rate, peers)
    if not row.backward:
        with torch.no_grad():
            check(row, ways)
            medians, noise = interleaved(ways, budget, patience)
    else:
        check(row, ways)
        medians, noise = interleaved(ways, budget, patience)
    dense = medians["dense"]
    return {
        "title": row.title,
        "batch": batch,
        "rate": rate,
        "ms": {name: 1e3 * seconds for name, seconds in medians.items()},
        "ratio": {name: seconds / dense for name, seconds in medians.items()},
        "others": noise,
    }


def prepare(row: Row, batch: int, rate: float, peers: bool) -> dict[str, Callable[[], Any]]:
    """Return what computes the row's result, by name; the first is dense."""
    draw = torch.Generator().manual_seed(0)
    grad = row.backward
    x = torch.randn(batch, row.width, generator=draw).requires_grad_(grad)
    weight = (torch.randn(row.units, row.width, generator=draw) / row.width**0.5).requires_grad_(grad)
    bias = torch.randn(row.units, generator=draw).requires_grad_(grad)
    gate = (torch.rand(batch, row.units // row.group, generator=draw) < rate).float().requires_grad_(grad)
    each = gate.detach().repeat_interleave(row.group, 1).requires_grad_(grad) if row.group > 1 else gate
    if row.op == "ffn":
        by_unit = (torch.randn(row.units, row.width, generator=draw) / row.units**0.5).requires_grad_(grad)
        shift = torch.randn(row.width, generator=draw).requires_grad_(grad)
        # Each side gets the layout that it likes.
        plain = by_unit.detach().t().contiguous().requires_grad_(grad)
        pair: dict[str, tuple[Callable[[], Tensor], Sequence[Tensor]]] = {
            "dense": (
                lambda: F.linear(F.gelu(F.linear(x, weight, bias)) * gate, plain, shift),
                (x, weight, bias, gate, shift, plain),
            ),
            "numba": (
                lambda: gated_ffn(x, weight, bias, gate, "gelu", by_unit.t(), shift, backend="numba"),
                (x, weight, bias, gate, shift, by_unit),
            ),
            "auto": (
                lambda: gated_ffn(x, weight, bias, gate, "gelu", by_unit.t(), shift),
                (x, weight, bias, gate, shift, by_unit),
            ),
        }
        return with_gradients(pair, torch.randn(batch, row.width, generator=draw)) if grad else forward_only(pair)

    ways: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: F.linear(x, weight, bias) * each,
        "numba": lambda: gated_linear(x, weight, bias, gate, backend="numba"),
        "auto": lambda: gated_linear(x, weight, bias, gate),
    }
    if peers:
        is_open = each.detach() != 0
        ways["dense × mask"] = lambda: torch.where(is_open, F.linear(x, weight, bias), 0)
        if row.group == 1 and not grad:
            # The peer's pattern is built outside of the clock: it starts ahead.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the peer announces that it is in beta
                csr = each.to_sparse_csr()
            transposed = weight.t()
            ways["sampled_addmm"] = lambda: torch.sparse.sampled_addmm(csr, x, transposed, beta=0.0)
        if row.group > 1:
            ways["loop over groups"] = lambda: loop_over_groups(x, weight, bias, gate)
            with suppress(RuntimeError, NotImplementedError, AttributeError):
                grouped_mm(x[:1], weight, bias, gate[:1])
                ways["grouped_mm"] = lambda: grouped_mm(x, weight, bias, gate)
    # The mask has no gradient of its own: its rows pass the gate by.
    inputs = {"dense": (x, weight, bias, each), "dense × mask": (x, weight, bias)}
    pairs = {name: (way, inputs.get(name, (x, weight, bias, gate))) for name, way in ways.items()}
    return with_gradients(pairs, torch.randn(batch, row.units, generator=draw)) if grad else forward_only(pairs)


def forward_only(pairs: Mapping[Any, tuple[Callable[[], Tensor], Sequence[Tensor]]]) -> dict[Any, Callable[[], Any]]:
    """Return the ways alone."""
    return {name: way for name, (way, _) in pairs.items()}


def with_gradients(
    pairs: Mapping[Any, tuple[Callable[[], Tensor], Sequence[Tensor]]], upper: Tensor
) -> dict[Any, Callable[[], Any]]:
    """Return each way followed by its backward pass to all of its inputs."""

    def both(way: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(way(), inputs, upper)

    return {name: both(way, inputs) for name, (way, inputs) in pairs.items()}


def loop_over_groups(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """A product per group with the examples that have it open."""
    size = weight.shape[0] // gate.shape[1]
    out = x.new_zeros(x.shape[0], weight.shape[0])
    for group in range(gate.shape[1]):
        span = slice(group * size, (group + 1) * size)
        examples = gate[:, group].nonzero().flatten()
        out[examples, span] = F.linear(x[examples], weight[span], bias[span]) * gate[examples, group, None]
    return out


def grouped_mm(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """One grouped product, of the examples sorted by group."""
    groups = gate.shape[1]
    size = weight.shape[0] // groups
    group, example = gate.t().nonzero(as_tuple=True)
    ends = (gate != 0).sum(0).cumsum(0).to(torch.int32)
    product = F.grouped_mm(x[example], weight.view(groups, size, -1).transpose(1, 2), offs=ends)
    out = x.new_zeros(x.shape[0], groups, size)
    out[example, group] = (product + bias.view(groups, size)[group]) * gate[example, group, None]
    return out.flatten(1)


def check(row: Row, ways: Ways) -> None:
    """Raise unless all ways compute the same: what is wrong is not timed."""
    want = ways["dense"]()
    for name, way in ways.items():
        have = way()
        if name == "sampled_addmm":
            continue  # no bias; a peer, not ours to vouch for
        pairs = zip(have, want, strict=False) if row.backward else [(have, want)]
        for a, b in pairs:
            scale = b.abs().max().item()
            # The gate's gradient is ours on open gates only, and one per group.
            if a.shape != b.shape:
                continue
            differs = (a - b).abs().max().item()
            if row.backward and a.shape == (want[0].shape[0], row.units):
                differs = torch.where(a == 0, 0, a - b).abs().max().item()
            if not differs <= 1e-4 * max(scale, 1e-30):
                raise RuntimeError(f"{row.title}: {name} is off by {differs:g} and is not timed")


def interleaved(ways: Ways, budget: float, patience: float = 0.0) -> tuple[dict[Any, float], float]:
    """Return each way's median time in turns, and the share of a core that other processes used meanwhile.

    With ``patience`` (seconds) a disturbed measurement is repeated; the least disturbed one counts.
    """
    for way in ways.values():
        way()
        way()
    begin, best = time.perf_counter(), None
    while best is None or (best[1] > QUIET and time.perf_counter() - begin < patience):
        found = _once(ways, budget)
        if best is None or found[1] < best[1]:
            best = found
    return best


def _once(ways: Ways, budget: float) -> tuple[dict[Any, float], float]:
    times: dict[Any, list[float]] = {name: [] for name in ways}
    begin, busy, own = time.perf_counter(), _busy(), time.process_time()
    order = list(ways)
    while time.perf_counter() - begin < budget or len(times[next(iter(times))]) < 5:
        for name in order:
            start = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - start)
        # What ran before leaves its weights in the caches: everyone follows everyone.
        random.shuffle(order)
    wall = time.perf_counter() - begin
    others = max(0.0, _busy() - busy - (time.process_time() - own)) / wall
    return {name: statistics.median(each) for name, each in times.items()}, round(others, 3)


def _busy() -> float:
    """Return the CPU seconds of the whole machine so far, 0 where they are not told."""
    with suppress(OSError, ValueError):
        fields = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    return 0.0


# -------------------------------------------------------------------- whether auto chooses well

AUTO_SHAPES = ((256, 512), (784, 2000), (1024, 4096), (2048, 2048))
AUTO_BATCHES = (1, 8, 32, 256, 1024)
AUTO_RATES = (0.02, 0.1, 0.3, 0.6, 0.9)


AUTO_MOST = 1 << 30
"""Multiply-adds of the largest layer on the grid."""
AUTO_LOSS = 0.05
AUTO_SHOWN = 12


@dataclass(frozen=True)
class Decision:
    """What auto chose for a layer, and how much slower that was than the faster backend (0: it was the faster)."""

    layer: str
    choice: Choice
    loss: float
    deciding: float
    """The share of the call that choosing took."""


def check_auto(shapes: Sequence[tuple[int, int]], options: BenchKernels, console: Console) -> None:
    """Print how much slower than the faster backend auto's choice is, where it is most, and what choosing costs."""
    found: list[Decision] = []
    for dtype in (torch.float32,) if options.quick else (torch.float32, torch.float64):
        for (width, units), batch, group, backward in itertools.product(shapes, AUTO_BATCHES, (1, 16), (False, True)):
            if units % group == 0 and batch * width * units <= AUTO_MOST:
                found += decisions(width, units, batch, group, backward, dtype, options.patience)
    within = sum(each.loss <= AUTO_LOSS for each in found)
    deciding = sorted(each.deciding for each in found)
    console.print(
        f"auto is within {AUTO_LOSS:.0%} of the faster backend in {within} of {len(found)} layers; choosing takes "
        f"{statistics.median(deciding):.1%} of a call in the median, {deciding[-1]:.1%} at most; furthest off:",
        highlight=False,
    )
    for each in sorted(found, key=lambda each: -each.loss)[:AUTO_SHOWN]:
        console.print(f"{each.loss:7.1%}  {each.layer}: {each.choice.backend}", highlight=False)


def decisions(
    width: int, units: int, batch: int, group: int, backward: bool, dtype: torch.dtype, patience: float
) -> list[Decision]:
    """Time both backends at several active fractions, and say what auto chooses."""
    draw = torch.Generator().manual_seed(0)
    kind: Any = {"generator": draw, "dtype": dtype}
    x, weight = torch.randn(batch, width, **kind), torch.randn(units, width, **kind) / width**0.5
    bias, upper = torch.randn(units, **kind), torch.randn(batch, units, **kind)
    gates = {rate: (torch.rand(batch, units // group, **kind) < rate).to(dtype) for rate in AUTO_RATES}
    for each in (x, weight, bias, *gates.values()):
        each.requires_grad_(backward)
    pairs = {
        (backend, rate): (
            functools.partial(gated_linear, x, weight, bias, gate, backend=backend),
            (x, weight, bias, gate),
        )
        for rate, gate in gates.items()
        for backend in ("dense", "numba")
    }
    found = []
    with torch.set_grad_enabled(backward):
        medians, _ = interleaved(with_gradients(pairs, upper) if backward else forward_only(pairs), 0.1, patience)
        for rate, gate in gates.items():
            choice = explain(x, weight, gate)
            took = medians[choice.backend, rate]
            layer = (
                f"{width}→{units}, B = {batch}, {f'groups of {group}' if group > 1 else 'units'}, {rate:.0%} open, "
                f"{'f+b' if backward else 'forward'}, {str(dtype).removeprefix('torch.')}"
            )
            loss = took / min(medians["dense", rate], medians["numba", rate]) - 1
            deciding = cost_of_deciding(gate.detach(), width, units, dtype, backward, choice.backend) / took
            found.append(Decision(layer, choice, loss, deciding))
    return found


def cost_of_deciding(gate: Tensor, width: int, units: int, dtype: torch.dtype, backward: bool, chosen: str) -> float:
    """Return how many seconds ``backend="auto"`` takes beyond the same call with the backend that it chooses."""

    layer = Layer(len(gate), width, units, units // gate.shape[1], dtype, gate.device, backward)

    def seconds(backend: str) -> float:
        times = []
        for _ in range(50):
            start = time.perf_counter()
            choose.choose(backend, layer, functools.partial(choose.share_open, gate))
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return max(0.0, seconds("auto") - seconds(chosen))


# -------------------------------------------------------------------- a training step of the paper's network


def show_steps(budget: float, patience: float, bottleneck: int, console: Console) -> None:
    """Print a training step's time, dense and by auto, and the parts of the latter: gater, experts, optimiser."""
    split = data.load("mnist")
    names = ("dense", "auto", "gater", "experts", "dense experts", "optimiser")
    console.print(f"{'ms per step':24}{'open':>6}" + "".join(f"{name:>15}" for name in names))
    for row in ("noisy_rectifier", "smooth_times_stochastic", "score_function"):
        trainer = PaperTrainer(recipe(row, "paper").but(bottleneck=bottleneck), 0, split)
        layer = cast(ConditionalLinear, trainer.model.layer)
        ways = steps(trainer)
        medians, _ = interleaved(ways, budget, patience)
        times = "".join(f"{1e3 * medians[name]:15.3f}" for name in names)
        console.print(f"{row:24}{float(layer.active_fraction):6.1%}{times}", highlight=False)


@torch.no_grad()
def open_at(layer: ConditionalLinear, x: Tensor, rate: float) -> None:
    """Shift the gates' biases together until they fire at this rate: where a recipe starts, they may not yet."""
    logits, low, high = layer.gater(x), -100.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        if layer.unit.estimator.fire_probability(logits + middle).mean() < rate:
            low = middle
        else:
            high = middle
    cast(Gater, layer.gater).gates.bias.add_(low)


def steps(trainer: PaperTrainer) -> dict[str, Callable[[], Any]]:
    """Return a training step with dense experts and with auto's, and what it is made of, forward and backward."""
    layer = cast(ConditionalLinear, trainer.model.layer)
    size = trainer.recipe.optimiser.batch
    x, y = trainer.train_images[:size], trainer.train_labels[:size]
    trainer.model.train()

    def step(linear: Callable[..., Tensor]) -> None:
        # One batch again and again would be learned by heart, and its gates with it: hence the rate.
        rates = [1e-6 for _ in trainer.optimizer.param_groups]
        with (
            mock.patch.object(conditional_linear, "gated_linear", linear),
            mock.patch.object(trainer, "rates", return_value=rates),
        ):
            trainer.step((x, y))

    step(gated_linear)  # max-norm takes hold
    images = F.dropout(trainer.train_images[:1000], trainer.recipe.augmentation.input_dropout)  # as in training
    open_at(layer, images, trainer.recipe.sparsity.target_rate or RATE)
    with torch.no_grad():
        gates = layer.unit.estimator.sample(layer.gater(x), torch.rand(len(x), layer.expert.out_features))
    gates.requires_grad_()
    upper = torch.ones_like(gates)
    expert, gater = list(layer.expert.parameters()), list(layer.gater.parameters())

    def dense(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, **_: object) -> Tensor:
        return F.linear(x, weight, bias) * gate

    affine = (layer.expert.weight, layer.expert.bias)
    return {
        "dense": lambda: step(dense),
        "auto": lambda: step(gated_linear),
        "gater": lambda: torch.autograd.grad(layer.gater(x), gater, upper),
        "experts": lambda: torch.autograd.grad(gated_linear(x, *affine, gates), [*expert, gates], upper),
        "dense experts": lambda: torch.autograd.grad(dense(x, *affine, gates), [*expert, gates], upper),
        "optimiser": trainer.optimizer.step,
    }


# -------------------------------------------------------------------- what is shown


def head() -> str:
    """Return the head of the table's columns."""
    names = "".join(f"{name:>8}" for name in COLUMNS.values())
    return f"{'':23}{'B':>5}{'dense ms':>10}{names}{'speed-up':>10}{'others':>8}"


def line(found: dict[str, Any]) -> str:
    """Return a line of the table: times over dense, the speed-up, and how much other processes disturbed."""
    ratio = found["ratio"]
    ratios = "".join(f"{ratio[name]:8.3f}" if name in ratio else f"{'':8}" for name in COLUMNS)
    speed = f"{1 / ratio['numba']:.1f}×"
    return (
        f"{found['title']:23}{found['batch']:>5}{found['ms']['dense']:10.3f}{ratios}{speed:>10}{found['others']:>8.0%}"
    )


def sweep_rate(budget: float, patience: float) -> list[dict[str, Any]]:
    """Return ratios over the active fraction, 1024 → 4096, B = 256."""
    rates = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    row = Row("sweep over the active fraction", 1024, 4096)
    return [measure(row, 256, rate, budget, patience, peers=False) for rate in rates]


def sweep_units(budget: float, patience: float) -> list[dict[str, Any]]:
    """Return times over N with 200 open units per example, D = 1024, B = 256: the cost must follow the open work."""
    found = []
    for units in (1000, 2000, 4000, 8000, 16000):
        row = Row("sweep over N", 1024, units)
        found.append(measure(row, 256, 200 / units, budget, patience, peers=False) | {"units": units})
    return found


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw both sweeps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rates = [each["rate"] for each in report["rates"]]
    for name in ("numba", "auto"):
        left.plot(rates, [each["ratio"][name] for each in report["rates"]], marker=".", label=name)
    left.plot(rates, rates, "k:", label="ideal")
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="active fraction", ylabel="time / dense", title="1024 → 4096, B = 256")
    left.legend()
    for name in ("dense", "numba", "auto"):
        right.plot(
            [each["units"] for each in report["units"]],
            [each["ms"][name] for each in report["units"]],
            marker=".",
            label=name,
        )
    right.set(xscale="log", yscale="log", xlabel="N, 200 units open", ylabel="ms", title="1024 → N, B = 256")
    right.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))
    plt.close(figure)


__all__ = ["BenchKernels", "run"]
