"""Sizes of maps: integers, or symbols while a graph for images of any size is traced.

A condition on a symbol counts as true only if it holds for all sizes; otherwise the caller takes the general path,
which is correct for every size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cadsurgery.support import torch_internals
from cadsurgery.support.running import running

Number = TypeVar("Number", int, Tensor)


def is_statically_true(condition: bool | torch.SymBool) -> bool:
    """Return True if a condition holds; for symbols, if it is known to hold for all sizes."""
    if isinstance(condition, bool):
        return condition
    return bool(condition.node.statically_known_true(__file__, 0))


# For each export the expressions that a symbol does not exceed.
_LIMITS: WeakKeyDictionary[Any, dict[Any, set[Any]]] = WeakKeyDictionary()


def is_at_most(one: int, other: int) -> bool:
    """Return True if a size does not exceed another one, for all sizes as far as that is known."""
    if is_statically_true(one <= other):
        return True
    if not isinstance(one, torch.SymInt) or not isinstance(other, torch.SymInt):
        return False
    limits = _LIMITS.get(one.node.shape_env, {})
    parts = (
        one.node.expr.args if isinstance(one.node.expr, torch_internals.min_of_sizes) else (one.node.expr,)
    )
    return any(other.node.expr in {part, *limits.get(part, ())} for part in parts)


def limit(symbol: int, length: int, limits: Iterable[int]) -> None:
    """Record which of several sizes a new symbol for a length does not exceed."""
    node = cast(torch.SymInt, symbol).node
    larger = {cast(torch.SymInt, longest).node.expr for longest in limits if is_at_most(length, longest)}
    _LIMITS.setdefault(node.shape_env, {})[node.expr] = larger


def divide_up(length: Number, step: int) -> Number:
    """Return ceil(length / step), computed without negative numbers, which engines round one way or the other."""
    return (length + step - 1) // step


def least(one: int, other: int) -> int:
    """Return the smaller size."""
    if type(one) is type(other) is int:
        return min(one, other)
    for smaller, larger in ((one, other), (other, one)):
        if is_at_most(smaller, larger):
            return smaller
    return cast(int, torch.sym_min(one, other))


def most(one: int, other: int) -> int:
    """Return the larger size."""
    return max(one, other) if type(one) is type(other) is int else cast(int, torch.sym_max(one, other))


def is_for_any_size(shape: Iterable[int]) -> bool:
    """Return True if a shape contains symbols."""
    return any(isinstance(length, torch.SymInt) for length in shape)


def as_number(value: int, like: Tensor) -> Tensor:
    """Return a size as a tensor without dimensions, with the dtype of `like`."""
    return torch.scalar_tensor(value, dtype=like.dtype, device=like.device)


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor (n,); on a GPU it is made once, because a copy from the CPU waits for the device."""
    if device.type != "cuda" or running.in_graph:
        return torch.tensor(values, dtype=dtype, device=device)
    return _on_gpu(values, dtype, device)


@lru_cache(1024)
def _on_gpu(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # used outside this call's inference mode, too
        return torch.tensor(values, dtype=dtype, device=device)


def as_numbers(values: Sequence[int], like: Tensor) -> Tensor:
    """Return sizes as a tensor with the dtype of `like`."""
    if all(isinstance(value, int) for value in values):
        return constant(tuple(values), like.dtype, like.device)
    return torch.stack([as_number(value, like) for value in values])


def pair_of(value: Any) -> tuple[Any, Any]:
    """Return a number, or one per axis, as a pair (vertical, horizontal)."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    return (values[0], values[-1])
