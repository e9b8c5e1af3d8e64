"""The plan of a network with a sampled input, and its multiply-accumulates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.following.equivalence import meta_copy
from cadsurgery.methods.report import MethodMacs, MethodPlan, in_words
from cadsurgery.support.meta_tensors import to_meta
from cadsurgery.support.torch_internals import tree_map


@dataclass(frozen=True, kw_only=True)
class ResampledPlan(MethodPlan):
    """How an image is sampled, and how the network's output is interpolated back.

    Attributes:
        sampler: `learned`, `labels`, `uniform`, or a mask.
        grid: number of locations per side.
        size: (height, width) of the sampled image.
        mode: how pixels are sampled.
        back: how scores are interpolated back.
        maps: (channels, height, width) of each output map that is interpolated back, on the sampled image.
        macs: MACs on the example of the sampler, the network, and the network without sampling.
    """

    sampler: str
    grid: int
    size: tuple[int, int]
    mode: str
    back: str
    maps: tuple[tuple[int, ...], ...]
    macs: tuple[int, int, int] = field(compare=False)

    def check(self) -> bool:
        """True if the size and the grid are valid and there are maps."""
        return min(*self.size, self.grid) >= 1 and bool(self.maps) and math.prod(self.size) >= 4

    def __str__(self) -> str:
        height, width = self.example_shape[2:]
        sampler, network, original = self.macs
        return "\n".join(
            (
                f"{self.size[0]} x {self.size[1]} pixels of {height} x {width}, {self.mode}, at a grid of "
                f"{self.grid} x {self.grid} locations by {self.sampler}",
                f"  the network gives {', '.join(map(in_words, self.maps))}, brought back to the image's size by "
                f"{self.back}",
                f"  MACs: {sampler:.3e} of the sampler, {network:.3e} of the network; {original:.3e} without sampling",
            )
        )


@dataclass(frozen=True, kw_only=True)
class ResampledMacs(MethodMacs):
    """MACs of a batch; `print` shows them.

    Attributes:
        sampler: MACs of the sampler.
        network: MACs of the network on the sampled image.
        original: MACs of the network on the image itself.
        size: (height, width) of the sampled image.
    """

    sampler: int
    network: int
    original: int
    size: tuple[int, int]
    told = ("total",)

    @property
    def total(self) -> int:
        """MACs of sampler and network."""
        return self.sampler + self.network

    @property
    def dense(self) -> int:
        """MACs of the network without sampling."""
        return self.original

    def lines(self) -> list[str]:
        """Return the total, its parts, and the MACs without sampling."""
        share = self.total / max(self.original, 1)
        return [
            f", sampled at {in_words(self.size)}: {self.total:.4e}, of them {self.sampler:.4e} the sampler's; "
            f"{self.original:.4e} without sampling, {share:.3f} of it"
        ]


def conv_macs(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Count the MACs of the Conv2d modules of a network on a call, without bias and without running it.

    Args:
        model: the network.
        args, kwargs: arguments of the call.
    """
    counted, counts = meta_copy(model), [0]

    def add(module: nn.Conv2d, inputs: tuple[Any, ...], output: Tensor) -> None:
        counts[0] += output[:, 0].numel() * module.weight.numel()

    for module in counted.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    with torch.no_grad():
        counted(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
    return counts[0]
