"""Gates opened at a share of their positions, whatever they are trained to: does time follow work?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.support.errors import InvalidInput, check_name

PATTERNS = ("areas", "scattered")
_FAR = 10.0  # a score of which no doubt is left
_AREA = 8  # positions between the nodes of smooth noise


class Opened:
    """What stands for the scores of gates, see `SampledModel.instead`: far above 0 at a share of positions, the same
    for each call of a size."""

    def __init__(self, density: float, pattern: str = "areas") -> None:
        """Choose how much is open, and where.

        Args:
            density: 0..1.
            pattern: in `areas`, where smooth noise is high, or `scattered`.

        Raises:
            InvalidInput: a density out of range.
            UnknownName: no such pattern.
        """
        check_name("pattern", pattern, PATTERNS)
        if not 0 <= density <= 1:
            raise InvalidInput(f"density={density:g}.", next="give a share of the positions, 0..1.")
        self.density, self.pattern = density, pattern
        self._scores: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, number: int, score: Tensor) -> Tensor:
        """Scores for those (B, h, w) of a gate."""
        key = (number, *score.shape)
        if key not in self._scores:
            self._scores[key] = self._make(number, score)
        return self._scores[key]

    def _make(self, number: int, score: Tensor) -> Tensor:
        if self.density in (0, 1):
            return torch.full_like(score, _FAR if self.density else -_FAR)
        generator = torch.Generator().manual_seed(number)
        size = tuple(score.shape[1:])
        if self.pattern == "areas":
            nodes = [max(2, length // _AREA + 1) for length in size]
            noise = torch.rand((len(score), 1, *nodes), generator=generator)
            noise = F.interpolate(noise, size, mode="bilinear", align_corners=True)[:, 0]
        else:
            noise = torch.rand(score.shape, generator=generator)
        least = noise.flatten().kthvalue(max(1, round((1 - self.density) * noise.numel()))).values
        return torch.where(noise > least, _FAR, -_FAR).to(score)
