"""linear_gated on the CPU: each example adds up the weight columns of its open units."""

import torch
from torch import Tensor

from gatelet.kernels import _sparse


def forward(hidden: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return hidden Wᵀ + b over the open units.

    The columns of W (O, N) are read as rows of its transpose: free if ``weight`` is the transposed view of a
    matrix kept by unit, a copy otherwise.
    """
    return _sparse.by_example(hidden, weight.t().contiguous(), bias, rows)


def backward(
    grad: Tensor,
    hidden: Tensor,
    rows: Tensor,
    cols: Tensor,
    weight: Tensor,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden (zero at closed units), weight and bias; None for what is not needed."""
    from_hidden = from_weight = None
    if need[0]:
        from_hidden = torch.empty_like(hidden)
        _sparse.dots(grad, weight.t().contiguous(), None, None, cols, from_hidden)
    if need[1]:
        by_unit, _ = _sparse.by_unit(hidden, grad, cols, need_sum=False)
        from_weight = None if by_unit is None else by_unit.t()
    return from_hidden, from_weight, grad.sum(0) if need[2] else None
