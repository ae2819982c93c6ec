"""The products that skip closed units, beside dense ones and other sparse ways."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels import gated_ffn, gated_linear
from gatelet_lab.bench.timing import Ways, interleaved
from gatelet_lab.files import write_atomically

RATE = 0.1
BATCHES = (1, 32, 256, 1024)


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
        # Each side gets the layout that suits it.
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
            # The peer's pattern is built before the timing starts, which favours the peer.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the peer announces that it is in beta
                csr = each.to_sparse_csr()
            transposed = weight.t()
            ways["sampled_addmm"] = lambda: torch.sparse.sampled_addmm(csr, x, transposed, beta=0.0)
        if row.group > 1:
            ways["loop over groups"] = lambda: loop_over_groups(x, weight, bias, gate)
            try:
                grouped_mm(x[:1], weight, bias, gate[:1])
                ways["grouped_mm"] = lambda: grouped_mm(x, weight, bias, gate)
            except (RuntimeError, NotImplementedError, AttributeError) as error:
                warnings.warn(f"bench kernels: grouped_mm is left out, because it fails: {error}", stacklevel=3)
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
    """Raise unless all ways compute the same; wrong results are not timed."""
    want = ways["dense"]()
    for name, way in ways.items():
        have = way()
        if name == "sampled_addmm":
            continue  # no bias; a peer, which we cannot mend
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
