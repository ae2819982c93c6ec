"""gated_linear: an affine layer of which each example computes only its open units."""

import functools
import importlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.kernels import _dispatch
from gatelet.kernels._checks import check_affine, check_gate
from gatelet.kernels._pattern import OpenPattern, flat, mask_of
from gatelet.kernels.gated_linear import _reference
from gatelet.kernels.open_pattern import pattern_of


def gated_linear(
    x: Float[Tensor, "*lead D"],
    weight: Float[Tensor, "N D"],
    bias: Float[Tensor, " N"] | None,
    gate: Float[Tensor, "*lead G"],
    *,
    support: Tensor | None = None,
    pattern: OpenPattern | None = None,
    backend: str = "auto",
    active_fraction: float | None = None,
) -> Float[Tensor, "*lead N"]:
    """(x Wᵀ + b) ∘ gate, computed only where the gate is not zero, forward and backward.

    Closed units are exactly zero, whatever their weights hold. They send no gradient to x, weight and bias, as
    in the dense product; the gradient of the gate is formed on open gates only, or on ``support``.

    Args:
        x: (..., D), float32 or float64 (on a CPU others run on the dense reference path, which is announced once).
        weight: (N, D).
        bias: (N,) or None.
        gate: (..., G), one number per unit (G = N) or per group of N / G consecutive units.
        support: (..., G), boolean: where the gate's gradient is wanted; must include the open gates.
        pattern: the pattern of ``gate`` if it was built before (:func:`gatelet.kernels.open_pattern`).
        backend: ``"auto"`` (the faster of dense and sparse), ``"reference"`` (dense), ``"numba"``, ``"triton"``.
        active_fraction: the share of open gates to expect. ``"auto"`` needs it on a GPU, where it does not look at
            the gates; without it dense runs there. Elsewhere it is not used.

    Returns:
        (..., N).

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, an unknown backend.
        RuntimeError, NotImplementedError: for a backend that is not there; under ``torch.vmap`` and ``torch.func``.

    >>> x, weight = torch.ones(2, 3), torch.ones(4, 3)
    >>> gated_linear(x, weight, None, torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 1.0]]))
    tensor([[3., 0., 0., 6.],
            [0., 0., 0., 3.]])
    """
    _dispatch.check_backend(backend)
    check_affine(x, weight, bias)
    units, width = weight.shape
    check_gate(gate, x, units)
    plain = _dispatch.plain(x, weight, bias, gate)
    if not plain:
        _dispatch.refuse_transforms("gated_linear", x, weight, bias, gate)
    flat_x, flat_gate = flat(x), flat(gate)
    if flat_gate.dtype != x.dtype:
        flat_gate = flat_gate.to(x.dtype)
    shape = (*x.shape[:-1], units)
    if support is not None and support.shape != gate.shape:
        raise ValueError(f"support must have gate's shape {tuple(gate.shape)}, not {tuple(support.shape)}")
    if not plain:
        backend = _dispatch.settled(backend, x)
        choice = backend
    else:
        gradients = _dispatch.recording(x, weight, bias, gate)
        computed = flat_gate if support is None else flat(support)
        choice = _dispatch.choose(backend, computed, width, units, x.dtype, gradients, declared=active_fraction).backend
        if not gradients and support is None and pattern is None:
            # Without a gradient the ops' machinery would cost more than a small product.
            if choice in ("numba", "triton"):
                shift = None if bias is None else bias.contiguous()
                found: Tensor = _inference(choice)(
                    flat_x.contiguous(), weight.contiguous(), shift, flat_gate.contiguous()
                )
                return found if x.dim() == 2 else found.view(shape)
            return _reference.forward(flat_x, weight, bias, flat_gate, False)[0].view(shape)
    rows = cols = wide_rows = wide_cols = None
    if support is not None:
        wide_rows, wide_cols = pattern_of(flat(support).to(x.dtype), units, choice)
    if pattern is not None:
        if pattern.lead != gate.shape[:-1] or pattern.units != units:
            raise ValueError(
                f"pattern is one of gates {(*pattern.lead, pattern.units)}, but x and weight ask for {shape}"
            )
        rows, cols = pattern.rows, pattern.cols
    elif choice != "reference":
        rows, cols = pattern_of(flat_gate.detach(), units, choice)
    keep = _dispatch.recording(gate) or not plain
    op = _recorded if plain else torch.ops.gatelet.gated_linear
    out: Tensor = op(flat_x, weight, bias, flat_gate, rows, cols, wide_rows, wide_cols, choice, keep)[0]
    return out.view(shape)


