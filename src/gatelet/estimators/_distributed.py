"""Statistics over the batches of all processes of torch.distributed."""

import torch
from jaxtyping import Float
from torch import Tensor


def batch_mean(values: Float[Tensor, "*lead N"]) -> Float[Tensor, " N"] | None:
    """Return the mean over all dimensions but the last, of all processes together; None if none has an example.

    Every process takes part, one with an empty batch too: the others would wait for it.
    """
    rows = values.reshape(-1, values.shape[-1])
    return mean_of_sums(rows.sum(0), len(rows))


def mean_of_sums(sums: Float[Tensor, "*s"], count: int) -> Float[Tensor, "*s"] | None:
    """Return the sums over this process's ``count`` examples as a mean over those of all processes."""
    if not is_distributed():
        return sums / count if count else None
    packed = torch.cat([sums.flatten(), sums.new_full((1,), count)])
    torch.distributed.all_reduce(packed)
    return (packed[:-1] / packed[-1]).reshape(sums.shape) if packed[-1] > 0 else None


def is_distributed() -> bool:
    """Return whether there are other processes to agree with."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
