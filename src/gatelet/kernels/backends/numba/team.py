"""The threads that run a kernel: torch's own OpenMP pool, or the calling thread alone while the cores are busy.

Numba's ``prange`` brings a second pool of threads. While torch's idle threads still spin, the two pools compete for the
cores, and Numba's ``workqueue`` layer aborts when two Python threads enter it. So kernels here are plain compiled
functions that take tasks from an atomic counter, and the OpenMP runtime that torch is linked with starts them. There is
one pool, ``torch.set_num_threads`` holds, and any number of Python threads may call at once.

An OpenMP region ends when all of its threads have run, even if the others did all the work before the system started
the last one. On a busy machine a call of 50 µs then takes milliseconds. So each region notes when its first thread ran
out of tasks; the time after that is waiting. If a region was mostly waiting, the cores are taken: for a while, in
proportion to the time lost, kernels run on the calling thread alone.
"""

import ctypes
import functools
import inspect
import os
import pickle
import time
import warnings
from array import array
from collections.abc import Sequence
from typing import Any

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

call, note_time = vector.call, vector.note_time
_callable = functools.cache(ctypes.CFUNCTYPE(None, ctypes.c_void_p))
CLOCK = getattr(time, "CLOCK_MONOTONIC", None)
HEAD = 4
"""Words before a kernel's own arguments: its address, whether a thread has left, and when (seconds, nanoseconds)."""
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
    _run(kernel, array("q", (kernel, 0, 0, 0, 0, 0, *args)), team)


class Prepared:
    """A kernel with its arguments packed, except for a few (None) that each call gives. Any Python thread may call it.

    Packing two dozen arguments takes longer than a small kernel runs.
    """

    def __init__(self, kernel: int, args: Sequence[int | None]) -> None:
        self.kernel = kernel
        self.places = [HEAD + RESERVED + place for place, each in enumerate(args) if each is None]
        self.packed = array("q", (kernel, 0, 0, 0, 0, 0, *(each or 0 for each in args)))

    def __call__(self, team: int, *values: int) -> "array[int]":
        """Run the kernel on ``team`` threads; return its arguments, to which it may have written results."""
        packed = self.packed[:]
        for place, value in zip(self.places, values, strict=True):
            packed[place] = value
        _run(self.kernel, packed, team)
        return packed[HEAD + RESERVED :]


def _run(kernel: int, packed: "array[int]", team: int) -> None:
    address, _ = packed.buffer_info()
    if team == 1 or _parallel is None:
        _callable(kernel)(address + 8 * HEAD)
        return
    begin = time.monotonic_ns()
    _parallel(_timed()[1], address, team, 0)
    _judge(begin, packed[2] * 1_000_000_000 + packed[3], time.monotonic_ns())


def _judge(begin: int, left: int, end: int) -> None:
    """Decide from a region's times whether the next ones run alone; at ``left`` a thread first found no more tasks."""
    global _alone_until, _multiple
    waited = end - left
    if waited > SLACK and waited > WAITED * (end - begin):
        _alone_until = end + int(_multiple * waited)
        _multiple = min(MOST, GROWTH * _multiple)
    else:
        _alone_until, _multiple = 0, max(LEAST, DECAY * _multiple)


def compiled(function: Any, **options: Any) -> Any:
    """Compile a function of one address for calls from C; keep the result on disk if Numba's cache can be written."""
    decorate = functools.partial(cfunc, types.void(types.voidptr), **options)
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
    """Run a region's kernel, and note when its first thread has finished."""
    head = carray(p, (HEAD,), types.int64)
    call(head[0], head.ctypes.data + 8 * HEAD)
    note_time(head.ctypes.data + 8, CLOCK)


@functools.cache
def _timed() -> tuple[Any, int]:
    """Return ``_run_timed``, compiled, and its address."""
    built = compiled(inspect.unwrap(_run_timed))
    return built, ctypes.cast(built.ctypes, ctypes.c_void_p).value or 0
