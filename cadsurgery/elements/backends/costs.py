"""Where an ordinary convolution of a dense map is faster than the kernels for elements: tables by kind of work.

A convolution on elements does less work, but a dense one needs no kernel map. The tables were measured with each
instruction set on an Intel processor (docs/notes.md, "Dense maps or elements"). In each the first row that fits counts,
so that the same program has the same bits on all processors with the same instruction sets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cadsurgery.elements.backends.weights import FusedConv
from cadsurgery.kernels import isa


class Kind(NamedTuple):
    """A kind of convolution; as part of a row, the least that a convolution must have.

    Attributes:
        dtype: type of the rows.
        isa: instruction set; "" for work without a compiled kernel.
        group: channels of a group; 0 without groups, which is a kind of its own, as is 1, depthwise.
        taps: number of taps.
    """

    dtype: torch.dtype
    isa: str
    group: int
    taps: int

    def includes(self, other: Kind, available: tuple[str, ...]) -> bool:
        """Return True if the other kind has at least what this one asks for."""
        same_groups = self.group == other.group if min(self.group, other.group) < 2 else True
        at_least = other.group >= self.group and other.taps >= self.taps
        return self.dtype == other.dtype and self.isa in available and same_groups and at_least


class Costs(NamedTuple):
    """Costs relative to one multiply-accumulate of a convolution on elements.

    Attributes:
        dense: one multiply-accumulate of an ordinary convolution of the whole map.
        moved: reading and writing one value in a conversion between elements and dense maps.
    """

    dense: float
    moved: float

    def prefer_dense(self, work: int, elements: int, pixels: int, channels: tuple[int, int]) -> bool:
        """Return True if convolving the whole map is cheaper.

        Args:
            work: multiply-accumulates per element.
            elements: number of output elements.
            pixels: number of pixels of the whole map.
            channels: numbers of input and output channels.
        """
        moved = pixels * channels[0] + elements * channels[1]
        return pixels * work * self.dense + moved * self.moved < elements * work


_F32, _BF16 = torch.float32, torch.bfloat16
# On lattices of several levels; without a row, elements are never dearer than the whole map.
OF_WHOLE_MAPS: tuple[tuple[Kind, Costs], ...] = (
    (Kind(_F32, "avx2", 1, 25), Costs(0.6, 8.0)),
    (Kind(_F32, "avx2", 1, 4), Costs(0.7, 4.5)),
    (Kind(_F32, "avx512", 16, 4), Costs(0.55, 22.0)),
    (Kind(_F32, "avx512", 8, 4), Costs(0.8, 15.0)),
    (Kind(_F32, "avx2", 16, 4), Costs(0.85, 25.0)),
    (Kind(_F32, "avx2", 8, 4), Costs(0.68, 13.0)),
    (Kind(_F32, "sse4", 1, 4), Costs(0.6, 5.0)),
    (Kind(_BF16, "amx", 0, 4), Costs(0.77, 100.0)),
    (Kind(_BF16, "amx", 1, 25), Costs(0.6, 5.0)),
    (Kind(_BF16, "amx", 1, 4), Costs(0.7, 3.5)),
    (Kind(_BF16, "amx", 16, 4), Costs(0.3, 18.0)),
    (Kind(_BF16, "amx", 8, 4), Costs(0.5, 11.0)),
    (Kind(_BF16, "avx512bf16", 1, 4), Costs(0.9, 4.5)),
    (Kind(_BF16, "avx512bf16", 16, 4), Costs(0.8, 10.0)),
    (Kind(_F32, "", 0, 4), Costs(0.5, 65.0)),
    (Kind(_F32, "", 1, 4), Costs(0.1, 2.0)),
    (Kind(_F32, "", 2, 4), Costs(0.1, 10.0)),
    (Kind(_BF16, "", 0, 4), Costs(0.4, 85.0)),
    (Kind(_BF16, "", 1, 4), Costs(0.1, 2.0)),
    (Kind(_BF16, "", 2, 4), Costs(0.1, 10.0)),
)
# On uniform maps: the largest dilation up to which the dense convolution is at least as fast as the kernel. For windows
# that are dilated oneDNN takes up to eighty times as long as the kernels of depthwise convolutions.
_ALWAYS = 1 << 30
OF_UNIFORM_MAPS: tuple[tuple[Kind, int], ...] = (
    (Kind(_F32, "avx512", 1, 25), 1),
    (Kind(_F32, "avx2", 1, 49), 1),
    (Kind(_F32, "avx2", 1, 1), 0),
    (Kind(_F32, "sse4", 1, 4), 1),
    (Kind(_F32, "avx512", 16, 4), _ALWAYS),
    (Kind(_F32, "avx512", 8, 4), 0),
    (Kind(_F32, "avx512", 2, 1), 0),
    (Kind(_F32, "avx2", 8, 4), _ALWAYS),
    (Kind(_BF16, "amx", 1, 25), 1),
    (Kind(_BF16, "amx", 8, 4), _ALWAYS),
)


def kind_of(weights: FusedConv, dtype: torch.dtype) -> Kind:
    """Return the kind of a convolution, except the instruction set."""
    _, group, height, width = weights.weight.shape
    return Kind(dtype, "", group if weights.groups > 1 else 0, height * width)


def costs_of(kind: Kind, has_kernel: bool) -> Costs | None:
    """Return the costs of a kind of work on lattices of several levels; None if the whole map is never cheaper."""
    available = isa.allowed() if has_kernel else ("",)
    return next((costs for row, costs in OF_WHOLE_MAPS if row.includes(kind, available)), None)


def largest_dense_dilation(kind: Kind) -> int:
    """Return the dilation up to which a dense convolution of a uniform map is preferred to a kernel; 0 for none."""
    available = isa.allowed()
    return next((largest for row, largest in OF_UNIFORM_MAPS if row.includes(kind, available)), 0)
