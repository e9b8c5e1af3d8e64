"""Train what comes after a fixed stem, whose outputs are computed once per image and stay in memory."""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch
from torch import Tensor

import cadsurgery as cs
from cadsurgery.data.images import normalise
from cadsurgery.following.trace import evaluating
from cadsurgery.network.model import pictures_for


def body_of(net: cs.AdaptiveModel) -> cs.AdaptiveModel:
    """Return the part of a network after its mask is computed: `body(*stem_outputs(net, x))` equals `net(x)`.

    The body shares modules and mask with the network, so that training or saving the body trains or saves the network.
    No operation behind the stem may change its outputs in place.
    """
    graph = net.program.halves.after
    names = [node.name for node in graph.nodes if node.op == "placeholder"][1:]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    program = replace(net.program, graph=graph, signature=inspect.Signature(parameters), unchanged=None)
    body = cs.AdaptiveModel(net, program, net.mask)
    body._constants, body.checks, body.source = net._constants, net.checks, net.source
    return body


def stem_outputs(net: cs.AdaptiveModel, image: Tensor) -> tuple[Tensor, ...]:
    """Compute the arguments of the body: the image, then the maps that enter the region."""
    with torch.no_grad(), evaluating(net):
        values: tuple[Tensor, ...] = net.program.before(net.program.bind(image))
    return values


class CachedStem:
    """A dataset of the body's inputs (C, h, w) with labels: of whole images, or of crops and their mirror images."""

    def __init__(
        self,
        net: cs.AdaptiveModel,
        data: cs.SegmentationData,
        crop: tuple[int, int] | None = None,
        places: tuple[int, int] = (1, 1),
    ) -> None:
        """Run the stem over the data.

        Args:
            net: a converted network, whose stem must not change afterwards.
            data: images (3, H, W) in 0..1 with labels (H, W).
            crop: (height, width) in pixels, multiples of the low output stride; default: whole images.
            places: number of crops along height and width, spread evenly over the image from edge to edge.
        """
        self.name, self.classes, self.is_labelled = f"{data.name}, stem fixed", data.classes, True
        self._crop, self._places, self._stride = crop, places, net.plan.strides[-1]
        self._items: list[tuple[tuple[Tensor, ...], Tensor]] = []
        for index in range(len(data)):
            image, labels = data[index]
            for turned, own in ((image, labels), (image.flip(-1), labels.flip(-1)))[
                : 1 if crop is None else 2
            ]:
                batch = normalise(turned, pictures_for(net)).unsqueeze(0)
                self._items.append((tuple(value[0] for value in stem_outputs(net, batch)), own))

    def __len__(self) -> int:
        return len(self._items) * self._places[0] * self._places[1]

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
        image, place = divmod(index, self._places[0] * self._places[1])
        values, labels = self._items[image]
        if self._crop is None:
            return values, labels
        size, steps = labels.shape, divmod(place, self._places[1])
        top, left = (
            self._stride * ((whole - part) // self._stride * step // max(count - 1, 1))
            for step, count, whole, part in zip(steps, self._places, size, self._crop, strict=True)
        )

        def cut(value: Tensor) -> Tensor:
            side = -(-size[0] // value.shape[-2])  # pixels per sample of the map
            high, wide = (part // side for part in self._crop or ())
            return value[..., top // side : top // side + high, left // side : left // side + wide]

        return tuple(map(cut, values)), cut(labels)
