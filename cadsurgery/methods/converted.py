"""What the networks of all methods are: the original's modules, some of their own beside them, one inference copy."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from cadsurgery.support.errors import InvalidInput


class ConvertedModel(nn.Module):
    """A network that a method made.

    Attributes:
        converted_by: the function that gives one, as users call it.
        plan: what was made of the network.
        source: where the network came from, if it was built by name.
    """

    converted_by: ClassVar[str]
    plan: Any
    source: Any

    @property
    def is_optimized(self) -> bool:
        """Whether it is an inference copy."""
        raise NotImplementedError

    def take_over(self, model: nn.Module) -> None:
        """Make the modules, parameters and buffers of a network this one's own, under their names."""
        for kind in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            getattr(self, kind).update(getattr(model, kind))
        self.constants = {name: value for name, value in vars(model).items() if isinstance(value, Tensor)}
        self.training = model.training

    def train(self, mode: bool = True) -> Self:
        """As of any network; refused of an optimised copy.

        Raises:
            InvalidInput: it is one, and mode is True.
        """
        if mode and self.is_optimized:
            raise InvalidInput(
                "an optimised network cannot be trained.",
                why="its batch norms are folded into its convolutions.",
                next="train the network it was made from, and call optimize() again.",
            )
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return clone
