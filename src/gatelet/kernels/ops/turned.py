"""turned: a matrix copied with rows and columns exchanged."""

import torch
from torch import Tensor

from gatelet.kernels.backends import BACKENDS
from gatelet.kernels.ops._declare import plain

LARGE = 1 << 16
"""From this many numbers on, compiled code copies whole cache lines on all threads; torch's copy uses one thread."""


def turned(matrix: Tensor, into: Tensor | None = None) -> Tensor:
    """Return a contiguous copy of a matrix with rows and columns exchanged, without a derivative.

    Args:
        matrix: (R, C).
        into: memory for it, contiguous (C, R).

    Returns:
        (C, R).

    >>> turned(torch.tensor([[1.0, 2.0]]))
    tensor([[1.],
            [2.]])
    """
    numba = BACKENDS["numba"]
    ordinary = matrix.device.type == "cpu" and matrix.is_contiguous() and matrix.numel() >= LARGE
    if ordinary and plain(matrix) and matrix.dtype in (torch.float32, torch.float64) and not numba.missing():
        found: Tensor = numba.products.turned(matrix, into)
        return found
    return matrix.t().contiguous() if into is None else into.copy_(matrix.t())
