"""What a process that trains on a CPU asks of the C library's allocator."""

from __future__ import annotations

import ctypes
import os

_OPTIONS = {-1: -1, -4: 0}
"""Of mallopt(3): M_TRIM_THRESHOLD, never; M_MMAP_MAX, none."""
_SAID_OTHERWISE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Have what is freed stay with the process, where the next step takes the same again; whether that is so.

    By default glibc hands large blocks back to the kernel, which clears each page anew when the next step
    writes to it: some 100,000 page faults a step of a model of 55 M parameters. The process then holds
    what it needed at its peak. Not where a variable of glibc's says otherwise, or with another C library.
    """
    if any(name in os.environ for name in _SAID_OTHERWISE):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) for option, value in _OPTIONS.items())
