"""Inputs of masks besides image and features: labels, keypoints, outputs of first passes.

They are held in a context variable, so each thread or async task has its own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from cadsurgery.data.labels import as_classes
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.running import running


@dataclass(frozen=True, eq=False)
class CallContext:
    """Inputs of the masks evaluated now.

    Attributes:
        labels: (B, H, W) integers, one per image pixel; see `labelled`.
        points: for each image (n, 2) x and y in image pixels; see `keypoints_at`.
        first_passes: outputs of the network with everything kept at one level, by level.
        preview: output of the network as given on a smaller picture; None if no mask asked for it.
        masks: masks that replace the network's own during a call, by network; see `AdaptiveModel.masked`.
        limits: what masks compare with a threshold of the whole picture, by mask, where they are given parts of it.
        sizes: (height, width) of each image of a batch that is padded below and at the right; see `sized`.
    """

    labels: Tensor | None = None
    points: Sequence[Tensor] | None = None
    first_passes: Mapping[int, Any] = field(default_factory=dict)
    preview: Any = None
    masks: Mapping[nn.Module, object] = field(default_factory=dict)
    limits: Mapping[nn.Module, Tensor] = field(default_factory=dict)
    sizes: Sequence[tuple[int, int]] | None = None


_CALL = "with cadsurgery.masks.labelled(labels): net(image)"
_CONTEXT: ContextVar[CallContext] = ContextVar("cadsurgery", default=CallContext())  # noqa: B039 (it is frozen)


def call_context() -> CallContext:
    """Return the current inputs of this thread or task."""
    return _CONTEXT.get()


def _put(**values: Any) -> None:
    _CONTEXT.set(replace(_CONTEXT.get(), **values))


@contextmanager
def provided(**values: Any) -> Iterator[None]:
    """Set these values inside the `with` block and restore the previous values afterwards."""
    before = {name: getattr(_CONTEXT.get(), name) for name in values}
    _put(**values)
    try:
        yield
    finally:
        _put(**before)


def labelled(labels: Tensor) -> AbstractContextManager[None]:
    """Provide the labels of the images for the masks evaluated inside the `with` block, in this thread; may be
    nested.

        with labelled(labels):
            y = net(image, mask="trimap:width=33")

    Args:
        labels: (B, H, W) whole numbers, one per image pixel.

    Raises:
        InvalidInput: `labels` is not a tensor of whole numbers with three non-empty axes.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 3 or 0 in labels.shape:
        raise InvalidInput(
            f"the labels are {describe(labels)}.",
            next="give an integer tensor (batch, height, width): a class for every image pixel.",
        )
    return provided(labels=as_classes(labels))


def labels_of(image: Tensor, where: str) -> Tensor:
    """Return the labels of the call, (B, H, W) on the image's device.

    Raises:
        InvalidInput: there are no labels, or their size differs from the image's.
    """
    labels, expected = call_context().labels, (image.shape[0], *image.shape[2:])
    if labels is None:
        raise InvalidInput(
            f"there are no labels, which {where} looks at.",
            where=where,
            why="labels are not an input of the network.",
            next=f"write {_CALL}; on the command line: --labels FILE.",
        )
    if tuple(labels.shape) != expected:
        raise InvalidInput(
            f"the labels have shape {tuple(labels.shape)}, the image batch {tuple(image.shape)}.",
            where=where,
            next=f"give labels of shape {expected}: {_CALL}.",
        )
    return labels.to(image.device)


