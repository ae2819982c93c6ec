"""Commands under torchrun: the first process runs the command, and the others train its jobs with it."""

import functools
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gatelet_lab.training.paper import Epoch
from gatelet_lab.training.workers import Work, Workers
from gatelet_lab.training.world import ALONE, World

GONE = (
    "another process of this training has ended; the same command with --resume continues, with as many processes as "
    "are started then"
)
_world = ALONE
Command = TypeVar("Command", bound=Callable[[Any, Any], None])


def started() -> bool:
    """Return whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def world() -> World:
    """Return the processes of this training."""
    return _world


def check(scheduler: str | None, jobs: int | None = None) -> None:
    """Raise for options that do not work under torchrun."""
    if started() and scheduler is not None:
        raise ValueError("--scheduler: under torchrun its processes train together; start the command without torchrun")
    if started() and jobs is not None:
        raise ValueError("--jobs: under torchrun all processes train one run after the other; leave it out")


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, with NCCL on CUDA and gloo elsewhere; alone, yield ``ALONE``.

    Raises:
        RuntimeError: when another process has ended, in these words.
    """
    global _world
    if not started():
        yield ALONE
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    signal.signal(signal.SIGTERM, _told_to_end)
    os.environ.setdefault("GATELET_PATIENCE", "600")  # the first process writes checkpoints while the others go on
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))  # others may be busy
    _world = World(dist.get_rank(), dist.get_world_size())
    try:
        yield _world
    except RuntimeError as error:
        if not is_gone(error):
            raise
        raise RuntimeError(GONE) from error
    finally:
        _world = ALONE
        dist.destroy_process_group()


def _told_to_end(number: int, frame: FrameType | None) -> None:
    """End as torchrun asks its processes to when one of them has ended, and say why."""
    print(f"gatelet: {GONE}", file=sys.stderr, flush=True)
    os._exit(128 + number)


def is_gone(error: BaseException) -> bool:
    """Return whether an error means that another process has ended."""
    signs = ("Connection closed by peer", "Connection reset", "Broken pipe", "gloo", "NCCL", "not all of them came")
    return isinstance(error, RuntimeError) and (str(error) == GONE or any(sign in str(error) for sign in signs))


def led(run: Command) -> Command:
    """Let a command's jobs be trained by all processes where torchrun started several."""

    @functools.wraps(run)
    def first_runs(options: Any, console: Any) -> None:
        with join(options.device) as joined:
            if not joined.first:
                follow(joined)
                return
            try:
                run(options, console)
            except BaseException as error:
                if not is_gone(error) and not isinstance(error, KeyboardInterrupt):
                    joined.from_first(None)
                raise
            joined.from_first(None)

    return several(first_runs)  # type: ignore[return-value]


def several(run: Command) -> Command:
    """Mark a command that can run as one of several processes."""
    run.several = True  # type: ignore[attr-defined]
    return run


def follow(joined: World) -> None:
    """Take part in the first process's jobs until there are no more."""
    while (job := joined.from_first(None)) is not None:
        work, args = job
        try:
            work(_Link(joined), *args)
        except Exception as error:
            if is_gone(error):
                raise  # any other error happened in all processes, and the first one reports it


class _Link:
    """A job's link to its command; only the first process reports."""

    def __init__(
        self,
        joined: World,
        tell: Callable[[Epoch | None], None] = lambda row: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.world, self._tell, self._stopped = joined, tell, stopped

    def tell(self, row: Epoch | None) -> None:
        """Report an epoch."""
        self._tell(row)

    def stopped(self) -> bool:
        """Return whether the command has ended."""
        return self._stopped()


class TogetherWorkers(Workers):
    """All processes together, one job after the other."""

    def __init__(self, joined: World) -> None:
        self._world, self._halted = joined, False
        self._pool = ThreadPoolExecutor(1)
        self._rows: queue.Queue[tuple[str, Epoch | None]] = queue.Queue()
        super().__init__(self._rows)

    @property
    def places(self) -> int:
        """One job at a time."""
        return 1

    def _submit(self, name: str, work: Work, *args: Any) -> Future[Any]:
        return self._pool.submit(self._run, name, work, *args)

    def _run(self, name: str, work: Work, *args: Any) -> Any:
        self._world.from_first((work, args))
        return work(_Link(self._world, lambda row: self._rows.put((name, row)), lambda: self._halted), *args)

    def lost(self, error: BaseException) -> str | None:
        """Return a message if another process has ended, since this one cannot continue alone."""
        return GONE if is_gone(error) else None

    def _stop(self) -> None:
        self._halted = True
        self._pool.shutdown(wait=True, cancel_futures=True)
