"""Gates: where a convolution is computed (Xie et al., ECCV 2020, stochastic sampling).

A gate reads the input of its branch and predicts a score for each position of a convolution's output. Let p be the
sigmoid of the score, u and v uniform noise, n(u) = -log(-log(u + e) + e), T the temperature and e = 1e-8. Then

    s = sigmoid((log(p + e) + n(u) - log(1 - p + e) - n(v)) / (T + e))

is a Gumbel-softmax over two classes; without noise, n is zero. In training s is the share of a position that counts as
computed. In evaluation the share is s where s is at least 1/2, and 0 elsewhere. Every position of a coarse grid is
always computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.support.errors import InvalidInput

# As published.
BIAS = 3.0
WIDTH = 3.0
DECAY = 0.99998
TEMPERATURE = 0.03
GRID = 11
_EPSILON = 1e-8
_HALF = 0.5
_SIDE = 3  # side of a gate's kernel
_FAR = 10.0  # a score at which a gate is fully open (or closed, if negative)
_AREA = 8  # positions between the nodes of smooth noise


class Gate(nn.Module):
    """A layer that scores the positions of one convolution; initially it is open everywhere.

    Attributes:
        weight: (1, C, 3, 3), initially 0.
        bias: (1,), initially 3: a probability of .9526.
        width: width parameter of the Gaussian that fills gaps, initially 3.
        temperature: temperature of training, initially 1 and multiplied by .99998 in each step.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    width: nn.Parameter
    temperature: Tensor

    def __init__(self, channels: int, like: Tensor | None = None) -> None:
        """Take the number of input channels, and a tensor with the desired dtype and device."""
        super().__init__()
        like = torch.empty(0) if like is None else like.detach()
        self.weight = nn.Parameter(like.new_zeros(1, channels, _SIDE, _SIDE))
        self.bias = nn.Parameter(like.new_full((1,), BIAS))
        self.width = nn.Parameter(like.new_tensor(WIDTH))
        self.register_buffer("temperature", like.new_tensor(1.0))


def scores(x: Tensor, gates: Sequence[Gate], strides: Sequence[int]) -> list[Tensor]:
    """Compute the scores (B, h, w) of each gate of a branch: 3x3 convolutions of its input, with padding.

    Computed as a matrix product with nine outputs per gate, followed by sums of shifted outputs. A convolution with one
    output channel would waste the rest of a vector register at each of the nine taps.

    Args:
        x: (B, C, H, W).
        gates: gates of the branch.
        strides: stride of each gate; (h, w) = ceil((H, W) / stride).
    """
    size = (x.shape[2], x.shape[3])
    weight = torch.cat([gate.weight for gate in gates]).to(x.dtype)
    taps = weight.flip(2, 3).flatten(2).transpose(1, 2).flatten(0, 1)
    products = torch.matmul(taps, x.flatten(2)).contiguous()
    sums = F.fold(products, size, _SIDE, padding=_SIDE // 2)
    sums = sums + torch.cat([gate.bias for gate in gates]).to(x.dtype).view(-1, 1, 1)
    return [sums[:, number, ::stride, ::stride] for number, stride in enumerate(strides)]


def shares(score: Tensor, temperature: Tensor | float, noise: Tensor | None, grid: int) -> Tensor:
    """Compute the share of each position that counts as computed, (B, h, w) in 0..1; it is 1 on the grid.

    Args:
        score: (B, h, w).
        temperature: T.
        noise: (2, B, h, w), uniform in 0..1; None for no noise.
        grid: spacing of the positions that are always computed, along both axes; 0 for no grid.
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
    """Return the shares used in evaluation: unchanged where they are at least 1/2, 0 elsewhere."""
    return torch.where(share >= _HALF, share, 0.0)


def uniform(numbers: Sequence[int], like: Tensor) -> Tensor:
    """Draw uniform noise (2, *shape) in 0..1 that depends only on `numbers`, such as seed, step and gate number."""
    drawn = np.random.default_rng(list(numbers)).random((2, *like.shape), np.float32)
    return torch.from_numpy(drawn).to(like)


class Opened:
    """A replacement for the scores of gates (see `SampledModel.score_override`) that opens a fixed share of positions,
    in connected areas where smooth noise is high, the same ones in each call with the same size."""

    def __init__(self, density: float) -> None:
        """Set the share of open positions.

        Args:
            density: share of open positions, 0..1.

        Raises:
            InvalidInput: the density is out of range.
        """
        if not 0 <= density <= 1:
            raise InvalidInput(f"density={density:g}.", next="give a share of the positions, 0..1.")
        self.density = density
        self._scores: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, number: int, score: Tensor) -> Tensor:
        """Return the scores that replace the scores (B, h, w) of a gate."""
        key = (number, *score.shape)
        if key not in self._scores:
            self._scores[key] = self._make(number, score)
        return self._scores[key]

    def _make(self, number: int, score: Tensor) -> Tensor:
        if self.density in (0, 1):
            return torch.full_like(score, _FAR if self.density else -_FAR)
        generator = torch.Generator().manual_seed(number)
        size = tuple(score.shape[1:])
        nodes = [max(2, length // _AREA + 1) for length in size]
        noise = torch.rand((len(score), 1, *nodes), generator=generator, device="cpu")
        noise = F.interpolate(noise, size, mode="bilinear", align_corners=True)[:, 0]
        least = noise.flatten().kthvalue(max(1, round((1 - self.density) * noise.numel()))).values
        return torch.where(noise > least, _FAR, -_FAR).to(score)
