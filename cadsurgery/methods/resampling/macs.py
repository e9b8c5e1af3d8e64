"""Multiply-accumulates of a resampled network: of its sampler, of the network on what was sampled, and without."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cadsurgery.network.macs import meta_copy, to_meta
from cadsurgery.support.counting import describe_not_counted
from cadsurgery.support.errors import check_name

RULES = ("conv", "published")


@dataclass(frozen=True)
class ResampledMacs:
    """MACs of a batch; `print` shows them.

    Attributes:
        sampler: what finds the locations.
        network: on the sampled image.
        original: the network on the image itself.
        rule: how they were counted: `conv`, or `published`, see `conv_macs`.
        shape: of the image batch.
        size: (height, width) of the sampled image.
        not_counted: operations that may multiply and are in none of these numbers, because no rule says how much.
    """

    sampler: int
    network: int
    original: int
    rule: str
    shape: tuple[int, ...]
    size: tuple[int, int]
    not_counted: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Sampler and network."""
        return self.sampler + self.network

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"total": self.total}

    def __str__(self) -> str:
        shape, size = "x".join(map(str, self.shape)), "x".join(map(str, self.size))
        counts = (
            f"MACs on {shape}, sampled at {size} ({self.rule} rule): {self.total:.4e}, of them {self.sampler:.4e} the "
            f"sampler's; {self.original:.4e} without sampling, {self.total / max(self.original, 1):.3f} of it"
        )
        return "\n".join(filter(None, [counts, describe_not_counted(self.not_counted)]))


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
