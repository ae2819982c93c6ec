"""A few tokens through a feed-forward block and its gater in one kernel, for ordinary calls in ``eval()``.

For one token, calls into torch and Python's checks take longer than the arithmetic. So the arguments are packed once,
and used again as long as all weights and the threshold are at the same addresses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatelet.kernels import ACTIVATIONS as FUSED
from gatelet.kernels.backends.rows import Gated
from gatelet.kernels.ops._declare import plain
from gatelet.kernels.ops.decode import FEW, gated_block
from gatelet.nn.conditional_layer import ConditionalLayer, PlainGater
from gatelet.nn.parts import Affine, Part

Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]


class Prepared(NamedTuple):
    """A block's packed call, and the addresses of its weights at that time."""

    places: list[Any]
    run: Run | None


def one_pass(
    x: Tensor, gating: ConditionalLayer, activation: str, up: Part, down: Part, glu: Part | None
) -> Tensor | None:
    """Return the block's output for a few tokens, whose gates are counted; None: go the long way."""
    if gating.training or x.dtype is not torch.float32 or gating.group_size != 1:
        return None
    if type(up) is not Affine or type(down) is not Affine or not (glu is None or type(glu) is Affine):
        return None
    gater = gating.plain_gater(x)
    # The number of tokens is looked at last: while a model is exported, that would narrow the range it is exported for.
    if gater is None or not plain(x) or not 0 < x.numel() <= FEW * gating.in_features:
        return None
    if down.weight.is_inference():  # it has no version that would tell of a change
        return None
    places: list[Any] = [activation, down.weight._version, gater.threshold.data_ptr()]
    for weight, bias in (
        (gater.hidden, gater.last, up, down) if glu is None else (gater.hidden, gater.last, up, down, glu)
    ):
        places += weight.data_ptr(), weight.is_contiguous(), None if bias is None else bias.data_ptr()
    found: Prepared | None = gating.laid.prepared
    if found is None or found.places != places:
        first, third = (up, None) if glu is None else (glu, up)
        found = gating.laid.prepared = Prepared(places, _prepare(gating, activation, gater, first, third, down))
    return None if found.run is None else _each(x, gating, found.run)


def _prepare(
    gating: ConditionalLayer, activation: str, gater: PlainGater, first: Affine, third: Affine | None, down: Affine
) -> Run | None:
    """Return the packed kernel, or None if it cannot read these weights."""
    if activation not in FUSED or first.weight.shape[0] != gating.num_gates:
        return None
    given = down.weight.detach()
    by_unit = gating.laid.columns("down", given).t()
    original = given if by_unit.data_ptr() != given.data_ptr() else None
    maps = (*gater.hidden, *gater.last, gater.threshold, *first, *(third or (None, None)), by_unit, down.bias)
    numbers: Any = [None if each is None else each.detach() for each in maps]
    return gated_block(Gated._make([*numbers, original, activation]))


def _each(x: Tensor, gating: ConditionalLayer, run: Run) -> Tensor | None:
    """Run the tokens one by one; return their outputs, and count the gates."""
    opened = gating.counts()
    done: list[tuple[Tensor, Tensor]] = []
    single = x.numel() == gating.in_features
    for token in (x.contiguous(),) if single else x.reshape(-1, gating.in_features).contiguous().unbind():
        found = run(token, opened)
        if found is None:  # the long way finds the reason and says so
            for _, gates in done:
                opened.sub_(gates.long())
            gating.laid.forget()
            return None
        done.append(found)
    out, gates = done[0] if single else tuple(torch.stack(each) for each in zip(*done, strict=True))
    gating.noted(gates if single else gates.sum(0), len(done))
    return out.view(*x.shape[:-1], out.shape[-1])
