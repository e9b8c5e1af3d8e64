"""Memory of large results in large pages: the kernel clears and maps 2 MiB at once instead of 4 KiB.

The C library maps pieces of 32 MiB and more anew each time and gives them back when they are freed (it never keeps
larger ones, mallopt(3)), so each such tensor pays for its pages in every call: for 32 MiB five times what adding two
maps into memory that is there takes (`python benchmarks/large_pages.py`).
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
    """A tensor of a shape, of another's type and place, that holds nothing yet; on Linux large ones in large pages,
    where the system lets programs ask for them."""
    out = like.new_empty(shape)
    size = out.numel() * out.element_size()
    if size >= LARGE and out.device.type == "cpu" and (advise := _advise()) is not None:
        start = -(-out.data_ptr() // _PAGE) * _PAGE
        end = (out.data_ptr() + size) // _PAGE * _PAGE
        if end > start:  # refused, all is as before
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
    return out


@cache
def _advise() -> Any:
    """`madvise` of the C library; None where there is none, or no large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
