"""Allocate large tensors in huge pages: the kernel clears and maps 2 MiB at once instead of 4 KiB.

The C library maps allocations of 32 MiB and more anew each time and unmaps them when they are freed (mallopt(3)), so
such tensors pay for page faults in every call. Adding two maps into 32 MiB of new memory takes five times as long as
into memory that is already mapped (`python -m benchmarks.sides pages`).
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

from torch import Tensor

LARGE = 32 << 20  # bytes
_PAGE = 2 << 20


def new_memory(like: Tensor, *shape: int) -> Tensor:
    """Return an uninitialised tensor with the dtype and device of `like`; on Linux large ones use huge pages if the
    system allows it."""
    out = like.new_empty(shape)
    size = out.numel() * out.element_size()
    if size >= LARGE and out.device.type == "cpu" and (advise := _advise()) is not None:
        start = -(-out.data_ptr() // _PAGE) * _PAGE
        end = (out.data_ptr() + size) // _PAGE * _PAGE
        if end > start:  # if the system refuses, the memory keeps its small pages
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
    return out


@cache
def _advise() -> Any:
    """Return `madvise` of the C library; None where it or huge pages are missing."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
