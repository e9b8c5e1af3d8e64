"""Heads that predict from the maps of an exit, as published (Liu et al. 2022)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, fx, nn

from cadsurgery.support.divergence import resize

HeadKind = Literal["redesigned", "plain"]
MOST_STEPS = 3  # most times that a redesigned head halves its resolution
_SPREAD = 0.001  # standard deviation of the initial weights


class Resize(nn.Module):
    """Marks where a head doubles its resolution; `connect` replaces it by `resize_like` the map before halving."""


def resize_like(x: Tensor, like: Tensor) -> Tensor:
    """Resize a map to the height and width of another, bilinear; no operation if they are equal."""
    return resize(x, like.shape[2:])


def make_head(kind: HeadKind, channels: int, hidden: int, classes: int, steps: int) -> nn.Sequential:
    """Create the layers of a head; `connect` adds them to a graph.

    Args:
        kind: `plain`, a 1x1 convolution, batch norm, ReLU and a 1x1 classifier; or `redesigned`, which halves the
            resolution `steps` times and doubles it again.
        channels: channels of the input map.
        hidden: channels inside the head.
        classes: number of output channels.
        steps: number of halvings of a redesigned head.
    """
    if kind == "plain":
        layers = [*_block(channels, hidden), nn.Conv2d(hidden, classes, 1)]
    else:
        layers = []
        for step in range(steps):
            # ceil_mode pools a last odd row or column alone, so maps of any size can be halved.
            layers += [nn.AvgPool2d(2, 2, ceil_mode=True), *_block(channels if step == 0 else hidden, hidden)]
        for _ in range(steps - 1):
            layers += [Resize(), *_block(hidden, hidden)]
        layers += [Resize(), nn.Conv2d(hidden, classes, 1)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=_SPREAD)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def _block(channels: int, hidden: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden, momentum=0.01), nn.ReLU()]


def connect(graph: fx.Graph, path: str, head: nn.Sequential, branches: list[fx.Node]) -> fx.Node:
    """Insert nodes that call a head, at the graph's insertion point; return the node of its logits.

    Args:
        graph: the graph, which is changed.
        path: qualified name of the head.
        head: its layers.
        branches: its input maps; maps of other resolutions are resized to the first and concatenated.
    """
    resized = [
        branch if branch is branches[0] else graph.call_function(resize_like, (branch, branches[0]))
        for branch in branches
    ]
    x = graph.call_function(torch.cat, (resized, 1)) if len(resized) > 1 else resized[0]
    halved: list[fx.Node] = []
    for place, layer in enumerate(head):
        if isinstance(layer, Resize):
            x = graph.call_function(resize_like, (x, halved.pop()))
            continue
        if isinstance(layer, nn.AvgPool2d):
            halved.append(x)
        x = graph.call_module(f"{path}.{place}", (x,))
    return x
