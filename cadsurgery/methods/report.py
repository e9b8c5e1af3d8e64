"""Base classes of the plans of methods and of their counts of multiply-accumulates."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from cadsurgery.support.counting import describe_not_counted
from cadsurgery.support.plain import read_as


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """Base of the plans of all methods: plain values, stored as JSON.

    Attributes:
        example_shape: shape of the image batch that the network was observed on.
        call: all arguments of that call as JSON, if it had more than an image; see `describe_call`.
        part: name of the part that was converted, "" for the whole network.
    """

    example_shape: tuple[int, ...]
    call: str = ""
    part: str = ""

    def check(self) -> bool:
        """True if the values of a plan read from a file are valid."""
        return True

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a plan written by `to_json`.

        Raises:
            ValueError: the text is not a plan.
        """
        plan: Self = read_as(cls, json.loads(text), "the plan")
        if len(plan.example_shape) != 4 or min(plan.example_shape) < 1 or not plan.check():
            raise ValueError(f"it is no {cls.__name__}")
        return plan


@dataclass(frozen=True, kw_only=True)
class MethodMacs:
    """Base of the counts of all methods: multiply-accumulates of a batch; `print` shows them.

    Attributes:
        shape: shape of the image batch.
        not_counted: operations that may multiply but are in none of these numbers, because no counting rule is known.
    """

    shape: tuple[int, ...]
    not_counted: tuple[str, ...] = ()
    told: ClassVar[tuple[str, ...]] = ()  # names of properties that `to_dict` includes

    @property
    def total(self) -> int:
        """MACs of everything that is computed."""
        raise NotImplementedError

    @property
    def dense(self) -> int:
        """MACs of the network with everything computed."""
        raise NotImplementedError

    def lines(self) -> list[str]:
        """Return the text of `print` after the shape: the rest of that line, then further lines."""
        return [f": {self.total:.4e}, {self.total / max(self.dense, 1):.3f} of {self.dense:.4e}"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {name: getattr(self, name) for name in self.told}

    def __str__(self) -> str:
        first, *more = self.lines()
        title = f"MACs on {in_words(self.shape)}{first}"
        return "\n".join(filter(None, [title, *more, describe_not_counted(self.not_counted)]))


def in_words(shape: tuple[int, ...]) -> str:
    """Format a shape as `1x3x64x96`."""
    return "x".join(map(str, shape))
