"""Pack weights by the compiled kernels: each form packs those that it takes, for torch and for engines (`c/pack.h`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from cadsurgery.kernels.load import bytes_held, library
from cadsurgery.support.errors import CadError

_NOT_TAKEN = -1


class _Unpacked(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("groups", "outputs", "channels", "taps")),
        *((f"next_{name}", ctypes.c_long) for name in ("group", "output", "channel", "tap")),
        ("held", ctypes.c_void_p),
    )


def takes(form: str, weight: Tensor, groups: int) -> bool:
    """Return True if a form, e.g. "grouped_float32_avx2", takes a weight (O, C / groups, kh, kw) of its type."""
    return _pack(form, weight, groups, (), None)[0] >= 0


def pack(form: str, weight: Tensor, groups: int, *constants: Tensor | None) -> tuple[Tensor, ...]:
    """Return the memory of a weight (O, C / groups, kh, kw), packed by a form that takes it, then of its constants.

    Args:
        form: name of a function, its element type and its instruction set, e.g. "product_float32_avx2".
        weight: in the form's type.
        groups: channel groups.
        constants: as many as the form has, (O,) each, in the type of its sums; None for zeros.
    """
    first, size = _pack(form, weight, groups, constants, None)
    memory = torch.zeros(size, dtype=torch.uint8, device="cpu")
    _pack(form, weight, groups, constants, memory)
    return memory[:first], *memory[first:].chunk(len(constants))


def _pack(
    form: str, weight: Tensor, groups: int, constants: Sequence[Tensor | None], memory: Tensor | None
) -> tuple[int, int]:
    """Return where the constants begin, -1 if the form does not take the weight, and the number of all bytes."""
    function = getattr(library(), f"pack_{form}")
    function.restype = ctypes.c_long
    weight, constants = weight.detach().contiguous(), [_detached(values) for values in constants]
    outputs, channels, taps = weight.shape[0] // groups, weight.shape[1], weight.shape[2:].numel()
    steps = outputs * channels * taps, channels * taps, taps, 1
    held = bytes_held(weight, *constants)
    unpacked = _Unpacked(weight.data_ptr(), groups, outputs, channels, taps, *steps, ctypes.addressof(held))
    pointers = [None if values is None else values.data_ptr() for values in constants]
    size, to = ctypes.c_long(), None
    if memory is not None:
        size, to = ctypes.c_long(memory.numel()), ctypes.c_void_p(memory.data_ptr())
    arrays = (ctypes.c_void_p * len(pointers))(*pointers)
    first = function(ctypes.byref(unpacked), arrays, to, ctypes.byref(size))
    if first < _NOT_TAKEN:
        raise CadError(
            f"{form} cannot pack a weight of shape {tuple(weight.shape)} in {groups} groups.",
            why="the weight or its constants hold fewer numbers than that.",
            next="give a weight whose outputs are a multiple of its groups, with constants of each.",
        )
    return first, size.value


def _detached(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().contiguous()
