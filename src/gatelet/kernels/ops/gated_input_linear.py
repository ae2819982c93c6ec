"""gated_input_linear: the affine layer after a gated one, reading only open hidden units."""

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
from gatelet.kernels.ops._checks import check_second, check_tensor
from gatelet.kernels.ops._declare import ORDINARY, Op, plain, recording, untraced
from gatelet.kernels.ops._sparse_grad import backend_for, refuse_sparse, touched
from gatelet.kernels.ops.open_pattern import check_values, checked, mask_of_form
from gatelet.kernels.pattern import Bits, Form, Lists, OpenPattern, flat


def gated_input_linear(
    hidden: Float[Tensor, "..."],
    pattern: OpenPattern | Tensor,
    weight: Float[Tensor, "_ _"],
    bias: Float[Tensor, " O"] | None = None,
    *,
    by_unit: bool = False,
    sparse_grad: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "*lead O"]:
    """Hidden Wᵀ + b where closed hidden units are not read, forward and backward.

    Closed units count as zero, whatever ``hidden`` and the weights hold there; they receive no gradient. Derivatives of
    second order, forward-mode derivatives and ``torch.func`` transforms are computed densely.

    Args:
        hidden: (..., N), float32 or float64 (other types run dense on a CPU, with a warning once). With a pattern of
            given indices: the values of these alone, in their shape.
        pattern: the open units, from :func:`gatelet.kernels.open_pattern`; or given ones:
            :meth:`gatelet.kernels.OpenPattern.from_indices`, indices (..., K) or a sparse CSR tensor.
        weight: (O, N). Fastest as the transposed view of a contiguous (N, O) matrix; any other layout is copied into
            that one.
        bias: (O,) or None.
        by_unit: the weight is given as (N, O), a row per hidden unit.
        sparse_grad: with given indices and ``by_unit``, give the weight a sparse gradient of the rows that are open
            for any example, as ``torch.nn.Embedding`` does.
        backend: ``"auto"``, ``"dense"``, ``"numba"``, ``"triton"``.

    Returns:
        (..., O).

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, an unknown backend or one that cannot
            run the layer.
        RuntimeError: for a backend that is not available.
        NotImplementedError: for a transform of ``torch.func`` with a backend of kernels asked for by name.

    >>> from gatelet.kernels import open_pattern
    >>> gate = torch.tensor([[1.0, 0.0, 1.0]])
    >>> gated_input_linear(torch.tensor([[1.0, torch.nan, 3.0]]), open_pattern(gate), torch.ones(2, 3))
    tensor([[4., 4.]])
    """
    if by_unit and not sparse_grad and backend in ("auto", "numba"):
        found = _at_once(hidden, pattern, weight, bias)
        if found is not None:
            return found
    choose.check_backend(backend)
    check_tensor(weight, "weight", 2)
    check_tensor(hidden, "hidden")
    outputs, units = reversed(weight.shape) if by_unit else weight.shape
    pattern = checked(pattern, units, None, "hidden and weight")
    given_units = isinstance(pattern.form, Lists)
    if sparse_grad and not (given_units and by_unit):
        raise ValueError("sparse_grad=True goes with given indices and by_unit=True, a weight (N, O)")
    if given_units:
        check_values(hidden, pattern, "hidden")
    elif hidden.shape != (*pattern.lead, units):
        raise ValueError(f"hidden must have shape {(*pattern.lead, units)}, as pattern has, not {tuple(hidden.shape)}")
    check_second(hidden, weight, bias, outputs, ("hidden", "weight", "bias"))
    ordinary = plain(hidden, weight, bias)
    keep = not ordinary or recording(hidden, weight, bias)
    refuse_sparse(sparse_grad, ordinary)
    values = hidden.reshape(-1) if given_units else flat(hidden)
    layer = _layer(values, pattern.form, outputs, units)
    name = backend
    if given_units:
        name = backend_for(backend, layer, hidden, weight, bias)
    elif not ordinary:
        name = choose.settled(backend, layer)
    out = _op(Given(values, pattern.form, weight, bias, by_unit, sparse_grad, name, keep))
    return out if len(pattern.lead) == 1 else out.view(*pattern.lead, outputs)


def _at_once(hidden: Any, indices: Any, weight: Any, bias: Any) -> Tensor | None:
    """Return the output for given indices where nothing is to be found out but whether they ascend; None: go the long
    way.

    Behind a product that empties the caches, each step of the long way takes some microseconds.
    """
    for each in (hidden, weight, weight if bias is None else bias):
        if type(each) not in ORDINARY or each.dtype is not weight.dtype or not each.is_cpu:
            return None
    if type(indices) is OpenPattern:
        form = indices.form
        if not isinstance(form, Lists) or indices.most is None or weight.dim() != 2:
            return None
        indices = form.units.view(indices.values_shape) if indices.units == weight.shape[0] else None
    if type(indices) is not Tensor or indices.dtype is not torch.int64 or not indices.is_cpu:
        return None
    if not untraced() or forward_ad._current_level >= 0 or recording(hidden, weight, bias):
        return None
    run = _fitting(hidden.shape, indices.shape, weight.shape, None if bias is None else bias.shape, weight.dtype)
    if run is None or not (hidden.is_contiguous() and indices.is_contiguous() and weight.is_contiguous()):
        return None
    found: Tensor | None = run(hidden, weight, bias, indices) if bias is None or bias.is_contiguous() else None
    return found


