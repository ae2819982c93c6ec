"""gated_ffn: two affine layers whose hidden units are computed only where they are open."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_choice
from gatelet.kernels import _dispatch
from gatelet.kernels._checks import check_affine, check_gate
from gatelet.kernels._pattern import flat, words
from gatelet.kernels.gated_ffn import _reference

ACTIVATIONS = ("identity", "relu", "gelu", "silu")


def gated_ffn(
    x: Float[Tensor, "*lead D"],
    w1: Float[Tensor, "N D"],
    b1: Float[Tensor, " N"] | None,
    gate: Float[Tensor, "*lead G"],
    activation: str,
    w2: Float[Tensor, "O N"],
    b2: Float[Tensor, " O"] | None,
    *,
    backend: str = "auto",
    active_fraction: float | None = None,
) -> Float[Tensor, "*lead O"]:
    """(act(x W1ᵀ + b1) ∘ gate) W2ᵀ + b2; closed hidden units are neither computed nor written nor read.

    The pattern of open units is built once and serves both layers, forward and backward.

    Args:
        x: (..., D), float32 or float64 (on a CPU others run on the dense reference path, which is announced once).
        w1: (N, D).
        b1: (N,) or None.
        gate: (..., G), one number per hidden unit (G = N) or per group of N / G consecutive ones.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (exact, with the error function) or ``"silu"``.
        w2: (O, N). Fastest as the transposed view of a contiguous (N, O) matrix; any other is copied so.
        b2: (O,) or None.
        backend: ``"auto"``, ``"reference"``, ``"numba"``, ``"triton"``.
        active_fraction: the share of open gates to expect; see :func:`gatelet.kernels.gated_linear`.

    Returns:
        (..., O).

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, an unknown backend or activation.
        RuntimeError, NotImplementedError: for a backend that is not there; under ``torch.vmap`` and ``torch.func``.

    >>> x, gate = torch.ones(1, 2), torch.tensor([[0.0, 1.0, 1.0]])
    >>> gated_ffn(x, torch.ones(3, 2), None, gate, "relu", torch.ones(1, 3), None)
    tensor([[4.]])
    """
    _dispatch.check_backend(backend)
    check_choice(activation, ACTIVATIONS, "activation")
    check_affine(x, w1, b1, ("x", "w1", "b1"))
    check_gate(gate, x, w1.shape[0])
    # What w2 is checked against: a hidden layer of x's leading shape.
    check_affine(x.new_empty(()).expand(*x.shape[:-1], w1.shape[0]), w2, b2, ("the hidden layer", "w2", "b2"))
    _dispatch.refuse_transforms("gated_ffn", x, w1, b1, gate, w2, b2)
    flat_x, flat_gate = flat(x), flat(gate)
    if flat_gate.dtype != x.dtype:
        flat_gate = flat_gate.to(x.dtype)
    plain = _dispatch.plain(x, w1, b1, gate, w2, b2)
    if plain:
        keep = _dispatch.recording(x, w1, b1, gate, w2, b2)
        backend = _choose(backend, flat_gate.detach(), w1, w2, keep, active_fraction)
    else:
        keep, backend = True, _dispatch.settled(backend, x)
    op = _forward if not keep else _recorded if plain else torch.ops.gatelet.gated_ffn
    out: Tensor = op(flat_x, w1, b1, flat_gate, activation, w2, b2, backend, keep)[0]
    return out.view(*x.shape[:-1], w2.shape[0])


def _choose(backend: str, gate: Tensor, w1: Tensor, w2: Tensor, gradients: bool, declared: float | None = None) -> str:
    """Decide as for one of two products, each with half of both layers' features."""
    width = (w1.shape[1] + w2.shape[0]) // 2
    return _dispatch.choose(backend, gate, width, w1.shape[0], w1.dtype, gradients, declared=declared).backend


