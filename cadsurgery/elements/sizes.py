"""Sizes of maps: whole numbers, or symbols while a graph for images of any size is made.

What holds of a symbol is asked for all sizes: a question that has no such answer has the answer no, and what is done
then is right for every size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch


def is_statically_true(condition: bool | torch.SymBool) -> bool:
    """True if a condition holds; for symbols, if it is known to hold for all sizes."""
    if isinstance(condition, bool):
        return condition
    return bool(condition.node.statically_known_true(__file__, 0))


def divide_up(length: int, step: int) -> int:
    """ceil(length / step), without negative numbers: engines divide them towards zero."""
    return (length + step - 1) // step


def least(one: int, other: int) -> int:
    """The smaller size."""
    return cast(int, torch.sym_min(one, other))


def most(one: int, other: int) -> int:
    """The larger size."""
    return cast(int, torch.sym_max(one, other))


def is_for_any_size(shape: Iterable[int]) -> bool:
    """True if a shape has symbols in it."""
    return any(isinstance(length, torch.SymInt) for length in shape)
