"""gated_ffn on the CPU: the hidden layer exists at open units only."""

import torch
from torch import Tensor

from gatelet.kernels import _sparse
from gatelet.kernels._pattern import words
from gatelet.kernels.gated_linear._numba import _grouped


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    gate: Tensor,
    activation: str,
    w2: Tensor,
    b2: Tensor | None,
    keep: bool,
    fill: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output; to ``keep``, the hidden units before and after activation and gate; and the pattern.

    ``fill`` writes zeros at closed hidden units of what is kept: only so are they the same from call to call.
    """
    batch, units = x.shape[0], w1.shape[0]
    hidden = x.new_empty((batch, units))
    pre = x.new_empty((batch, units) if keep else 0)
    rows = x.new_empty((batch, words(units)), dtype=torch.int64)
    cols = x.new_empty((units, words(batch)), dtype=torch.int64)
    _sparse.dots(
        *(x, w1, b1, gate, cols, hidden, pre if keep else None),
        mask=gate,
        rows=rows,
        grouped=_grouped(gate, units),
        activation=activation,
        fill=keep and fill,
    )
    return _sparse.by_example(hidden, w2.t().contiguous(), b2, rows), pre, hidden, rows, cols


def backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    gate: Tensor,
    activation: str,
    w2: Tensor,
    pre: Tensor,
    hidden: Tensor,
    rows: Tensor,
    cols: Tensor,
    need: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, w1, b1, gate, w2, b2; None for what is not needed."""
    from_x = from_w1 = from_b1 = from_gate = from_w2 = None
    if any(need[:4]):
        inner = torch.empty_like(hidden)
        _sparse.dots(
            grad, w2.t().contiguous(), None, None, cols, inner, grouped=_grouped(gate, w1.shape[0]), fill=False
        )
        coefficient, from_gate = _sparse.pointwise(inner, pre, gate, rows, need[3], any(need[:3]), activation)
        if coefficient is not None:
            if need[0]:
                from_x = _sparse.by_example(coefficient, w1, None, rows)
            if need[1] or need[2]:
                from_w1, from_b1 = _sparse.by_unit(coefficient, x, cols, need[2], need[1])
    if need[4]:
        by_unit, _ = _sparse.by_unit(hidden, grad, cols, need_sum=False)
        from_w2 = None if by_unit is None else by_unit.t()
    return from_x, from_w1, from_b1, from_gate, from_w2, grad.sum(0) if need[5] else None
