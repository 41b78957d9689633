"""What the C library does with memory that torch has freed."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for the next step instead of giving them back to the kernel; whether it could be told.

    Every step frees and asks for the same activations. Given back, each page is faulted in anew: a third of a CPU run's
    time where faults are dear. The process then stays at its peak. No effect on other C libraries or on a GPU's memory.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 32 << 20) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
