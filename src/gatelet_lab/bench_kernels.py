"""`gatelet bench kernels`: how much time closed units save, beside dense products and other sparse ways."""

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels import gated_ffn, gated_linear
from gatelet_lab.train import write_atomically, write_json

RATE = 0.1
BATCHES = (1, 32, 256, 1024)
QUIET = 0.05
"""A measurement counts as undisturbed while other processes use less of a core than this."""


@dataclass(frozen=True)
class BenchKernels:
    """Time the kernels that skip closed units, and their peers, on this machine."""

    quick: bool = False
    """Fewer and shorter measurements: half a minute, not five."""
    shape: tuple[int, int] | None = None
    """Time this shape, D and N, instead of the table's."""
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
    Row("1024 → 4096, units, forward", 1024, 4096),
    Row("784 → 2000, units, forward", 784, 2000),
    Row("4096 → 11008, units, forward", 4096, 11008, batches=(1, 32, 256)),
    Row("1024 → 4096, units, forward + backward", 1024, 4096, backward=True),
    Row("1024 → 4096, groups of 64, forward", 1024, 4096, group=64),
    Row("FFN 1024 → 4096 → 1024, units, forward", 1024, 4096, op="ffn"),
)
Ways = Mapping[str, Callable[[], Any]]


def run(options: BenchKernels, console: Console) -> None:
    """Check, time, show; sweeps only when they are to be plotted."""
    if options.plot is not None and options.plot.exists() and not options.plot.is_dir():
        raise ValueError(f"--plot {options.plot}: exists and is not a directory")
    rows: tuple[Row, ...] = ROWS
    if options.shape is not None:
        width, units = options.shape
        if width < 1 or units < 1:
            raise ValueError(f"--shape: D and N must be at least 1, not {width} {units}")
        rows = (
            Row(f"{width} → {units}, units, forward", width, units),
            Row(f"{width} → {units}, units, forward + backward", width, units, backward=True),
        )
    batches = (1, 32, 256) if options.quick else BATCHES
    budget = 0.2 if options.quick else 1.0
    about = machine()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    results = []
    for row in rows:
        for batch in (each for each in row.batches if each in batches):
            found = measure(row, batch, RATE, budget, options.patience)
            results.append(found)
            times = "  ".join(f"{name} {value:.3f}" for name, value in found["ms"].items())
            console.print(f"{row.title}, B = {batch}: ms {times}", highlight=False)
    show(rows, results, console)
    report: dict[str, Any] = {"machine": about, "results": results}
    if options.plot is not None:
        report["rates"], report["units"] = (
            sweep_rate(budget / 2, options.patience),
            sweep_units(budget / 2, options.patience),
        )
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
        by_unit = torch.randn(row.units, row.width, generator=draw) / row.units**0.5
        after, shift = by_unit.t(), torch.randn(row.width, generator=draw)
        plain = after.contiguous()  # dense gets the layout it likes, the kernel the one that it likes
        return {
            "dense": lambda: F.linear(F.gelu(F.linear(x, weight, bias)) * gate, plain, shift),
            "numba": lambda: gated_ffn(x, weight, bias, gate, "gelu", after, shift, backend="numba"),
            "auto": lambda: gated_ffn(x, weight, bias, gate, "gelu", after, shift),
        }

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
            csr = each.to_sparse_csr()
            transposed = weight.t()
            ways["sampled_addmm"] = lambda: torch.sparse.sampled_addmm(csr, x, transposed, beta=0.0)
        if row.group > 1:
            ways["loop over groups"] = lambda: loop_over_groups(x, weight, bias, gate)
            with suppress(RuntimeError, NotImplementedError, AttributeError):
                grouped_mm(x[:1], weight, bias, gate[:1])
                ways["grouped_mm"] = lambda: grouped_mm(x, weight, bias, gate)
    if not grad:
        return dict(ways)
    upper = torch.randn(batch, row.units, generator=draw)
    plain_inputs, inputs = (x, weight, bias, each), (x, weight, bias, gate)

    def both(name: str) -> Callable[[], Any]:
        # The mask has no gradient of its own: its rows pass the gate by.
        if name == "dense × mask":
            return lambda: torch.autograd.grad(ways[name](), plain_inputs[:3], upper)
        return lambda: torch.autograd.grad(ways[name](), plain_inputs if name == "dense" else inputs, upper)

    return {name: both(name) for name in ways}


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


def interleaved(ways: Ways, budget: float, patience: float = 0.0) -> tuple[dict[str, float], float]:
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


def _once(ways: Ways, budget: float) -> tuple[dict[str, float], float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    begin, busy, own = time.perf_counter(), _busy(), time.process_time()
    order = list(ways)
    while time.perf_counter() - begin < budget or len(times["dense"]) < 5:
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


# -------------------------------------------------------------------- what is shown


def show(rows: tuple[Row, ...], results: list[dict[str, Any]], console: Console) -> None:
    """Print the table: our time over dense, the ideal speed-up, the one reached, the share of the ideal."""
    table = Table(title=f"time / dense at {RATE:.0%} open (speed-up reached of ideal {1 / RATE:.0f}×)")
    names = list(dict.fromkeys(name for each in results for name in each["ms"] if name != "dense"))
    for head in ("", "B", "dense ms", *names, "reached", "share of ideal", "others' CPU"):
        table.add_column(head, justify="left" if not head else "right")
    for found in results:
        ratio = found["ratio"]
        table.add_row(
            found["title"],
            str(found["batch"]),
            f"{found['ms']['dense']:.3f}",
            *(f"{ratio[name]:.3f}" if name in ratio else "" for name in names),
            f"{1 / ratio['numba']:.1f}×",
            f"{RATE / ratio['numba']:.0%}",
            f"{found['others']:.0%}",
        )
    console.print(table)


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
