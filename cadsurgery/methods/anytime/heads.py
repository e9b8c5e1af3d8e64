"""Heads: what predicts from the maps of an exit, as published (Liu et al. 2022)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

HeadKind = Literal["redesigned", "plain"]
MOST_STEPS = 3  # down and up again in a redesigned head
_SPREAD = 0.001  # of the weights at the start


class Resize(nn.Module):
    """Where a head doubles its resolution again: a `resize_like` of the map that was halved."""


def resize_like(x: Tensor, like: Tensor) -> Tensor:
    """A map at the height and width of another, bilinear; as it is where it has them."""
    return resize(x, (like.shape[2], like.shape[3]))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map at a size (height, width), bilinear."""
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def make_head(kind: HeadKind, channels: int, hidden: int, classes: int, steps: int) -> nn.Sequential:
    """The layers of a head, see `connect`.

    Args:
        kind: `plain`, a 1x1 convolution, batch norm, ReLU and a 1x1 classifier; or `redesigned`: computed at lower
            resolutions, `steps` times halved and doubled again.
        channels: of the map it reads.
        hidden: channels inside.
        classes: of what it gives.
        steps: of a redesigned one.
    """
    if kind == "plain":
        layers = [*_block(channels, hidden), nn.Conv2d(hidden, classes, 1)]
    else:
        layers = []
        for step in range(steps):
            # A last odd line is pooled alone, so that maps of any size have a half.
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
    """Nodes that call a head, and the one of its logits; they are put where the graph inserts.

    Args:
        graph: which is changed.
        path: name of the head.
        head: its layers.
        branches: what it reads: maps of several resolutions are resized to the first and concatenated.
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
