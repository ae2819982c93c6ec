"""gated_ffn: two affine layers whose hidden units are computed only where they are open."""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gatelet._checks import check_choice
from gatelet.kernels import choose
from gatelet.kernels.backends import BACKENDS, Backend, Layer
from gatelet.kernels.backends.dense import ACTIVATIONS, activate
from gatelet.kernels.ops._checks import check_affine, check_gate
from gatelet.kernels.ops._declare import Op, plain, recording
from gatelet.kernels.ops.open_pattern import pattern_of
from gatelet.kernels.pattern import Form, flat, spread


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

    The pattern of open units is built once and serves both layers, forward and backward. Derivatives of second order,
    forward-mode derivatives and ``torch.func`` transforms are computed densely.

    Args:
        x: (..., D), float32 or float64 (on a CPU others run dense, which is announced once).
        w1: (N, D).
        b1: (N,) or None.
        gate: (..., G), one number per hidden unit (G = N) or per group of N / G consecutive ones.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (exact, with the error function) or ``"silu"``.
        w2: (O, N). Fastest as the transposed view of a contiguous (N, O) matrix; any other is copied so.
        b2: (O,) or None.
        backend: ``"auto"``, ``"dense"``, ``"numba"``, ``"triton"``.
        active_fraction: the share of open gates to expect; see :func:`gatelet.kernels.gated_linear`.

    Returns:
        (..., O).

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, an unknown activation, an unknown backend
            or one that cannot run the layer.
        RuntimeError: for a backend that is not there.
        NotImplementedError: for a transform of ``torch.func`` with a backend of kernels asked for by name.

    >>> x, gate = torch.ones(1, 2), torch.tensor([[0.0, 1.0, 1.0]])
    >>> gated_ffn(x, torch.ones(3, 2), None, gate, "relu", torch.ones(1, 3), None)
    tensor([[4.]])
    """
    choose.check_backend(backend)
    check_choice(activation, ACTIVATIONS, "activation")
    check_affine(x, w1, b1, ("x", "w1", "b1"))
    check_gate(gate, x, w1.shape[0])
    # What w2 is checked against: a hidden layer of x's leading shape.
    check_affine(x.new_empty(()).expand(*x.shape[:-1], w1.shape[0]), w2, b2, ("the hidden layer", "w2", "b2"))
    flat_x, flat_gate = flat(x), flat(gate)
    if flat_gate.dtype != x.dtype:
        flat_gate = flat_gate.to(x.dtype)
    ordinary = plain(x, w1, b1, gate, w2, b2)
    keep = not ordinary or recording(x, w1, b1, gate, w2, b2)
    layer = _layer(flat_x, w1, flat_gate, w2, keep, active_fraction)
    form = None
    if ordinary:
        name = choose.choose(backend, layer, partial(choose.share_open, flat_gate)).backend
        if name != "dense":
            form = BACKENDS[name].products.promise(flat_gate.detach(), w1.shape[0], keep)
    else:
        name = choose.settled(backend, layer)
        if name != "dense":
            form = pattern_of(flat_gate.detach(), w1.shape[0], name)
    out = _op(Given(flat_x, w1, b1, flat_gate, activation, w2, b2, form, name, keep))
    return out.view(*x.shape[:-1], w2.shape[0])


class Given(NamedTuple):
    """The op's arguments: x (B, D), gate (B, G)."""

    x: Tensor
    w1: Tensor
    b1: Tensor | None
    gate: Tensor
    activation: str
    w2: Tensor
    b2: Tensor | None
    pattern: Form | None
    backend: str
    keep: bool


def naive(given: Given) -> Tensor:
    """What the op means."""
    gate = spread(given.gate, given.w1.shape[0])
    hidden = activate(F.linear(given.x, given.w1, given.b1), given.activation)
    return F.linear(torch.where(gate != 0, hidden * gate, 0), given.w2, given.b2)


def _layer(x: Tensor, w1: Tensor, gate: Tensor, w2: Tensor, gradients: bool, rate: float | None = None) -> Layer:
    """Return one of two products, each with half of both layers' features."""
    width, units = (w1.shape[1] + w2.shape[0]) // 2, w1.shape[0]
    return Layer(x.shape[0], width, units, units // max(gate.shape[1], 1), x.dtype, x.device, gradients, rate)


def _running(given: Given) -> Backend:
    layer = _layer(given.x, given.w1, given.gate, given.w2, given.keep)
    return choose.running(given.backend, layer, partial(choose.share_open, given.gate))


def forward(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output and, to keep, the hidden units before and after activation and gate."""
    backend = _running(given)
    run, pattern, keep = backend.products, None if backend.by_gate else given.pattern, given.keep
    hidden, pre = run.dots(
        *(given.x, given.w1, given.b1, given.gate, pattern), keep=keep, activation=given.activation, fill=keep
    )
    out = run.by_example(hidden, given.w2.t(), given.b2, pattern, given.gate)
    return out, pre, hidden if keep else hidden.new_empty(0)


def backward(grad: Tensor, given: Given, kept: tuple[Tensor, ...], need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, w1, b1, gate, w2, b2; None for what is not needed."""
    backend = _running(given)
    run, pattern = backend.products, None if backend.by_gate else given.pattern
    pre, hidden = kept
    need_x, need_w1, need_b1, need_gate, need_w2, need_b2 = need
    products = need_x or need_w1 or need_b1
    from_x = from_w1 = from_b1 = from_gate = from_w2 = None
    if products or need_gate:
        inner, _ = run.dots(grad, given.w2.t(), None, None, pattern, fill=False)
        coefficient, from_gate = run.pointwise(
            *(inner, pre, given.gate, pattern),
            need_gate=need_gate,
            need_coefficient=products,
            activation=given.activation,
        )
        if need_x:
            from_x = run.by_example(coefficient, given.w1, None, pattern)
        if need_w1 or need_b1:
            from_w1, from_b1 = run.by_unit(coefficient, given.x, pattern, need_rows=need_w1, need_sum=need_b1)
    if need_w2:
        from_w2, _ = run.by_unit(hidden, grad, pattern, transposed=True)
    return from_x, from_w1, from_b1, from_gate, from_w2, grad.sum(0) if need_b2 else None


def shapes(given: Given) -> tuple[tuple[Any, ...], ...]:
    """Return the shapes of what ``forward`` returns."""
    batch, units = given.x.shape[0], given.w1.shape[0]
    hidden = (batch, units) if given.keep else (0,)
    return (batch, given.w2.shape[0]), hidden, hidden


_op = Op("gated_ffn", Given, forward, backward, naive, shapes, differentiable=("x", "w1", "b1", "gate", "w2", "b2"))
