"""Plan of a network whose input is sampled, and its multiply-accumulates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cadsurgery.methods.report import RULES, MethodMacs, MethodPlan, in_words
from cadsurgery.network.macs import meta_copy, to_meta
from cadsurgery.support.errors import check_name


@dataclass(frozen=True, kw_only=True)
class ResampledPlan(MethodPlan):
    """How an image is sampled, and what the network gives is brought back.

    Attributes:
        sampler: `learned`, `labels`, `uniform`, or a mask.
        grid: locations on a side.
        size: (height, width) of the sampled image.
        mode: how pixels are taken.
        back: how scores are brought back.
        maps: what the network returns of the sampled image that is brought back: (channels, height, width) of each.
        macs: on the example, of the sampler, the network, and the network without sampling.
    """

    sampler: str
    grid: int
    size: tuple[int, int]
    mode: str
    back: str
    maps: tuple[tuple[int, ...], ...]
    macs: tuple[int, int, int] = field(compare=False)

    def check(self) -> bool:
        """True if there is something to sample, and maps to bring back."""
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
        sampler: what finds the locations.
        network: on the sampled image.
        original: the network on the image itself.
        rule: how they were counted: `conv`, or `published`, see `conv_macs`.
        size: (height, width) of the sampled image.
    """

    sampler: int
    network: int
    original: int
    size: tuple[int, int]
    told = ("total",)

    @property
    def total(self) -> int:
        """Sampler and network."""
        return self.sampler + self.network

    @property
    def dense(self) -> int:
        """The network without sampling."""
        return self.original

    def lines(self) -> list[str]:
        """The total, its parts, and without sampling."""
        share = self.total / max(self.original, 1)
        return [
            f", sampled at {in_words(self.size)}: {self.total:.4e}, of them {self.sampler:.4e} the sampler's; "
            f"{self.original:.4e} without sampling, {share:.3f} of it"
        ]


def conv_macs(model: nn.Module, *args: Any, rule: str = "conv", **kwargs: Any) -> int:
    """MACs of the convolutions of a network's modules on a call, without bias; not run.

    Args:
        model: the network.
        args, kwargs: of the call.
        rule: `conv`, what is computed; or `published`: a depthwise convolution of dilation r is counted at every r-th
            row and column only, as the notebook beside the published code does by mistake.

    Raises:
        UnknownName: no such rule.
    """
    check_name("counting rule", rule, RULES)
    counted, counts = meta_copy(model), [0]

    def add(module: nn.Conv2d, inputs: tuple[Any, ...], output: Tensor) -> None:
        height, width = output.shape[2:]
        if rule == "published" and module.groups == module.in_channels > 1:
            height, width = (
                -(-side // step) for side, step in zip((height, width), module.dilation, strict=True)
            )
        counts[0] += output.shape[0] * height * width * module.weight.numel()

    for module in counted.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    with torch.no_grad():
        counted(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
    return counts[0]