@functools.cache
def _inference(backend: str) -> Any:
    """Return what computes the output alone. No module-level import: each backend is loaded when it first runs."""
    return importlib.import_module(f"{__name__}._{backend}").infer


# -------------------------------------------------------------------- the ops that torch knows


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    wide_rows: Tensor | None,
    wide_cols: Tensor | None,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    choice = _dispatch.choose(backend, gate, weight.shape[1], weight.shape[0], x.dtype, keep)
    if choice.backend == "numba" and cols is not None:
        from gatelet.kernels.gated_linear import _numba

        x, weight, gate = x.contiguous(), weight.contiguous(), gate.contiguous()
        return _numba.forward(x, weight, bias if bias is None else bias.contiguous(), gate, cols, wide_cols, keep)
    if choice.backend == "triton" and rows is not None and cols is not None:
        from gatelet.kernels.gated_linear import _triton

        if wide_rows is not None and wide_cols is not None:
            rows, cols = wide_rows, wide_cols
        x, weight, gate = x.contiguous(), weight.contiguous(), gate.contiguous()
        return _triton.forward(x, weight, bias if bias is None else bias.contiguous(), gate, rows, cols, keep)
    return _reference.forward(x, weight, bias, gate, keep)


_gated_linear = torch.library.custom_op(
    "gatelet::gated_linear",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor gate, Tensor? rows, Tensor? cols, Tensor? wide_rows, "
    "Tensor? wide_cols, str backend, bool keep) -> (Tensor, Tensor)",
)


@_gated_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    wide_rows: Tensor | None,
    wide_cols: Tensor | None,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    pre: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    wide_rows: Tensor | None,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wants = (need[0], need[1], need[2], need[3])
    choice = _dispatch.choose(backend, gate, weight.shape[1], weight.shape[0], x.dtype, True)
    if choice.backend == "numba" and rows is not None and cols is not None:
        from gatelet.kernels.gated_linear import _numba

        grad, x, weight, gate = grad.contiguous(), x.contiguous(), weight.contiguous(), gate.contiguous()
        found = _numba.backward(grad, x, weight, gate, pre, rows, cols, wide_rows, wants)
    elif choice.backend == "triton" and rows is not None and cols is not None:
        from gatelet.kernels.gated_linear import _triton

        grad, x, weight, gate = grad.contiguous(), x.contiguous(), weight.contiguous(), gate.contiguous()
        found = _triton.backward(grad, x, weight, gate, pre, rows, cols, wide_rows, wants)
    else:
        wide = None if wide_rows is None else mask_of(wide_rows, weight.shape[0])
        found = _reference.backward(grad, x, weight, gate, pre, wide, wants)
    first, second, third, fourth = (x.new_empty(0) if each is None else each for each in found)
    return first, second, third, fourth


_gated_linear_backward = torch.library.custom_op(
    "gatelet::gated_linear_backward",
    _gradients,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor gate, Tensor pre, Tensor? rows, Tensor? cols, "
    "Tensor? wide_rows, str backend, bool[] need) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@_gated_linear_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    pre: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    wide_rows: Tensor | None,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1], gate.shape)
    first, second, third, fourth = (x.new_empty(s if n else (0,)) for s, n in zip(shapes, need, strict=True))
    return first, second, third, fourth


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, gate, rows, cols, wide_rows, _, ctx.backend, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for the gradient of what has none would cost as much as the output
    ctx.save_for_backward(x, weight, gate, output[1], rows, cols, wide_rows)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    x, weight, gate, pre, rows, cols, wide_rows = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:4])
    op = _gradients if _dispatch.plain(grad) else torch.ops.gatelet.gated_linear_backward
    found = op(grad, x, weight, gate, pre, rows, cols, wide_rows, ctx.backend, need)
    gradients = [each if wanted else None for each, wanted in zip(found, need, strict=True)]
    return (*gradients, None, None, None, None, None, None)


torch.library.register_autograd("gatelet::gated_linear", _backward, setup_context=_setup)
_recorded = _dispatch.recorded(_forward, _setup, _backward)
