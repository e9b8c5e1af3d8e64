"""Inputs of masks besides image and features: labels, keypoints, outputs of first passes.

They are held in a context variable, so each thread or async task has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from cadsurgery.data.labels import as_classes
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class CallContext:
    """Inputs of the masks evaluated now.

    Attributes:
        labels: (B, H, W) integers, one per image pixel; see `labelled`.
        points: for each image (n, 2) x and y in image pixels; see `keypoints_at`.
        first_passes: outputs of the network with everything kept at one level, by level.
        preview: output of the network as given on a smaller picture; None if no mask asked for it.
        masks: masks that replace the network's own during a call, by network; see `AdaptiveModel.masked`.
    """

    labels: Tensor | None = None
    points: Sequence[Tensor] | None = None
    first_passes: Mapping[int, Any] = field(default_factory=dict)
    preview: Any = None
    masks: Mapping[nn.Module, object] = field(default_factory=dict)


_CALL = "with cadsurgery.masks.labelled(labels): net(image)"
_CONTEXT: ContextVar[CallContext] = ContextVar("cadsurgery", default=CallContext())  # noqa: B039 (it is frozen)


def call_context() -> CallContext:
    """Return the current inputs of this thread or task."""
    return _CONTEXT.get()


def _put(**values: Any) -> None:
    _CONTEXT.set(replace(_CONTEXT.get(), **values))


@contextmanager
def _within(**values: Any) -> Iterator[None]:
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
    return _within(labels=as_classes(labels))


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
    return _within(points=points)


def first_passes(outputs: Mapping[int, Any], preview: Any = None) -> AbstractContextManager[None]:
    """Provide the network's outputs at single levels, by level, and on a smaller picture, to masks inside the `with`
    block."""
    return _within(first_passes=outputs, preview=preview)


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
