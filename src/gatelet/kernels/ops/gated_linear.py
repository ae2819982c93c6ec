"""gated_linear: an affine layer of which each example computes only its open units."""

import functools
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from gatelet.kernels import choose
from gatelet.kernels.backends import BACKENDS, Backend, Layer, _pairs
from gatelet.kernels.ops._checks import check_affine, check_gate
from gatelet.kernels.ops._declare import ORDINARY, Op, plain, recording, untraced
from gatelet.kernels.ops._sparse_grad import backend_for, listed, refuse_sparse, touched
from gatelet.kernels.ops.open_pattern import check_values, checked, mask_of_form, pattern_of
from gatelet.kernels.pattern import Form, Lists, OpenPattern, flat, spread


def gated_linear(
    x: Float[Tensor, "*lead D"],
    weight: Float[Tensor, "N D"],
    bias: Float[Tensor, " N"] | None,
    gate: Float[Tensor, "..."] | None,
    *,
    support: Tensor | None = None,
    pattern: OpenPattern | Tensor | None = None,
    sparse_grad: bool = False,
    backend: str = "auto",
    active_fraction: float | None = None,
) -> Float[Tensor, "..."]:
    """(x Wᵀ + b) ∘ gate, computed only where the gate is not zero, forward and backward.

    Closed units are exactly zero, whatever their weights hold. They send no gradient to x, weight and bias, as
    in the dense product; the gradient of the gate is formed on open gates only, or on ``support``. Derivatives of
    second order, forward-mode derivatives and ``torch.func`` transforms are computed densely.

    Args:
        x: (..., D), float32 or float64 (other types run dense on a CPU, with a warning once).
        weight: (N, D).
        bias: (N,) or None.
        gate: (..., G), one number per unit (G = N) or per group of N / G consecutive units. With a pattern of given
            indices: one number per index, in their shape, or None for ones.
        support: (..., G), boolean: where the gate's gradient is wanted; must include the open gates.
        pattern: the pattern of ``gate`` if it was built before (:func:`gatelet.kernels.open_pattern`); or given open
            units: :meth:`gatelet.kernels.OpenPattern.from_indices`, indices (..., K) or a sparse CSR tensor.
        sparse_grad: with given indices, give the weight a sparse gradient of the rows that are open for any example,
            as ``torch.nn.Embedding`` does; ``torch.optim.SGD``, ``Adagrad`` and ``SparseAdam`` take it.
        backend: ``"auto"`` (the faster of dense and sparse), ``"dense"``, ``"numba"``, ``"triton"``.
        active_fraction: the share of open gates to expect. ``"auto"`` needs it on a GPU, where it does not look at
            the gates; without it dense runs there. Elsewhere it is not used.

    Returns:
        (..., N); with given indices the values at these, in their shape.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, an unknown backend or one that cannot
            run the layer.
        RuntimeError: for a backend that is not available.
        NotImplementedError: for a transform of ``torch.func`` with a backend of kernels asked for by name.

    >>> x, weight = torch.ones(2, 3), torch.ones(4, 3)
    >>> gated_linear(x, weight, None, torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 1.0]]))
    tensor([[3., 0., 0., 6.],
            [0., 0., 0., 3.]])
    >>> gated_linear(x, weight, None, None, pattern=torch.tensor([[0, 3], [1, 2]]))
    tensor([[3., 3.],
            [3., 3.]])
    """
    if pattern is None and support is None and not sparse_grad and backend in ("auto", "numba"):
        found = _at_once(x, weight, bias, gate)
        if found is not None:
            return found
    choose.check_backend(backend)
    check_affine(x, weight, bias)
    units = weight.shape[0]
    if pattern is not None:
        pattern = checked(pattern, units, x.shape[:-1], "x and weight")
        if isinstance(pattern.form, Lists):
            if support is not None:
                raise ValueError("support goes with gates (..., G), not with given indices")
            return _at_pairs(x, weight, bias, gate, pattern, pattern.form, sparse_grad, backend)
    if sparse_grad:
        raise ValueError("sparse_grad=True goes with given indices: pattern=OpenPattern.from_indices(...)")
    if gate is None:
        raise TypeError("gate must be a torch.Tensor; it may be None only with given indices")
    check_gate(gate, x, units)
    if support is not None and support.shape != gate.shape:
        raise ValueError(f"support must have gate's shape {tuple(gate.shape)}, not {tuple(support.shape)}")
    shape = (*x.shape[:-1], units)
    flat_x, flat_gate = flat(x), flat(gate)
    if flat_gate.dtype != x.dtype:
        flat_gate = flat_gate.to(x.dtype)
    ordinary = plain(x, weight, bias, gate)
    keep = not ordinary or recording(x, weight, bias, gate)
    wide = None if support is None or not keep else flat(support).to(x.dtype)
    layer = choose.layer_of(weight, flat_gate, flat_x.shape[0], keep, active_fraction)
    if ordinary:
        name = choose.choose(backend, layer, partial(choose.share_open, flat_gate if wide is None else wide)).backend
    else:
        name = choose.settled(backend, layer)
    form = None
    if name != "dense" and pattern is not None:
        form = pattern.form
    elif name != "dense" and keep:
        own = flat_gate.detach()
        if ordinary and wide is None:
            form = BACKENDS[name].products.promise(own, units, keep)
        else:
            form = pattern_of(own, units, name)
    wide_form = None if wide is None else pattern_of(wide, units, name)
    return _op(Given(flat_x, weight, bias, flat_gate, form, wide_form, False, name, keep), ordinary).view(shape)


