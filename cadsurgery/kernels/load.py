"""Choose the form of a kernel: the widest instruction set that the processor has and the user allows."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from cadsurgery.kernels import isa
from cadsurgery.kernels.library import find, library
from cadsurgery.support.torch_internals import current_dispatch_mode, interpreters

__all__ = ["forget", "function", "has_bf16_dot", "is_observed", "isa_of", "library", "setting"]

_forgotten = 0


def is_observed() -> bool:
    """True if torch counts, records, compiles or transforms (`torch.func`) the called operations; it would not see
    compiled kernels."""
    if torch.compiler.is_compiling() or current_dispatch_mode() is not None:
        return True
    return interpreters() is not None


@cache
def function(name: str, element: str = "") -> Any | None:
    """Return the form of a kernel function for the widest allowed instruction set.

    Args:
        name: its name in the C file.
        element: its element type: "float32", "float64", "bfloat16", "uint8", or empty.

    Returns:
        The function, with no return value until its `restype` is set; None if there is no such form, or no library.

    Raises:
        InvalidInput: CADSURGERY_ISA names an unknown instruction set, or one that this processor lacks.
    """
    return _form(name, element)[1]


@cache
def isa_of(name: str, element: str = "") -> str:
    """Return the instruction set of the form that `function` returns; empty if there is none.

    Raises:
        InvalidInput: see `function`.
    """
    return _form(name, element)[0]


def has_bf16_dot(dtype: torch.dtype) -> bool:
    """True if one instruction multiplies pairs of values of this type and sums them, as in AVX512-BF16.

    Raises:
        InvalidInput: see `function`.
    """
    return dtype == torch.bfloat16 and bool(isa_of("depthwise", "bfloat16"))


@cache
def setting() -> tuple[str, int]:
    """Return a key of the chosen forms: the value of CADSURGERY_ISA, and the number of calls of `forget`."""
    return isa.cap(), _forgotten


def forget() -> None:
    """Make the next call search for the library and its forms again, after a change of CADSURGERY_NATIVE,
    CADSURGERY_ISA or of a file."""
    global _forgotten
    _forgotten += 1
    for cached in (find, isa.cap, function, isa_of, setting, _form):
        cached.cache_clear()


@cache
def _form(name: str, element: str) -> tuple[str, Any | None]:
    """Return the widest form that CADSURGERY_ISA allows: the name of its instruction set, and the function."""
    compiled = library()
    for one in reversed(isa.allowed()):
        symbol = "_".join(part for part in (name, element, one) if part)
        try:
            found = compiled[symbol] if compiled is not None else None
        except AttributeError:
            continue
        if found is not None:
            found.restype = None
            return one, found
    return "", None
