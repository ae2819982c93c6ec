"""The threads that run a kernel: those of torch's own OpenMP pool.

Numba's ``prange`` brings a second pool of threads; while torch's idle threads still spin, the two fight for
the cores, and its ``workqueue`` layer dies when two Python threads enter it. So kernels here are compiled as plain
functions that share out tasks through an atomic counter, and the OpenMP runtime that torch is linked with starts
them: one pool, ``torch.set_num_threads`` respected, any number of Python threads at once.
"""

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import torch

RESERVED = 2
"""Leading arguments of every kernel: the counter of tasks and the counter of threads."""

FEW = 1 << 15
"""Passing over fewer numbers than this takes less time than waking a thread."""

_Kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_forked = False


def _find_parallel() -> Any:
    """Return GOMP_parallel of the runtime that torch is linked with, None if there is no such."""
    try:
        # A lookup in torch's library also searches what it is linked with.
        found = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.restype = None
    return found


_parallel = _find_parallel()


def _after_fork() -> None:
    # An OpenMP pool does not survive a fork: entering it in the child would wait for ever.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads(numbers: int | None = None) -> int:
    """Return how many threads a kernel may use now; one where it only passes over a few ``numbers``."""
    few = numbers is not None and numbers < FEW
    return 1 if few or _forked or _parallel is None else torch.get_num_threads()


def run(kernel: int, args: Sequence[int], team: int) -> None:
    """Call the kernel at this address with these arguments, on ``team`` threads at once."""
    packed = (ctypes.c_int64 * (RESERVED + len(args)))(0, 0, *args)
    if team > 1 and _parallel is not None:
        _parallel(kernel, ctypes.addressof(packed), team, 0)
    else:
        _Kernel(kernel)(ctypes.addressof(packed))
