"""Statistics over the batches of all processes of torch.distributed."""

import ctypes
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal
from weakref import WeakKeyDictionary

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
    """Results are read from here: this is a repetition, which the other processes may run at another time."""


_exchange = _Exchange()


@contextmanager
def alone(on: bool = True) -> Iterator[None]:
    """Exchange nothing with other processes of torch.distributed inside the block: each uses only its own batch.

    If one process runs a layer that the others do not run (for a check, say), the exchange would wait for them and
    then fail. Put both the forward and the backward pass into the block.

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
    that of the mean over all examples. Every process must take part, even with an empty batch, or the others wait.
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


def sums_of_all(sums: Float[Tensor, "*s"], count: int) -> tuple[Float[Tensor, "*s"], int]:
    """Return the sums over this process's ``count`` examples, and their number, as those over all processes."""
    if not is_distributed():
        return sums, count
    total, everyone = _sums(sums, count)
    return total.to(sums), everyone


def _sums(sums: Tensor, count: int) -> tuple[Tensor, int]:
    """Return the sums and counts of all processes together, in double precision."""
    if _exchange.repeated is not None:
        packed = next(_exchange.repeated)
    else:
        packed = exchanged(torch.cat([sums.flatten().double(), sums.new_full((1,), count, dtype=torch.float64)]))
        if _exchange.noted is not None:
            _exchange.noted.append(packed)
    return packed[:-1].reshape(sums.shape), int(packed[-1])


# ---------------------------------------------------------------- exchanges, and waiting for those that are late

_AGREE = (
    "gatelet: the processes of torch.distributed agree on rates of open gates, baselines and statistics in every "
    "training step"
)
_LATE = "where one is late for good reasons, the environment variable GATELET_PATIENCE gives it more seconds"
_ALONE = f"a process that runs a layer by itself does so under `with gatelet.sparsity.alone():`; {_LATE}"
_PIECE = 1.0
"""A waiting process checks after every so many seconds how long it has waited."""


class _Group:
    """A process group of gatelet's own.

    Its messages cannot be confused with the program's own, and a backward pass may exchange while
    DistributedDataParallel sends gradients.
    """

    def __init__(self) -> None:
        meet("a layer in training", patience(), f"does so under `with gatelet.sparsity.alone():`; {_LATE}")
        # The waiting process decides how long it waits; the group's own limit must not end the wait earlier.
        self.group = torch.distributed.new_group(timeout=timedelta(days=1))
        self.count, self.given_up = 0, False

    def give_up(self) -> None:
        """Exchange no more, and let the group be: to end it would mean to wait for those who do not come."""
        if not self.given_up:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))  # it outlives the interpreter, too
        self.given_up = True


# A group lives no longer than the program's: its threads have to end with destroy_process_group(). One that still holds
# a tensor when the interpreter ends aborts the process (pytorch issue 190489).
_groups: WeakKeyDictionary[Any, _Group] = WeakKeyDictionary()


def exchanged(values: Tensor, how: Literal["sum", "min", "gather"] = "sum") -> Tensor:
    """Return the sum of all processes' values, their minimum, or all of them one after the other.

    Raises:
        RuntimeError: if a process does not come within :func:`patience` seconds, or has ended.
    """
    world = torch.distributed.group.WORLD
    if world not in _groups:
        _groups[world] = _Group()
    ours = _groups[world]
    if ours.given_up:
        raise RuntimeError(f"{_AGREE}, and this one has given up waiting for the others in an earlier step")
    ours.count += 1
    if how == "gather":
        parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
        work = torch.distributed.all_gather(parts, values.contiguous(), group=ours.group, async_op=True)
    else:
        parts = [values.clone()]
        op = torch.distributed.ReduceOp.SUM if how == "sum" else torch.distributed.ReduceOp.MIN
        work = torch.distributed.all_reduce(parts[0], op, group=ours.group, async_op=True)
    try:
        _wait(work, values.device.type, f"gatelet/step/{ours.count}")
    except RuntimeError as error:
        ours.give_up()
        if str(error).startswith(_AGREE):
            raise
        raise RuntimeError(f"{_AGREE}, and not all of them came to this one ({str(error).splitlines()[0]})") from error
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def patience() -> float:
    """Return for how many seconds a training step waits for the other processes: ``GATELET_PATIENCE``, or 30.

    Raises:
        ValueError: if that is no number above 0.
    """
    said = os.environ.get("GATELET_PATIENCE", "30")
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"GATELET_PATIENCE: must be a number of seconds above 0, not {said!r}")
    return seconds


