"""Compare the outputs of an exported file with those of the network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cadsurgery.network.export.int8 import Fidelity
from cadsurgery.support.divergence import relative_difference
from cadsurgery.support.errors import CannotConvert

# Largest allowed difference between a written file and the network, relative to the largest output.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Comparison:
    """Result of comparing a file with its network; see `Exported` for the fields."""

    difference: float
    compared: tuple[tuple[int, ...], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fidelity: Fidelity | None = None


def more_images(image: Tensor, other: Tensor | None) -> list[Tensor]:
    """Return variants of a batch to compare on: upside down (or `other`), mirrored with half the contrast, negated.

    The first two are in contiguous memory, the last in channels_last: a file must take both.
    """
    contiguous = [image.flip(2) if other is None else other, image.flip(3) / 2]
    channels_last = (-image).contiguous(memory_format=torch.channels_last)
    return [*(one.contiguous() for one in contiguous), channels_last]


def check_difference(differences: Iterable[float], tolerance: float = TOLERANCE) -> float:
    """Return the largest of several differences, NaN if one is NaN.

    Raises:
        CannotConvert: the largest difference exceeds the tolerance.
    """
    largest = float(torch.tensor(list(differences)).max())  # Python's max may lose a NaN
    if not largest < tolerance:
        raise CannotConvert(
            f"the written file differs from the network by {largest:.1e}.",
            why=f"more than {tolerance:.0e} of the largest output, on another image; nothing was written.",
            next="report it with the name of the network; torch.compile(net) needs no export.",
        )
    return largest


def difference(output: Any, expected: Any) -> float:
    """Return the largest difference of two outputs, each tensor relative to its largest value; it may be NaN."""
    pairs = zip(*(tree_leaves(value) for value in (output, expected)), strict=True)
    differences = [
        relative_difference(one, two)
        for one, two in pairs
        if isinstance(two, Tensor) and two.is_floating_point()
    ]
    return float(torch.tensor([0.0, *differences]).max())
