"""Read the layouts of packed weights from the compiled kernels; each form exports the numbers of its own layout."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

from cadsurgery.kernels.load import isa_of, library


class ProductLayout(NamedTuple):
    """Layout of the packed weights of `product.c`.

    Attributes:
        rows: rows of a tile.
        chunk: adjacent output channels.
        side: adjacent input channels of one output channel.
        depth: the number whose multiples groups of adjacent channels, of all taps of a chunk, are padded to.
    """

    rows: int
    chunk: int
    side: int
    depth: int


class GroupedLayout(NamedTuple):
    """Layout of the packed weights of `grouped.c`.

    Attributes:
        lanes: channels of a vector; rows of weights are padded to a multiple of it.
        most_group: largest number of channels per group.
        taps: largest number of kernel taps.
    """

    lanes: int
    most_group: int
    taps: int


class IntegerLayout(NamedTuple):
    """Layout of the packed weights of `int8.c` and `int8_depthwise.c`.

    Attributes:
        rows: rows of a tile.
        chunk: adjacent output channels.
        side: adjacent input channels of one output channel.
        depth: see `ProductLayout`.
        bytes: bytes per weight.
        shift: number subtracted from every value of a row before the multiplication.
        many: channels that a depthwise convolution reads at once.
        half: if the last part has at most this many channels, two of its rows are read at once.
    """

    rows: int
    chunk: int
    side: int
    depth: int
    bytes: int
    shift: int
    many: int
    half: int


def product_layout(element: str) -> ProductLayout:
    """Return the layout of the form of `product` that is chosen for an element type."""
    return ProductLayout(*_numbers("product_layout", element, isa_of("product", element), 4))


def grouped_layout(element: str) -> GroupedLayout:
    """Return the layout of the form of `grouped` that is chosen for an element type."""
    return GroupedLayout(*_numbers("grouped_layout", element, isa_of("grouped", element), 3))


def depthwise_width(element: str) -> int:
    """Return the number of channels that `depthwise` (with two adjacent taps) reads at once."""
    return _numbers("depthwise_layout", element, isa_of("depthwise", element), 1)[0]


def integer_layout(isa: str) -> IntegerLayout:
    """Return the layout of a form of `int8.c`."""
    return IntegerLayout(*_numbers("int8_layout", "", isa, 8))


@cache
def _numbers(name: str, element: str, isa: str, count: int) -> tuple[int, ...]:
    """Read the layout numbers that a form of a kernel exports."""
    symbol = "_".join(part for part in (name, element, isa) if part)
    compiled = library()
    assert compiled is not None
    return tuple((ctypes.c_long * count).in_dll(compiled, symbol))
