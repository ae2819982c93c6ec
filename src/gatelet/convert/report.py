"""What a model's conditional layers do: open share, cost, dead units, measured speed-up."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatelet._checks import check_positive, check_weight
from gatelet.convert.block import BlockGating
from gatelet.convert.place import blocks
from gatelet.convert.run import run_block
from gatelet.estimators._distributed import alone, is_distributed, meet, total
from gatelet.nn.conditional_layer import ConditionalLayer, conditional_layers, fully_open

CACHE = 1 << 26
"""So many bytes of other weights push a layer's out of the processor's caches, or most of them."""


@dataclass(frozen=True)
class LayerReport:
    """One conditional layer. FLOPs are per token; None: nothing was counted or measured yet."""

    name: str
    units: int
    groups: int
    tokens: int
    """How many tokens the statistics are over."""
    open_share: float | None
    dead: int | None
    """Groups that no token opened."""
    always: int | None
    """Groups that every token opened."""
    flops_dense: int
    flops_active: float | None
    """FLOPs of the units that were open, without the gater."""
    flops_gater: int
    dense_ms: float | None = None
    ms: float | None = None

    @property
    def speed_up(self) -> float | None:
        """Dense time over time."""
        return None if self.ms is None or self.dense_ms is None else self.dense_ms / self.ms


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`report` returns: a row per conditional layer. It prints as a table."""

    layers: list[LayerReport]

    def __getitem__(self, name: str) -> LayerReport:
        """Return the row of this layer."""
        return next(layer for layer in self.layers if layer.name == name)

    def __repr__(self) -> str:
        """Show the table."""
        head = ["layer", "units", "open", "kFLOPs dense", "active", "gater", "dead", "always", "tokens"]
        timed = any(layer.ms is not None for layer in self.layers)
        head += ["dense ms", "ms", "speed-up"] if timed else []
        rows = [head]
        for it in self.layers:
            share = f"{it.units}" if it.groups == it.units else f"{it.groups} × {it.units // it.groups}"
            row = [it.name or "(the model)", share, _show(it.open_share, ".1%"), f"{it.flops_dense / 1e3:,.0f}"]
            active = None if it.flops_active is None else it.flops_active / 1e3
            row += [_show(active, ",.0f"), f"{it.flops_gater / 1e3:,.0f}"]
            row += [_show(it.dead, "d"), _show(it.always, "d"), f"{it.tokens}"]
            if timed:
                row += [_show(it.dense_ms, ".3f"), _show(it.ms, ".3f"), _show(it.speed_up, ".2f")]
            rows.append(row)
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        dense = sum(layer.flops_dense for layer in self.layers)
        gater = sum(layer.flops_gater for layer in self.layers)
        counted = [layer.flops_active for layer in self.layers if layer.flops_active is not None]
        if len(counted) == len(self.layers):
            spent = sum(counted) + gater
            lines.append(f"together {spent / 1e3:,.0f} of {dense / 1e3:,.0f} kFLOPs per token, {spent / dense:.1%}")
        else:
            lines.append("– : nothing counted yet; run the model, or give report(model, *inputs)")
        return "\n".join(line.rstrip() for line in lines)


def report(
    model: nn.Module, *inputs: Any, seconds: float = 0.2, local: bool = False, timeout: float = 30.0, **named: Any
) -> Report:
    """Open share, FLOPs, dead units and measured speed-up of a model's conditional layers.

    The share of open gates and the groups that are dead (open for no token) or always open are those of all tokens
    since the layers last changed their mode; :func:`gatelet.distil` resets the count and runs its batches of
    calibration. Of several processes (torch.distributed) the counts of all are added up, so all call this; one that
    calls it by itself does so with ``local=True`` or under ``with gatelet.sparsity.alone():``.
    FLOPs count a multiply and an add as two, in affine maps only.

    Args:
        model: holds conditional layers.
        inputs, named: if given, the model is run on them once, in the mode it is in, and then every layer is timed by
            itself, on the input that it had there, without gradients: against itself with all gates open and no
            gater, in turns; medians. Between two runs as many other bytes are read as the model has (at most 64 MB),
            because in the model its weights have left the caches when the next token comes.
        seconds: time to spend in each layer.
        local: of several processes, show what this one counted. Times are always its own.
        timeout: seconds to wait for the other processes to call this too.

    Returns:
        a row per layer; print it.

    Raises:
        ValueError: if the model holds no conditional layer, or ``seconds`` is not a finite number of at least 0.
        RuntimeError: if another process does not call this in time.

    >>> import torch, gatelet
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    >>> _ = gatelet.convert(model, target_rate=0.25, bottleneck=8)
    >>> gatelet.report(model)
    layer     units  open  kFLOPs dense  active  gater  dead  always  tokens
    0.gating    256     –            66       –      5     –       –       0
    – : nothing counted yet; run the model, or give report(model, *inputs)
    """
    check_weight(seconds, "seconds")
    check_positive(timeout, "timeout")
    layers = conditional_layers(model)
    if together := is_distributed() and not local:
        meet("report", timeout)
    with alone(not together):
        return _reported(model, layers, inputs, named, seconds)


