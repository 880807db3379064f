"""Memory that was freed is given back."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK = 4 << 20


def give_back_large_blocks() -> None:
    """Keep large blocks out of this process's heap, from which freed ones seldom return.

    glibc does so until the first one is freed, then takes that size for usual: while a document of 50 MB is
    read, twice its bytes can be lost in the heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
