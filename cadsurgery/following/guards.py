"""Guards: branches that a network's Python code takes while it is traced are checked again in every later call.

A graph holds a single path through the network. Where the Python code branches on a size, `if h != skip.shape[2]:`, the
graph gets a node that compares the outcome with the outcome at conversion.
"""

from __future__ import annotations

import linecache
import operator
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx

from cadsurgery.support.errors import InvalidInput

_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
_LIBRARIES = tuple(
    f"{Path(str(module.__file__)).parent}{os.sep}" for module in (torch, sys.modules["cadsurgery"])
)


class GuardFailed(InvalidInput):
    """An image takes another path through the network than the one that was converted."""


def check_branch(
    value: Any, outcome: Any, where: str, operands: tuple[Any, ...] = (), before: tuple[Any, ...] = ()
) -> None:
    """Check that a Python branch has the same outcome as when the network was traced.

    Args:
        value: value of the condition in this call: a truth value or a number.
        outcome: its value while tracing.
        where: file, line and text of the source code.
        operands: operands of the comparison that gave the value.
        before: the operands while tracing.

    Raises:
        GuardFailed: the outcome differs.
    """
    now = value if isinstance(value, type(outcome)) else type(outcome)(value)
    if now == outcome:
        return
    was = f"{_words(before)} ({outcome})" if before else str(outcome)
    raise GuardFailed(
        "this image takes another path through the network than the one that was converted.",
        where=where,
        why=f"there it was {was}, for this image it is {f'{_words(operands)} ({now})' if operands else now}.",
        next="convert with example_input= of this size, or resize or pad the images to sizes of one kind, "
        "e.g. multiples of the network's lowest output stride.",
    )


def is_whole(window: Any, size: Sequence[int], or_larger: bool = False) -> bool:
    """True if a window (one length or two) is as large as a map of size (B, C, H, W), or covers it."""
    lengths = tuple(window) if isinstance(window, (tuple, list)) else (window, window)
    if or_larger:
        return all(length >= side for length, side in zip(lengths, size[2:], strict=True))
    return lengths == tuple(size[2:])


def _words(operands: tuple[Any, ...]) -> str:
    shown = (
        f"{tuple(operand)}" if isinstance(operand, (tuple, list)) else str(operand) for operand in operands
    )
    return " and ".join(shown)


def compared(node: fx.Node) -> tuple[Any, ...]:
    """Return the operands of a comparison; an empty tuple for any other node."""
    return tuple(node.args) if node.target in _COMPARISONS else ()


def is_guard(node: fx.Node) -> bool:
    """True if a node is a guard, which checks a value and returns none."""
    return node.target is check_branch


def drop_dead_code(graph: fx.Graph) -> None:
    """Remove unused nodes except inputs, outputs and guards."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or is_guard(node))


def user_line() -> str:
    """Return the innermost running line outside torch and this package: file, function and text."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if place := line_of(frame):
            return place
        frame = frame.f_back
    return "the network"


def is_of_library(file: str) -> bool:
    """True if a source file belongs to torch, this package or Python itself."""
    return file.startswith(_LIBRARIES) or file.startswith("<frozen")


def stack_of(frame: FrameType | None, until: CodeType) -> str:
    """Return the lines that lead to a frame from a call of the code `until`, as a traceback prints them, without those
    of torch and this package."""
    lines: list[str] = []
    while frame is not None and frame.f_code is not until:
        name, number = frame.f_code.co_filename, frame.f_lineno
        if not is_of_library(name) and name != "<string>":
            text = linecache.getline(name, number, frame.f_globals).strip()
            lines.append(f'  File "{name}", line {number}, in {frame.f_code.co_name}\n    {text}\n')
        frame = frame.f_back
    return "".join(reversed(lines)).strip()


def line_of(frame: FrameType) -> str:
    """Return file, line, function and text of a frame; "" for code of torch or this package."""
    name, line = frame.f_code.co_filename, frame.f_lineno
    if is_of_library(name):
        return ""
    text = linecache.getline(name, line, frame.f_globals).strip()
    owner = frame.f_locals.get("self")
    function = f"{type(owner).__name__}.{frame.f_code.co_name}" if owner is not None else frame.f_code.co_name
    return f"{Path(name).name}:{line} in {function}" + (f": {text}" if text else "")
