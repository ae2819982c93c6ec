"""gated_linear on the CPU: only open pairs are computed, forward and backward."""

from torch import Tensor

from gatelet.kernels import _sparse
from gatelet.kernels._dispatch import SMALLEST_GROUP
from gatelet.kernels._pattern import words

IN_PLACE = 1 << 23
"""Bytes of a matrix (B, N) from which memory is saved at the cost of a second pass."""


def infer(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """Return the output alone; the pattern is built on the way and dropped."""
    units = weight.shape[0]
    out = x.new_empty((x.shape[0], units))
    cols = None if len(x) == 1 else _scratch_words(x, units * words(x.shape[0]))
    _sparse.dots(x, weight, bias, gate, cols, out, mask=gate, grouped=_grouped(gate, units))
    return out


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    cols: Tensor,
    wide: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output and, to ``keep``, the values before the gate at the pairs of the pattern.

    ``cols`` is the pattern of the open gates, ``wide`` that of a wider support, where values are wanted too.
    """
    units = weight.shape[0]
    out = x.new_empty((x.shape[0], units))
    pre = x.new_empty((x.shape[0], units) if keep else 0)
    pattern = cols if wide is None else wide
    _sparse.dots(x, weight, bias, gate, pattern, out, pre if keep else None, grouped=_grouped(gate, units))
    return out, pre


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    pre: Tensor,
    rows: Tensor,
    cols: Tensor,
    wide: Tensor | None,
    need: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and gate; None for what is not needed."""
    need_x, need_weight, need_bias, need_gate = need
    pattern = rows if wide is None else wide
    products = need_x or need_weight or need_bias
    # The gate's gradient takes the place of the coefficients after them, where another such matrix would weigh.
    later = need_gate and products and gate.shape == grad.shape and grad.nbytes > IN_PLACE
    coefficient, slope = _sparse.pointwise(grad, pre, gate, pattern, need_gate and not later, products)
    from_x = from_weight = from_bias = None
    if need_x and coefficient is not None:
        from_x = _sparse.by_example(coefficient, weight, None, rows)
    if (need_weight or need_bias) and coefficient is not None:
        from_weight, from_bias = _sparse.by_unit(coefficient, x, cols, need_bias, need_weight)
    if later:
        _, slope = _sparse.pointwise(grad, pre, gate, pattern, True, False, slopes=coefficient)
    return from_x, from_weight, from_bias, slope


def _grouped(gate: Tensor, units: int) -> int:
    group = units // max(gate.shape[1], 1)
    return group if group >= SMALLEST_GROUP else 1


def _scratch_words(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count * 8 // like.element_size())
