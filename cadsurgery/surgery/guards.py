"""Decisions that a network takes in Python while it is traced: each is checked in every later call.

A graph holds one way through a network. Where Python asked for a size, `if h != skip.shape[2]:`, the graph gets a
node that compares the answer with that of the conversion.
"""

from __future__ import annotations

import linecache
import operator
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx

from cadsurgery.support.errors import InvalidInput

_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
_LIBRARIES = tuple(
    f"{Path(str(module.__file__)).parent}{os.sep}" for module in (torch, sys.modules["cadsurgery"])
)


class GuardFailed(InvalidInput):
    """An image that takes another way through the network than the one that was converted."""


def check_branch(
    value: Any, outcome: Any, where: str, operands: tuple[Any, ...] = (), before: tuple[Any, ...] = ()
) -> None:
    """Check that Python would decide as it did when the network was traced.

    Args:
        value: what it asked for: something true or false, or a number.
        outcome: as it was then, of type bool, int or float.
        where: file, line and what stands there.
        operands: what was compared to get the value.
        before: the operands as they were then.

    Raises:
        GuardFailed: it decides otherwise.
    """
    now = type(outcome)(value)
    if now == outcome:
        return
    was = f"{_words(before)} ({outcome})" if before else str(outcome)
    raise GuardFailed(
        "this image takes another way through the network than the one that was converted.",
        where=where,
        why=f"there it was {was}, for this image it is {f'{_words(operands)} ({now})' if operands else now}.",
        next="convert with example_input= of this size, or resize or pad the images to sizes of one kind, "
        "e.g. multiples of the network's lowest output stride.",
    )


def is_whole(window: Any, size: Sequence[int]) -> bool:
    """True if a window, one length or two, is as large as a map of a size (B, C, H, W)."""
    lengths = tuple(window) if isinstance(window, (tuple, list)) else (window, window)
    return lengths == tuple(size[2:])


def _words(operands: tuple[Any, ...]) -> str:
    shown = (
        f"{tuple(operand)}" if isinstance(operand, (tuple, list)) else str(operand) for operand in operands
    )
    return " and ".join(shown)


def compared(node: fx.Node) -> tuple[Any, ...]:
    """Return the operands of a comparison; nothing if the node is none."""
    return tuple(node.args) if node.target in _COMPARISONS else ()


def is_guard(node: fx.Node) -> bool:
    """True if a node is there for what it checks, not for a value."""
    return node.target is check_branch


def drop_dead_code(graph: fx.Graph) -> None:
    """Remove what nobody uses: no inputs, no outputs, no guards."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or is_guard(node))


def user_line() -> str:
    """The innermost line that runs and is neither torch's nor ours: file, function and text."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if place := line_of(frame):
            return place
        frame = frame.f_back
    return "the network"


def is_of_library(file: str) -> bool:
    """True if a file of code is torch's, ours or Python's own, rather than the network's."""
    return file.startswith(_LIBRARIES) or file.startswith("<frozen")


def line_of(frame: FrameType) -> str:
    """File, line, function and text of a frame; "" if it is torch's or ours."""
    name, line = frame.f_code.co_filename, frame.f_lineno
    if is_of_library(name):
        return ""
    text = linecache.getline(name, line, frame.f_globals).strip()
    owner = frame.f_locals.get("self")
    function = f"{type(owner).__name__}.{frame.f_code.co_name}" if owner is not None else frame.f_code.co_name
    return f"{Path(name).name}:{line} in {function}" + (f": {text}" if text else "")