@functools.lru_cache(maxsize=64)
def _fitting(
    hidden: torch.Size, indices: torch.Size, weight: torch.Size, bias: torch.Size | None, dtype: torch.dtype
) -> Any:
    """Return what computes given indices of these shapes; None if they need checks."""
    if hidden != indices or len(weight) != 2 or not indices.numel() or bias not in (None, weight[1:]):
        return None
    layer = Layer(indices[:-1].numel(), weight[1], weight[0], 1, dtype, torch.device("cpu"), False)
    if BACKENDS["numba"].cannot(layer):
        return None
    shape, bits = (*indices[:-1], weight[1]), torch.finfo(dtype).bits
    return BACKENDS["numba"].products.decoder(layer.batch, indices[-1], layer.units, layer.width, bits, shape)


class Given(NamedTuple):
    """The op's arguments: hidden (B, N), or (P,) with lists; weight (O, N), or (N, O) by unit."""

    hidden: Tensor
    pattern: Form | None
    weight: Tensor
    bias: Tensor | None
    by_unit: bool
    sparse_grad: bool
    backend: str
    keep: bool

    @property
    def rows(self) -> Tensor:
        """The weight, a row per unit: without a copy if it is stored so, or is the transposed view of what is."""
        return self.weight if self.by_unit else self.weight.t()


def naive(given: Given) -> Tensor:
    """What the op means."""
    if isinstance(given.pattern, Lists):
        return _pairs.by_example(given.hidden, given.rows, given.bias, given.pattern)
    assert given.pattern is not None
    is_open = mask_of_form(given.pattern, given.hidden.shape[1])
    return F.linear(torch.where(is_open, given.hidden, 0), given.rows.t(), given.bias)


def _layer(hidden: Tensor, form: Form, outputs: int, units: int) -> Layer:
    batch = form.batch if isinstance(form, Lists) else hidden.shape[0]
    return Layer(batch, outputs, units, 1, hidden.dtype, hidden.device, False)


def _share_open(given: Given) -> float:
    """Return the share of open units in a sample of examples, by their bits."""
    assert isinstance(given.pattern, Bits)
    rows = given.pattern.rows[:: choose.step_of(given.hidden.numel(), len(given.pattern.rows))]
    is_open = mask_of_form(Bits(rows, rows), given.hidden.shape[1])
    return float(is_open.count_nonzero()) / max(is_open.numel(), 1)


def _running(given: Given) -> Backend:
    if given.backend != "auto":
        return BACKENDS[given.backend]
    assert given.pattern is not None
    units, outputs = given.rows.shape
    return choose.running("auto", _layer(given.hidden, given.pattern, outputs, units), partial(_share_open, given))


def forward(given: Given) -> tuple[Tensor]:
    """Return the output."""
    return (_running(given).products.by_example(given.hidden, given.rows, given.bias, given.pattern),)


def backward(grad: Tensor, given: Given, kept: tuple[Tensor, ...], need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden (zero at closed units), weight and bias; None for what is not needed."""
    run = _running(given).products
    from_bias = grad.sum(0) if need[2] else None
    if isinstance(given.pattern, Lists) and need[0] and need[1] and hasattr(run, "dots_and_by_unit"):
        from_hidden, rows = run.dots_and_by_unit(grad, given.rows, given.hidden, given.pattern, given.sparse_grad)
        return from_hidden, rows if given.by_unit else rows.t(), from_bias
    from_hidden = from_weight = None
    if need[0]:
        from_hidden, _ = run.dots(grad, given.rows, None, None, given.pattern)
    if need[1] and given.sparse_grad:
        from_weight = touched(run)(given.hidden, grad, given.pattern)
    elif need[1]:
        from_weight, _ = run.by_unit(given.hidden, grad, given.pattern, transposed=not given.by_unit)
    return from_hidden, from_weight, from_bias


def shapes(given: Given) -> tuple[tuple[Any, ...], ...]:
    """Return the shapes of what ``forward`` returns."""
    form = given.pattern
    batch = form.batch if isinstance(form, Lists) else given.hidden.shape[0]
    return ((batch, given.rows.shape[1]),)


_op = Op("gated_input_linear", Given, forward, backward, naive, shapes, differentiable=("hidden", "weight", "bias"))
