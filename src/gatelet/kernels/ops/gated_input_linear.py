"""gated_input_linear: the affine layer after a gated one, reading only open hidden units."""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels import choose
from gatelet.kernels.backends import Backend, Layer
from gatelet.kernels.ops._checks import check_affine
from gatelet.kernels.ops._declare import Op, plain, recording
from gatelet.kernels.ops.open_pattern import mask_of_form
from gatelet.kernels.pattern import Bits, Form, OpenPattern, flat


def gated_input_linear(
    hidden: Float[Tensor, "*lead N"],
    pattern: OpenPattern,
    weight: Float[Tensor, "O N"],
    bias: Float[Tensor, " O"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "*lead O"]:
    """Hidden Wᵀ + b where closed hidden units are not read, forward and backward.

    Closed units count as zero, whatever ``hidden`` and the weights hold there; they receive no gradient. Derivatives of
    second order, forward-mode derivatives and ``torch.func`` transforms are computed densely.

    Args:
        hidden: (..., N), float32 or float64 (on a CPU others run dense, which is announced once).
        pattern: the open units, from :func:`gatelet.kernels.open_pattern`.
        weight: (O, N). Fastest as the transposed view of a contiguous (N, O) matrix; any other is copied so.
        bias: (O,) or None.
        backend: ``"auto"``, ``"dense"``, ``"numba"``, ``"triton"``.

    Returns:
        (..., O).

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, an unknown backend or one that cannot
            run the layer.
        RuntimeError: for a backend that is not there.
        NotImplementedError: for a transform of ``torch.func`` with a backend of kernels asked for by name.

    >>> from gatelet.kernels import open_pattern
    >>> gate = torch.tensor([[1.0, 0.0, 1.0]])
    >>> gated_input_linear(torch.tensor([[1.0, torch.nan, 3.0]]), open_pattern(gate), torch.ones(2, 3))
    tensor([[4., 4.]])
    """
    choose.check_backend(backend)
    check_affine(hidden, weight, bias, ("hidden", "weight", "bias"))
    if not isinstance(pattern, OpenPattern):
        raise TypeError(f"pattern must come from gatelet.kernels.open_pattern, not be a {type(pattern).__name__}")
    if pattern.lead != hidden.shape[:-1] or pattern.units != hidden.shape[-1]:
        raise ValueError(
            f"pattern is one of gates {(*pattern.lead, pattern.units)}, but hidden has shape {tuple(hidden.shape)}"
        )
    flat_hidden = flat(hidden)
    ordinary = plain(hidden, weight, bias)
    keep = not ordinary or recording(hidden, weight, bias)
    name = backend if ordinary else choose.settled(backend, _layer(flat_hidden, weight))
    out = _op(Given(flat_hidden, pattern.form, weight, bias, name, keep))
    return out.view(*hidden.shape[:-1], weight.shape[0])


class Given(NamedTuple):
    """The op's arguments: hidden (B, N), weight (O, N)."""

    hidden: Tensor
    pattern: Form | None
    weight: Tensor
    bias: Tensor | None
    backend: str
    keep: bool


def naive(given: Given) -> Tensor:
    """What the op means."""
    assert given.pattern is not None
    is_open = mask_of_form(given.pattern, given.hidden.shape[1])
    return F.linear(torch.where(is_open, given.hidden, 0), given.weight, given.bias)


def _layer(hidden: Tensor, weight: Tensor) -> Layer:
    outputs, units = weight.shape
    return Layer(hidden.shape[0], outputs, units, 1, hidden.dtype, hidden.device, False)


def _share_open(given: Given) -> float:
    """Return the share of open units in a sample of examples, by their bits."""
    assert isinstance(given.pattern, Bits)
    rows = given.pattern.rows[:: choose.step_of(given.hidden.numel(), len(given.pattern.rows))]
    is_open = mask_of_form(Bits(rows, rows), given.hidden.shape[1])
    return float(is_open.count_nonzero()) / max(is_open.numel(), 1)


def _running(given: Given) -> Backend:
    return choose.running(given.backend, _layer(given.hidden, given.weight), partial(_share_open, given))


def forward(given: Given) -> tuple[Tensor]:
    """Return the output.

    The columns of W (O, N) are read as rows of its transpose: free if it is the view of a matrix kept by unit.
    """
    run = _running(given).products
    return (run.by_example(given.hidden, given.weight.t(), given.bias, given.pattern),)


def backward(grad: Tensor, given: Given, kept: tuple[Tensor, ...], need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden (zero at closed units), weight and bias; None for what is not needed."""
    run = _running(given).products
    from_hidden = from_weight = None
    if need[0]:
        from_hidden, _ = run.dots(grad, given.weight.t(), None, None, given.pattern)
    if need[1]:
        from_weight, _ = run.by_unit(given.hidden, grad, given.pattern, transposed=True)
    return from_hidden, from_weight, grad.sum(0) if need[2] else None


def shapes(given: Given) -> tuple[tuple[Any, ...], ...]:
    """Return the shapes of what ``forward`` returns."""
    return ((given.hidden.shape[0], given.weight.shape[0]),)


_op = Op("gated_input_linear", Given, forward, backward, naive, shapes, differentiable=("hidden", "weight", "bias"))
