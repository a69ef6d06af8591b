"""How the memory of CPU tensors is handed back to the operating system."""

from __future__ import annotations

import ctypes
import os
import sys

# These two numbers stand in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_GIBIBYTE = 2**30
_LARGEST_OLD_THRESHOLD = 2**25


def keep_freed_memory() -> bool:
    """Let this process keep freed CPU memory for its next tensors, instead of returning it to the operating system.

    A step of an inner loop frees memory that the next step allocates again. glibc's malloc returns large blocks, and
    the free end of its heap, to the operating system at once; the next step then waits while the system clears and maps
    every page anew (``python -m benchmarks.allocator`` measures how long). After this call, malloc keeps up to 1 GiB.
    The command line calls this function; call it first in a script that trains on a CPU. On a GPU, PyTorch's own
    allocator keeps memory already.

    Returns:
        Whether the call took effect. It has no effect where the C library is not glibc (macOS, Windows, musl), or where
        the user has set glibc's variables ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_`` or
        ``GLIBC_TUNABLES``, which stay as they are. It changes nothing for an allocator that was preloaded.
    """
    chosen = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys()
    if sys.platform != "linux" or chosen:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has no mallopt.
        return False
    # The mmap threshold comes first: with the trim threshold alone, malloc would map every larger block. Older versions
    # of glibc refuse a threshold above 32 MiB and go on mapping blocks larger than that.
    if not (mallopt(_M_MMAP_THRESHOLD, _GIBIBYTE) or mallopt(_M_MMAP_THRESHOLD, _LARGEST_OLD_THRESHOLD)):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _GIBIBYTE))
