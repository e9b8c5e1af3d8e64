"""What a network's forward keeps for its next call, such as grids, anchors or position codes, made once for each size.

    if self.grid is None or self.grid.shape[-2:] != y.shape[-2:]:
        self.grid = make_grid(y)

A graph holds no such values. While the network is traced they are forgotten, so that the graph computes them in each
call from the sizes. Which values these are is found by experiment: calls with images of two sizes replace them, and
without them a call gives the same outputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, product
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.following.arguments import Arguments, change_images, crop, run_forward
from cadsurgery.following.facts import scale
from cadsurgery.following.guards import line_of
from cadsurgery.following.module_state import CallCaches, Entry, State
from cadsurgery.following.trace import CannotFollow, evaluating
from cadsurgery.support.divergence import tensors_of

# Each way to forget costs a call of the network.
_MOST_CHOICES = 12


def find_caches(model: nn.Module, calls: Iterable[Arguments]) -> CallCaches:
    """Find what a network's forward keeps, by calls with images of two sizes.

    Args:
        model: the network; it holds afterwards what it did.
        calls: arguments of calls, of which the network accepts some.

    Raises:
        CannotFollow: what it returns depends on the pixels of earlier calls.
    """
    with torch.no_grad(), evaluating(model):
        state = State(model)
        try:
            for call in calls:
                smaller = _other_pixels(call, 2)
                if _run(model, smaller) is not None:
                    return _with_written(state, _experiment, model, state, call, smaller)
                if _run(model, call) is not None:
                    return _with_written(state, _experiment, model, state, call, _other_pixels(call, 1))
            return CallCaches(state)
        finally:
            state.restore()


def _with_written(state: State, experiment: Callable[..., CallCaches], *args: Any) -> CallCaches:
    """Return what a network keeps, with the attributes that calls change."""
    written = state.written()
    return replace(experiment(*args), written=written)


def _experiment(model: nn.Module, state: State, call: Arguments, other: Arguments) -> CallCaches:
    """Find out how to forget what calls replace; `other` has other pixels than `call`, and may be of another size."""
    if not state.changes():
        return _find_remade(model, state, other)
    _run(model, other)
    replaced = {(id(entry.container), entry.key): entry.value for entry in state.changes()}
    outputs = _run(model, call)
    if outputs is None:
        return CallCaches(state)
    entries = state.changes()
    values = [(entry, entry.value, replaced.get((id(entry.container), entry.key))) for entry in entries]
    for choice in _choices(values):
        caches = CallCaches(state, choice)
        if _same(_run_after(caches.forget, model, call), outputs):
            return caches
    if not _same(_run_after(state.restore, model, call), outputs):
        raise _depends_on_earlier_calls(model, CallCaches(state), entries[0], call)
    return CallCaches(state)


def _find_remade(model: nn.Module, state: State, call: Arguments) -> CallCaches:
    """Find what calls leave as it is, but make again where it is missing, such as a grid that is cut to the size."""
    remade: list[Callable[[], None]] = []
    candidates, outputs = state.tensors()[:_MOST_CHOICES], None
    for entry in candidates:
        state.restore()
        outputs = _run(model, call) if outputs is None else outputs
        caches = CallCaches(state, (partial(entry.put, None),))
        ours = _run_after(caches.forget, model, call)
        if outputs is None or ours is None or entry.value is None:
            continue
        if not _same(ours, outputs):
            raise _depends_on_earlier_calls(model, caches, entry, call)
        remade += caches.forgetting
    return CallCaches(state, tuple(remade))


def _depends_on_earlier_calls(
    model: nn.Module, caches: CallCaches, entry: Entry, call: Arguments
) -> CannotFollow:
    caches.forget()
    return CannotFollow(
        f"{type(model).__name__} keeps what its next call depends on.",
        where=_line_that_replaces(entry, partial(_run, model, call)),
        why=f"its forward assigns {entry.place}, on which what it returns in the next call depends: after other images "
        "it returns something else.",
        next="convert the part that is a plain CNN and put it back, or let the network take and "
        "return what it keeps.",
    )


def _other_pixels(call: Arguments, part: int) -> Arguments:
    """Return a call with other pixels: of an image turned and darkened, and with a part of its height and width."""

    def change(image: Tensor) -> Tensor:
        height, width = (_part_of(length, part) for length in image.shape[-2:])
        image = image.flip(-1, -2)
        return crop(image / 2 if image.is_floating_point() else image, height, width)

    return change_images(call, change)


def _part_of(length: int, part: int) -> int:
    """Return a part of a length, rounded to a multiple of 32 if the length itself is one."""
    step = next(step for step in (32, 16, 8, 4, 1) if length % step == 0)
    return max(length // part // step, 1) * step


def _run(model: nn.Module, call: Arguments) -> list[Tensor] | None:
    """Return the outputs of a call; None if the network raises an error."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return [output.clone() for output in tensors_of(run_forward(model, call))]
        except Exception:  # the network may refuse a size with any error
            return None


