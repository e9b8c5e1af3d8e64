"""Pack weights by the compiled kernels: each form packs those that it takes, for torch and for engines (`c/pack.h`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from cadsurgery.kernels.dispatch import call, library


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
    weight, own = weight.detach().contiguous(), [_detached(values) for values in constants]
    outputs, channels, taps = weight.shape[0] // groups, weight.shape[1], weight.shape[2:].numel()
    steps = outputs * channels * taps, channels * taps, taps, 1
    size = ctypes.c_long(memory.numel() if memory is not None else 0)
    values = (weight, groups, outputs, channels, taps, *steps)
    kernel = getattr(library(), f"pack_{form}")
    kernel.restype = ctypes.c_long
    return call(kernel, values, own, memory, ctypes.byref(size)), size.value


def _detached(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().contiguous()
