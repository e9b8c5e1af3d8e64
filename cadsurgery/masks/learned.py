"""The learned mask: a small network on the features that enter the region, trained together with the network."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.masks.filters import on_samples
from cadsurgery.masks.mask_options import SHARE, Allowed, between, check_options, several
from cadsurgery.masks.provider import FineMapSpec, MaskProvider, mask_provider
from cadsurgery.support.errors import InvalidInput

_INITIALISATION = threading.Lock()
_MAX_CHANNELS = 4096
_NO_CHANNELS = f"are not three numbers in 1..{_MAX_CHANNELS}."

Generators = torch.Generator | Sequence[torch.Generator] | None


class EstimatedMask(MaskProvider):
    """Base of masks that run a small network, `estimator`, on the features that enter the region.

    The estimator has four convolutions. It is created when it first sees features or when its weights are loaded.

    Args:
        channels: channels of the three hidden convolutions; at most 4096.
        seed: seed of the initial weights, 0 or more.
    """

    ignores_image = True
    kernels: ClassVar[tuple[int, ...]] = (3, 3, 3, 3)
    places: ClassVar[tuple[int, ...]]  # indices of the convolutions in the estimator
    per_channel: ClassVar[int] = 1  # input channels of the estimator per channel that enters the region
    first_level: ClassVar[int] = 0  # the finest level with an output of the estimator

    def __init__(self, channels: int | tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.channels, self.seed = several(channels), seed
        three = len(self.channels) == 3
        check_options(
            self.name,
            channels=(
                self.channels,
                Allowed(lambda n: three and 1 <= n <= _MAX_CHANNELS, _NO_CHANNELS, "128/64/64"),
            ),
            seed=(seed, between(0, 2**63 - 1, "0")),
        )
        self.estimator = nn.Sequential()

    def assemble(self, convolutions: list[nn.Conv2d], device: torch.device) -> nn.Sequential:
        """Build the estimator from four convolutions with random weights, which are still on the CPU."""
        raise NotImplementedError

    @property
    def dependence(self) -> str:
        """Name the missing weights, without which a graph cannot contain the mask; empty if the estimator exists."""
        return "" if len(self.estimator) else "weights that the first call of the network makes"

    def require(self, features: Tensor, grid: FineMapSpec) -> torch.dtype:
        """Create the estimator for these features if it does not exist yet, and return its dtype.

        Raises:
            InvalidInput: the estimator was made for another number of channels or levels.
        """
        channels, levels = features.shape[1], grid.max_level + 1
        if not len(self.estimator):
            self._make(channels * self.per_channel, levels - self.first_level, features.device)
        first, last = self.estimator[self.places[0]], self.estimator[self.places[-1]]
        assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)
        sizes = (first.in_channels // self.per_channel, last.out_channels + self.first_level)
        if sizes != (channels, levels):
            raise InvalidInput(
                f"the {self.name} mask was made for {sizes[0]} channels and {sizes[1]} levels.",
                where=f"mask {self.name}",
                why=f"{channels} channels enter the region, and maps have {levels} levels.",
                next=f'use a new one, mask="{self.name}", or the network it was trained with.',
            )
        return first.weight.dtype

    def _make(self, inputs: int, outputs: int, device: torch.device) -> None:
        """Create the estimator with random weights.

        Only the first thread creates it. Its parameters can be trained, even if torch is in inference mode.
        """
        with _INITIALISATION, torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            if len(self.estimator):
                return
            # Seed the CPU generator only: fork_rng restores no other one here.
            torch.default_generator.manual_seed(self.seed)
            sizes = pairwise((inputs, *self.channels, outputs))
            convolutions = [
                nn.Conv2d(*size, kernel, padding=kernel // 2, device="cpu")
                for size, kernel in zip(sizes, self.kernels, strict=True)
            ]
            layers = self.assemble(convolutions, device)
            # Assigned last: a thread that finds an estimator assumes that everything else exists.
            self.estimator = layers.to(device).train(self.training)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Create the estimator for the tensors if it does not exist yet; its children are loaded afterwards."""
        stored: list[Any] = [state_dict.get(f"{prefix}estimator.{place}.weight") for place in self.places]
        weights = [weight for weight in stored if isinstance(weight, Tensor) and weight.dim() == 4]
        if not len(self.estimator) and len(weights) == 4:
            sizes = (weights[0].shape[1], *self.channels, weights[-1].shape[0])
            # Tensors that contradict the options create no estimator, and are refused as unexpected keys.
            shapes = [
                (after, before, kernel, kernel)
                for (before, after), kernel in zip(pairwise(sizes), self.kernels, strict=True)
            ]
            if [tuple(weight.shape) for weight in weights] == shapes:
                self._make(sizes[0], sizes[-1], weights[0].device)
        super()._load_from_state_dict(state_dict, prefix, *args)


