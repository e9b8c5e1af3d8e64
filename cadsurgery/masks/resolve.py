"""From what a user gives as a mask to a provider, and masks made from other masks."""

from __future__ import annotations

from torch import Tensor

from cadsurgery.elements.lattice import describe
from cadsurgery.masks.basic import FixedMask, FunctionMask
from cadsurgery.masks.provider import Grid, MaskProvider, checked_levels, checked_scores
from cadsurgery.masks.spec import PIPE, parse
from cadsurgery.support.errors import InvalidInput


def resolve_mask(mask: object) -> MaskProvider:
    """A provider from a string (see `cadsurgery.masks.text`), a provider, a callable image -> map, or a tensor.

    Raises:
        UnknownName: no such mask or option; the closest names are listed.
        InvalidInput: a string that cannot be read, or `mask` is something else.
    """
    if isinstance(mask, MaskProvider):
        return mask
    if isinstance(mask, str):
        return parse(mask)
    if isinstance(mask, Tensor):
        return FixedMask(mask)
    if callable(mask):
        return FunctionMask(mask)
    raise InvalidInput(
        f"{describe(mask)} is not a mask.",
        next='give a name such as "edges", a tensor, a provider or a function image -> map.',
    )


class MaskWrapper(MaskProvider):
    """Base of masks made from another mask; the string form writes them behind it and a pipe.

    The first parameter of a subclass's constructor is the inner mask, the others are its options.
    """

    takes = "one"

    def __init__(self, mask: object) -> None:
        """Wrap anything `resolve_mask` takes.

        Args:
            mask: the inner mask.
        """
        super().__init__()
        self.mask = resolve_mask(mask)

    @property
    def parts(self) -> tuple[MaskProvider, ...]:
        """The inner mask."""
        return (self.mask,)

    def spec(self) -> str:
        """The string form that `resolve_mask` reads back: the inner mask's, a pipe, its own."""
        return f"{self.mask.spec()} {PIPE} {super().spec()}"

    def inner_levels(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w) int64: the levels of the inner mask, checked."""
        return checked_levels(self.mask(image, features, grid), grid, self.mask.name)

    def inner_scores(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w): the scores of the inner mask, checked."""
        return checked_scores(self.mask.scores(image, features, grid), grid, self.mask.name, self.name)
