"""How far ``backend="auto"`` is from the faster of its choices, over a grid of layers."""

import functools
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from gatelet.kernels import Choice, choose, explain, gated_linear
from gatelet.kernels.backends import Layer
from gatelet_lab.bench.kernels import forward_only, with_gradients
from gatelet_lab.bench.timing import interleaved

AUTO_SHAPES = ((256, 512), (784, 2000), (1024, 4096), (2048, 2048))
AUTO_BATCHES = (1, 8, 32, 256, 1024)
AUTO_RATES = (0.02, 0.1, 0.3, 0.6, 0.9)


AUTO_MOST = 1 << 30
"""Multiply-adds of the largest layer on the grid."""
AUTO_LOSS = 0.05
AUTO_SHOWN = 12


@dataclass(frozen=True)
class Decision:
    """What auto chose for a layer, and how much slower that was than the faster backend (0 if it was the faster)."""

    layer: str
    choice: Choice
    loss: float
    deciding: float
    """The share of the call that choosing took."""


def check_auto(shapes: Sequence[tuple[int, int]], quick: bool, patience: float, console: Console) -> None:
    """Print how much slower than the faster backend auto's choice is, where it is most, and what choosing costs."""
    found: list[Decision] = []
    for dtype in (torch.float32,) if quick else (torch.float32, torch.float64):
        for (width, units), batch, group, backward in itertools.product(shapes, AUTO_BATCHES, (1, 16), (False, True)):
            if units % group == 0 and batch * width * units <= AUTO_MOST:
                found += decisions(width, units, batch, group, backward, dtype, patience)
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
