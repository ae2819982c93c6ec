"""Statistics over the batches of all processes of torch.distributed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor


class _Exchange(threading.local):
    """How this thread's sums are exchanged."""

    alone = False
    """With nobody."""
    noted: "list[Tensor] | None" = None
    """Results are put here, for a repetition of this forward pass."""
    repeated: "Iterator[Tensor] | None" = None
    """Results come from here: this is a repetition, which the other processes may run at another time."""


_exchange = _Exchange()


@contextmanager
def alone(on: bool = True) -> Iterator[None]:
    """Exchange nothing with other processes of torch.distributed inside the block: each goes by its own batch.

    Where one process runs a layer that the others do not run (to look at something), the exchange would wait for them.

    Args:
        on: False: exchange as usual.

    >>> import torch, gatelet
    >>> layer = gatelet.nn.ConditionalLinear(8, 16, bottleneck=4)
    >>> with gatelet.sparsity.alone():
    ...     layer(torch.randn(3, 8)).shape
    torch.Size([3, 16])
    """
    before, _exchange.alone = _exchange.alone, on
    try:
        yield
    finally:
        _exchange.alone = before


@contextmanager
def noting(results: list[Tensor]) -> Iterator[None]:
    """Put the results of all exchanges inside the block into this list."""
    before, _exchange.noted = _exchange.noted, results
    try:
        yield
    finally:
        _exchange.noted = before


@contextmanager
def repeating(results: list[Tensor]) -> Iterator[None]:
    """Take the results of all exchanges inside the block from this list, in their order."""
    before, _exchange.repeated = _exchange.repeated, iter(results)
    try:
        yield
    finally:
        _exchange.repeated = before


def batch_mean(values: Float[Tensor, "*lead N"]) -> Float[Tensor, " N"] | None:
    """Return the mean over all dimensions but the last, of all processes together; None if none has an example.

    Its gradient for this process's values is such that the processes' *mean* gradient, which DDP and FSDP form, is
    that of the mean over all examples. Every process takes part, one with an empty batch too: the others would wait.
    """
    rows = values.reshape(-1, values.shape[-1])
    own = rows.sum(0)
    if not is_distributed():
        return own / len(rows) if len(rows) else None
    total, count = _sums(own.detach(), len(rows))
    if not count:
        return None
    mean = (total / count).to(own)
    if not own.requires_grad:
        return mean
    return mean + (own - own.detach()) * (torch.distributed.get_world_size() / count)


def mean_of_sums(sums: Float[Tensor, "*s"], count: int) -> Float[Tensor, "*s"] | None:
    """Return the sums over this process's ``count`` examples as a mean over those of all processes."""
    if not is_distributed():
        return sums / count if count else None
    total, everyone = _sums(sums, count)
    return (total / everyone).to(sums) if everyone else None


def _sums(sums: Tensor, count: int) -> tuple[Tensor, int]:
    """Return the sums and counts of all processes together, in double precision."""
    if _exchange.repeated is not None:
        packed = next(_exchange.repeated)
    else:
        packed = torch.cat([sums.flatten().double(), sums.new_full((1,), count, dtype=torch.float64)])
        try:
            torch.distributed.all_reduce(packed)
        except RuntimeError as error:
            raise RuntimeError(
                "gatelet: the processes of torch.distributed agree on the share of open gates and on baselines in "
                "every training step, and not all of them came to this one; a process that runs a layer by itself does "
                f"so under `with gatelet.sparsity.alone():` ({str(error).splitlines()[0]})"
            ) from error
        if _exchange.noted is not None:
            _exchange.noted.append(packed)
    return packed[:-1].reshape(sums.shape), int(packed[-1])


def is_distributed() -> bool:
    """Return whether there are other processes to agree with."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and not _exchange.alone