def keypoints_at(points: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Provide the keypoints of the images for the masks evaluated inside the `with` block, in this thread; may be
    nested.

        with keypoints_at([points]):
            y = net(image, mask="keypoints:detector=given,dilations=25/51/51")

    Args:
        points: for each image (n, 2) x and y in image pixels; n may differ between images, and may be 0.
    """
    return provided(points=points)


def sized(sizes: Sequence[tuple[int, int]] | Tensor | None) -> AbstractContextManager[None]:
    """Say how large the images of padded batches are, for the masks evaluated inside the `with` block, in this thread:
    each image gets the mask that it has alone, and nothing is kept in its padding. None takes batches as they come.

    Args:
        sizes: for each image (height, width) in pixels, from the top left corner.

    Raises:
        InvalidInput: `sizes` are no pairs of whole numbers above 0.
    """
    return provided(sizes=_as_sizes(sizes))


def _as_sizes(sizes: Any) -> list[tuple[int, int]] | None:
    if sizes is None:
        return None
    try:
        pairs = [(operator.index(height), operator.index(width)) for height, width in sizes]
    except (TypeError, ValueError):
        pairs = [(0, 0)]
    if any(length < 1 for pair in pairs for length in pair):
        raise InvalidInput(
            f"{describe(sizes)} are no sizes of images.",
            where="sizes",
            next="give (height, width) in pixels for each image: sizes=[(480, 640), (427, 640)].",
        )
    return pairs


def note_sizes(values: Any) -> None:
    """Take the sizes of images from what a network has made of them, for masks evaluated later in a `sized` block:
    an object with `image_sizes` beside its batch, as torchvision's detectors have; else nothing changes."""
    for value in values if isinstance(values, tuple | list) else (values,):
        sizes = getattr(value, "image_sizes", None)
        if isinstance(sizes, list) and isinstance(getattr(value, "tensors", None), Tensor):
            _put(sizes=_as_sizes(sizes))


def sizes_in(arguments: Mapping[str, Any]) -> list[tuple[int, int]] | None:
    """Return the sizes of images that the `pixel_mask` (B, H, W) of a call states, as image processors make it: ones
    from the top left corner, zeros in the padding. None without one, or if it has another form."""
    mask = arguments.get("pixel_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 3 or mask.is_meta or running.in_graph:
        return None
    down, across = (mask != 0).any(2), (mask != 0).any(1)
    heights, widths = down.sum(1).tolist(), across.sum(1).tolist()
    is_corner = int((mask != 0).sum()) == sum(h * w for h, w in zip(heights, widths, strict=True))
    starts = bool(down[:, 0].all()) and bool(across[:, 0].all())
    return list(zip(heights, widths, strict=True)) if is_corner and starts else None


def sizes_of(image: Tensor) -> Sequence[tuple[int, int]] | None:
    """Return the sizes of the images of a padded batch (B, C, H, W); None if no image is smaller than the batch.

    Raises:
        InvalidInput: there are more or fewer sizes than images, or one is larger than the batch.
    """
    sizes = call_context().sizes
    if sizes is None or running.in_graph:
        return None
    whole = (int(image.shape[2]), int(image.shape[3]))
    if len(sizes) != image.shape[0] or any(h > whole[0] or w > whole[1] for h, w in sizes):
        raise InvalidInput(
            f"the sizes {', '.join(f'{h} x {w}' for h, w in sizes)} do not fit a batch of {describe(image)}.",
            where="sizes",
            next="give (height, width) for each image of the batch, at most those of the batch.",
        )
    return sizes if any(size != whole for size in sizes) else None


def first_passes(outputs: Mapping[int, Any], preview: Any = None) -> AbstractContextManager[None]:
    """Provide the network's outputs at single levels, by level, and on a smaller picture, to masks inside the `with`
    block."""
    return provided(first_passes=outputs, preview=preview)


def first_pass_outputs(where: str) -> dict[int, Any]:
    """Return the outputs of the first passes by level, the finest level first.

    Raises:
        InvalidInput: there was no first pass.
    """
    outputs = call_context().first_passes
    if not outputs:
        raise _no_network("there was no first pass of a network to look at.", where)
    return dict(sorted(outputs.items()))


def first_pass_output(where: str) -> Any:
    """Return the output of the first pass at the lowest level.

    Raises:
        InvalidInput: there was no first pass.
    """
    return [*first_pass_outputs(where).values()][-1]


def preview_output(where: str) -> Any:
    """Return the output of the network on a smaller picture.

    Raises:
        InvalidInput: the network was not run on one.
    """
    output = call_context().preview
    if output is None:
        raise _no_network("there was no preview of a network to look at.", where)
    return output


def _no_network(problem: str, where: str) -> InvalidInput:
    """Return the error for a mask that looks at the network's output where there is none."""
    return InvalidInput(
        problem,
        where=where,
        why="the mask looks at the network's own output, so it works inside an adaptive network only.",
        next="call the network with this mask: net(image, mask=...).",
    )


@contextmanager
def masked(net: nn.Module, mask: object) -> Iterator[None]:
    """Use another mask for calls of `net` inside the `with` block, in this thread; None for the network's own."""

    def put(mask: object) -> None:
        others = {key: value for key, value in call_context().masks.items() if key is not net}
        _put(masks=others if mask is None else {**others, net: mask})

    before = call_context().masks.get(net)
    put(mask)
    try:
        yield
    finally:
        put(before)