@mask_provider(
    "learned",
    source="Hesse et al., CVPRW 2023, supplementary; reference code ad_e2e_resnet.py",
    of_recipes=True,
)
class LearnedMask(EstimatedMask):
    """Keep high where an estimator, trained with `cadsurgery finetune --set objective=blend`, says so.

    Two 3x3 convolutions, max-pooling to the cells of the lowest level, and two more convolutions give one score per
    level and cell; the level with the best score is used. The estimator is created when it first sees features.

    Args:
        fraction: share to keep high that training aims at, 0..1. With more than two levels it is the share of a
            two-level map with the same number of elements. The published gamma is 1 - fraction.
        channels: channels of the three hidden convolutions, as published by default; at most 4096.
        temperature: temperature of the Gumbel-softmax in training, above 0.
        noise: draw Gumbel noise, from torch's generator, in inference too, as published.
        seed: seed of the initial weights, 0 or more.

    Raises:
        InvalidInput: a value is out of range.
    """

    places = (0, 2, 5, 7)

    def __init__(
        self,
        fraction: float = 0.5,
        channels: int | tuple[int, ...] = (128, 64, 64),
        temperature: float = 1.0,
        noise: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(channels, seed)
        self.fraction, self.temperature, self.noise = fraction, temperature, noise
        check_options(
            "learned",
            fraction=(fraction, SHARE),
            temperature=(temperature, Allowed(lambda value: value > 0, "is not above 0.", "1")),
        )
        self.centre: Tensor
        self.spread: Tensor
        self.offset: Tensor
        self._register_statistics(2)

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return (B, h, w) int64: the level of the best score in each cell of the lowest level."""
        logits = self.logits(features, grid)
        if self.noise:
            logits = logits + _gumbel(logits)
        return on_samples(logits.argmax(1), grid.side, grid.size)

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the expected number of levels above the lowest."""
        probabilities = self.logits(features, grid).softmax(1)
        above = torch.arange(grid.max_level, -1, -1, device=features.device)
        expected = torch.einsum("blhw,l->bhw", probabilities, above.to(probabilities))
        return on_samples(expected, grid.side, grid.size)

    def logits(self, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Compute one score per level and cell of the lowest level: (B, levels, ceil(h / side), ceil(w / side)).

        Raises:
            InvalidInput: as `estimate`.
        """
        estimates = self.estimate(features, grid)
        centre, spread, offset = (value.to(estimates) for value in (self.centre, self.spread, self.offset))
        return _raise_high((estimates - centre[:, None, None]) / spread, offset)

    def balanced_logits(self, features: Tensor, grid: FineMapSpec, rate: float = 0.1) -> Tensor:
        """Compute `logits` with the statistics of this batch, so that its map keeps the target fraction; for
        training.

        Scores are normalised over the batch, and level 0 is raised until the share kept is the fraction. So the
        estimator learns where to keep, not how much. As in batch norm, running statistics follow at the given rate;
        `logits` uses them. They are buffers, equal in all processes of a distributed run.

        Raises:
            InvalidInput: as `estimate`.
        """
        estimates = self.estimate(features, grid)
        centre = estimates.mean((0, 2, 3))
        estimates = estimates - centre[:, None, None]
        spread = (estimates[:, 0] - estimates[:, -1]).std(correction=0).clamp(min=1e-6) / _SHARPNESS
        estimates = estimates / spread
        with torch.no_grad():
            offset = self._offset([(estimates, grid)])
            for buffer, value in ((self.centre, centre), (self.spread, spread), (self.offset, offset)):
                buffer.lerp_(torch.as_tensor(value).to(buffer), rate)
        return _raise_high(estimates, offset)

    @torch.no_grad()
    def balance(self, logits: Sequence[tuple[Tensor, FineMapSpec]]) -> float:
        """Shift the score of level 0 permanently, so that the maps of these `logits` keep the target fraction on
        average.

        Returns:
            The share that they keep afterwards, averaged over the images.
        """
        offset = self._offset(logits)
        self.offset += offset
        return self._kept_of_all(logits, offset)

    def _kept_of_all(self, images: Sequence[tuple[Tensor, FineMapSpec]], offset: float) -> float:
        shares = [float(self.kept(_raise_high(logits, offset), grid)) for logits, grid in images]
        return sum(shares) / len(shares)

    def _offset(self, images: Sequence[tuple[Tensor, FineMapSpec]]) -> float:
        """Find the offset of level 0's score at which the target fraction is kept, by bisection."""
        reach = max(float(logits.max() - logits.min()) for logits, _ in images) + 1.0
        low, high = -reach, reach
        for _ in range(30):
            middle = (low + high) / 2
            if self._kept_of_all(images, middle) < self.fraction:
                low = middle
            else:
                high = middle
        return high + 1e-5 * reach  # so that rounding cannot change a cell

    def estimate(self, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the raw scores of the estimator: (B, levels, ceil(h / side), ceil(w / side)).

        Raises:
            InvalidInput: the estimator was made for another number of channels or levels.
        """
        values = features.to(self.require(features, grid))
        for layer in self.estimator:
            pools = isinstance(layer, nn.Identity)
            values = F.max_pool2d(values, grid.side, ceil_mode=True) if pools else layer(values)
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def sample(self, logits: Tensor, grid: FineMapSpec, generator: Generators = None) -> Tensor:
        """Draw a one-hot Gumbel-softmax sample (B, levels, h, w) on the fine map, with straight-through gradient.

        See Jang et al. 2017. Noise comes from torch's generator, from `generator`, or from one generator per image.
        """
        return on_samples(self._harden(logits + _gumbel(logits, generator)), grid.side, grid.size)

    def kept(self, logits: Tensor, grid: FineMapSpec, generator: Generators = None) -> Tensor:
        """Compute the share kept high, a scalar comparable with `fraction`, with straight-through gradient.

        It is the share of the map that `forward` returns; with generators, of a Gumbel sample, as published.
        """
        noisy = logits if generator is None else logits + _gumbel(logits, generator)
        shares = self._harden(noisy).mean((0, 2, 3))
        sides = [grid.side ** (level / max(grid.max_level, 1)) for level in range(grid.max_level + 1)]
        worth = shares.new_tensor([side**-2 - sides[-1] ** -2 for side in sides])
        return (shares * worth / worth[0]).sum()

    def _harden(self, logits: Tensor) -> Tensor:
        """Return the one-hot maximum over axis 1, with the gradient of the softmax."""
        soft = (logits / self.temperature).softmax(1)
        hard = F.one_hot(soft.argmax(1), soft.shape[1]).movedim(-1, 1).to(soft)
        return hard + soft - soft.detach()

    def assemble(self, convolutions: list[nn.Conv2d], device: torch.device) -> nn.Sequential:
        """Build the estimator; its initial bias keeps about the target share. `nn.Identity` marks the max-pooling."""
        first, two, three, last = convolutions
        share = min(max(self.fraction, 0.01), 0.99)
        start = torch.tensor([math.log(share / (1 - share)), *(0.0,) * (last.out_channels - 1)], device="cpu")
        last.bias = nn.Parameter(start)
        self._register_statistics(last.out_channels, device)
        return nn.Sequential(first, nn.ReLU(), two, nn.ReLU(), nn.Identity(), three, nn.ReLU(), last)

    def _register_statistics(self, levels: int, device: torch.device | None = None) -> None:
        """Register running statistics that leave the scores unchanged."""
        self.register_buffer("centre", torch.zeros(levels, device=device))
        self.register_buffer("spread", torch.ones((), device=device))
        self.register_buffer("offset", torch.zeros((), device=device))


# Standard deviation of the difference between the first and the last level's scores in training.
_SHARPNESS = 3.0


def _raise_high(logits: Tensor, offset: Tensor | float) -> Tensor:
    """Add an offset to the score of level 0."""
    return torch.cat([logits[:, :1] + offset, logits[:, 1:]], 1)


def _gumbel(like: Tensor, generator: Generators = None) -> Tensor:
    """Draw standard Gumbel noise; from a generator on the CPU it is the same on all devices."""
    if isinstance(generator, Sequence):
        return torch.cat([_gumbel(*pair) for pair in zip(like.split(1), generator, strict=True)])
    device = generator.device if generator is not None else like.device
    uniform = (
        torch.rand(like.shape, generator=generator, device=device, dtype=torch.float32)
        .clamp(min=1e-20)
        .to(like)
    )
    return -(-uniform.log()).clamp(min=1e-20).log()
