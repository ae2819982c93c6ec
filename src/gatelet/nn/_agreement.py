"""What the processes of torch.distributed exchange about their parts of a batch."""

from torch import Tensor

from gatelet.estimators._distributed import exchanged, is_distributed


def total(values: Tensor) -> Tensor:
    """Return the sum over all processes."""
    return exchanged(values) if is_distributed() else values


def least(values: Tensor) -> Tensor:
    """Return the minimum over all processes."""
    return exchanged(values, "min") if is_distributed() else values


def gathered(values: Tensor) -> Tensor:
    """Return all processes' values, of one shape, one after the other."""
    return exchanged(values, "gather") if is_distributed() else values
