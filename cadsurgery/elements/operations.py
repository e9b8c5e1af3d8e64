"""Facts about the operations on elements, declared where each operation is defined and used by every pass.

Planning asks whether an operation reads other positions, verification whether it mixes resolutions, the dependency
cone what it reads, MAC counting what it multiplies, and fusion whether its result is elements. Users declare their
own operations in the same way:

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
        call: the function. If it has a window, it takes `window=` and `stage=`.
        reads: the input of one result element: `nothing` (no values, only sizes), the `element` at the same
            position, a `window` around it, its whole `image`, or the whole `batch`.
        gives: `elements`, a `vector` per image, a `dense` map (which ends the region), or something `other`.
        outside: value that a window reads beyond the border of the map.
        drops: True if cells that are not downsampled pass unchanged when the geometry has `pool="drop"`.
        macs: function of the result and the arguments that returns the multiply-accumulates of a call; None to use
            torch's count while it runs. Moving and interpolating values counts as 0.
        trains_only: True if the operation is the identity in evaluation mode.
        at_exit: operation with a dense result that replaces this one if nothing in the region reads the result.
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
    """Return zero MACs: the operation only moves or interpolates values."""
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
    """Declare a function on elements; the function itself is unchanged.

    Args:
        reads, gives, outside, drops, macs, trains_only: facts about the function, see `Operation`.
        exit_of: the operation that this one replaces at the end of the region.

    Raises:
        InvalidInput: `reads` or `gives` is not one of the listed words.
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
    """Return all declared operations, keyed by their functions."""
    return MappingProxyType(_OPERATIONS)


def operation_of(target: Any) -> Operation | None:
    """Return the facts about a node's target, if it is an operation on elements."""
    return getattr(target, "stated", None) or _OPERATIONS.get(target) if callable(target) else None
