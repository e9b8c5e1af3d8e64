"""Training what follows a fixed stem: its outputs are computed once per image and kept.

    body, cached = cs.body_of(net), cs.CachedStem(net, data)
    fit(body, cached, settings, output=folder)

The body shares the network's modules: what is trained there is trained here.
"""

from __future__ import annotations

import hashlib
import inspect
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from cadsurgery.data.datasets import is_labelled, sample_of
from cadsurgery.data.images import normalise
from cadsurgery.elements.lattice import describe
from cadsurgery.network.model import AdaptiveModel, pictures_for, whole_program
from cadsurgery.network.program import Program
from cadsurgery.support.errors import InvalidInput
from cadsurgery.surgery.trace import evaluating


def body_of(net: AdaptiveModel) -> AdaptiveModel:
    """The network from where its mask is asked for: `body(*stem_outputs(net, x))` is `net(x)`.

    Its modules, mask and state dict are those of the network, so that a body that was trained or saved is the network
    trained or saved.

    Raises:
        InvalidInput: no converted network, an optimised one, or one that only hosts a converted part.
    """
    program = _program(net)
    graph = _on_copies(program.halves.after)
    names = [node.name for node in graph.nodes if node.op == "placeholder"][1:]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    program = replace(program, graph=graph, signature=inspect.Signature(parameters), unchanged=None)
    body = AdaptiveModel(net, program, net.mask)
    body._constants, body.checks, body.source = net._constants, net.checks, net.source
    return body


def _on_copies(graph: fx.Graph) -> fx.Graph:
    """The graph on copies of its inputs: what follows a stem may work in place, and its outputs are used again."""
    copied, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs:
        copies[node] = copied.node_copy(node)
    for node in inputs[2:]:  # behind the masking and the image, which nothing changes
        copies[node] = copied.call_method("clone", (copies[node],))
    for node in graph.nodes:
        if node.op != "placeholder":
            copies[node] = copied.node_copy(node, copies.__getitem__)
    return copied


