"""One to sixteen examples and weights of few bytes, as functions of tensors; for inference only, without gradients.

A weight is float32 or bfloat16 (N, D), or ``Int8Rows``. Activations are float32 or bfloat16. Products are summed in
float32, and results have the activations' dtype.
"""

import torch
from torch import Tensor

from gatelet.kernels.backends._activations import ACTIVATIONS
from gatelet.kernels.backends.numba import team
from gatelet.kernels.backends.numba.narrow_kernels import NEAR, narrow
from gatelet.kernels.backends.rows import Int8Rows, Rows

PARTS = 8
"""Units are split into this many parts, each with its own sums. So results do not depend on the number of threads."""


def linear(x: Tensor, weight: Rows, bias: Tensor | None, gate: Tensor, activation: str = "identity") -> Tensor:
    """Return act(x Wᵀ + b) ∘ gate, zero where the gate is zero; rows of closed units are not read.

    Args:
        x: (B, D), B at most 16, float32 or bfloat16.
        weight: (N, D).
        bias: (N,).
        gate: (B, N), or (B, G) for groups of N / G units.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` or ``"silu"``.

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
        *("linear", 8 * rows.element_size(), team.threads(batch * units * width // team.DENSE)),
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
    return _as(out, x.dtype)


def input_linear(hidden: Tensor, weight: Rows, bias: Tensor | None) -> Tensor:
    """Return Σ_n hidden[b, n] · W[n] + bias; only the rows of open units are read.

    Args:
        hidden: (B, N), B at most 16, float32 or bfloat16; zero means closed.
        weight: (N, O), by unit.
        bias: (O,).

    Returns:
        (B, O).
    """
    return _ffn(hidden, None, None, hidden, "identity", weight, bias, None, None)


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
    """Return (act(x W1ᵀ + b1) ∘ (x W3ᵀ + b3) ∘ gate) W2 + b2 in one pass over the open units; SwiGLU where act is silu.

    Args:
        x: (B, D), B at most 16, float32 or bfloat16.
        w1: (N, D).
        b1: (N,).
        gate: (B, N), or (B, G) for groups of N / G units.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` or ``"silu"``.
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
    w1: Rows | None,
    b1: Tensor | None,
    gate: Tensor,
    activation: str,
    w2: Rows,
    b2: Tensor | None,
    w3: Rows | None,
    b3: Tensor | None,
) -> Tensor:
    rows, scales = _stored(w2)
    (batch, width), (units, outputs) = x.shape, rows.shape
    sums = torch.empty((PARTS, batch, outputs))
    if not (sums.numel() and units):
        return sums.new_zeros((batch, outputs)).add_(0 if b2 is None else b2.float()).to(x.dtype)
    first, first_scales = (None, None) if w1 is None else _stored(w1)
    third, third_scales = (None, None) if w3 is None else _stored(w3)
    kept = [None if each is None else _floats(each) for each in (x, b1, b3, gate)]
    own, shift, third_shift, mask = kept
    assert mask is not None
    scratch, stride = _scratch(units)
    work = batch * units * (outputs + (width if first is not None else 0) + (width if third is not None else 0))
    narrow.run(
        *("ffn", 8 * rows.element_size(), team.threads(work // team.DENSE)),
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
    return _as(total if b2 is None else total.add_(b2), x.dtype)


def _stored(weight: Rows) -> tuple[Tensor, Tensor | None]:
    """Return a weight's rows and their scales."""
    if isinstance(weight, Int8Rows):
        return _contiguous(weight.values), _contiguous(weight.scales)
    return _contiguous(weight), None


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _floats(tensor: Tensor) -> Tensor:
    return _as(_contiguous(tensor), torch.float32)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Behind a product whose weights have emptied the caches, each operator of torch that does nothing takes 15 µs.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _scratch(units: int) -> tuple[Tensor, int]:
    """Return memory for every part, and the bytes of each."""
    words = -(-units // 64)
    stride = 4 * NEAR + 16 * 64 * -(-words // PARTS) + 128
    return torch.empty(PARTS * stride, dtype=torch.uint8), stride


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
