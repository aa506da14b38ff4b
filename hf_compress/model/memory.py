"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import platform


def return_freed_memory() -> None:
    """Have the C library hand back what it keeps for later (glibc; elsewhere nothing happens).

    It keeps freed chunks of up to 32 MB, and buffers of a batch and float64 matrices, which
    take turns, then never fit each other's places: the process grows by both.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