def _reported(
    model: nn.Module, layers: dict[str, ConditionalLayer], inputs: Any, named: dict[str, Any], seconds: float
) -> Report:
    times: dict[str, tuple[float, float]] = {}
    if inputs or named:
        with torch.no_grad(), _inputs_of(model, layers) as seen:
            model(*inputs, **named)
        counted = {name: (layer.opened.clone(), layer.tokens) for name, layer in layers.items()}
        owners = blocks(model)
        for name, x in seen.items():
            times[name] = timed(layers[name], x, owners.get(name), seconds, others_of(model))
        for name, (opened, tokens) in counted.items():  # what timing counted is no statistics
            layers[name].reset_statistics()
            layers[name].opened.copy_(opened)
            layers[name].tokens = tokens
    return Report([_row(name, layer, times.get(name)) for name, layer in layers.items()])


def _row(name: str, layer: ConditionalLayer, times: tuple[float, float] | None) -> LayerReport:
    groups, dense = layer.opened.numel(), layer.units * layer.flops_per_unit
    opened, tokens = layer.opened.cpu(), int(layer.tokens)
    if is_distributed():
        *counts, tokens = map(int, total([*opened.tolist(), tokens]))
        opened = torch.tensor(counts, device="cpu")
    share = None if not tokens else float(opened.sum()) / (tokens * groups)
    return LayerReport(
        name,
        layer.units,
        groups,
        tokens,
        share,
        None if share is None else int((opened == 0).sum()),
        None if share is None else int((opened == tokens).sum()),
        dense,
        None if share is None else share * layer.units * layer.flops_open,
        layer.flops_gater,
        None if times is None else times[0],
        None if times is None else times[1],
    )


@contextlib.contextmanager
def _inputs_of(model: nn.Module, layers: dict[str, ConditionalLayer]) -> Iterator[dict[str, Tensor]]:
    """Collect what each layer's gater is given, the last time that it runs."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.gater.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
        for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def others_of(model: nn.Module) -> int:
    """Return how many bytes of weights pass between two runs of a layer in this model, as far as it matters."""
    return min(CACHE, sum(parameter.nbytes for parameter in model.parameters()))


def in_turns(runs: dict[str, Callable[[], Any]], seconds: float, others: int, like: Tensor) -> dict[str, float]:
    """Return milliseconds of each run, medians of turns.

    Before each, ``others`` bytes are read: in a model a layer's weights have left the processor's caches when the next
    token comes, where the model is larger than these.
    """
    memory = torch.zeros(max(1, others // 4), dtype=torch.float32, device=like.device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    spent, turns = 0.0, 0
    with torch.no_grad():
        while spent < seconds or turns < 7:
            turns += 1
            for name, run in runs.items():
                memory.sum()
                if like.is_cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                run()
                if like.is_cuda:
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
                spent += times[name][-1]
    skip = 2  # what runs first compiles kernels and fills caches
    return {name: 1e3 * statistics.median(each[skip:]) for name, each in times.items()}


def timed(
    layer: ConditionalLayer, x: Tensor, owned: tuple[nn.Module, BlockGating] | None, seconds: float, others: int = 0
) -> tuple[float, float]:
    """Return milliseconds of the layer fully open and of the layer, medians of runs in turns."""

    def gated() -> None:
        if owned is not None:
            run_block(owned[0], owned[1], x)
        else:
            layer(x)

    def dense() -> None:
        with fully_open(layer):
            gated()

    found = in_turns({"dense": dense, "gated": gated}, seconds, others, x)
    return found["dense"], found["gated"]


def _show(value: float | int | None, form: str) -> str:
    return "–" if value is None else format(value, form)
