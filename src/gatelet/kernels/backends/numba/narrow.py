"""One to 64 examples and weights of few bytes, as functions of tensors; for inference only, without gradients.

A weight is float32 or bfloat16 (N, D), or ``Int8Rows``. Activations are float32 or bfloat16. Products are summed in
float32, and results have the activations' dtype.
"""

from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gatelet.kernels.backends._activations import ACTIVATIONS
from gatelet.kernels.backends.numba import memory, team
from gatelet.kernels.backends.numba.few_gradients import few_gradients
from gatelet.kernels.backends.numba.few_kernels import EXAMPLES, TILE, TILES, few
from gatelet.kernels.backends.numba.narrow_kernels import NEAR, narrow
from gatelet.kernels.backends.numba.vector import VECTOR
from gatelet.kernels.backends.rows import Int8Rows, Rows

PARTS = 8
"""Units are split into this many parts, each with its own sums. So results do not depend on the number of threads."""


STREAMED = 1 << 22
"""Gradients of at least this many bytes are written past the caches, which they would only empty."""


def linear(
    x: Tensor,
    weight: Rows,
    bias: Tensor | None,
    gate: Tensor,
    activation: str = "identity",
    pre: Tensor | None = None,
    most: int = EXAMPLES,
) -> Any:
    """Return act(x Wᵀ + b) ∘ gate, zero where the gate is zero; rows of closed units are not read.

    Args:
        x: (B, D), B at most 64, float32 or bfloat16.
        weight: (N, D).
        bias: (N,).
        gate: (B, N), or (B, G) for groups of N / G units.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` or ``"silu"``.
        pre: (B, N) float32, filled with x Wᵀ + b, zero where the gate is zero.
        most: examples for which open units may be open on average.

    Returns:
        (B, N), or None if units are open for more than ``most``.
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
    several = batch > 1 or pre is not None
    scratch, stride = _scratch(batch, units, threads, several)
    args |= {"scratch": scratch.data_ptr(), "stride": stride}
    if not several:
        narrow.run("linear", bits, threads, **args, half=0, parts=PARTS)
    else:
        span = max(1, units // (64 * PARTS * threads))
        crowded = array("q", (0,))
        more = {"pre": _address(pre), "examples": batch, "span": span, "most": most, "told": crowded.buffer_info()[0]}
        few.run("linear", bits, threads, **args, **more)
        if crowded[0]:
            return None
    return _as(out, x.dtype)


def one(
    units: int,
    width: int,
    group: int,
    shape: tuple[int, ...],
    *,
    bits: int = 32,
    half: bool = False,
    activation: str = "identity",
) -> Callable[..., Tensor]:
    """Return a function of x (D,), W (N, D), bias (N,) or None, gates (G,) and W's scales that does :func:`linear`.

    Its arguments must be contiguous. It takes fewer steps than :func:`linear`.

    Args:
        units: N.
        width: D.
        group: N / G.
        shape: of the result, N numbers.
        bits: of W's numbers.
        half: whether x, bias and gates are bfloat16, not float32.
        activation: as for :func:`linear`.
    """
    stride = _stride(units) + (4 * (width + 3 * 64 * _most_words(units)) if half else 0)
    addresses = dict.fromkeys(("x", "weight", "scales", "bias", "gate", "out", "scratch"))
    sizes = {"units": units, "width": width, "group": group, "stride": stride, "parts": PARTS}
    run = narrow.prepare("linear", bits, **addresses, **sizes, code=ACTIVATIONS.index(activation), half=int(half))
    numbers, spare = units * width // team.DENSE, list[Tensor]()  # memory of earlier calls, to be used again

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, scales: Tensor | None = None) -> Tensor:
        out = x.new_empty(*shape)
        scratch = spare.pop() if spare else x.new_empty(PARTS * stride, dtype=torch.uint8)
        shift, by = 0 if bias is None else bias.data_ptr(), 0 if scales is None else scales.data_ptr()
        data = (x.data_ptr(), weight.data_ptr(), by, shift, gate.data_ptr(), out.data_ptr(), scratch.data_ptr())
        run(team.threads(numbers), *data)
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
    found: Tensor = _ffn(hidden, None, None, hidden, "identity", weight, bias, None, None, several=len(hidden) > 1)
    return found


def next_layer(hidden: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return Σ_n hidden[b, n] · W[n] + bias over the units with a gate (B, N) that is not zero; all float32."""
    found: Tensor = _ffn(hidden, None, None, gate, "identity", weight, bias, None, None, several=True)
    return found


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
    *,
    most: int = EXAMPLES,
) -> Any:
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
        most: examples for which open units may be open on average.

    Returns:
        (B, O), or None if units are open for more than ``most``.
    """
    return _ffn(x, w1, b1, gate, activation, w2, b2, w3, b3, most=most, several=len(x) > 1)


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
    *,
    most: int = EXAMPLES,
    several: bool,
) -> Any:
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
    scratch, stride = _scratch(batch, units, threads, several)
    args = {
        **{"x": _address(own), "w1": _map(first), "s1": _address(first_scales), "b1": _address(shift)},
        **{"w3": _map(third), "s3": _address(third_scales), "b3": _address(third_shift), "gate": mask.data_ptr()},
        **{"w2": rows.data_ptr(), "s2": _address(scales), "out": sums.data_ptr(), "units": units, "width": width},
        **{"outputs": outputs, "group": units // mask.shape[1], "code": ACTIVATIONS.index(activation)},
        **{"scratch": scratch.data_ptr(), "stride": stride, "parts": PARTS},
    }
    if not several:
        narrow.run("ffn", 8 * rows.element_size(), threads, **args)
    else:
        crowded = array("q", (0,))
        more = {"examples": batch, "most": most, "told": crowded.buffer_info()[0]}
        few.run("ffn", 8 * rows.element_size(), threads, **args, **more)
        if crowded[0]:
            return None
    total = sums.sum(0)
    return _as(total if b2 is None else total.add_(b2), x.dtype)


def gradients(
    upper: Tensor,
    pre: Tensor,
    gate: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor | None,
    need: tuple[bool, ...],
    activation: str = "identity",
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, w1, b1, the gates and w2, as far as they are needed, in one pass over the open units.

    Args:
        upper: the gradient of act(pre) ∘ gate (B, N), or with ``w2`` that of its product with it, (B, O).
        pre: x W1ᵀ + b1 (B, N), where gates are open.
        gate: (B, N), B at most 64.
        x: (B, D).
        w1: (N, D).
        w2: (N, O), by unit.
        need: which of them are wanted.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` or ``"silu"``.

    Returns:
        (B, D), (N, D), (N,), (B, N) and (N, O); None for what is not needed.
    """
    need_x, need_w1, need_b1, need_gate, need_w2 = need
    (batch, width), units, outputs = x.shape, len(w1), 0 if w2 is None else w2.shape[1]
    upper, pre, gate, x = (_contiguous(each) for each in (upper, pre, gate, x))
    shares = x.new_empty(PARTS, batch, width) if need_x else None
    v1 = memory.empty(x, (units, width)) if need_w1 else None
    v2 = memory.empty(x, (units, outputs)) if need_w2 else None
    total, slopes = x.new_empty(units) if need_b1 else None, torch.empty_like(gate) if need_gate else None
    threads = team.threads(batch * units * (width + outputs) // team.DENSE)
    stride = TILES + TILE * batch + 4 * max(width, outputs) + 128
    scratch = torch.empty(threads * stride, dtype=torch.uint8, device="cpu")
    few_gradients.run(
        *("gradients", 32, threads),
        **{"x": x.data_ptr(), "w1": w1.data_ptr(), "v1": _address(v1), "total": _address(total)},
        **{"gate": gate.data_ptr(), "z": pre.data_ptr(), "upper": upper.data_ptr(), "slopes": _address(slopes)},
        **{"w2": _address(w2), "v2": _address(v2), "shares": _address(shares), "examples": batch, "units": units},
        **{"width": width, "outputs": outputs, "code": ACTIVATIONS.index(activation)},
        **{"stream": int(_streams(v1) and _streams(v2))},
        **{"scratch": scratch.data_ptr(), "stride": stride, "parts": PARTS},
    )
    return None if shares is None else shares.sum(0), v1, total, slopes, v2


def _streams(result: Tensor | None) -> bool:
    """Return whether a result is written past the caches: it is large, and its rows are whole vectors."""
    if result is None:
        return True
    return result.nbytes >= STREAMED and result.shape[1] % (VECTOR // 4) == 0 and result.data_ptr() % VECTOR == 0


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


def _scratch(batch: int, units: int, threads: int, several: bool) -> tuple[Tensor, int]:
    """Return memory for every part or, for kernels of several examples, for every thread, and the bytes of each."""
    if several:
        stride = TILES + 2 * TILE * batch + 128
        return torch.empty(threads * stride, dtype=torch.uint8, device="cpu"), stride
    return torch.empty(PARTS * _stride(units), dtype=torch.uint8, device="cpu"), _stride(units)


def _stride(units: int) -> int:
    """Return the bytes of a part's memory with one example."""
    return 4 * NEAR + 16 * 64 * _most_words(units) + 128


def _most_words(units: int) -> int:
    """Return the most words of 64 units in a part."""
    return -(-units // (64 * PARTS))


def _map(weight: Tensor | None) -> int:
    """Return where a weight lies; 0 means that there is none, which is not the same as one of no features."""
    return 0 if weight is None else weight.data_ptr() or 1


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
