"""The threads that run a kernel: torch's own OpenMP pool, or the calling thread alone while the cores are busy.

Numba's ``prange`` brings a second pool of threads. While torch's idle threads still spin, the two pools compete for the
cores, and Numba's ``workqueue`` layer aborts when two Python threads enter it. So kernels here are plain compiled
functions that take tasks from an atomic counter, and the OpenMP runtime that torch is linked with starts them. There is
one pool, ``torch.set_num_threads`` holds, and any number of Python threads may call at once.

An OpenMP region ends when all of its threads have run, even if the others did all the work before the system started
the last one. On a busy machine a call of 50 µs then takes milliseconds. So each region notes when its first thread ran
out of tasks, and when its last one started. If the start was later, the time in between and after is waiting. If a
region was mostly waiting, the cores are taken: for a while, in proportion to the time lost, kernels run on the calling
thread alone.
"""

import ctypes
import functools
import inspect
import os
import pickle
import time
import warnings
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from numba import carray, cfunc, types

from gatelet.kernels.backends.numba import vector

RESERVED = 2
"""Leading arguments of every kernel: the counter of tasks and the counter of threads."""

FEW = 1 << 15
"""Passing over fewer numbers than this takes less time than waking a thread."""

DENSE = 1 << 5
"""This many multiply-adds of the dense product count as one number to pass over: a tenth is computed, with vectors."""

WAITED = 0.75
"""Threads did not pay in a region that was waiting for more than this share of its time,"""
SLACK = 100_000
"""and for longer than this, in nanoseconds (threads take time to wake, and tasks differ in length)."""
LEAST, MOST, GROWTH, DECAY = 2.0, 256.0, 4.0, 0.95
"""Kernels then run on one thread for a multiple of the time lost. The multiple grows with every loss, up to a point
where testing whether cores are free costs under half a percent. It shrinks with every region that lost nothing, so
interruptions of up to 4 % of the regions have little effect."""

call, call_team, now, write_first = vector.call, vector.call_team, vector.now, vector.write_first
_callable = functools.cache(ctypes.CFUNCTYPE(None, ctypes.c_void_p))
CLOCK = getattr(time, "CLOCK_MONOTONIC", None)
HEAD = 8
"""Words before a kernel's own arguments: the addresses of the kernel, of ``GOMP_parallel`` and of what its threads
call; the number of threads; then times in nanoseconds: when the region began, when its last thread started, when its
first one ran out of tasks, and when the region ended."""
THREADS, BEGAN, CAME, LEFT, ENDED = 3, 4, 5, 6, 7
FIRST = HEAD + RESERVED
"""Where a kernel's own arguments begin."""
_forked = False
_alone_until, _multiple = 0, LEAST
_announced = False


def _find_parallel() -> Any:
    """Return GOMP_parallel of the OpenMP runtime that torch is linked with, or None if it has no such function."""
    try:
        # A lookup in torch's library also searches the libraries it is linked with.
        found = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.restype = None
    return found


_parallel = None if CLOCK is None else _find_parallel()


def _after_fork() -> None:
    # An OpenMP pool does not survive a fork: entering it in the child would wait for ever.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads(numbers: int | None = None) -> int:
    """Return how many threads a kernel may use now: one if it passes over only a few ``numbers``."""
    few = numbers is not None and numbers < FEW
    if few or _forked or _parallel is None or (_alone_until and time.monotonic_ns() < _alone_until):
        return 1
    return torch.get_num_threads()


def run(kernel: int, args: Sequence[int], team: int) -> None:
    """Call the kernel at this address with these arguments, on ``team`` threads at once."""
    _run(array("q", (kernel, *_region().words, *args)), team)


