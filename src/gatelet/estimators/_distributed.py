"""Statistics over the batches of all processes of torch.distributed."""

import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class _Exchange(threading.local):
    """How this thread's sums are exchanged."""

    alone = False
    """Exchange with no other process."""
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
            _sum_in_place(packed)
        except RuntimeError as error:
            raise RuntimeError(f"{_MISSING} ({str(error).splitlines()[0]})") from error
        if _exchange.noted is not None:
            _exchange.noted.append(packed)
    return packed[:-1].reshape(sums.shape), int(packed[-1])


PATIENCE = 10.0
"""Seconds after which a process that waits for the others in a training step says so."""
_MISSING = (
    "gatelet: the processes of torch.distributed agree on the share of open gates and on baselines in every training "
    "step, and not all of them came to this one; a process that runs a layer by itself does so under "
    "`with gatelet.sparsity.alone():`"
)


def _sum_in_place(values: Tensor) -> None:
    """Add up all processes' values. Late ones are waited for as long as the group does, but not without a word.

    Raises:
        RuntimeError: when the group's own timeout is over.
    """
    work = torch.distributed.all_reduce(values, async_op=True)
    if torch.distributed.get_backend() == "gloo":  # others take a timeout for the end of the group
        try:
            work.wait(timedelta(seconds=PATIENCE))
            return
        except RuntimeError:
            if work.is_completed():
                raise
        warnings.warn(f"{_MISSING}; after {PATIENCE:g} s it still waits", UserWarning, stacklevel=2)
    work.wait()


_meetings = 0


def meet(what: str, timeout: float) -> None:
    """Wait until all processes are here.

    Nothing is sent through the process group before: one that came alone leaves it as it was.

    Raises:
        RuntimeError: if some process does not come within ``timeout`` seconds.
    """
    global _meetings
    world, store = torch.distributed.get_world_size(), torch.distributed.distributed_c10d._get_default_store()
    key, until = f"gatelet/meeting/{_meetings}", time.monotonic() + timeout
    store.add(key, 1)
    while (there := store.add(key, 0)) < world:
        if time.monotonic() > until:
            store.add(key, -1)
            raise RuntimeError(
                f"{what}: {there} of {world} processes of torch.distributed called it within {timeout:g} s; all have "
                "to, for they pool what they see; one that calls it by itself says local=True"
            )
        time.sleep(0.01)
    _meetings += 1


def gathered(value: Any) -> list[Any]:
    """Return the value of every process, by rank."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def total(values: Sequence[float]) -> list[float]:
    """Return the sums of these numbers over all processes."""
    device = "cpu" if torch.distributed.get_backend() in ("gloo", "mpi") else torch.accelerator.current_accelerator()
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(summed)
    return summed.tolist()


def pooled_quantile(values: Float[Tensor, " n"], rate: float, kept: float) -> Float[Tensor, ""]:
    """Return the (1 − rate)-quantile of the values of all processes, of which each has ``kept`` of those it saw.

    The order statistic that ``kthvalue`` finds in all values together: by bisection over the floating numbers in their
    order, so that no process sends what it has.
    """
    bits, most = values.double().view(torch.int64), 2**63 - 1
    keys = (bits ^ ((bits >> 63) & most)).sort().values  # integers in the numbers' order
    (count,) = total([len(keys) / kept])
    wanted = min(count, max(1.0, round((1 - rate) * count)))
    low, high = -most - 1, most
    while low < high:
        middle = (low + high) // 2
        (below,) = total([int(torch.searchsorted(keys, middle, right=True)) / kept])
        low, high = (low, middle) if below >= wanted else (middle + 1, high)
    found = torch.tensor(low, dtype=torch.int64, device="cpu")
    return (found ^ ((found >> 63) & most)).view(torch.float64)


def is_distributed() -> bool:
    """Return whether there are other processes to agree with."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and not _exchange.alone
