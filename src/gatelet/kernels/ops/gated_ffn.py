"""gated_ffn: two affine layers whose hidden units are computed only where they are open."""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gatelet._checks import check_choice
from gatelet.kernels import choose
from gatelet.kernels.backends import BACKENDS, Backend, Layer, _pairs
from gatelet.kernels.backends._activations import ACTIVATIONS, activate
from gatelet.kernels.ops._checks import check_affine, check_gate, check_second, check_tensor
from gatelet.kernels.ops._declare import Op, plain, recording
from gatelet.kernels.ops._sparse_grad import backend_for, listed, refuse_sparse, touched
from gatelet.kernels.ops.open_pattern import check_values, checked, pattern_of
from gatelet.kernels.pattern import Form, Lists, OpenPattern, flat, spread


def gated_ffn(
    x: Float[Tensor, "*lead D"],
    w1: Float[Tensor, "N D"],
    b1: Float[Tensor, " N"] | None,
    gate: Float[Tensor, "..."] | None,
    activation: str,
    w2: Float[Tensor, "_ _"],
    b2: Float[Tensor, " O"] | None,
    *,
    pattern: OpenPattern | Tensor | None = None,
    by_unit: bool = False,
    sparse_grad: bool = False,
    backend: str = "auto",
    active_fraction: float | None = None,
) -> Float[Tensor, "*lead O"]:
    """(act(x W1ᵀ + b1) ∘ gate) W2ᵀ + b2; closed hidden units are neither computed nor written nor read.

    The pattern of open units is built once and serves both layers, forward and backward. Derivatives of second order,
    forward-mode derivatives and ``torch.func`` transforms are computed densely.

    Args:
        x: (..., D), float32 or float64 (other types run dense on a CPU, with a warning once).
        w1: (N, D).
        b1: (N,) or None.
        gate: (..., G), one number per hidden unit (G = N) or per group of N / G consecutive ones. With a pattern: one
            number per index, in their shape, or None for ones.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (exact, with the error function) or ``"silu"``.
        w2: (O, N). Fastest as the transposed view of a contiguous (N, O) matrix; any other layout is copied into that
        one.
        b2: (O,) or None.
        pattern: given open units: :meth:`gatelet.kernels.OpenPattern.from_indices`, indices (..., K) or a sparse CSR
            tensor. A pattern of bits is not accepted, since the gates say the same.
        by_unit: w2 is given as (N, O), a row per hidden unit.
        sparse_grad: with given indices and ``by_unit``, give w1 and w2 sparse gradients of the rows that are open for
            any example, as ``torch.nn.Embedding`` does.
        backend: ``"auto"``, ``"dense"``, ``"numba"``, ``"triton"``.
        active_fraction: the share of open gates to expect; see :func:`gatelet.kernels.gated_linear`.

    Returns:
        (..., O).

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, an unknown activation, an unknown backend
            or one that cannot run the layer.
        RuntimeError: for a backend that is not available.
        NotImplementedError: for a transform of ``torch.func`` with a backend of kernels asked for by name.

    >>> x, gate = torch.ones(1, 2), torch.tensor([[0.0, 1.0, 1.0]])
    >>> gated_ffn(x, torch.ones(3, 2), None, gate, "relu", torch.ones(1, 3), None)
    tensor([[4.]])
    """
    choose.check_backend(backend)
    check_choice(activation, ACTIVATIONS, "activation")
    check_affine(x, w1, b1, ("x", "w1", "b1"))
    check_tensor(w2, "w2", 2)
    outputs, units = reversed(w2.shape) if by_unit else w2.shape
    if units != w1.shape[0]:
        raise ValueError(f"w2 must have a weight for each of w1's {w1.shape[0]} units, but has {tuple(w2.shape)}")
    check_second(x, w2, b2, outputs, ("x", "w2", "b2"))
    if pattern is not None:
        pattern = checked(pattern, units, x.shape[:-1], "x and w1")
        if not isinstance(pattern.form, Lists):
            raise ValueError("pattern must be one of given indices; a pattern of bits would only repeat the gates")
        if sparse_grad and not by_unit:
            raise ValueError("sparse_grad=True goes with by_unit=True, w2 given as (N, O)")
        weights = (w1, b1, w2, b2)
        return _at_pairs(x, gate, activation, weights, pattern, pattern.form, by_unit, sparse_grad, backend)
    if sparse_grad:
        raise ValueError("sparse_grad=True goes with given indices: pattern=OpenPattern.from_indices(...)")
    if gate is None:
        raise TypeError("gate must be a torch.Tensor; it may be None only with given indices")
    check_gate(gate, x, w1.shape[0])
    flat_x, flat_gate = flat(x), flat(gate)
    if flat_gate.dtype != x.dtype:
        flat_gate = flat_gate.to(x.dtype)
    ordinary = plain(x, w1, b1, gate, w2, b2)
    keep = not ordinary or recording(x, w1, b1, gate, w2, b2)
    layer = _layer(flat_x, w1, units // max(flat_gate.shape[1], 1), outputs, keep, active_fraction)
    form = None
    if ordinary:
        name = choose.choose(backend, layer, partial(choose.share_open, flat_gate)).backend
        if name != "dense":
            form = BACKENDS[name].products.promise(flat_gate.detach(), w1.shape[0], keep)
    else:
        name = choose.settled(backend, layer)
        if name != "dense":
            form = pattern_of(flat_gate.detach(), w1.shape[0], name)
    out = _op(Given(flat_x, w1, b1, flat_gate, activation, w2, b2, form, by_unit, False, name, keep), ordinary)
    return out.view(*x.shape[:-1], outputs)


def _at_pairs(
    x: Tensor,
    gate: Tensor | None,
    activation: str,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    pattern: OpenPattern,
    lists: Lists,
    by_unit: bool,
    sparse_grad: bool,
    backend: str,
) -> Tensor:
    """Return the output where the open units were given."""
    w1, b1, w2, b2 = weights
    if gate is None:
        gate = x.new_ones(pattern.values_shape)
    check_values(gate, pattern, "gate")
    ordinary = plain(x, w1, b1, gate, w2, b2)
    keep = not ordinary or recording(x, w1, b1, gate, w2, b2)
    refuse_sparse(sparse_grad, ordinary)
    outputs = w2.shape[1] if by_unit else w2.shape[0]
    flat_x, values = flat(x), gate.reshape(-1).to(x.dtype)
    name = backend_for(backend, _layer(flat_x, w1, 1, outputs, keep), x, w1, b1, gate, w2, b2)
    out = _op(Given(flat_x, w1, b1, values, activation, w2, b2, lists, by_unit, sparse_grad, name, keep), ordinary)
    return out.view(*x.shape[:-1], outputs)


class Given(NamedTuple):
    """The op's arguments: x (B, D), gate (B, G), or (P,) with lists."""

    x: Tensor
    w1: Tensor
    b1: Tensor | None
    gate: Tensor
    activation: str
    w2: Tensor
    b2: Tensor | None
    pattern: Form | None
    by_unit: bool
    sparse_grad: bool
    backend: str
    keep: bool

    @property
    def rows2(self) -> Tensor:
        """W2, a row per hidden unit."""
        return self.w2 if self.by_unit else self.w2.t()


def naive(given: Given) -> Tensor:
    """What the op means."""
    if isinstance(given.pattern, Lists):
        pre = _pairs.dots(given.x, given.w1, given.b1, given.pattern)
        return _pairs.by_example(activate(pre, given.activation) * given.gate, given.rows2, given.b2, given.pattern)
    gate = spread(given.gate, given.w1.shape[0])
    hidden = activate(F.linear(given.x, given.w1, given.b1), given.activation)
    return F.linear(torch.where(gate != 0, hidden * gate, 0), given.rows2.t(), given.b2)


def _layer(x: Tensor, w1: Tensor, group: int, outputs: int, gradients: bool, rate: float | None = None) -> Layer:
    """Return one of two products, each with half of both layers' features."""
    width = (w1.shape[1] + outputs) // 2
    return Layer(x.shape[0], width, w1.shape[0], group, x.dtype, x.device, gradients, rate)


def _running(given: Given) -> Backend:
    if given.backend != "auto":
        return BACKENDS[given.backend]
    group = given.w1.shape[0] // max(given.gate.shape[1], 1)
    layer = _layer(given.x, given.w1, group, given.rows2.shape[1], given.keep)
    return choose.running("auto", layer, partial(choose.share_open, given.gate))


def forward(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output and, to keep, the hidden units before and after activation and gate."""
    backend, keep = _running(given), given.keep
    run, pattern = backend.products, None if backend.by_gate and not listed(given.pattern) else given.pattern
    if not keep and not listed(pattern) and hasattr(run, "ffn"):
        both = run.ffn(given.x, given.w1, given.b1, given.gate, given.activation, given.rows2, given.b2)
        if both is not None:
            return both, both.new_empty(0), both.new_empty(0)
    hidden, pre = run.dots(
        *(given.x, given.w1, given.b1, given.gate, pattern), keep=keep, activation=given.activation, fill=keep
    )
    out = run.by_example(hidden, given.rows2, given.b2, pattern, given.gate, own=True)
    return out, pre, hidden if keep else hidden.new_empty(0)


def backward(grad: Tensor, given: Given, kept: tuple[Tensor, ...], need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, w1, b1, gate, w2, b2; None for what is not needed."""
    backend = _running(given)
    run, pattern = backend.products, None if backend.by_gate and not listed(given.pattern) else given.pattern
    pre, hidden = kept
    need_x, need_w1, need_b1, need_gate, need_w2, need_b2 = need
    products = need_x or need_w1 or need_b1
    if hasattr(run, "gradients"):
        weights = (given.w1, given.rows2)
        at_once = run.gradients(grad, pre, given.gate, given.x, *weights, pattern, need[:5], given.activation)
        if at_once is not None:
            *others, from_w2 = at_once
            if from_w2 is not None and not given.by_unit:
                from_w2 = from_w2.t()
            return *others, from_w2, grad.sum(0) if need_b2 else None
    from_x = from_w1 = from_b1 = from_gate = None
    inner, from_w2 = _second_layer(run, grad, given, hidden, pattern, products or need_gate, need_w2)
    if inner is not None:
        coefficient, from_gate = run.pointwise(
            *(inner, pre, given.gate, pattern),
            need_gate=need_gate,
            need_coefficient=products,
            activation=given.activation,
        )
        if need_x:
            from_x = run.by_example(coefficient, given.w1, None, pattern, own=True)
        if need_w1 and given.sparse_grad:
            from_w1, need_w1 = touched(run)(coefficient, given.x, pattern), False
        if need_w1 or need_b1:
            rows, from_b1 = run.by_unit(coefficient, given.x, pattern, need_rows=need_w1, need_sum=need_b1, own=True)
            from_w1 = rows if need_w1 else from_w1
    return from_x, from_w1, from_b1, from_gate, from_w2, grad.sum(0) if need_b2 else None


def _second_layer(
    run: Any, grad: Tensor, given: Given, hidden: Tensor, pattern: Form | None, need_hidden: bool, need_w2: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the hidden layer, where it is open, and of w2."""
    if listed(pattern) and need_hidden and need_w2 and hasattr(run, "dots_and_by_unit"):
        inner, rows = run.dots_and_by_unit(grad, given.rows2, hidden, pattern, given.sparse_grad)
        return inner, rows if given.by_unit else rows.t()
    inner = from_w2 = None
    if need_hidden:
        inner, _ = run.dots(grad, given.rows2, None, None, pattern, fill=False)
    if need_w2 and given.sparse_grad:
        from_w2 = touched(run)(hidden, grad, pattern)
    elif need_w2:
        from_w2, _ = run.by_unit(hidden, grad, pattern, transposed=not given.by_unit, own=True)
    return inner, from_w2


def shapes(given: Given) -> tuple[tuple[Any, ...], ...]:
    """Return the shapes of what ``forward`` returns."""
    batch, units, form = given.x.shape[0], given.w1.shape[0], given.pattern
    pairs = (form.pairs,) if isinstance(form, Lists) else (batch, units)
    hidden = pairs if given.keep else (0,)
    return (batch, given.rows2.shape[1]), hidden, hidden


_op = Op("gated_ffn", Given, forward, backward, naive, shapes, differentiable=("x", "w1", "b1", "gate", "w2", "b2"))
