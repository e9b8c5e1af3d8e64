"""Inputs of masks besides image and features: one value for each call, for this thread or async task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from cadsurgery.elements.lattice import describe
from cadsurgery.support.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class CallContext:
    """Inputs of the masks that are asked now.

    Attributes:
        labels: (B, H, W) integers, one per image pixel; see `labelled`.
        points: of each image, (n, 2) x and y in image pixels; see `keypoints_at`.
        first_passes: what the network gave with everything at a level, by level.
        masks: of networks that have another one for the calls of now; see `AdaptiveModel.masked`.
    """

    labels: Tensor | None = None
    points: Sequence[Tensor] | None = None
    first_passes: Mapping[int, Any] = field(default_factory=dict)
    masks: Mapping[nn.Module, object] = field(default_factory=dict)


_CONTEXT: ContextVar[CallContext] = ContextVar("cadsurgery", default=CallContext())  # noqa: B039 (it is frozen)


def call_context() -> CallContext:
    """Return the inputs given last, in this thread or task."""
    return _CONTEXT.get()


def _put(**values: Any) -> None:
    _CONTEXT.set(replace(_CONTEXT.get(), **values))


@contextmanager
def _within(**values: Any) -> Iterator[None]:
    """These values within; afterwards those from before, of the same names."""
    before = {name: getattr(_CONTEXT.get(), name) for name in values}
    _put(**values)
    try:
        yield
    finally:
        _put(**before)


def labelled(labels: Tensor) -> AbstractContextManager[None]:
    """Give the labels of the images that are masked within, in this thread; may be nested.

        with labelled(labels):
            y = net(image, mask="trimap:width=33")

    Args:
        labels: (B, H, W) integers, one per image pixel.

    Raises:
        InvalidInput: no such tensor.
    """
    wrong = not isinstance(labels, Tensor) or labels.dim() != 3 or 0 in labels.shape
    if wrong or labels.is_floating_point() or labels.is_complex():
        raise InvalidInput(
            f"the labels are {describe(labels)}.",
            next="give an integer tensor (batch, height, width): a class for every image pixel.",
        )
    return _within(labels=labels)


def keypoints_at(points: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Give the keypoints of the images that are masked within, in this thread; may be nested.

        with keypoints_at([points]):
            y = net(image, mask="keypoints:detector=given,dilations=25/51/51")

    Args:
        points: of each image, (n, 2) x and y in image pixels; n may differ, and may be 0.
    """
    return _within(points=points)


def first_passes(outputs: Mapping[int, Any]) -> AbstractContextManager[None]:
    """Keep the network's outputs with everything at a level, by level, for the masks asked within, in this thread."""
    return _within(first_passes=outputs)


def first_pass_outputs(where: str) -> dict[int, Any]:
    """Return the outputs of first passes by level, the finest first.

    Raises:
        InvalidInput: there was none.
    """
    outputs = call_context().first_passes
    if not outputs:
        raise InvalidInput(
            "there was no first pass of a network to look at.",
            where=where,
            why="it looks at the network's own output, so it works inside an adaptive network only.",
            next="call the network with this mask: net(image, mask=...).",
        )
    return dict(sorted(outputs.items()))


def first_pass_output(where: str) -> Any:
    """Return the output of the first pass at the lowest level.

    Raises:
        InvalidInput: there was none.
    """
    return [*first_pass_outputs(where).values()][-1]


@contextmanager
def masked(net: nn.Module, mask: object) -> Iterator[None]:
    """Another mask for the calls of a network made within, in this thread; None leaves its own."""

    def put(mask: object) -> None:
        others = {key: value for key, value in call_context().masks.items() if key is not net}
        _put(masks=others if mask is None else {**others, net: mask})

    before = call_context().masks.get(net)
    put(mask)
    try:
        yield
    finally:
        put(before)
