"""Plans of methods, and multiply-accumulates of a call: bases of both."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from cadsurgery.support.counting import describe_not_counted
from cadsurgery.support.plain import read_as

RULES = ("conv", "published")
TAPS = 49  # of the Gaussian that fills gaps, as both reference codes count it


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """Base of the plans of all methods: pure values, and JSON in a file.

    Attributes:
        example_shape: of the image batch the network was observed on.
    """

    example_shape: tuple[int, ...]

    def check(self) -> bool:
        """True if the values of a plan that was read from a file make sense."""
        return True

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan written by `to_json`.

        Raises:
            ValueError: a text that is no plan.
        """
        plan: Self = read_as(cls, json.loads(text), "the plan")
        if len(plan.example_shape) != 4 or min(plan.example_shape) < 1 or not plan.check():
            raise ValueError(f"it is no {cls.__name__}")
        return plan


@dataclass(frozen=True, kw_only=True)
class MethodMacs:
    """Base of the counts of all methods: multiply-accumulates of a batch; `print` shows them.

    Attributes:
        rule: `conv`, multiply-accumulates that are carried out; or `published`, the counting of the reference code.
        shape: of the image batch.
        not_counted: operations that may multiply and are in none of these numbers, because no rule says how much.
    """

    rule: str
    shape: tuple[int, ...]
    not_counted: tuple[str, ...] = ()
    told: ClassVar[tuple[str, ...]] = ()  # properties that `to_dict` has, too

    @property
    def total(self) -> int:
        """All that is computed."""
        raise NotImplementedError

    @property
    def dense(self) -> int:
        """Of the network with everything computed."""
        raise NotImplementedError

    def lines(self) -> list[str]:
        """Text of `print` after the shape and the rule: the rest of that line, and further ones."""
        return [f": {self.total:.4e}, {self.total / max(self.dense, 1):.3f} of {self.dense:.4e}"]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {name: getattr(self, name) for name in self.told}

    def __str__(self) -> str:
        first, *more = self.lines()
        title = f"MACs on {in_words(self.shape)} ({self.rule} rule){first}"
        return "\n".join(filter(None, [title, *more, describe_not_counted(self.not_counted)]))


def in_words(shape: tuple[int, ...]) -> str:
    """A shape as `1x3x64x96`."""
    return "x".join(map(str, shape))
