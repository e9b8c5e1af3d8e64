"""Train a network after a fixed stem, whose outputs are computed once per image and cached.

    body, cached = cs.body_of(net), cs.CachedStem(net, data)
    fit(body, cached, settings, output=folder)

The body shares the network's modules, so training the body trains the network.
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

from cadsurgery.data.images import normalise
from cadsurgery.data.samples import check_data, is_labelled, sample_of
from cadsurgery.network.model import AdaptiveModel, pictures_for, whole_program
from cadsurgery.network.program import Program
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput
from cadsurgery.surgery.trace import evaluating


def body_of(net: AdaptiveModel) -> AdaptiveModel:
    """Return the part of a network after its mask is computed: `body(*stem_outputs(net, x))` equals `net(x)`.

    The body shares modules, mask and state dict with the network, so that training or saving the body trains or saves
    the network.

    Raises:
        InvalidInput: the network is not converted, is optimised, or only hosts a converted part.
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
    """Return the graph with copies of its inputs: later nodes may work in place, and cached inputs are reused."""
    copied, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs:
        copies[node] = copied.node_copy(node)
    for node in inputs[2:]:  # all but the masking and the image, which are never changed
        copies[node] = copied.call_method("clone", (copies[node],))
    for node in graph.nodes:
        if node.op != "placeholder":
            copies[node] = copied.node_copy(node, copies.__getitem__)
    return copied


