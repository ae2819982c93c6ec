"""linear_gated in plain PyTorch: a dense product of a hidden layer whose closed units are taken for zero."""

import torch
from torch import Tensor

from gatelet.kernels._pattern import gathered


def forward(hidden: Tensor, is_open: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return hidden Wᵀ + b over the open units; ``is_open`` is (B, N)."""
    out = gathered(torch.where(is_open, hidden, 0), weight.t())
    return out if bias is None else out + bias


def backward(
    grad: Tensor, hidden: Tensor, is_open: Tensor, weight: Tensor, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden (zero at closed units), weight and bias; None for what is not needed."""
    return (
        torch.where(is_open, grad @ weight, 0) if need[0] else None,
        gathered(torch.where(is_open, hidden, 0).t(), grad).t() if need[1] else None,
        grad.sum(0) if need[2] else None,
    )
