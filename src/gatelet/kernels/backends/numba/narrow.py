"""One to 64 examples and weights of few bytes, as functions of tensors; for inference only, without gradients.

A weight is float32 or bfloat16 (N, D), or ``Int8Rows``. Activations are float32 or bfloat16. Products are summed in
float32, and results have the activations' dtype.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gatelet.kernels.backends._activations import ACTIVATIONS
from gatelet.kernels.backends.numba import team
from gatelet.kernels.backends.numba.few_kernels import VALUES, few
from gatelet.kernels.backends.numba.narrow_kernels import NEAR, narrow
from gatelet.kernels.backends.rows import Int8Rows, Rows

PARTS = 8
"""Units are split into this many parts, each with its own sums. So results do not depend on the number of threads."""


def linear(x: Tensor, weight: Rows, bias: Tensor | None, gate: Tensor, activation: str = "identity") -> Tensor:
    """Return act(x Wᵀ + b) ∘ gate, zero where the gate is zero; rows of closed units are not read.

    Args:
        x: (B, D), B at most 64, float32 or bfloat16.
        weight: (N, D).
        bias: (N,).
        gate: (B, N), or (B, G) for groups of N / G units.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` or ``"silu"``.

    Returns:
        (B, N).
    """
    rows, scales = _stored(weight)
    (batch, width), units = x.shape, len(rows)
    own, mask = _floats(x), _floats(gate)
    out = own.new_empty(batch, units)
    if not out.numel():
        return out.to(x.dtype)
    shift = None if bias is None else _floats(bias)
    args = {
        **{"x": own.data_ptr(), "weight": _map(rows), "scales": _address(scales), "bias": _address(shift)},
        **{"gate": mask.data_ptr(), "out": out.data_ptr(), "units": units, "width": width},
        **{"group": units // mask.shape[1], "code": ACTIVATIONS.index(activation)},
    }
    bits, threads = 8 * rows.element_size(), team.threads(batch * units * width // team.DENSE)
    scratch, stride = _scratch(batch, units, threads)
    args |= {"scratch": scratch.data_ptr(), "stride": stride}
    if batch == 1:
        narrow.run("linear", bits, threads, **args, parts=PARTS)
    else:
        few.run("linear", bits, threads, **args, examples=batch, span=max(1, units // (64 * PARTS * threads)))
    return _as(out, x.dtype)


def one(units: int, width: int, group: int, shape: tuple[int, ...]) -> Callable[..., Tensor]:
    """Return a function of x (D,), W (N, D), bias (N,) or None and gates (G,) that does what :func:`linear` does.

    Its arguments must be contiguous float32, in any shape. The function takes fewer steps than :func:`linear`.

    Args:
        units: N.
        width: D.
        group: N / G.
        shape: of the result, N numbers.
    """
    first, stride = _scratch(1, units, 1)
    addresses = dict.fromkeys(("x", "weight", "bias", "gate", "out", "scratch"))
    sizes = {"units": units, "width": width, "group": group, "stride": stride, "parts": PARTS}
    run = narrow.prepare("linear", 32, **addresses, **sizes, scales=0, code=ACTIVATIONS.index("identity"))
    numbers, size = units * width // team.DENSE, first.numel()
    spare = [first]  # memory of earlier calls, to be used again

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
        out = x.new_empty(*shape)
        scratch = spare.pop() if spare else x.new_empty(size, dtype=torch.uint8)
        shift = 0 if bias is None else bias.data_ptr()
        threads, data = team.threads(numbers), (x.data_ptr(), weight.data_ptr(), shift, gate.data_ptr())
        run(threads, *data, out.data_ptr(), scratch.data_ptr())
        spare.append(scratch)
        return out

    return call


def input_linear(hidden: Tensor, weight: Rows, bias: Tensor | None) -> Tensor:
    """Return Σ_n hidden[b, n] · W[n] + bias; only the rows of open units are read.

    Args:
        hidden: (B, N), B at most 64, float32 or bfloat16; zero means closed.
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
        x: (B, D), B at most 64, float32 or bfloat16.
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
    sums = x.new_empty(PARTS, batch, outputs, dtype=torch.float32)
    if not (sums.numel() and units):
        return sums.new_zeros((batch, outputs)).add_(0 if b2 is None else b2.float()).to(x.dtype)
    first, first_scales = (None, None) if w1 is None else _stored(w1)
    third, third_scales = (None, None) if w3 is None else _stored(w3)
    kept = [None if each is None else _floats(each) for each in (x, b1, b3, gate)]
    own, shift, third_shift, mask = kept
    assert mask is not None
    work = batch * units * (outputs + (width if first is not None else 0) + (width if third is not None else 0))
    threads = team.threads(work // team.DENSE)
    scratch, stride = _scratch(batch, units, threads)
    args = {
        **{"x": _address(own), "w1": _map(first), "s1": _address(first_scales), "b1": _address(shift)},
        **{"w3": _map(third), "s3": _address(third_scales), "b3": _address(third_shift), "gate": mask.data_ptr()},
        **{"w2": rows.data_ptr(), "s2": _address(scales), "out": sums.data_ptr(), "units": units, "width": width},
        **{"outputs": outputs, "group": units // mask.shape[1], "code": ACTIVATIONS.index(activation)},
        **{"scratch": scratch.data_ptr(), "stride": stride, "parts": PARTS},
    }
    if batch == 1:
        narrow.run("ffn", 8 * rows.element_size(), threads, **args)
    else:
        few.run("ffn", 8 * rows.element_size(), threads, **args, examples=batch)
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


def _scratch(batch: int, units: int, threads: int) -> tuple[Tensor, int]:
    """Return memory for every part, or with several examples for every thread, and the bytes of each."""
    if batch > 1:
        stride = VALUES + 256 * batch + 128
        return torch.empty(threads * stride, dtype=torch.uint8, device="cpu"), stride
    words = -(-units // 64)
    stride = 4 * NEAR + 16 * 64 * -(-words // PARTS) + 128
    return torch.empty(PARTS * stride, dtype=torch.uint8, device="cpu"), stride


def _map(weight: Tensor | None) -> int:
    """Return where a weight lies; 0 means that there is none, which is not the same as one of no features."""
    return 0 if weight is None else weight.data_ptr() or 1


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
