"""linear_gated: the affine layer after a gated one, reading only open hidden units."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.kernels import _dispatch
from gatelet.kernels._checks import check_affine
from gatelet.kernels._pattern import OpenPattern, flat, mask_of
from gatelet.kernels.linear_gated import _reference


def linear_gated(
    hidden: Float[Tensor, "*lead N"],
    pattern: OpenPattern,
    weight: Float[Tensor, "O N"],
    bias: Float[Tensor, " O"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "*lead O"]:
    """Hidden Wᵀ + b where closed hidden units are not read, forward and backward.

    Closed units count as zero, whatever ``hidden`` and the weights hold there; they receive no gradient.

    Args:
        hidden: (..., N), float32 or float64 (on a CPU others run on the dense reference path, which is announced once).
        pattern: the open units, from :func:`gatelet.kernels.open_pattern`.
        weight: (O, N). Fastest as the transposed view of a contiguous (N, O) matrix; any other is copied so.
        bias: (O,) or None.
        backend: ``"auto"``, ``"reference"``, ``"numba"``, ``"triton"``.

    Returns:
        (..., O).

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, an unknown backend.
        RuntimeError, NotImplementedError: for a backend that is not there; under ``torch.vmap`` and ``torch.func``.

    >>> from gatelet.kernels import open_pattern
    >>> gate = torch.tensor([[1.0, 0.0, 1.0]])
    >>> linear_gated(torch.tensor([[1.0, torch.nan, 3.0]]), open_pattern(gate), torch.ones(2, 3))
    tensor([[4., 4.]])
    """
    _dispatch.check_backend(backend)
    check_affine(hidden, weight, bias, ("hidden", "weight", "bias"))
    if not isinstance(pattern, OpenPattern):
        raise TypeError(f"pattern must come from gatelet.kernels.open_pattern, not be a {type(pattern).__name__}")
    if pattern.lead != hidden.shape[:-1] or pattern.units != hidden.shape[-1]:
        raise ValueError(
            f"pattern is one of gates {(*pattern.lead, pattern.units)}, but hidden has shape {tuple(hidden.shape)}"
        )
    _dispatch.refuse_transforms("linear_gated", hidden, weight, bias)
    plain = _dispatch.plain(hidden, weight, bias)
    out: Tensor = (_recorded if plain else torch.ops.gatelet.linear_gated)(
        flat(hidden), pattern.rows, pattern.cols, weight, bias, backend
    )
    return out.view(*hidden.shape[:-1], weight.shape[0])


def _forward(hidden: Tensor, rows: Tensor, cols: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    choice = _dispatch.choose_by_pattern(backend, rows, hidden, weight).backend
    if choice == "numba":
        from gatelet.kernels.linear_gated import _numba

        return _numba.forward(hidden.contiguous(), rows, weight, None if bias is None else bias.contiguous())
    if choice == "triton":
        from gatelet.kernels.linear_gated import _triton

        return _triton.forward(hidden.contiguous(), rows, weight, None if bias is None else bias.contiguous())
    return _reference.forward(hidden, mask_of(rows, hidden.shape[1]), weight, bias)


_linear_gated = torch.library.custom_op(
    "gatelet::linear_gated",
    _forward,
    mutates_args=(),
    schema="(Tensor hidden, Tensor rows, Tensor cols, Tensor weight, Tensor? bias, str backend) -> Tensor",
)


@_linear_gated.register_fake
def _(hidden: Tensor, rows: Tensor, cols: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return hidden.new_empty((hidden.shape[0], weight.shape[0]))


def _gradients(
    grad: Tensor, hidden: Tensor, rows: Tensor, cols: Tensor, weight: Tensor, backend: str, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    wants = (need[0], need[1], need[2])
    choice = _dispatch.choose_by_pattern(backend, rows, hidden, weight).backend
    if choice == "numba":
        from gatelet.kernels.linear_gated import _numba

        found = _numba.backward(grad.contiguous(), hidden.contiguous(), rows, cols, weight, wants)
    elif choice == "triton":
        from gatelet.kernels.linear_gated import _triton

        found = _triton.backward(grad.contiguous(), hidden.contiguous(), rows, cols, weight, wants)
    else:
        found = _reference.backward(grad, hidden, mask_of(rows, hidden.shape[1]), weight, wants)
    first, second, third = (hidden.new_empty(0) if each is None else each for each in found)
    return first, second, third


_linear_gated_backward = torch.library.custom_op(
    "gatelet::linear_gated_backward",
    _dispatch.one_layout(_gradients),
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor rows, Tensor cols, Tensor weight, str backend, bool[] need) "
    "-> (Tensor, Tensor, Tensor)",
)


@_linear_gated_backward.register_fake
def _(
    grad: Tensor, hidden: Tensor, rows: Tensor, cols: Tensor, weight: Tensor, backend: str, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    first, second, third = (hidden.new_empty(s if n else (0,)) for s, n in zip(shapes, need, strict=True))
    return first, second, third


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, rows, cols, weight, _, ctx.backend = inputs
    ctx.save_for_backward(hidden, rows, cols, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need = [ctx.needs_input_grad[index] for index in (0, 3, 4)]
    op: Any = _gradients if _dispatch.plain(grad) else torch.ops.gatelet.linear_gated_backward
    found = op(grad, *ctx.saved_tensors, ctx.backend, need)
    hidden, weight, bias = (each if wanted else None for each, wanted in zip(found, need, strict=True))
    return hidden, None, None, weight, bias, None


torch.library.register_autograd("gatelet::linear_gated", _backward, setup_context=_setup)
_recorded = _dispatch.recorded(_forward, _setup, _backward)
