"""Statistics over the batches of all processes of torch.distributed."""

import torch
from jaxtyping import Float
from torch import Tensor


def batch_mean(values: Float[Tensor, "*lead N"]) -> Float[Tensor, " N"] | None:
    """Return the mean over all dimensions but the last, of all processes together; None if none has an example.

    Every process takes part, one with an empty batch too: the others would wait for it.
    """
    rows = values.reshape(-1, values.shape[-1])
    if not is_distributed():
        return rows.mean(0) if len(rows) else None
    sums = torch.cat([rows.sum(0), rows.new_full((1,), len(rows))])
    torch.distributed.all_reduce(sums)
    return sums[:-1] / sums[-1] if sums[-1] > 0 else None


def is_distributed() -> bool:
    """Return whether there are other processes to agree with."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
