"""gated_ffn in plain PyTorch: two dense products, closed hidden units taken for zero."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels._pattern import spread
from gatelet.kernels.gated_linear import _reference as first
from gatelet.kernels.linear_gated import _reference as second


def activate(z: Tensor, activation: str) -> Tensor:
    """Return the activation of z."""
    if activation == "identity":
        return z
    found: Tensor = getattr(F, activation)(z)
    return found


def slope(z: Tensor, activation: str) -> Tensor:
    """Return the derivative of the activation at z."""
    ones = torch.ones_like(z)
    if activation == "identity":
        return ones
    if activation == "relu":
        return (z > 0).to(z.dtype)
    backward = {"gelu": torch.ops.aten.gelu_backward, "silu": torch.ops.aten.silu_backward}[activation]
    found: Tensor = backward(ones, z)
    return found


def forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, gate: Tensor, activation: str, w2: Tensor, b2: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output and, to ``keep``, the hidden units before and after activation and gate."""
    each = spread(gate, w1.shape[0])
    is_open = each != 0
    pre = torch.where(is_open, F.linear(x, w1, b1), 0)
    hidden = torch.where(is_open, activate(pre, activation) * each, 0)
    empty = x.new_empty(0)
    return second.forward(hidden, is_open, w2, b2), pre if keep else empty, hidden if keep else empty


def backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    gate: Tensor,
    activation: str,
    w2: Tensor,
    pre: Tensor,
    hidden: Tensor,
    need: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, w1, b1, gate, w2, b2; None for what is not needed."""
    is_open = spread(gate, w1.shape[0]) != 0
    inner, from_w2, from_b2 = second.backward(grad, hidden, is_open, w2, (any(need[:4]), need[4], need[5]))
    if inner is None:
        return None, None, None, None, from_w2, from_b2
    passed = torch.where(is_open, inner * slope(pre, activation), 0)
    from_x, from_w1, from_b1, _ = first.backward(passed, x, w1, gate, pre, None, (need[0], need[1], need[2], False))
    from_gate = None
    if need[3]:
        values = torch.where(is_open, inner * activate(pre, activation), 0)
        from_gate = values if gate.shape == values.shape else values.unflatten(1, (gate.shape[1], -1)).sum(-1)
    return from_x, from_w1, from_b1, from_gate, from_w2, from_b2
