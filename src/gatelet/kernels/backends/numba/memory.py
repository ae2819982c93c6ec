"""Memory for large results, in huge pages where the system has them."""

import ctypes
import functools
import mmap
from typing import Any, NamedTuple

from torch import Tensor

LARGE = 1 << 22
"""Results of at least this many bytes get huge pages. The C library maps memory of this size anew at every call."""
POPULATE = 23
"""Linux's MADV_POPULATE_WRITE: provide the pages now. Else threads that first write to one page wait for each other."""
SAMPLE = 4
"""How many pages are looked at. Where all pages are there, asking for them would take longer than writing them."""


class _System(NamedTuple):
    """The C library's madvise and mincore."""

    advise: Any
    in_core: Any


@functools.cache
def _system() -> _System | None:
    """Return the C library's functions, or None if there are none or no huge pages."""
    try:
        library = ctypes.CDLL(None)
        found = _System(library.madvise, library.mincore)
    except (OSError, AttributeError, TypeError):
        return None
    found.advise.argtypes, found.advise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    found.in_core.argtypes, found.in_core.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p], ctypes.c_int
    return found if hasattr(mmap, "MADV_HUGEPAGE") else None


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``like.new_empty(shape)``. New large memory comes in huge pages: one page fault per 2 MB, not per 4 KB."""
    found = like.new_empty(shape)
    if found.nbytes >= LARGE and (system := _system()) is not None:
        # Only whole pages inside the memory. If the system refuses, nothing changes.
        begin = -(-found.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = (found.data_ptr() + found.nbytes - begin) // mmap.PAGESIZE
        if not _there(system, begin, pages):
            system.advise(begin, pages * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
            system.advise(begin, pages * mmap.PAGESIZE, POPULATE)
    return found


def _there(system: _System, begin: int, pages: int) -> bool:
    """Return whether the memory's pages are there already, judged by a few of them from first to last."""
    told = ctypes.create_string_buffer(1)
    for each in range(SAMPLE):
        place = begin + (pages - 1) * each // (SAMPLE - 1) * mmap.PAGESIZE
        if system.in_core(place, mmap.PAGESIZE, told) != 0 or not told.raw[0] & 1:
            return False
    return True