def _at_once(x: Any, weight: Any, bias: Any, gate: Any) -> Tensor | None:
    """Return the layer's values for one example where nothing is to be found out; None: go the long way.

    For one example the checks and the choice would take longer than a small layer.
    """
    for each in (x, weight, gate, weight if bias is None else bias):
        if type(each) not in ORDINARY or each.dtype is not _FLOAT or not each.is_cpu:
            return None
    if forward_ad._current_level >= 0 or not untraced():
        return None
    if torch.is_grad_enabled() and recording(x, weight, bias, gate):
        return None
    run = _fitting(x.shape, weight.shape, None if bias is None else bias.shape, gate.shape)
    if run is None or not (x.is_contiguous() and weight.is_contiguous() and gate.is_contiguous()):
        return None
    found: Tensor | None = run(x, weight, bias, gate) if bias is None or bias.is_contiguous() else None
    return found


@functools.lru_cache(maxsize=64)
def _fitting(x: torch.Size, weight: torch.Size, bias: torch.Size | None, gate: torch.Size) -> Any:
    """Return what computes one example of these shapes; None if they need checks or a choice."""
    if len(weight) != 2 or not x or not gate or x.numel() != x[-1] or gate.numel() != gate[-1] or x[:-1] != gate[:-1]:
        return None
    units, width = weight
    if x[-1] != width or units * width < LEAST or not gate[-1] or units % gate[-1] or bias not in (None, (units,)):
        return None
    if BACKENDS["numba"].missing():
        return None
    return BACKENDS["numba"].products.one(units, width, units // gate[-1], (*x[:-1], units))


def _at_pairs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    pattern: OpenPattern,
    lists: Lists,
    sparse_grad: bool,
    backend: str,
) -> Tensor:
    """Return the values at given pairs."""
    shape = pattern.values_shape
    if gate is None:
        gate = x.new_ones(shape)
    check_values(gate, pattern, "gate")
    ordinary = plain(x, weight, bias, gate)
    keep = not ordinary or recording(x, weight, bias, gate)
    refuse_sparse(sparse_grad, ordinary)
    flat_x, values = flat(x), gate.reshape(-1).to(x.dtype)
    layer = Layer(lists.batch, weight.shape[1], weight.shape[0], 1, x.dtype, x.device, keep)
    name = backend_for(backend, layer, x, weight, bias, gate)
    return _op(Given(flat_x, weight, bias, values, lists, None, sparse_grad, name, keep), ordinary).view(shape)