class _Patience:
    """The seconds of a wait. The count starts again when another process shows that it is alive.

    Only seconds in which this process ran are counted: a process that was stopped does not blame the others.
    """

    def __init__(self, key: str, seconds: float) -> None:
        self.key, self.seconds, self.spent, self.store = key, seconds, 0.0, _store()
        self.store.add(f"{key}/{torch.distributed.get_rank()}", 1)
        self.signs = self.store.add("gatelet/alive", 0)

    def over(self, seconds: float) -> bool:
        """Return whether no seconds are left after so many more."""
        self.spent += seconds
        if self.spent >= self.seconds and (signs := self.store.add("gatelet/alive", 0)) != self.signs:
            self.spent, self.signs = 0.0, signs
        return self.spent >= self.seconds

    def leave(self) -> list[int]:
        """Stop waiting; return the processes that did not come."""
        missing = [r for r in range(torch.distributed.get_world_size()) if not self.store.add(f"{self.key}/{r}", 0)]
        self.store.add(f"{self.key}/{torch.distributed.get_rank()}", -1)
        return missing


def _wait(work: Any, device: str, key: str) -> None:
    """Wait until an exchange is over. Warn after a third of the patience, and raise after all of it."""
    seconds, limit, warned = patience(), None, False
    piece = min(_PIECE, seconds / 10)
    while not _over(work, device, piece):
        limit = _Patience(key, seconds) if limit is None else limit  # a short exchange does not read the store
        if limit.over(piece):
            who = ", ".join(map(str, limit.leave()))
            raise RuntimeError(f"{_AGREE}; process {who} did not come to this one within {seconds:g} s; {_ALONE}")
        if limit.spent > seconds / 3 and not warned:
            warned = True
            told = f"{_AGREE}, and not all of them came to this one; after {limit.spent:.0f} s it still waits; {_ALONE}"
            warnings.warn(told, UserWarning, stacklevel=2)


def _over(work: Any, device: str, seconds: float) -> bool:
    """Wait for so many seconds at most, and return whether it is over."""
    if device == "cpu":
        try:
            work.wait(timedelta(seconds=seconds))
        except RuntimeError:
            if work.is_completed():
                raise
            return False
        return True
    until = time.monotonic() + seconds  # a wait of NCCL that has a limit ends its group with it
    while not work.is_completed():
        if time.monotonic() > until:
            return False
        time.sleep(1e-5)
    work.wait()
    return True


_next_sign = 0.0


def sign_of_life() -> None:
    """Tell processes that wait in a training step that this one is alive but busy, for example with evaluation."""
    global _next_sign
    now = time.monotonic()
    if now > _next_sign and _has_others():
        _next_sign = now + patience() / 6
        _store().add("gatelet/alive", 1)


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


_meetings = 0


def meet(what: str, timeout: float, by_itself: str = "says local=True") -> None:
    """Wait until all processes are here.

    Nothing is sent through the process group before that, so a process that came alone does not change it.

    Raises:
        RuntimeError: if some process does not come within ``timeout`` seconds.
    """
    global _meetings
    world, key = torch.distributed.get_world_size(), f"gatelet/meeting/{_meetings}"
    limit = _Patience(key, timeout)
    limit.store.add(key, 1)
    while (there := limit.store.add(key, 0)) < world:
        if limit.over(0.01):
            limit.store.add(key, -1)
            limit.leave()
            raise RuntimeError(
                f"{what}: {there} of {world} processes of torch.distributed called it within {timeout:g} s; all have "
                f"to, because they pool what they see; one that calls it by itself {by_itself}"
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
    """Return the (1 − rate)-quantile of the values of all processes, each of which kept the share ``kept`` of those it
    saw.

    The order statistic that ``kthvalue`` finds in all values together: by bisection over the floating numbers in their
    order, so that no process has to send its values.
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
    return not _exchange.alone and _has_others()


def _has_others() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
