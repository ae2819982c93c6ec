"""Where jobs are trained: worker processes of this machine, or of a Dask cluster; both have the same interface."""

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from queue import Empty
from typing import Any, Protocol, Self

import torch

from gatelet_lab.training.paper import Epoch
from gatelet_lab.training.world import ALONE, World

Tell = Callable[[Epoch | None], None]
"""Takes an epoch as it ends, or None: the job stopped before its last one."""


class Link(Protocol):
    """A job's link to the process that wants it."""

    @property
    def world(self) -> World:
        """The processes that do the job together."""

    def tell(self, row: Epoch | None) -> None:
        """Report an epoch, or that no more will come."""

    def stopped(self) -> bool:
        """Return whether the job is no longer wanted."""


Work = Callable[..., Any]
"""A module's function: the first argument is a Link, the others come from ``submit``."""


class Workers(ABC):
    """An executor of jobs that also reports their epochs as they happen. Leaving the context stops what still runs.

    ``events`` is a queue of (job's name, epoch), which a thread hands to the functions that wait for them.
    """

    def __init__(self, events: Any) -> None:
        self._events = events
        self._tell: dict[str, Tell] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    @property
    @abstractmethod
    def places(self) -> int:
        """How many jobs run at once."""

    def submit(self, name: str, tell: Tell, work: Work, *args: Any) -> Future[Any]:
        """Run ``work(link, *args)``; call ``tell`` with each epoch, in a thread of this process."""
        self._tell[name] = tell
        return self._submit(name, work, *args)

    @abstractmethod
    def _submit(self, name: str, work: Work, *args: Any) -> Future[Any]: ...

    @abstractmethod
    def lost(self, error: BaseException) -> str | None:
        """Return a message if this error means that no worker is left; None if it is the job's own."""

    def trouble(self) -> str | None:
        """Return what the jobs wait for, if that has changed."""
        return None

    @abstractmethod
    def _stop(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        while True:
            try:
                name, row = self._events.get(timeout=0.2)
            except Empty:
                if self._over.is_set():
                    return
                continue
            self._tell[name](row)


def failure(future: Future[Any]) -> BaseException | None:
    """Return what went wrong in a job that is done, a cancellation included."""
    try:
        return future.exception()
    except CancelledError as error:
        return error


class LocalWorkers(Workers):
    """Processes of this machine, which share its cores evenly."""

    def __init__(self, places: int) -> None:
        context = get_context("spawn")
        events, self._halt = context.Queue(), context.Event()
        self._places = places
        self._pool: Executor = ProcessPoolExecutor(
            places,
            mp_context=context,
            initializer=_begin,
            initargs=(events, self._halt, max(1, cores() // places)),
        )
        super().__init__(events)

    @property
    def places(self) -> int:
        """As many as there are processes."""
        return self._places

    def _submit(self, name: str, work: Work, *args: Any) -> Future[Any]:
        return self._pool.submit(_run, name, work, *args)

    def lost(self, error: BaseException) -> str | None:
        """Return a message if a process was killed, since the pool ends with it."""
        if isinstance(error, BrokenProcessPool):
            return "a worker process was killed (out of memory?); --resume continues"
        return None

    def _stop(self) -> None:
        self._halt.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


def check_device(device: str) -> None:
    """Raise unless torch has this device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_events: Any = None
_halt: Any = None


def _begin(events: Any, halt: Any, threads: int) -> None:
    """Set up a worker process: it stops when the parent asks for it, or when the parent is gone."""
    import signal

    global _events, _halt
    _events, _halt = events, halt
    parent = os.getppid()

    def watch() -> None:  # a parent that was killed cannot ask; no state is lost, as checkpoints are whole
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    torch.set_num_threads(threads)


class _Pipe:
    """The link of a worker process."""

    world = ALONE

    def __init__(self, name: str) -> None:
        self._name = name

    def tell(self, row: Epoch | None) -> None:
        _events.put((self._name, row))

    def stopped(self) -> bool:
        return bool(_halt.is_set())


def _run(name: str, work: Work, *args: Any) -> Any:
    return work(_Pipe(name), *args)
