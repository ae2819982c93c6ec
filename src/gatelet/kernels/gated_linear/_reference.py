"""gated_linear in plain PyTorch: everything is computed, then closed units are discarded."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels._pattern import gathered, spread


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Return (x Wᵀ + b) ∘ gate and, to ``keep``, x Wᵀ + b."""
    pre = F.linear(x, weight, bias)
    each = spread(gate, weight.shape[0])
    out = closed(pre * each if keep else pre.mul_(each), each)
    return out, pre if keep else x.new_empty(0)


def closed(product: Tensor, gate: Tensor) -> Tensor:
    """Return the product with the gate, where NaN and infinity times a closed gate are zero too.

    One sum tells whether there are any; looking at every number would cost as much as the product. But waiting for
    the sum would cost a GPU more than that.
    """
    if product.device.type != "cpu":
        return torch.where(gate != 0, product, 0)
    if product.numel() and not math.isfinite(product.sum().item()):
        return torch.where(gate != 0, product, 0)
    return product


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    pre: Tensor,
    wide: Tensor | None,
    need: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and gate; None for what is not needed."""
    each = spread(gate, weight.shape[0])
    is_open = each != 0
    coefficient = closed(grad * each, each)
    slope = None
    if need[3]:
        units = torch.where(is_open if wide is None else wide, grad * pre, 0)
        slope = units if gate.shape == units.shape else units.unflatten(1, (gate.shape[1], -1)).sum(-1)
    return (
        gathered(coefficient, weight) if need[0] else None,
        gathered(coefficient.t(), x) if need[1] else None,
        coefficient.sum(0) if need[2] else None,
        slope,
    )