def stem_outputs(net: AdaptiveModel, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Compute the arguments of the body: the image, then the maps that enter the region; in evaluation mode, without
    gradients.

    Raises:
        InvalidInput: `body_of` does not take the network, or its stem returns other values than tensors.
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


class _StemOutputs(NamedTuple):
    """Outputs of the stem for one image.

    Attributes:
        values: maps (C, h, w), or vectors.
        types: their original types.
        sides: image pixels per sample of each map; None for a value that is no map of the image.
        labels: labels of the image (H, W).
    """

    values: tuple[Tensor, ...]
    types: tuple[torch.dtype, ...]
    sides: tuple[int | None, ...]
    labels: Tensor


class CachedStem:
    """A dataset of stem outputs with labels: the stem runs once over all images, and its outputs stay in memory.

    An item is (inputs of the body, labels), for whole images or crops at fixed places, also mirrored with `flip`.
    Colours can no longer be jittered. Unlike for a cropped image, features of a crop depend on its surroundings.

    Attributes:
        name: name of the data, with the options of the cache.
        classes: classes of the data.
        is_labelled: True if the data has labels.
        bytes: memory of the cache in bytes.
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
            net: a converted network, whose stem must not change afterwards.
            data: items (image (3, H, W) in 0..1, labels (H, W)), or images only.
            flip: add the mirror image of each image.
            crop: (height, width) in pixels, multiples of the low output stride; default: whole images.
            places: number of crops along height and width, spread evenly over the image from edge to edge.
            dtype: type of the cached values, e.g. torch.float16 for half the memory; items keep the original type.
                Default: the original type.

        Raises:
            InvalidInput: an item is no image, a crop does not fit an image or the strides, or the network has no stem.
        """
        program = _program(net)
        check_data(data, "training")
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
        self._outputs = [
            _run_stem(net, *pair, dtype)
            for index in range(len(data))
            for pair in _mirror(sample_of(data, index), index, flip)
        ]
        if crop is not None:
            for outputs in self._outputs:
                _check_crop(outputs, crop, self._stride, name)

    @property
    def bytes(self) -> int:
        """The memory of the cache in bytes, labels included."""
        return sum(value.nbytes for sample in self._outputs for value in (*sample.values, sample.labels))

    def __len__(self) -> int:
        return len(self._outputs) * self._places[0] * self._places[1]

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the inputs of the body for one image, (C, h, w) each, and labels (H, W)."""
        image, place = divmod(index, self._places[0] * self._places[1])
        outputs = self._outputs[image]
        parts: tuple[Tensor, ...] = (*outputs.values, outputs.labels)
        if self._crop is not None:
            size, steps = outputs.labels.shape, divmod(place, self._places[1])
            corner = [
                self._stride * ((whole - part) // self._stride * step // max(count - 1, 1))
                for step, count, whole, part in zip(steps, self._places, size, self._crop, strict=True)
            ]
            sides = (*outputs.sides, 1)
            parts = tuple(_cut(*pair, corner, self._crop) for pair in zip(parts, sides, strict=True))
        values = tuple(value.to(kind) for value, kind in zip(parts[:-1], outputs.types, strict=True))
        return values, parts[-1]


def _digest(program: Program) -> str:
    """Return a hash of the stem's weights, which distinguishes training runs with different stems."""
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
    """Return a sample and, if `flip`, its mirror image."""
    image, labels = sample
    if not isinstance(image, Tensor):
        raise InvalidInput(
            f"a sample is {describe(image)}.",
            where=f"sample {index} of the data",
            why="the stem runs on images alone.",
            next="give (image (3, H, W) float in 0..1, labels (H, W)).",
        )
    return [(image, labels), (image.flip(-1), labels.flip(-1))][: 1 + flip]


def _run_stem(net: AdaptiveModel, image: Tensor, labels: Tensor, dtype: torch.dtype | None) -> _StemOutputs:
    """Return the stem's outputs for an image."""
    batch = normalise(image, pictures_for(net)).unsqueeze(0).to(next(net.parameters()).device)
    values = stem_outputs(net, batch)
    stored = tuple(value[0].to("cpu", dtype or value.dtype) for value in values)
    sides = tuple(_side(value, labels.shape, net.plan.strides[-1]) for value in stored)
    return _StemOutputs(stored, tuple(value.dtype for value in values), sides, labels)


def _check_crop(outputs: _StemOutputs, crop: tuple[int, int], stride: int, name: str) -> None:
    """Refuse a crop that cannot be cut from an image and its maps."""
    height, width = outputs.labels.shape
    fits = all(c % stride == 0 and 0 < c <= n for c, n in zip(crop, (height, width), strict=True))
    pairs = zip(outputs.values, outputs.sides, strict=True)
    maps = [(value, side) for value, side in pairs if value.dim() > 1]
    if not fits or any(side is None for _, side in maps):
        raise InvalidInput(
            f"crops of {crop[0]} x {crop[1]} cannot be cut from an image of {height} x {width} and its maps"
            f" of {', '.join(f'{value.shape[-2]} x {value.shape[-1]}' for value, _ in maps[1:])}.",
            where=f"data {name}",
            next=f"give multiples of {stride} that fit the image, or use whole images (crop 0).",
        )


def _side(value: Tensor, size: Sequence[int], stride: int) -> int | None:
    """Return the image pixels per sample of a map (..., h, w), a divisor of the low stride; None for other values."""
    shape = list(value.shape[-2:])
    sides = [side for side in range(1, stride + 1) if stride % side == 0]
    return next((side for side in sides if [-(-n // side) for n in size] == shape), None)


def _cut(value: Tensor, side: int | None, corner: Sequence[int], crop: Sequence[int]) -> Tensor:
    """Cut the part of a map (..., h, w) that a crop in pixels covers; a value that is no map is not changed."""
    if side is None:
        return value
    top, left, high, wide = (number // side for number in (*corner, *crop))
    return value[..., top : top + high, left : left + wide]


def _program(net: nn.Module) -> Program:
    """Return the program of a network; refuse networks without a stem."""
    program = whole_program(net, "has no stem to keep")
    if program.is_fused:
        raise InvalidInput(
            "an optimised network is not taken apart.",
            why="the outputs of its stem are fused with later operations.",
            next="take the network it was made from; cs.body_of(net).optimize() is fast too.",
        )
    return program