def stem_outputs(net: AdaptiveModel, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Return the arguments of the body: the image first, then the maps that enter the region; without gradients, in
    evaluation mode.

    Raises:
        InvalidInput: no network that `body_of` takes, or one whose stem passes on more than tensors.
    """
    program = _program(net)
    with torch.no_grad(), evaluating(net):
        values: tuple[Any, ...] = program.check_and_run(program.before, *args, **kwargs)
    for value in values:
        if not isinstance(value, Tensor):
            raise InvalidInput(
                f"the stem of this network passes on {describe(value)}.",
                why="only tensors can be kept for training.",
                next="train the whole network.",
            )
    return values


class _Seen(NamedTuple):
    """Outputs of the stem for one image.

    Attributes:
        values: (C, h, w) each, or vectors.
        types: that they had.
        sides: pixels of the image that a sample of each stands for; None of what is no map of the image.
        labels: (H, W).
    """

    values: tuple[Tensor, ...]
    types: tuple[torch.dtype, ...]
    sides: tuple[int | None, ...]
    labels: Tensor


class CachedStem:
    """A dataset of what enters the region, with labels: images seen once by the stem, then kept in memory.

    An item is (inputs of the body, labels). Whole images, or crops at fixed places; each also mirrored if `flip`.
    Colours cannot be jittered any more. A crop of a map has seen what lies around the crop.

    Attributes:
        name: of the data, and what was made of it.
        classes: of the data.
        is_labelled: likewise.
        bytes: of memory that is kept.
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
            data: items (image (3, H, W) in 0..1, labels (H, W)), or such images alone.
            flip: each image also mirrored.
            crop: (height, width) in pixels, multiples of the low output stride; default: whole images.
            places: number of crops downwards and across, evenly spread over the image from edge to edge.
            dtype: of the values that are kept, e.g. torch.float16 for half the memory; items have the network's.
                Default: as they are.

        Raises:
            InvalidInput: an image that is none, a crop that does not fit an image or the strides, or a network without
                a stem of its own.
        """
        program = _program(net)
        if min(places) < 1 or not (dtype is None or dtype.is_floating_point):
            raise InvalidInput(
                f"places={places}, dtype={dtype}.", next="give 1 place or more each way, and a floating type."
            )
        self._crop, self._stride = crop, net.plan.strides[-1]
        self._places = places if crop is not None else (1, 1)
        name = getattr(data, "name", type(data).__name__)
        options = {
            "crop": crop,
            "places": self._places,
            "flip": flip,
            "dtype": dtype,
            "stem": _digest(program),
        }
        self.name = f"{name}, cached with " + ", ".join(f"{key}={value}" for key, value in options.items())
        self.classes = getattr(data, "classes", ())
        self.is_labelled = is_labelled(data)
        self._seen = [
            _see(net, *pair, dtype)
            for index in range(len(data))
            for pair in _mirror(sample_of(data, index), index, flip)
        ]
        if crop is not None:
            for seen in self._seen:
                _check_crop(seen, crop, self._stride, name)

    @property
    def bytes(self) -> int:
        """Of memory that is kept, labels included."""
        return sum(value.nbytes for seen in self._seen for value in (*seen.values, seen.labels))

    def __len__(self) -> int:
        return len(self._seen) * self._places[0] * self._places[1]

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Inputs of the body for one image, (C, h, w) each, and labels (H, W)."""
        image, place = divmod(index, self._places[0] * self._places[1])
        seen = self._seen[image]
        parts: tuple[Tensor, ...] = (*seen.values, seen.labels)
        if self._crop is not None:
            size, steps = seen.labels.shape, divmod(place, self._places[1])
            corner = [
                self._stride * ((whole - part) // self._stride * step // max(count - 1, 1))
                for step, count, whole, part in zip(steps, self._places, size, self._crop, strict=True)
            ]
            sides = (*seen.sides, 1)
            parts = tuple(_cut(*pair, corner, self._crop) for pair in zip(parts, sides, strict=True))
        values = tuple(value.to(kind) for value, kind in zip(parts[:-1], seen.types, strict=True))
        return values, parts[-1]


def _digest(program: Program) -> str:
    """Of the weights of the stem: a run with another one is another run."""
    digest, names = hashlib.sha256(), program.names()
    for node in program.halves.before.nodes:
        if node.op in ("call_module", "get_attr"):
            value = operator.attrgetter(str(node.target))(names)
            tensors = value.state_dict().values() if isinstance(value, nn.Module) else [value]
            for tensor in tensors:
                digest.update(
                    tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                )
    return digest.hexdigest()[:12]


def _mirror(sample: tuple[Any, Any], index: int, flip: bool) -> list[tuple[Tensor, Tensor]]:
    """A sample, and its mirror image if `flip`."""
    image, labels = sample
    fits = isinstance(image, Tensor) and image.dim() == 3 and image.is_floating_point()
    if not fits or not isinstance(labels, Tensor) or labels.dim() != 2:
        raise InvalidInput(
            f"a sample is {describe(image)} with labels {describe(labels)}.",
            where=f"sample {index} of the data",
            next="give (image (3, H, W) float in 0..1, labels (H, W)).",
        )
    return [(image, labels), (image.flip(-1), labels.flip(-1))][: 1 + flip]


def _see(net: AdaptiveModel, image: Tensor, labels: Tensor, dtype: torch.dtype | None) -> _Seen:
    """Return the stem's outputs for an image."""
    shown = normalise(image, pictures_for(net)).unsqueeze(0).to(next(net.parameters()).device)
    values = stem_outputs(net, shown)
    stored = tuple(value[0].to("cpu", dtype or value.dtype) for value in values)
    sides = tuple(_side(value, labels.shape, net.plan.strides[-1]) for value in stored)
    return _Seen(stored, tuple(value.dtype for value in values), sides, labels)


def _check_crop(seen: _Seen, crop: tuple[int, int], stride: int, name: str) -> None:
    """Refuse a crop that cannot be cut from an image and its maps."""
    height, width = seen.labels.shape
    fits = all(c % stride == 0 and 0 < c <= n for c, n in zip(crop, (height, width), strict=True))
    maps = [(value, side) for value, side in zip(seen.values, seen.sides, strict=True) if value.dim() > 1]
    if not fits or any(side is None for _, side in maps):
        raise InvalidInput(
            f"crops of {crop[0]} x {crop[1]} cannot be cut from an image of {height} x {width} and its maps"
            f" of {', '.join(f'{value.shape[-2]} x {value.shape[-1]}' for value, _ in maps[1:])}.",
            where=f"data {name}",
            next=f"give multiples of {stride} that fit the image, or use whole images (crop 0).",
        )


def _side(value: Tensor, size: Sequence[int], stride: int) -> int | None:
    """How many pixels of an image of `size` a sample of a map (..., h, w) stands for: a divisor of the low stride."""
    shape = list(value.shape[-2:])
    sides = [side for side in range(1, stride + 1) if stride % side == 0]
    return next((side for side in sides if [-(-n // side) for n in size] == shape), None)


def _cut(value: Tensor, side: int | None, corner: Sequence[int], crop: Sequence[int]) -> Tensor:
    """The part of a map (..., h, w) that a crop in pixels covers; what is no map of the image as it is."""
    if side is None:
        return value
    top, left, high, wide = (number // side for number in (*corner, *crop))
    return value[..., top : top + high, left : left + wide]


def _program(net: nn.Module) -> Program:
    """The program of a network, once it is known to have a stem."""
    program = whole_program(net, "has no stem to keep")
    if program.is_fused:
        raise InvalidInput(
            "an optimised network is not taken apart.",
            why="what its stem passes on is fused.",
            next="take the network it was made from; cs.body_of(net).optimize() is fast too.",
        )
    return program
