"""Training what follows a fixed stem: its outputs are computed once per image and kept.

    body, cached = cs.body_of(net), cs.CachedStem(net, data)
    fit(body, cached, settings, output=folder)

The body shares the network's modules: what is trained there is trained here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.errors import InvalidInput
from cadsurgery.hosted import HostedModel
from cadsurgery.images import normalise
from cadsurgery.lattice import describe
from cadsurgery.model import AdaptiveModel, OptimizedModel, evaluating
from cadsurgery.zoo import source_of


def body_of(net: AdaptiveModel) -> AdaptiveModel:
    """The network from where its mask is asked for: `body(*stem_outputs(net, x))` is `net(x)`.

    Its modules, mask and state dict are those of the network, so that a body that was trained or saved is the network
    trained or saved.

    Raises:
        InvalidInput: no converted network, or one that only hosts a converted part.
    """
    _check(net)
    cut = net.halved().cut
    names = [node.name for node in cut.after.nodes if node.op == "placeholder"][1:]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    surgery = replace(net._surgery, graph=cut.after, signature=inspect.Signature(parameters), unchanged=None)
    kind = OptimizedModel if isinstance(net, OptimizedModel) else AdaptiveModel
    body = kind.__new__(kind)
    AdaptiveModel.__init__(body, net, surgery, net.mask)
    if isinstance(net, OptimizedModel):
        vars(body).update({name: value for name, value in vars(net).items() if name in ("_counted",)})
    body.source, body.checks = source_of(net), net.checks
    return body


def stem_outputs(net: AdaptiveModel, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """What the body takes: the image first, then the maps that enter the region; without gradients, in evaluation
    mode.

    Raises:
        InvalidInput: no converted network, or one whose stem passes on more than tensors.
    """
    _check(net)
    with torch.no_grad(), evaluating(net):
        values = net.halved().before(net.names(), **net.bind(*args, **kwargs))
    for value in values:
        if not isinstance(value, Tensor):
            raise InvalidInput(
                f"the stem of this network passes on {describe(value)}.",
                why="only tensors can be kept for training.",
                next="train the whole network.",
            )
    return tuple(values)


class CachedStem:
    """A dataset of what enters the region, with labels: images seen once by the stem, then kept in memory.

    An item is (inputs of the body, labels). Whole images, or crops at fixed places; each also mirrored if `flip`.
    Colours cannot be jittered any more. A crop of a map has seen what lies around the crop.
    """

    def __init__(
        self,
        net: AdaptiveModel,
        data: Any,
        *,
        flip: bool = False,
        crop: tuple[int, int] | None = None,
        places: tuple[int, int] = (3, 3),
        dtype: torch.dtype | None = None,
    ) -> None:
        """Run the stem over the data.

        Args:
            net: a converted network; its stem is to stay as it is now.
            data: (image (3, H, W) in 0..1, labels (H, W)), all of one size unless they are used whole, one by one.
            flip: each image also mirrored.
            crop: (height, width) in pixels, multiples of the low output stride; default: whole images.
            places: number of crops downwards and across, evenly spread over the image.
            dtype: of the values that are kept, e.g. torch.float16 for half the memory; default: as they are.

        Raises:
            InvalidInput: a crop that does not fit the image or the strides, or a network without a stem of its own.
        """
        _check(net)
        self.crop, self.places = crop, places
        self.name, self.classes = getattr(data, "name", "cached"), getattr(data, "classes", ())
        source, device = source_of(net), next(net.parameters()).device
        self._kept: list[tuple[tuple[Tensor, ...], Tensor]] = []
        self._types: tuple[torch.dtype, ...] = ()
        for index in range(len(data)):
            image, labels = data[index]
            for mirrored in (False, True)[: 1 + flip]:
                shown = image.flip(-1) if mirrored else image
                values = stem_outputs(net, normalise(shown, source).unsqueeze(0).to(device))
                self._types = tuple(value.dtype for value in values)
                kept = tuple(value[0].to("cpu", dtype or value.dtype) for value in values)
                self._kept.append((kept, labels.flip(-1) if mirrored else labels))
        if crop is not None and self._kept:
            self._check_crop(crop, net.plan.strides[-1])

    def __len__(self) -> int:
        return len(self._kept) * (self.places[0] * self.places[1] if self.crop else 1)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Inputs of the body for one image, (C, h, w) each, and labels (H, W)."""
        across = self.places[0] * self.places[1] if self.crop else 1
        kept, labels = self._kept[index // across]
        values = tuple(value.to(kind) for value, kind in zip(kept, self._types, strict=True))
        if self.crop is None:
            return values, labels
        place = divmod(index % across, self.places[1])
        size = (labels.shape[0], labels.shape[1])
        corner = [
            self._corner(n, count, whole, part)
            for n, count, whole, part in zip(place, self.places, size, self.crop, strict=True)
        ]
        return tuple(_cut(value, size, corner, self.crop) for value in values), _cut(
            labels, size, corner, self.crop
        )

    def _corner(self, place: int, count: int, whole: int, part: int) -> int:
        steps = (whole - part) // self._step
        return self._step * (steps * place // max(count - 1, 1))

    def _check_crop(self, crop: tuple[int, int], stride: int) -> None:
        self._step = stride
        for kept, labels in self._kept:
            fits = all(c % stride == 0 and 0 < c <= n for c, n in zip(crop, labels.shape, strict=True))
            if not fits or any(value.dim() == 3 and labels.shape[0] % value.shape[1] for value in kept):
                raise InvalidInput(
                    f"crops of {crop[0]} x {crop[1]} from an image of {labels.shape[0]} x {labels.shape[1]}.",
                    where=f"data {self.name}",
                    next=f"give multiples of {stride} that fit the image, or crop=None for whole images.",
                )


def _cut(value: Tensor, size: Sequence[int], corner: Sequence[int], crop: Sequence[int]) -> Tensor:
    """The part of a map (..., h, w) of an image of `size` that a crop in pixels covers; anything else as it is."""
    if value.dim() < 2:
        return value
    scale = size[0] // value.shape[-2]
    top, left, high, wide = (number // scale for number in (*corner, *crop))
    return value[..., top : top + high, left : left + wide]


def _check(net: nn.Module) -> None:
    if not isinstance(net, AdaptiveModel) or isinstance(net, HostedModel):
        raise InvalidInput(
            f"{type(net).__name__} has no stem to keep.",
            why="it is no network that is adaptive as a whole.",
            next="pass what cs.adaptify(...) gave; of a detector, its part: net.part.",
        )
