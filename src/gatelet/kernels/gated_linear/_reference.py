"""gated_linear in plain PyTorch: everything is computed, then closed units are discarded."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels._pattern import gathered, spread


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, wide: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """Return (x Wᵀ + b) ∘ gate and, to ``keep``, x Wᵀ + b on the support ``wide`` (B, N), by default the open gates."""
    pre = F.linear(x, weight, bias)
    each = spread(gate, weight.shape[0])
    # Not just a product: a closed unit may hold NaN or infinity.
    out = torch.where(each != 0, pre * each, 0)
    kept = torch.where(each != 0 if wide is None else wide, pre, 0) if keep else x.new_empty(0)
    return out, kept


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
    # What arrives at closed units is not looked at either.
    coefficient = torch.where(is_open, grad * each, 0)
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
