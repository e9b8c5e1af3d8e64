"""Gates: where a convolution is computed (Xie et al., ECCV 2020, stochastic sampling).

A gate reads the input of its branch and gives each position of a convolution's output a score; with p its sigmoid, u
and v uniform noise, n(u) = -log(-log(u + e) + e), T the temperature and e = 1e-8,

    s = sigmoid((log(p + e) + n(u) - log(1 - p + e) - n(v)) / (T + e)),

one of a softmax of two (Gumbel-softmax); without noise, n is left out. In training s itself is the share of a position
that counts as computed, in evaluation s where it is at least 1/2 and else 0. Every position of a coarse grid is always
computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.support.errors import InvalidInput, check_name

# As published.
BIAS = 3.0
WIDTH = 3.0
DECAY = 0.99998
TEMPERATURE = 0.03
GRID = 11
_EPSILON = 1e-8
_HALF = 0.5
_SIDE = 3  # of a gate's kernel
PATTERNS = ("areas", "scattered")
_FAR = 10.0  # a score of which no doubt is left
_AREA = 8  # positions between the nodes of smooth noise


class Gate(nn.Module):
    """Scores of the positions of one convolution; it starts open everywhere.

    Attributes:
        weight: (1, C, 3, 3), at first 0.
        bias: (1,), at first 3: a probability of .9526.
        width: of the Gaussian by which gaps are filled, at first 3.
        temperature: of training, at first 1, times .99998 with each step.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    width: nn.Parameter
    temperature: Tensor

    def __init__(self, channels: int, like: Tensor | None = None) -> None:
        """Take the channels of what it reads, and a tensor of the wanted type and place."""
        super().__init__()
        like = torch.empty(0) if like is None else like.detach()
        self.weight = nn.Parameter(like.new_zeros(1, channels, _SIDE, _SIDE))
        self.bias = nn.Parameter(like.new_full((1,), BIAS))
        self.width = nn.Parameter(like.new_tensor(WIDTH))
        self.register_buffer("temperature", like.new_tensor(1.0))


def scores(x: Tensor, gates: Sequence[Gate], strides: Sequence[int]) -> list[Tensor]:
    """(B, h, w) of each of the gates of a branch: 3x3 convolutions of its input, with padding.

    As products with nine outputs for each gate, whose sums at shifted places are taken afterwards: a convolution with
    one output would have to be computed as if it had as many as a register holds, at each of nine taps.

    Args:
        x: (B, C, H, W).
        gates: of the branch.
        strides: of each; (h, w) is ceil of (H, W) over it.
    """
    size = (x.shape[2], x.shape[3])
    weight = torch.cat([gate.weight for gate in gates]).to(x.dtype)
    taps = weight.flip(2, 3).flatten(2).transpose(1, 2).flatten(0, 1)
    products = torch.matmul(taps, x.flatten(2)).contiguous()
    sums = F.fold(products, size, _SIDE, padding=_SIDE // 2)
    sums = sums + torch.cat([gate.bias for gate in gates]).to(x.dtype).view(-1, 1, 1)
    return [sums[:, number, ::stride, ::stride] for number, stride in enumerate(strides)]


def shares(score: Tensor, temperature: Tensor | float, noise: Tensor | None, grid: int) -> Tensor:
    """(B, h, w) in 0..1: how much of each position counts as computed; 1 on every `grid`-th one of both axes.

    Args:
        score: (B, h, w).
        temperature: T.
        noise: (2, B, h, w), uniform in 0..1; None for none.
        grid: 0 for no grid.
    """
    p = score.sigmoid()
    logit = (p + _EPSILON).log() - (1 - p + _EPSILON).log()
    if noise is not None:
        gumbel = -(-(noise + _EPSILON).log() + _EPSILON).log()
        logit = logit + gumbel[0] - gumbel[1]
    soft = (logit / (temperature + _EPSILON)).sigmoid()
    if not grid:
        return soft
    always = torch.zeros_like(soft, dtype=torch.bool)
    always[:, ::grid, ::grid] = True
    return torch.where(always, 1.0, soft)


def hard_shares(share: Tensor) -> Tensor:
    """The shares where they are at least 1/2, else 0: what is computed in evaluation."""
    return torch.where(share >= _HALF, share, 0.0)


def uniform(numbers: Sequence[int], like: Tensor) -> Tensor:
    """(2, *shape) in 0..1 that depend on some numbers alone, such as seed, step and number of the gate."""
    drawn = np.random.default_rng(list(numbers)).random((2, *like.shape), np.float32)
    return torch.from_numpy(drawn).to(like)


class Opened:
    """Takes the place of the scores of gates, see `SampledModel.score_override`: far above 0 at a share of positions,
    the same for each call of a size."""

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
