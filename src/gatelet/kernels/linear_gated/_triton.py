"""linear_gated on a GPU: each example adds up the weight columns of its open units, or of tiles that hold one."""

from torch import Tensor

from gatelet.kernels import _triton as products


def forward(hidden: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return hidden Wᵀ + b over the open units; W (O, N) is read where it lies."""
    return products.by_example(hidden, weight.t(), bias, None, rows, None)


def backward(
    grad: Tensor,
    hidden: Tensor,
    rows: Tensor,
    cols: Tensor,
    weight: Tensor,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden (zero at closed units), weight and bias; None for what is not needed."""
    from_hidden = from_weight = None
    if need[0]:
        from_hidden, _ = products.dots(grad, weight.t(), None, None, rows, None)
    if need[1]:
        from_weight, _ = products.by_unit(hidden, grad, cols, None, need_sum=False, transposed=True)
    return from_hidden, from_weight, grad.sum(0) if need[2] else None
