"""How the memory of CPU tensors is handed back to the operating system."""

from __future__ import annotations

import ctypes
import os
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_GIBIBYTE = 2**30
_MOST_OF_OLD_VERSIONS = 2**25


def keep_freed_memory() -> bool:
    """Let this process keep what it frees on a CPU for its next tensors, where it would go back to the system.

    A step of an inner loop frees what the next one allocates again. glibc's malloc returns large blocks, and the free
    end of its heap, to the operating system at once; the next step then waits while the system clears and maps every
    page anew (``python -m benchmarks.allocator`` measures how long). From now on up to 1 GiB of that end is kept. The
    command line calls this function; call it first in a script that trains on a CPU. Tensors on a GPU have an allocator
    that keeps memory already.

    Returns:
        Whether it took effect. It does not where the system's library is not glibc (macOS, Windows, musl), nor where
        the user has set glibc's own variables ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_`` or
        ``GLIBC_TUNABLES``, which are left as they are. It changes nothing for an allocator that was preloaded.
    """
    chosen = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys()
    if sys.platform != "linux" or chosen:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none.
        return False
    # First, since the other setting alone would have every larger block mapped. Older versions refuse a threshold
    # above 32 MiB; blocks larger than that stay mapped there.
    if not (mallopt(_M_MMAP_THRESHOLD, _GIBIBYTE) or mallopt(_M_MMAP_THRESHOLD, _MOST_OF_OLD_VERSIONS)):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _GIBIBYTE))
