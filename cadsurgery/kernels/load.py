"""Choose the form of a kernel: the widest instruction set that the processor has and the user allows."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from cadsurgery.kernels import isa
from cadsurgery.kernels.library import find, library
from cadsurgery.support.errors import CadError
from cadsurgery.support.torch_internals import current_dispatch_mode, interpreters

__all__ = [
    "bytes_held",
    "check_code",
    "forget",
    "function",
    "has_bf16_dot",
    "is_observed",
    "isa_of",
    "library",
    "setting",
]

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
        The function, which returns a code for `check_code`; None if there is no such form, or no library.

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


# Codes that kernels return, in the order of `kernels/c/check.h`; larger ones name a buffer by its place.
_FITS, _NO_MEMORY, _IMPOSSIBLE, _TOO_SHORT = range(4)


def check_code(code: int, kernel: str = "") -> None:
    """Raise an error unless a kernel returned that it has computed its result.

    Args:
        code: what the kernel returned.
        kernel: its name, for the message.

    Raises:
        MemoryError: there is no memory for it.
        CadError: its numbers are impossible, or a buffer holds less than they say.
    """
    if code == _FITS:
        return
    if code == _NO_MEMORY:
        raise MemoryError(f"no memory for a kernel {kernel}.")
    what = (
        "numbers that cannot be"
        if code == _IMPOSSIBLE
        else f"too little memory as its buffer {code - _TOO_SHORT}"
    )
    raise CadError(
        f"a compiled kernel {kernel} is given {what}.",
        why="it computed nothing: it would read or write beyond its memory.",
        next="give values of the shape and type that the layer takes; if they have, this is a fault of cadsurgery.",
    )


def bytes_held(*buffers: torch.Tensor | None) -> ctypes.Array[ctypes.c_long]:
    """Return for C how many bytes each buffer holds; 0 for none.

    Raises:
        CadError: a buffer is not in main memory, which is all that C reads.
    """
    for buffer in buffers:
        if buffer is not None and buffer.device.type != "cpu":
            raise CadError(
                f"a compiled kernel was given a tensor on {buffer.device}.",
                why="it reads main memory alone.",
                next="report it, with the code that called the network; CADSURGERY_NATIVE=0 does without kernels.",
            )
    sizes = [0 if buffer is None else buffer.numel() * buffer.element_size() for buffer in buffers]
    return (ctypes.c_long * len(sizes))(*sizes)


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
            found.restype = ctypes.c_long
            return one, found
    return "", None