def _run_after(prepare: Callable[[], None], model: nn.Module, call: Arguments) -> list[Tensor] | None:
    prepare()
    return _run(model, call)


def _same(ours: list[Tensor] | None, theirs: list[Tensor]) -> bool:
    """True if two calls give the same, up to rounding in another order."""
    if ours is None or len(ours) != len(theirs):
        return False
    return all(
        a.shape == b.shape and torch.allclose(a, b, 1e-5, 1e-5 * scale(b), equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )


# -- ways to forget --------------------------------------------------------------------------------------------


def _choices(values: list[tuple[Entry, Any, Any]]) -> Iterator[tuple[Callable[[], None], ...]]:
    """Yield ways to forget entries: all in the same way, then each type of value in a way of its own.

    Args:
        values: the entries, each with its values after calls with images of two sizes.
    """
    types = list(dict.fromkeys(type(value) for _, value, _ in values))
    ways = (_set_to_none, _remove, _set_to_empty)
    same = [(way,) * len(types) for way in ways]
    for chosen in islice(dict.fromkeys((*same, *product(ways, repeat=len(types)))), _MOST_CHOICES):
        way_of = dict(zip(types, chosen, strict=True))
        yield tuple(partial(way_of[type(value)], entry, value, other) for entry, value, other in values)


def _set_to_none(entry: Entry, value: Any, other: Any) -> None:
    entry.remove(value) if entry.is_new_item else entry.put(None)


def _remove(entry: Entry, value: Any, other: Any) -> None:
    entry.remove(value)


def _set_to_empty(entry: Entry, value: Any, other: Any) -> None:
    entry.remove(value) if entry.is_new_item else entry.put(_emptied(value, other))


def _emptied(value: Any, other: Any) -> Any:
    """Return a value of the same type that fits no size: a tensor without elements, zeros, or None."""
    if isinstance(value, Tensor):
        alike = isinstance(other, Tensor) and other.dim() == value.dim()
        pairs = zip(value.shape, other.shape if alike else value.shape, strict=True)
        lengths = [length if length == of_other else 0 for length, of_other in pairs]
        return value.new_empty(lengths if 0 in lengths else [0] * value.dim())
    if isinstance(value, (bool, int, float)):
        return type(value)(0)
    if type(value) in (tuple, list, torch.Size):
        others = other if type(other) is type(value) and len(other) == len(value) else value
        return type(value)([_emptied(*pair) for pair in zip(value, others, strict=True)])
    return None


# -- where a value is kept -------------------------------------------------------------------------------------


def _line_that_replaces(entry: Entry, run: Callable[[], Any]) -> str:
    """Return the line of the network's code that replaces a value while it runs."""
    place, last, value = "", "", entry.value

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal place, last
        if not place and entry.value is not value:
            place = last
        last = line_of(frame) or last
        return watch

    tracing = sys.gettrace()
    sys.settrace(watch)
    try:
        run()
    finally:
        sys.settrace(tracing)
    return place
