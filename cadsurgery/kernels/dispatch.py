"""Choose and call the form of a kernel: the widest instruction set that the processor has and the user allows."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cadsurgery.kernels import isa
from cadsurgery.kernels.load import library, open_kernels
from cadsurgery.support.errors import CadError

__all__ = [
    "call",
    "check_code",
    "forget",
    "function",
    "has_bf16_dot",
    "isa_of",
    "setting",
]

_forgotten = 0


@cache
def function(name: str, element: str = "") -> Any | None:
    """Return the form of a kernel function for the widest allowed instruction set.

    Args:
        name: its name in the C file.
        element: its element type: "float32", "float64", "bfloat16", "uint8", or empty.

    Returns:
        The function, for `call`; None if there is no such form, or no library.

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


def call(kernel: Any, values: Sequence[Any], *arguments: Any) -> int:
    """Call a kernel, whose first argument is a structure.

    A tensor, which has to be contiguous, is passed as a pointer to its own memory, None as a null pointer, an int as
    long, a float as double and a list of tensors as an array of pointers.

    Args:
        kernel: a function of the library.
        values: of the structure's fields, but for the last: how many bytes each buffer of the call holds.
        arguments: those behind the structure.

    Returns:
        What the kernel returns: 0, or a number of its own; -1 from one that packs weights if it does not take them.

    Raises:
        MemoryError: there is no memory for it.
        CadError: a buffer is not in main memory or holds less than the numbers say, or these are impossible.
    """
    if kernel.argtypes is None:
        kernel.argtypes = (ctypes.POINTER(_layout(values)), *map(_kind, arguments))
    sizes: list[int] = []
    fields = [value if isinstance(value, (int, float)) else _for_c(value, sizes) for value in values]
    others = [value if isinstance(value, (int, float)) else _for_c(value, sizes) for value in arguments]
    held = (ctypes.c_long * len(sizes))(*sizes)
    structure = kernel.argtypes[0]._type_(*fields, ctypes.addressof(held))
    return check_code(kernel(structure, *others), kernel.__name__)


# Codes that kernels return, in the order of `kernels/c/check.h`; lower ones name a buffer by its place.
_NOT_TAKEN, _IMPOSSIBLE, _NO_MEMORY, _TOO_SHORT = range(-1, -5, -1)


def check_code(code: int, kernel: str = "") -> int:
    """Return what a kernel returned unless it is why it computed nothing.

    Args:
        code: what the kernel returned.
        kernel: its name, for the message.

    Raises:
        MemoryError: there is no memory for it.
        CadError: its numbers are impossible, or a buffer holds less than they say.
    """
    if code >= _NOT_TAKEN:
        return code
    if code == _NO_MEMORY:
        raise MemoryError(f"no memory for a kernel {kernel}.")
    what = (
        "numbers that cannot be"
        if code == _IMPOSSIBLE
        else f"too little memory as its buffer {_TOO_SHORT - code}"
    )
    raise CadError(
        f"a compiled kernel {kernel} is given {what}.",
        why="it computed nothing: it would read or write beyond its memory.",
        next="give values of the shape and type that the layer takes; if they have, this is a fault of cadsurgery.",
    )


def _for_c(value: Any, sizes: list[int]) -> Any:
    """Return a value that is no number as it is passed; add the bytes that its buffers hold, 0 for one that is missing,
    to `sizes`."""
    if isinstance(value, Tensor):
        if not value.is_cpu:
            raise CadError(
                f"a compiled kernel was given a tensor on {value.device}.",
                why="it reads only main memory.",
                next="report it, with the code that called the network; CADSURGERY_NATIVE=0 does without kernels.",
            )
        sizes.append(value.nbytes)
        return value.data_ptr()
    if isinstance(value, list):
        return (ctypes.c_void_p * len(value))(*(_for_c(one, sizes) for one in value))
    if value is None:
        sizes.append(0)
    return value


def _kind(value: Any) -> type:
    """Return the type of C that a value is passed as."""
    if isinstance(value, int):
        return ctypes.c_long
    return ctypes.c_double if isinstance(value, float) else ctypes.c_void_p


def _layout(values: Sequence[Any]) -> type[ctypes.Structure]:
    """Return the type of a structure of such values, with `held` behind them."""
    fields = [(f"field_{place}", _kind(value)) for place, value in enumerate((*values, None))]
    return type("Structure", (ctypes.Structure,), {"_fields_": fields})


@cache
def setting() -> tuple[str, int]:
    """Return a key of the chosen forms: the value of CADSURGERY_ISA, and the number of calls of `forget`."""
    return isa.cap(), _forgotten


def forget() -> None:
    """Make the next call search for the library and its forms again, after a change of CADSURGERY_NATIVE,
    CADSURGERY_ISA or of a file."""
    global _forgotten
    _forgotten += 1
    for cached in (open_kernels, isa.cap, function, isa_of, setting, _form):
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
