"""One token at a time through weights that do not change: the arguments of each kernel are packed once."""

from collections.abc import Callable

import torch
from torch import Tensor

from gatelet.kernels.backends._activations import ACTIVATIONS
from gatelet.kernels.backends.numba import team
from gatelet.kernels.backends.numba.decode_kernels import decode
from gatelet.kernels.backends.numba.narrow_kernels import NEAR
from gatelet.kernels.backends.rows import Decided, Int8Rows, Rows

PARTS = 8
"""Units are split into this many parts, each with its own sums. So results do not depend on the number of threads."""
BYTES = 32
"""For the choice of threads, reading this many bytes counts as passing over one number."""
Run = Callable[[Tensor], Tensor]


def linear(weight: Rows, bias: Tensor | None) -> Run:
    """Return a function from x (D,) to x Wᵀ + b (N,)."""
    rows, scales = _stored(weight)
    units, width = rows.shape
    stride = 4 * NEAR + 1024
    run = decode.prepare(
        *("full", 8 * rows.element_size()),
        x=None,
        w=rows.data_ptr(),
        s=_address(scales),
        b=_address(bias),
        out=None,
        units=units,
        width=width,
        scratch=None,
        stride=stride,
        parts=PARTS,
    )
    kept, numbers = (rows, scales, bias), rows.nbytes // BYTES  # kept alive: the packed addresses point at them

    def call(x: Tensor) -> Tensor:
        out, scratch = x.new_empty(units), x.new_empty(PARTS * stride, dtype=torch.uint8)
        run(team.threads(numbers), x.data_ptr(), out.data_ptr(), scratch.data_ptr())
        return out

    call.kept = kept  # type: ignore[attr-defined]
    return call


def input_linear(weight: Rows, bias: Tensor | None, norm: Tensor, limit: Tensor) -> Run:
    """Return a function from x (D,) to Σ_d x_d · W[d] + b (N,) over the inputs with |x_d|·norm_d above the limit."""
    rows, scales = _stored(weight)
    width, outputs = rows.shape
    stride = _stride(width)
    run = decode.prepare(
        *("by_input", 8 * rows.element_size()),
        x=None,
        w=rows.data_ptr(),
        s=_address(scales),
        norm=norm.data_ptr(),
        limits=limit.data_ptr(),
        out=None,
        width=width,
        outputs=outputs,
        scratch=None,
        stride=stride,
        parts=PARTS,
    )
    kept, numbers = (rows, scales, norm, limit), rows.nbytes // BYTES

    def call(x: Tensor) -> Tensor:
        sums, scratch = x.new_empty(PARTS, outputs), x.new_empty(PARTS * stride, dtype=torch.uint8)
        run(team.threads(numbers), x.data_ptr(), sums.data_ptr(), scratch.data_ptr())
        total = sums.sum(0)
        return total if bias is None else total.add_(bias)

    call.kept = kept  # type: ignore[attr-defined]
    return call


def ffn(given: Decided) -> Run:
    """Return a function from x (D,) to the block's output (O,)."""
    w1, s1 = _stored(given.first)
    w2, s2 = _stored(given.down)
    w3, s3 = (None, None) if given.third is None else _stored(given.third)
    near_1, sn = (None, None) if given.near_first is None else _stored(given.near_first)
    near_3, sm = (None, None) if given.near_third is None else _stored(given.near_third)
    (units, width), outputs = w1.shape, w2.shape[1]
    stride = _stride(units)
    run = decode.prepare(
        *("by_itself", 8 * w1.element_size()),
        x=None,
        w1=w1.data_ptr(),
        s1=_address(s1),
        b1=_address(given.first_bias),
        w3=_address(w3),
        s3=_address(s3),
        b3=_address(given.third_bias),
        near_1=_address(near_1),
        sn=_address(sn),
        near_3=_address(near_3),
        sm=_address(sm),
        scale=given.scale.data_ptr(),
        norm=given.norm.data_ptr(),
        limits=given.limits.data_ptr(),
        w2=w2.data_ptr(),
        s2=_address(s2),
        out=None,
        units=units,
        width=width,
        outputs=outputs,
        code=ACTIVATIONS.index(given.activation),
        scratch=None,
        stride=stride,
        parts=PARTS,
    )
    kept = (w1, s1, w2, s2, w3, s3, near_1, sn, near_3, sm, given)
    numbers, bias = (w1.nbytes + w2.nbytes) // BYTES, given.down_bias

    def call(x: Tensor) -> Tensor:
        sums, scratch = x.new_empty(PARTS, outputs), x.new_empty(PARTS * stride, dtype=torch.uint8)
        run(team.threads(numbers), x.data_ptr(), sums.data_ptr(), scratch.data_ptr())
        total = sums.sum(0)
        return total if bias is None else total.add_(bias)

    call.kept = kept  # type: ignore[attr-defined]
    return call


def _stored(weight: Rows) -> tuple[Tensor, Tensor | None]:
    """Return a weight's rows and their scales."""
    if isinstance(weight, Int8Rows):
        return weight.values.contiguous(), weight.scales.contiguous()
    return weight.contiguous(), None


def _stride(units: int) -> int:
    """Return the bytes of scratch memory of each part."""
    return 4 * NEAR + 16 * 64 * -(-((units + 63) // 64) // PARTS) + 128


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
