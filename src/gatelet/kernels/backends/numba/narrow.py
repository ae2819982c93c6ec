"""One to sixteen examples and weights of few bytes, as functions of tensors; inference alone, no gradients.

A weight is float32 or bfloat16 (N, D), or :class:`Int8Rows`. Activations are float32 or bfloat16; products are summed in
float32, and results have the activations' type.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gatelet.kernels import _team as team
from gatelet.kernels._products import ACTIVATIONS
from gatelet.kernels._sparse import DENSE
from gatelet.kernels.backends.numba.narrow_kernels import EXAMPLES, NEAR, narrow

PARTS = 8
"""Parts of the units, each with sums of its own, whatever the number of threads: so that this changes no bit."""


class Int8Rows(NamedTuple):
    """A weight (N, D) as int8 with a scale per row: W[n] ≈ scales[n] · values[n], off by at most scales[n] / 2 each.

    Attributes:
        values: (N, D) int8, −127 … 127.
        scales: (N,) float32.
    """

    values: Tensor
    scales: Tensor


def int8_rows(weight: Tensor) -> Int8Rows:
    """Return a weight (N, D) rounded to int8: each row is scaled so that its largest number becomes 127.

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


Weight = Tensor | Int8Rows


def linear(x: Tensor, weight: Weight, bias: Tensor | None, gate: Tensor, activation: str = "identity") -> Tensor:
    """Return act(x Wᵀ + b) ∘ gate, zero where the gate is; closed rows are not read.

    Args:
        x: (B, D), B at most 16, float32 or bfloat16.
        weight: (N, D).
        bias: (N,).
        gate: (B, N), or (B, G) for groups of N / G units.
        activation: of :data:`ACTIVATIONS`.

    Returns:
        (B, N).
    """
    rows, scales = _stored(weight)
    (batch, width), units = x.shape, len(rows)
    out = torch.empty((batch, units))
    if not out.numel():
        return out.to(x.dtype)
    own, mask = _floats(x), _floats(gate)
    shift = None if bias is None else _floats(bias)
    scratch, stride = _scratch(units)
    narrow.run(
        *("linear", 8 * rows.element_size(), team.threads(batch * units * width // DENSE)),
        x=own.data_ptr(),
        weight=rows.data_ptr(),
        scales=_address(scales),
        bias=_address(shift),
        gate=mask.data_ptr(),
        out=out.data_ptr(),
        examples=batch,
        units=units,
        width=width,
        group=units // mask.shape[1],
        code=ACTIVATIONS.index(activation),
        scratch=scratch.data_ptr(),
        stride=stride,
        parts=PARTS,
    )
    return out.to(x.dtype)


def input_linear(hidden: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return Σ_n hidden[b, n] · W[n] + bias, reading the rows of open units alone.

    Args:
        hidden: (B, N), B at most 16, float32 or bfloat16; what is zero is closed.
        weight: (N, O), by unit.
        bias: (O,).

    Returns:
        (B, O).
    """
    return _ffn(hidden, None, None, hidden, "identity", weight, bias, None, None)


def ffn(
    x: Tensor,
    w1: Weight,
    b1: Tensor | None,
    gate: Tensor,
    activation: str,
    w2: Weight,
    b2: Tensor | None,
    w3: Weight | None = None,
    b3: Tensor | None = None,
) -> Tensor:
    """Return (act(x W1ᵀ + b1) ∘ (x W3ᵀ + b3) ∘ gate) W2 + b2 in one pass over the open units; SwiGLU where act is silu.

    Args:
        x: (B, D), B at most 16, float32 or bfloat16.
        w1: (N, D).
        b1: (N,).
        gate: (B, N), or (B, G) for groups of N / G units.
        activation: of :data:`ACTIVATIONS`.
        w2: (N, O), by unit.
        b2: (O,).
        w3: (N, D); without it its factor is left out.
        b3: (N,).

    Returns:
        (B, O).
    """
    return _ffn(x, w1, b1, gate, activation, w2, b2, w3, b3)


def _ffn(
    x: Tensor,
    w1: Weight | None,
    b1: Tensor | None,
    gate: Tensor,
    activation: str,
    w2: Weight,
    b2: Tensor | None,
    w3: Weight | None,
    b3: Tensor | None,
) -> Tensor:
    rows, scales = _stored(w2)
    (batch, width), (units, outputs) = x.shape, rows.shape
    sums = torch.empty((PARTS, batch, outputs))
    if not (sums.numel() and units):
        return sums.new_zeros((batch, outputs)).add_(0 if b2 is None else b2.float()).to(x.dtype)
    first, first_scales = _stored(w1)
    third, third_scales = _stored(w3)
    for other in (first, third):
        if other is not None and other.dtype != rows.dtype:
            raise ValueError(f"the weights must be stored alike, not as {other.dtype} and {rows.dtype}")
    kept = [None if each is None else _floats(each) for each in (x, b1, b3, gate)]
    own, shift, third_shift, mask = kept
    assert mask is not None
    scratch, stride = _scratch(units)
    work = batch * units * (outputs + (width if first is not None else 0) + (width if third is not None else 0))
    narrow.run(
        *("ffn", 8 * rows.element_size(), team.threads(work // DENSE)),
        x=_address(own),
        w1=_address(first),
        s1=_address(first_scales),
        b1=_address(shift),
        w3=_address(third),
        s3=_address(third_scales),
        b3=_address(third_shift),
        gate=mask.data_ptr(),
        w2=rows.data_ptr(),
        s2=_address(scales),
        out=sums.data_ptr(),
        examples=batch,
        units=units,
        width=width,
        outputs=outputs,
        group=units // mask.shape[1],
        code=ACTIVATIONS.index(activation),
        scratch=scratch.data_ptr(),
        stride=stride,
        parts=PARTS,
    )
    total = sums.sum(0)
    return (total if b2 is None else total.add_(b2)).to(x.dtype)


def fits(examples: int) -> bool:
    """Whether so many examples are few enough."""
    return examples <= EXAMPLES


def _stored(weight: Weight | None) -> tuple[Tensor | None, Tensor | None]:
    """Return a weight's rows and their scales."""
    if isinstance(weight, Int8Rows):
        return weight.values, weight.scales
    return weight, None


def _floats(tensor: Tensor) -> Tensor:
    return tensor.contiguous().float()


def _scratch(units: int) -> tuple[Tensor, int]:
    """Return memory for every part, and the bytes of each."""
    stride = 4 * NEAR + 16 * 64 * -(-(-(-units // 64)) // PARTS) + 128
    return torch.empty(PARTS * stride, dtype=torch.uint8), stride


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
