"""Compare the outputs of an exported file with those of the network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cadsurgery.network.fidelity_measure import Fidelity
from cadsurgery.support.divergence import relative_difference
from cadsurgery.support.errors import CannotConvert
from cadsurgery.support.torch_internals import tree_leaves

if TYPE_CHECKING:
    from cadsurgery.network.model import AdaptiveModel

# Largest allowed difference between a written file and the network, relative to the largest output.
TOLERANCE = 1e-4
# How many times its own rounding error a network's file may differ, and the error from which a network is unusable.
_TIMES_ROUNDING, _LARGEST_ROUNDING = 4, 1e-2


@dataclass(frozen=True)
class FileComparison:
    """Result of comparing a file with its network; see `Exported` for the fields."""

    difference: float
    compared: tuple[tuple[int, ...], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    multiple: int = 1
    fidelity: Fidelity | None = None


def more_images(image: Tensor, other: Tensor | None) -> list[Tensor]:
    """Return variants of a batch to compare on: upside down (or `other`), mirrored with half the contrast, negated.

    The first two are in contiguous memory, the last in channels_last: a file must take both.
    """
    contiguous = [image.flip(2) if other is None else other, image.flip(3) / 2]
    channels_last = (-image).contiguous(memory_format=torch.channels_last)
    return [*(batch.contiguous() for batch in contiguous), channels_last]


def check_difference(
    differences: Iterable[float], tolerance: float = TOLERANCE, rounding: Callable[[], float] = lambda: 0.0
) -> float:
    """Return the largest of several differences, NaN if one is NaN.

    Args:
        differences: of the outputs of a file and of the network.
        tolerance: largest difference of a network that hardly rounds.
        rounding: returns the network's own rounding error, which is looked at only beyond the tolerance: engines sum
            in other orders, so a file may differ by some times as much (`_TIMES_ROUNDING`).

    Raises:
        CannotConvert: the largest difference exceeds the tolerance, and what rounding explains.
    """
    largest = float(torch.tensor(list(differences)).max())  # Python's max may lose a NaN
    if largest < tolerance:
        return largest
    own = rounding()
    if own < _LARGEST_ROUNDING and largest < _TIMES_ROUNDING * own:
        return largest
    of_rounding = f", whose own rounding, in float32 instead of float64, is {own:.1e}" if own > 0 else ""
    raise CannotConvert(
        f"the written file differs from the network by {largest:.1e}.",
        why=f"more than {tolerance:.0e} of the largest output{of_rounding}, on another image; nothing was written.",
        next="report it with the name of the network; torch.compile(net) needs no export.",
    )


@torch.no_grad()
def rounding_of(net: AdaptiveModel, images: Iterable[Tensor]) -> float:
    """Return the largest difference of a network's outputs from those in float64, at the same level maps; NaN if it
    cannot run in float64."""
    wide, differences = copy.deepcopy(net).double(), []
    for image in images:
        output, levels = net(image), net.levels.long()
        try:
            differences.append(difference(output, wide(image.double(), mask=levels)))
        except Exception:  # operations of users' own may know no float64
            return math.nan
    return max(differences, default=0.0)


def difference(output: Any, expected: Any) -> float:
    """Return the largest difference of two outputs, each tensor relative to its largest value; it may be NaN."""
    pairs = zip(*(tree_leaves(value) for value in (output, expected)), strict=True)
    differences = [
        relative_difference(one, two)
        for one, two in pairs
        if isinstance(two, Tensor) and two.is_floating_point()
    ]
    return float(torch.tensor([0.0, *differences]).max())
