"""gated_linear on a GPU: only open pairs are computed, or tiles that hold one, forward and backward."""

from torch import Tensor

from gatelet.kernels import _triton as products
from gatelet.kernels._dispatch import GPU_FEW


def infer(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """Return the output alone."""
    rows = listed = None
    if len(x) > GPU_FEW:  # few examples: one kernel reads the gates itself
        rows, cols = products.pattern(gate, weight.shape[0])
        listed = products.lists(cols, gate)
    return products.dots(x, weight, bias, gate, rows, listed)[0]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    rows: Tensor,
    cols: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output and, to ``keep``, the values before the gate, at the pairs of the pattern.

    That is the pattern of the open gates, or of a wider support, where values are wanted too.
    """
    return products.dots(x, weight, bias, gate, rows, products.lists(cols, gate), keep)


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
    coefficient, slope = products.pointwise(grad, pre, gate, rows, wide, need_gate, need_x or need_weight or need_bias)
    from_x = from_weight = from_bias = None
    if coefficient is not None:
        listed = products.lists(cols, gate)
        if need_x:
            from_x = products.by_example(coefficient, weight, None, None, rows, listed)
        if need_weight or need_bias:
            from_weight, from_bias = products.by_unit(coefficient, x, cols, listed, need_bias, need_weight)
    return from_x, from_weight, from_bias, slope