_FLOAT = torch.float32
LEAST = 1 << 18
"""Multiply-adds of a layer for one example from which the CPU kernels win at any active fraction."""


class Given(NamedTuple):
    """The op's arguments: x (B, D), gate (B, G), or (P,) with lists; ``wide`` is the pattern of the support."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    gate: Tensor
    pattern: Form | None
    wide: Form | None
    sparse_grad: bool
    backend: str
    keep: bool


def naive(given: Given) -> Tensor:
    """What the op means."""
    if isinstance(given.pattern, Lists):
        return _pairs.dots(given.x, given.weight, given.bias, given.pattern) * given.gate
    units = given.weight.shape[0]
    gate = spread(given.gate, units)
    wanted = gate != 0
    if given.wide is not None:
        wanted = wanted | mask_of_form(given.wide, units)
    return torch.where(wanted, F.linear(given.x, given.weight, given.bias) * gate, 0)


def _running(given: Given) -> Backend:
    if given.backend != "auto":
        return BACKENDS[given.backend]
    layer = choose.layer_of(given.weight, given.gate, given.x.shape[0], given.keep)
    return choose.running(given.backend, layer, partial(choose.share_open, given.gate))


def forward(given: Given) -> tuple[Tensor, Tensor]:
    """Return the output and, to keep, the values before the gate, at the pairs of the pattern or of the wider one."""
    run = _running(given).products
    pattern = given.pattern if given.wide is None else given.wide
    found: tuple[Tensor, Tensor] = run.dots(given.x, given.weight, given.bias, given.gate, pattern, keep=given.keep)
    return found


def backward(grad: Tensor, given: Given, kept: tuple[Tensor, ...], need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and gate; None for what is not needed."""
    backend = _running(given)
    run, pattern = backend.products, None if backend.by_gate and not listed(given.pattern) else given.pattern
    need_x, need_weight, need_bias, need_gate = need
    if given.wide is None and hasattr(run, "gradients"):
        at_once = run.gradients(grad, kept[0], given.gate, given.x, given.weight, None, pattern, (*need, False))
        if at_once is not None:
            return tuple(at_once[:4])
    products = need_x or need_weight or need_bias
    slopes = partial(run.pointwise, grad, kept[0], given.gate, pattern, given.wide)
    # To save the memory of another large matrix, the gate's gradient is formed last and overwrites the coefficients.
    spares = backend.spares is not None and grad.nbytes > backend.spares
    later = need_gate and products and spares and given.gate.shape == grad.shape
    coefficient, from_gate = slopes(need_gate=need_gate and not later, need_coefficient=products)
    from_x = from_weight = from_bias = None
    if need_x:
        from_x = run.by_example(coefficient, given.weight, None, pattern, own=True)
    if need_weight and given.sparse_grad:
        from_weight = touched(run)(coefficient, given.x, pattern)
        need_weight = False
    if need_weight or need_bias:
        rows, from_bias = run.by_unit(
            coefficient, given.x, pattern, need_rows=need_weight, need_sum=need_bias, own=True
        )
        from_weight = rows if need_weight else from_weight
    if later:
        _, from_gate = slopes(need_gate=True, need_coefficient=False, into=coefficient)
    return from_x, from_weight, from_bias, from_gate


def shapes(given: Given) -> tuple[tuple[Any, ...], ...]:
    """Return the shapes of what ``forward`` returns."""
    pattern = given.pattern
    shape = (pattern.pairs,) if isinstance(pattern, Lists) else (given.x.shape[0], given.weight.shape[0])
    return shape, shape if given.keep else (0,)


_op = Op("gated_linear", Given, forward, backward, naive, shapes, differentiable=("x", "weight", "bias", "gate"))