def _forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    gate: Tensor,
    activation: str,
    w2: Tensor,
    b2: Tensor | None,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    choice = _choose(backend, gate.detach(), w1, w2, keep)
    if choice == "numba":
        from gatelet.kernels.gated_ffn import _numba

        x, w1, gate, w2 = (each.detach() for each in (x, w1, gate, w2))
        b1, b2 = (each if each is None else each.detach().contiguous() for each in (b1, b2))
        return _numba.forward(x.contiguous(), w1.contiguous(), b1, gate.contiguous(), activation, w2, b2, keep)
    if choice == "triton":
        from gatelet.kernels.gated_ffn import _triton

        x, w1, gate, w2 = (each.detach() for each in (x, w1, gate, w2))
        b1, b2 = (each if each is None else each.detach().contiguous() for each in (b1, b2))
        return _triton.forward(x.contiguous(), w1.contiguous(), b1, gate.contiguous(), activation, w2, b2, keep)
    out, pre, hidden = _reference.forward(x, w1, b1, gate, activation, w2, b2, keep)
    # The dense path has no use for a pattern; its shape is promised by the fake.
    rows = x.new_zeros((x.shape[0], words(w1.shape[0])), dtype=torch.int64)
    return out, pre, hidden, rows, x.new_zeros((w1.shape[0], words(x.shape[0])), dtype=torch.int64)


_SCHEMA = "Tensor x, Tensor w1, Tensor? b1, Tensor gate, str activation, Tensor w2, Tensor? b2, str backend, bool keep"
_gated_ffn = torch.library.custom_op(
    "gatelet::gated_ffn",
    _forward,
    mutates_args=(),
    schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_gated_ffn.register_fake
def _(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    gate: Tensor,
    activation: str,
    w2: Tensor,
    b2: Tensor | None,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, units = x.shape[0], w1.shape[0]
    hidden = (batch, units) if keep else (0,)
    return (
        x.new_empty((batch, w2.shape[0])),
        x.new_empty(hidden),
        x.new_empty(hidden),
        x.new_empty((batch, words(units)), dtype=torch.int64),
        x.new_empty((units, words(batch)), dtype=torch.int64),
    )


def _gradients(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    gate: Tensor,
    activation: str,
    w2: Tensor,
    pre: Tensor,
    hidden: Tensor,
    rows: Tensor,
    cols: Tensor,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    choice = _choose(backend, gate, w1, w2, True)
    if choice == "numba":
        from gatelet.kernels.gated_ffn import _numba

        grad, x, w1, gate = (t.contiguous() for t in (grad, x, w1, gate))
        found = _numba.backward(grad, x, w1, gate, activation, w2, pre, hidden, rows, cols, tuple(need))
    elif choice == "triton":
        from gatelet.kernels.gated_ffn import _triton

        grad, x, w1, gate = (t.contiguous() for t in (grad, x, w1, gate))
        found = _triton.backward(grad, x, w1, gate, activation, w2, pre, hidden, rows, cols, tuple(need))
    else:
        found = _reference.backward(grad, x, w1, gate, activation, w2, pre, hidden, tuple(need))
    a, b, c, d, e, f = (x.new_empty(0) if each is None else each for each in found)
    return a, b, c, d, e, f


_gated_ffn_backward = torch.library.custom_op(
    "gatelet::gated_ffn_backward",
    _dispatch.one_layout(_gradients),
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor w1, Tensor gate, str activation, Tensor w2, Tensor pre, Tensor hidden, "
    "Tensor rows, Tensor cols, str backend, bool[] need) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_gated_ffn_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    gate: Tensor,
    activation: str,
    w2: Tensor,
    pre: Tensor,
    hidden: Tensor,
    rows: Tensor,
    cols: Tensor,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, w1.shape, w1.shape[:1], gate.shape, w2.shape, w2.shape[:1])
    a, b, c, d, e, f = (x.new_empty(s if n else (0,)) for s, n in zip(shapes, need, strict=True))
    return a, b, c, d, e, f


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, _, gate, ctx.activation, w2, _, ctx.backend, _ = inputs
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w1, gate, w2, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    x, w1, gate, w2, pre, hidden, rows, cols = ctx.saved_tensors
    places = (0, 1, 2, 3, 5, 6)
    need = [ctx.needs_input_grad[index] for index in places]
    op = _gradients if _dispatch.plain(grad) else torch.ops.gatelet.gated_ffn_backward
    found = op(grad, x, w1, gate, ctx.activation, w2, pre, hidden, rows, cols, ctx.backend, need)
    a, b, c, d, e, f = (each if wanted else None for each, wanted in zip(found, need, strict=True))
    return a, b, c, d, None, e, f, None, None


torch.library.register_autograd("gatelet::gated_ffn", _backward, setup_context=_setup)
_recorded = _dispatch.recorded(_forward, _setup, _backward)
