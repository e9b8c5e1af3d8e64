"""The layouts in which the kernels read packed weights: each form of a kernel states its own, in its C file."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

from cadsurgery.kernels.load import isa_of, library


class ProductLayout(NamedTuple):
    """The layout of the weights of `product.c`.

    Attributes:
        rows: rows of a tile.
        chunk: outputs side by side.
        side: channels of an output side by side.
    """

    rows: int
    chunk: int
    side: int


class GroupedLayout(NamedTuple):
    """The layout of the weights of `grouped.c`.

    Attributes:
        lanes: channels of a vector; rows of weights are padded to a multiple.
        most_group: the largest number of channels of a group.
        taps: the largest number of taps.
    """

    lanes: int
    most_group: int
    taps: int


class IntegerLayout(NamedTuple):
    """The layout of the weights of `int8.c` and `int8_depthwise.c`.

    Attributes:
        rows: rows of a tile.
        chunk: outputs side by side.
        side: channels of an output side by side.
        bytes: bytes of a weight.
        shift: subtracted from every value of a row before it is multiplied.
        many: channels that a depthwise convolution reads at once.
        half: of a last part of no more channels it reads two rows at once.
    """

    rows: int
    chunk: int
    side: int
    bytes: int
    shift: int
    many: int
    half: int


def product_layout(element: str) -> ProductLayout:
    """The layout of the form of `product` that is chosen for an element type."""
    return ProductLayout(*_numbers("product_layout", element, isa_of("product", element), 3))


def grouped_layout(element: str) -> GroupedLayout:
    """The layout of the form of `grouped` that is chosen for an element type."""
    return GroupedLayout(*_numbers("grouped_layout", element, isa_of("grouped", element), 3))


def depthwise_width(element: str) -> int:
    """The channels that `depthwise`, two taps of which lie side by side, reads at once."""
    return _numbers("depthwise_layout", element, isa_of("depthwise", element), 1)[0]


def integer_layout(isa: str) -> IntegerLayout:
    """The layout of a form of `int8.c`."""
    return IntegerLayout(*_numbers("int8_layout", "", isa, 7))


@cache
def _numbers(name: str, element: str, isa: str, count: int) -> tuple[int, ...]:
    """The numbers that a form of a kernel states."""
    symbol = "_".join(part for part in (name, element, isa) if part)
    compiled = library()
    assert compiled is not None
    return tuple((ctypes.c_long * count).in_dll(compiled, symbol))
