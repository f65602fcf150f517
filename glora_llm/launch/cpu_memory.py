"""Memory of a process that trains on a CPU: what one step frees, the next one takes again."""

import ctypes
import os

import psutil

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
MOST = 2**31 - 1  # bytes, the most that mallopt takes
LARGEST = 32 * 2**20  # bytes, the largest MMAP_THRESHOLD that glibc takes
OWN_SETTINGS = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"}


def resident_bytes() -> int:
    """Return what of this process is resident now."""
    return int(psutil.Process().memory_info().rss)


def keep_freed_memory() -> None:
    """Let glibc keep up to 2 GiB that are freed, where else it gives them back and faults them in again page by page.

    A training step frees and allocates the same tensors every time. Whether they lie at the end of the heap, where
    they are given back, is chance; then page faults take up to a tenth of a step (docs/benchmarks/vlora.md). A user's
    own setting stays (mallopt(3)); without glibc nothing happens.
    """
    if not OWN_SETTINGS.isdisjoint(os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, MOST)
        mallopt(MMAP_THRESHOLD, LARGEST)
