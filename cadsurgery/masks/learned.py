"""The learned mask: a small network on the features that enter the region, trained together with the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.errors import InvalidInput
from cadsurgery.masks.graded import several
from cadsurgery.masks.provider import Grid, MaskProvider, mask_provider


@mask_provider("learned", source="Hesse et al., CVPRW 2023, supplementary; reference code ad_e2e_resnet.py")
class LearnedMask(MaskProvider):
    """Keep high where an estimator, trained with `cadsurgery finetune --objective blend`, says so.

    A 3x3 convolution, another, max-pooling to the cells of the lowest level, two more; one score per level and cell,
    the best level is taken. It is made when it first sees features, with random weights from its seed.
    """

    def __init__(
        self,
        fraction: float = 0.5,
        channels: int | tuple[int, ...] = (128, 64, 64),
        temperature: float = 1.0,
        noise: bool = False,
        seed: int = 0,
    ) -> None:
        """Create the mask.

        Args:
            fraction: share to keep high that training aims at, 0..1; with more than two levels that of a two-level
                map with as many elements. The published gamma is 1 - fraction.
            channels: of the three hidden convolutions, as published by default.
            temperature: of the Gumbel-softmax in training.
            noise: draw Gumbel noise when it is used, too, as published; from torch's generator.
            seed: of the initial weights.

        Raises:
            InvalidInput: a value out of range.
        """
        super().__init__()
        self.fraction, self.channels, self.temperature = fraction, several(channels), temperature
        self.noise, self.seed = noise, seed
        if not 0 <= fraction <= 1 or temperature <= 0 or len(self.channels) != 3 or min(self.channels) < 1:
            raise InvalidInput(
                f"learned mask with fraction={fraction}, channels={self.channels}, temperature={temperature}.",
                next="fraction is in 0..1, channels are three positive numbers, temperature is above 0.",
            )
        self.estimator = nn.Sequential()

    def forward(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w) int64: the level of the best score in each cell of the lowest level."""
        found = self.logits(features, grid)
        if self.noise:
            found = found + _gumbel(found)
        return _on_fine_map(found.argmax(1), grid)

    def scores(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """How many levels above the lowest the mask expects to be kept."""
        probabilities = self.logits(features, grid).softmax(1)
        above = torch.arange(grid.max_level, -1, -1, device=features.device)
        return _on_fine_map(torch.einsum("blhw,l->bhw", probabilities, above.to(probabilities)), grid)

    def logits(self, features: Tensor, grid: Grid) -> Tensor:
        """(B, levels, ceil(h / side), ceil(w / side)): one score per level and cell of the lowest level.

        Raises:
            InvalidInput: features with other channels, or a network with other levels, than it was made for.
        """
        if not len(self.estimator):
            self._make(features.shape[1], grid.max_level + 1, grid.side, features)
        first, last, pool = self.estimator[0], self.estimator[7], self.estimator[4]
        made = (first.in_channels, last.out_channels)
        if made != (features.shape[1], grid.max_level + 1):
            raise InvalidInput(
                f"the learned mask was made for {made[0]} channels and {made[1]} levels.",
                where="mask learned",
                why=f"{features.shape[1]} channels enter the region, and maps have {grid.max_level + 1} levels.",
                next='use a new one, mask="learned", or the network it was trained with.',
            )
        assert isinstance(pool, nn.MaxPool2d)
        pool.kernel_size = pool.stride = grid.side  # known from the network, not from a file
        return self.estimator(features.to(next(self.estimator.parameters()).dtype)).float()

    def sample(self, logits: Tensor, grid: Grid, generator: torch.Generator | None = None) -> Tensor:
        """(B, levels, h, w) one-hot on the fine map, a Gumbel-softmax sample with straight-through gradient (Jang et
        al. 2017)."""
        return _on_fine_map(self._hardened(logits + _gumbel(logits, generator)), grid)

    def kept(self, logits: Tensor, grid: Grid, generator: torch.Generator | None = None) -> Tensor:
        """The share kept high, a scalar to hold against `fraction`, with straight-through gradient.

        Of the map that `forward` gives, which is what is used later; with a generator, of a Gumbel sample as published.
        """
        noisy = logits if generator is None else logits + _gumbel(logits, generator)
        shares = self._hardened(noisy).mean((0, 2, 3))
        sides = [grid.side ** (level / max(grid.max_level, 1)) for level in range(grid.max_level + 1)]
        worth = torch.tensor([side**-2 - sides[-1] ** -2 for side in sides], device=logits.device)
        return (shares * (worth / worth[0].clamp(min=1e-12)).to(shares)).sum()

    def _hardened(self, logits: Tensor) -> Tensor:
        """One-hot over axis 1, with the gradient of the softmax."""
        soft = (logits / self.temperature).softmax(1)
        hard = F.one_hot(soft.argmax(1), soft.shape[1]).movedim(-1, 1).to(soft)
        return hard + soft - soft.detach()

    @torch.inference_mode(False)  # made by a call in inference mode, it can be trained all the same
    def _make(self, inputs: int, levels: int, side: int, like: Tensor) -> None:
        """The estimator, with random weights; it begins at about its target."""
        a, b, c = self.channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            layers = nn.Sequential(
                *(nn.Conv2d(inputs, a, 3, padding=1), nn.ReLU()),
                *(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()),
                nn.MaxPool2d(side, side, ceil_mode=True),
                *(nn.Conv2d(b, c, 3, padding=1), nn.ReLU()),
                nn.Conv2d(c, levels, 3, padding=1),
            )
        share = min(max(self.fraction, 0.01), 0.99)
        with torch.no_grad():
            bias = torch.zeros(levels)
            bias[0] = math.log(share / (1 - share))
            layers[7].load_state_dict({"bias": bias}, strict=False)
        for name, layer in layers.named_children():
            self.estimator.add_module(name, layer)
        self.estimator.to(like.device)
        self.estimator.train(self.training)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Make the estimator that the tensors belong to, if there is none yet; its children are loaded after."""
        first, last = (state_dict.get(f"{prefix}estimator.{place}.weight") for place in (0, 7))
        if not len(self.estimator) and isinstance(first, Tensor) and isinstance(last, Tensor):
            self._make(first.shape[1], last.shape[0], 2, first)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise; of a generator on the CPU, so that it is the same on all devices."""
    device = generator.device if generator is not None else like.device
    uniform = torch.rand(like.shape, generator=generator, device=device).clamp(min=1e-20).to(like)
    return -(-uniform.log()).clamp(min=1e-20).log()


def _on_fine_map(cells: Tensor, grid: Grid) -> Tensor:
    """(..., h, w): each cell's value (..., ceil(h / side), ceil(w / side)) on its samples."""
    height, width = grid.size
    repeated = cells.repeat_interleave(grid.side, -2).repeat_interleave(grid.side, -1)
    return repeated[..., :height, :width]
