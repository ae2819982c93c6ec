"""Memory for large results, in huge pages where the system has them."""

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

LARGE = 1 << 22
"""Bytes of a result from which it pays to ask: the C library takes and gives such memory back at every call."""


POPULATE = 23
"""Linux's MADV_POPULATE_WRITE: give the pages now. Threads that meet in a page not yet there wait for each other."""


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """Return the C library's madvise, None where there is none, or no large pages."""
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return found if hasattr(mmap, "MADV_HUGEPAGE") else None


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``like.new_empty(shape)``; what is large and new is then written at a fault per 2 MB, not per 4 KB."""
    found = like.new_empty(shape)
    if found.nbytes >= LARGE and (advise := _advise()) is not None:
        # Whole pages inside; a refusal changes nothing.
        begin = -(-found.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (found.data_ptr() + found.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(begin, length, mmap.MADV_HUGEPAGE)
        advise(begin, length, POPULATE)
    return found
