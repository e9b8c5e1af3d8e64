"""Facts about the operations on elements, stated where each is defined and asked by every pass.

Planning asks whether an operation brings values from other places, verification whether it mixes resolutions, the
dependency cone what it reads, counting what it multiplies, fusion whether its value is elements. An operation of a
user's own is one as soon as it is declared:

    @cs.operation(reads="window")
    def lp_pool2d(x, window, stage, power): ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

from cadsurgery.support.errors import InvalidInput

Reads = Literal["nothing", "element", "window", "image", "batch"]
Gives = Literal["elements", "vector", "dense", "other"]
Macs = Callable[..., int]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Operation:
    """Facts about a function on elements.

    Attributes:
        call: the function. With a window it takes `window=` and `stage=`.
        reads: what an element of the result is computed from: `nothing` (no values, such as sizes), the `element` of
            its place, a `window` around it, its whole `image`, or the whole `batch`.
        gives: `elements`, a `vector` per image, a `dense` map, with which the region is left, or something `other`.
        outside: what a window reads beyond the border of the map.
        drops: true if cells that are not downsampled pass as they are where the geometry says `pool="drop"`.
        macs: multiply-accumulates of a call, from its value and its arguments; None for what torch counts of it while
            it runs. Moving and interpolating values is no such work: 0.
        trains_only: true if it gives back what it reads in evaluation mode.
        at_exit: what takes its place where nothing in the region reads the result, and which gives a dense map.
    """

    call: Callable[..., Any]
    reads: Reads
    gives: Gives = "elements"
    outside: float = 0.0
    drops: bool = False
    macs: Macs | None = None
    trains_only: bool = False
    at_exit: Callable[..., Any] | None = None

    @property
    def mixes(self) -> bool:
        """True if the value at one place depends on the resolution elsewhere."""
        return self.reads in ("image", "batch")


_OPERATIONS: dict[Callable[..., Any], Operation] = {}


def no_macs(*_: Any, **__: Any) -> int:
    """Of what multiplies nothing that a dense network would."""
    return 0


def operation(
    *,
    reads: Reads,
    gives: Gives = "elements",
    outside: float = 0.0,
    drops: bool = False,
    macs: Macs | None = no_macs,
    trains_only: bool = False,
    exit_of: Callable[..., Any] | None = None,
) -> Callable[[F], F]:
    """Declare a function on elements; it stays as it is.

    Args:
        reads, gives, outside, drops, macs, trains_only: what it is, see `Operation`.
        exit_of: the operation whose place it takes where the region is left.

    Raises:
        InvalidInput: a word that is not in the list.
    """
    for value, words in ((reads, get_args(Reads)), (gives, get_args(Gives))):
        if value not in words:
            raise InvalidInput(
                f"an operation cannot read or give {value!r}.", next=f"say one of {', '.join(words)}."
            )

    def declare(call: F) -> F:
        _OPERATIONS[call] = Operation(call, reads, gives, outside, drops, macs, trains_only)
        if exit_of is not None:
            _OPERATIONS[exit_of] = replace(_OPERATIONS[exit_of], at_exit=call)
        return call

    return declare


def operations() -> Mapping[Callable[..., Any], Operation]:
    """All operations by their functions."""
    return MappingProxyType(_OPERATIONS)


def operation_of(target: Any) -> Operation | None:
    """Return the facts about a node's target, if it is an operation on elements."""
    return _OPERATIONS.get(target) if callable(target) else None
