"""Choose the form of a kernel: that of the widest instruction set which the processor has and the user allows."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from cadsurgery.kernels import isa
from cadsurgery.kernels.library import find, library

__all__ = ["forget", "function", "has_bf16_dot", "is_observed", "isa_of", "library", "setting"]

_forgotten = 0


def is_observed() -> bool:
    """True if torch counts, records or compiles the operations that are called: it does not see compiled kernels."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def function(name: str, element: str = "") -> Any | None:
    """The function of the widest allowed instruction set that there is a form of it for.

    Args:
        name: its name in the C file.
        element: the type of its elements: "float32", "float64", "bfloat16", "uint8", or none.

    Returns:
        The function, which returns nothing until its `restype` is set; None if there is no such form, or no library.

    Raises:
        InvalidInput: CADSURGERY_ISA names an instruction set that there is not, or that this processor lacks.
    """
    return _form(name, element, os.environ.get(isa.VARIABLE, ""))[1]


def isa_of(name: str, element: str = "") -> str:
    """The name of the instruction set whose form `function` gives; empty if it gives none.

    Raises:
        InvalidInput: see `function`.
    """
    return _form(name, element, os.environ.get(isa.VARIABLE, ""))[0]


def has_bf16_dot(dtype: torch.dtype) -> bool:
    """True if the processor multiplies pairs of values of a type and sums them in one instruction, as AVX512-BF16.

    Raises:
        InvalidInput: see `function`.
    """
    return dtype == torch.bfloat16 and bool(isa_of("depthwise", "bfloat16"))


def setting() -> tuple[str, int]:
    """Return what decides which forms are used: the value of CADSURGERY_ISA, and how often `forget` was called."""
    return os.environ.get(isa.VARIABLE, ""), _forgotten


def forget() -> None:
    """Look for the library anew when it is next asked for: after a change of CADSURGERY_NATIVE, or of a file."""
    global _forgotten
    _forgotten += 1
    find.cache_clear()
    _form.cache_clear()


@cache
def _form(name: str, element: str, cap: str) -> tuple[str, Any | None]:
    """The widest form for a value of CADSURGERY_ISA: the name of its instruction set, and the function."""
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
