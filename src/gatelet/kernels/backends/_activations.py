"""The activations that the products know, and their derivatives, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("identity", "relu", "gelu", "silu")
"""The activations that the products know."""


def activate(z: Tensor, activation: str) -> Tensor:
    """Return the activation of z."""
    if activation == "identity":
        return z
    found: Tensor = getattr(F, activation)(z)
    return found


def slope(z: Tensor, activation: str) -> Tensor:
    """Return the derivative of the activation (any but the identity) at z."""
    if activation == "relu":
        return (z > 0).to(z.dtype)
    backward = {"gelu": torch.ops.aten.gelu_backward, "silu": torch.ops.aten.silu_backward}[activation]
    found: Tensor = backward(torch.ones_like(z), z)
    return found
