"""gated_ffn on a GPU: the hidden layer exists at open units only."""

import torch
from torch import Tensor

from gatelet.kernels import _triton as products
from gatelet.kernels._dispatch import GPU_FEW


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    gate: Tensor,
    activation: str,
    w2: Tensor,
    b2: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output; to ``keep``, the hidden units before and after activation and gate, and the pattern."""
    rows = cols = listed = None
    if keep or len(x) > GPU_FEW:  # without it, kernels for few examples read the gates themselves
        rows, cols = products.pattern(gate, w1.shape[0])
        listed = products.lists(cols, gate)
    hidden, pre = products.dots(x, w1, b1, gate, rows, listed, keep, activation, fill=keep)
    out = products.by_example(hidden, w2.t(), b2, gate, rows, listed)
    empty = x.new_empty(0, dtype=torch.int64)
    return out, pre, hidden, empty if rows is None else rows, empty if cols is None else cols


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
    listed = products.lists(cols, gate)
    if any(need[:4]):
        inner, _ = products.dots(grad, w2.t(), None, None, rows, listed, fill=False)
        coefficient, from_gate = products.pointwise(inner, pre, gate, rows, None, need[3], any(need[:3]), activation)
        if coefficient is not None:
            if need[0]:
                from_x = products.by_example(coefficient, w1, None, None, rows, listed)
            if need[1] or need[2]:
                from_w1, from_b1 = products.by_unit(coefficient, x, cols, listed, need[2], need[1])
    if need[4]:
        from_w2, _ = products.by_unit(hidden, grad, cols, listed, need_sum=False, transposed=True)
    return from_x, from_w1, from_b1, from_gate, from_w2, grad.sum(0) if need[5] else None
