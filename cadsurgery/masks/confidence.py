"""Masks by how sure the network itself is after a first pass with everything downsampled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.lattice import describe
from cadsurgery.masks.filters import blurred
from cadsurgery.masks.graded import ScoredMask, check_sigma
from cadsurgery.masks.provider import Grid, mask_provider
from cadsurgery.support.errors import InvalidInput, UnknownName

MEASURES = ("margin", "entropy")
_FIRST_PASS: ContextVar[Any] = ContextVar("first_pass", default=None)


@contextmanager
def first_pass(output: Any) -> Iterator[None]:
    """What the network gave with everything downsampled, for the masks asked within, in this thread."""
    token = _FIRST_PASS.set(output)
    try:
        yield
    finally:
        _FIRST_PASS.reset(token)


def first_pass_output(where: str) -> Any:
    """What the network gave in the first pass.

    Raises:
        InvalidInput: there was none.
    """
    output = _FIRST_PASS.get()
    if output is None:
        raise InvalidInput(
            "there was no first pass of a network to look at.",
            where=where,
            why="it looks at the network's own output, so it works inside an adaptive network only.",
            next="call the network with this mask: net(image, mask=...).",
        )
    return output


@mask_provider("confidence", source="ours, after confidence-adaptive prediction (Liu et al., ICLR 2022)")
class ConfidenceMask(ScoredMask):
    """Keep high where the network is unsure after a first pass with everything downsampled.

    The pass begins where the region begins: what comes before runs once. Its work counts as the mask's.
    """

    image_only = True
    needs = "a first pass of the network"

    def __init__(
        self, threshold: float | tuple[float, ...] = (0.5,), measure: str = "margin", sigma: float = 1.0
    ) -> None:
        """Create the mask.

        Args:
            threshold: on the doubt, 0..1; several as in `ScoredMask`.
            measure: of doubt: `margin`, one minus the difference of the two largest probabilities, or `entropy`,
                divided by its largest value.
            sigma: standard deviation of the smoothing, in samples of the fine map; 0 for none.

        Raises:
            UnknownName: no such measure.
            InvalidInput: thresholds that are NaN or do not fall, or a negative sigma.
        """
        super().__init__(threshold)
        self.measure, self.sigma = measure, sigma
        if measure not in MEASURES:
            raise UnknownName("measure of mask 'confidence'", measure, MEASURES)
        check_sigma(sigma, "mask confidence")

    @property
    def looks_ahead(self) -> bool:
        """It does."""
        return True

    def scores(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """The doubt at the pixels of each sample of the fine map, averaged and smoothed.

        Raises:
            InvalidInput: the network gives no class scores for a map.
        """
        doubt = _doubt(_logits(first_pass_output("mask confidence"), grid), self.measure)
        if tuple(doubt.shape[1:]) != grid.size:
            doubt = F.interpolate(
                doubt.unsqueeze(1), size=grid.size, mode="bilinear", antialias=True
            ).squeeze(1)
        return blurred(doubt, self.sigma)


def _logits(output: Any, grid: Grid) -> Tensor:
    """The class scores (B, C, H, W) among the outputs of the first pass: a tensor, or `out` of a dictionary."""
    found = output.get("out") if isinstance(output, Mapping) else output
    given = (
        f"a dictionary of {', '.join(map(str, output))}" if isinstance(output, Mapping) else describe(found)
    )
    if (
        not isinstance(found, Tensor)
        or found.dim() != 4
        or found.shape[1] < 2
        or found.shape[0] != grid.batch
    ):
        raise InvalidInput(
            f"the network gives {given}.",
            where="mask confidence",
            why="doubt needs scores (B, C, H, W) of two classes or more, alone or as 'out' of a dictionary.",
            next="choose another mask, e.g. detail or edges.",
        )
    return found


def _doubt(logits: Tensor, measure: str) -> Tensor:
    """(B, H, W) in 0..1 of class scores (B, C, H, W)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if measure == "entropy":
        logs = logits.log_softmax(1)
        return -(logs.exp() * logs).sum(1) / math.log(logits.shape[1])
    best = logits.softmax(1).topk(2, dim=1).values
    return 1 - (best[:, 0] - best[:, 1])