class Prepared:
    """A kernel with its arguments packed, except for a few (None) that each call gives. Any Python thread may call it.

    Packing two dozen arguments takes longer than a small kernel runs.
    """

    def __init__(self, kernel: int, args: Sequence[int | None]) -> None:
        self.places = [FIRST + place for place, each in enumerate(args) if each is None]
        self.packed = array("q", (kernel, *_region().words, *(each or 0 for each in args)))

    def __call__(self, team: int, *values: int) -> "array[int]":
        """Run the kernel on ``team`` threads; return its arguments (from FIRST on), where it may have put results."""
        packed = self.packed[:]
        for place, value in zip(self.places, values, strict=True):
            packed[place] = value
        _run(packed, team)
        return packed


def _run(packed: "array[int]", team: int) -> None:
    address, _ = packed.buffer_info()
    if team == 1 or _parallel is None:
        _callable(packed[0])(address + 8 * HEAD)
        return
    packed[THREADS] = team
    # Calls from Python take as long as a small kernel. So compiled code takes the times.
    if _region().enter(address) > SLACK or _multiple > LEAST:
        _judge(*packed[BEGAN:HEAD])


def _judge(begin: int, came: int, left: int, end: int) -> None:
    """Decide from a region's times whether the next ones run alone.

    If the last thread ``came`` before another one had ``left``, the rest is no lost time: their tasks differ in length.
    """
    global _alone_until, _multiple
    waited = end - left if came > left else 0
    if waited > SLACK and waited > WAITED * (end - begin):
        _alone_until = end + int(_multiple * waited)
        _multiple = min(MOST, GROWTH * _multiple)
    else:
        _alone_until, _multiple = 0, max(LEAST, DECAY * _multiple)


def compiled(function: Any, result: Any = types.void, **options: Any) -> Any:
    """Compile a function of one address for calls from C; keep the result on disk if Numba's cache can be written."""
    decorate = functools.partial(cfunc, result(types.voidptr), **options)
    try:
        return decorate(cache=True)(function)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:  # no folder, a full disk, a damaged file
        _announce_no_cache(str(error))
        return decorate()(function)


def _announce_no_cache(why: str) -> None:
    global _announced
    if not _announced:
        _announced = True
        warnings.warn(
            f"gatelet.kernels: every process compiles its kernels again, because Numba's cache cannot be used ({why}); "
            "set NUMBA_CACHE_DIR to a folder that can be written",
            UserWarning,
            stacklevel=2,
        )


def _run_timed(p: Any) -> None:  # pragma: no cover (compiled)
    """Run a region's kernel, and note when its last thread starts and its first one has finished."""
    head = carray(p, (HEAD,), types.int64)
    head[CAME] = now(CLOCK)
    call(head[0], head.ctypes.data + 8 * HEAD)
    write_first(head.ctypes.data + 8 * LEFT, now(CLOCK))


def _enter(p: Any) -> Any:  # pragma: no cover (compiled)
    """Run a region; return how long it lasted after its first thread had finished, in nanoseconds."""
    head = carray(p, (HEAD,), types.int64)
    head[BEGAN] = now(CLOCK)
    call_team(head[1], head[2], head.ctypes.data, head[THREADS])
    head[ENDED] = now(CLOCK)
    return head[ENDED] - head[LEFT]


class _Region(NamedTuple):
    """How a region is run.

    Attributes:
        enter: ``_enter``, compiled; takes the address of a region's words.
        words: the words between a kernel's address and its arguments.
        kept: what is compiled, since it must stay.
    """

    enter: Callable[[int], int]
    words: tuple[int, ...]
    kept: tuple[Any, ...]


@functools.cache
def _region() -> _Region:
    if _parallel is None:
        return _Region(lambda address: 0, (0,) * (FIRST - 1), ())
    threads, enter = compiled(inspect.unwrap(_run_timed)), compiled(inspect.unwrap(_enter), types.int64)
    addresses = [ctypes.cast(each, ctypes.c_void_p).value or 0 for each in (_parallel, threads.ctypes)]
    return _Region(enter.ctypes, (*addresses, *(0,) * (FIRST - 3)), (threads, enter))
