"""Weights stored in few bytes for inference, as bfloat16 or as int8 with a scale per row, in plain PyTorch."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels.backends._activations import activate
from gatelet.kernels.pattern import spread


class Int8Rows(NamedTuple):
    """A weight (N, D) as int8 with a scale per row: W[n] ≈ scales[n] · values[n], with errors of at most scales[n] / 2.

    Attributes:
        values: (N, D) int8, −127 … 127.
        scales: (N,) float32.
    """

    values: Int8[Tensor, "N D"]
    scales: Float32[Tensor, " N"]

    @property
    def shape(self) -> torch.Size:
        """(N, D)."""
        return self.values.shape


Rows = Tensor | Int8Rows
"""A weight: float32 or bfloat16, or rounded by :func:`int8_rows`."""


def int8_rows(weight: Float[Tensor, "N D"]) -> Int8Rows:
    """Return a weight rounded to int8, each row scaled so that its largest number becomes ±127.

    The error of a product with it is at most scales[n] / 2 · Σ_d |x_d|, plus the rounding of float32.

    Args:
        weight: (N, D).

    Raises:
        ValueError: if a number is not finite.

    >>> int8_rows(torch.tensor([[1.0, -0.5], [0.0, 0.0]])).values
    tensor([[127, -64],
            [  0,   0]], dtype=torch.int8)
    """
    weight = weight.detach().float()
    if not weight.isfinite().all():
        raise ValueError("weight must be finite to be rounded to int8")
    scales = weight.abs().amax(1) / 127 if weight.shape[1] else weight.new_zeros(len(weight))
    steps = weight / torch.where(scales == 0, 1, scales)[:, None]
    return Int8Rows(steps.round_().clamp_(-127, 127).to(torch.int8), scales)


def as_float(weight: Rows) -> Tensor:
    """Return the weight as float32."""
    if isinstance(weight, Int8Rows):
        return weight.values.float() * weight.scales[:, None]
    return weight.float()


def linear(x: Tensor, weight: Rows, bias: Tensor | None, gate: Tensor, activation: str = "identity") -> Tensor:
    """Return act(x Wᵀ + b) ∘ gate; everything is computed, then closed units are discarded."""
    each = spread(gate, weight.shape[0]).float()
    out = activate(F.linear(x.float(), as_float(weight), None if bias is None else bias.float()), activation)
    return torch.where(each != 0, out * each, 0).to(x.dtype)


def input_linear(hidden: Tensor, weight: Rows, bias: Tensor | None) -> Tensor:
    """Return hidden W + b, W (N, O) by unit."""
    out = hidden.float() @ as_float(weight)
    return (out if bias is None else out + bias.float()).to(hidden.dtype)


def ffn(
    x: Tensor,
    w1: Rows,
    b1: Tensor | None,
    gate: Tensor,
    activation: str,
    w2: Rows,
    b2: Tensor | None,
    w3: Rows | None = None,
    b3: Tensor | None = None,
) -> Tensor:
    """Return (act(x W1ᵀ + b1) ∘ (x W3ᵀ + b3) ∘ gate) W2 + b2, W2 (N, O) by unit."""
    own = x.float()
    hidden = linear(own, w1, b1, gate, activation)
    if w3 is not None:
        factor = F.linear(own, as_float(w3), None if b3 is None else b3.float())
        hidden = torch.where(hidden != 0, hidden * factor, 0)
    return input_linear(hidden, w2, b2).to(x.dtype)


class Decided(NamedTuple):
    """A feed-forward block for inference that decides by itself which of its N units are open.

    Let a = act(W_g x + b_g) and hidden = a ∘ (W1 x + b1), or hidden = a where there is no third map. Unit n is examined
    if scale_n·|a_n| > limits[0]. An examined unit is open if norm_n·|hidden_n| > limits[1]. Then
    y = W2 (hidden ∘ open) + b2. With int8 copies of W_g and W1 (``near_first``, ``near_third``), unit n is examined if
    scale_n·|hidden_n|, computed from the copies, exceeds limits[0].

    Attributes:
        first, third: W_g and W1 (N, D). Without a gated unit there is only ``first``.
        down: W2 (N, O), by unit.
        scale, norm: (N,).
        limits: (2,).
    """

    first: Rows
    first_bias: Tensor | None
    third: Rows | None
    third_bias: Tensor | None
    down: Rows
    down_bias: Tensor | None
    activation: str
    scale: Float32[Tensor, " N"]
    norm: Float32[Tensor, " N"]
    limits: Float32[Tensor, "2"]
    near_first: Int8Rows | None = None
    near_third: Int8Rows | None = None


class Gated(NamedTuple):
    """A feed-forward block of float32 weights with a gater network, for gates without noise.

    Unit n is open if (V tanh(U x + c) + d)_n exceeds the threshold; hidden = act(W x + b), times W3 x + b3 if there is
    a third map; y = W2 (hidden ∘ open) + b2.

    Attributes:
        hidden, gates: U (M, D) and V (N, M).
        threshold: one number.
        first, third: W and W3 (N, D).
        down: W2 (N, O), by unit.
        original: the matrix (O, N) of which ``down`` is a copy; None if it is not a copy.
    """

    hidden: Tensor
    hidden_bias: Tensor | None
    gates: Tensor
    gates_bias: Tensor | None
    threshold: Tensor
    first: Tensor
    first_bias: Tensor | None
    third: Tensor | None
    third_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    original: Tensor | None
    activation: str


def decided_ffn(given: Decided, x: Tensor) -> Tensor:
    """Return the block's output (..., O) for x (..., D); everything is computed, then closed units are discarded."""
    own = x.float()

    def product(weight: Rows | None, bias: Tensor | None) -> Tensor | float:
        return 1.0 if weight is None else F.linear(own, as_float(weight), bias)

    a = activate(F.linear(own, as_float(given.first), given.first_bias), given.activation)
    hidden = a * product(given.third, given.third_bias)
    seen = a
    if given.near_first is not None:
        near = F.linear(own, as_float(given.near_first), given.first_bias)
        seen = activate(near, given.activation) * product(given.near_third, given.third_bias)
    is_open = (seen.abs() * given.scale > given.limits[0]) & (hidden.abs() * given.norm > given.limits[1])
    return input_linear(torch.where(is_open, hidden, 0), given.down, given.down_bias)
