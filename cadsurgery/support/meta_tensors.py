"""Operations on meta tensors, whose results are remembered.

Torch finds the shapes of many results, such as those of batch norms and activations, by Python decompositions, which
take tenths of a millisecond. What a count needs of them depends only on the operation, the shapes, memory layouts and
types of its arguments and its numbers, which are the same for most layers of a network and for every level.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.support.torch_internals import OpOverload

# Results by what they depend on: shapes, strides and type of each new tensor; None if the first argument is changed.
_KNOWN: dict[Hashable, Any] = {}
_MOST = 1 << 16  # entries, of a few hundred bytes each
_PLAIN = (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout)
_PLAIN_TYPES = frozenset((*_PLAIN, torch.memory_format))
_TENSORS = frozenset((Tensor, nn.Parameter))


class _DependsOnValues(Exception):
    """A result depends on values."""


def call(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operation; if its tensors have no values and the result is known, return a tensor like it."""
    if not isinstance(operation, OpOverload) or (kind := _kind(operation)) is None:
        return operation(*args, **kwargs)
    try:
        key = (operation, torch.get_default_dtype(), _describe(args), _describe(tuple(kwargs.items())))
    except _DependsOnValues:
        return operation(*args, **kwargs)
    if key in _KNOWN:
        return args[0] if kind == "in place" else _make(_KNOWN[key])
    value = operation(*args, **kwargs)
    if len(_KNOWN) < _MOST and (kind == "in place" or _is_meta(value)):
        _KNOWN[key] = None if kind == "in place" else _form(value)
    return value


def to_meta(value: Any) -> Any:
    """Move a tensor to the meta device; return any other value unchanged."""
    return value.to("meta") if isinstance(value, Tensor) else value


@cache
def _kind(operation: OpOverload) -> str | None:
    """Return "new" for an operation that makes new tensors, "in place" for one that changes the values of its first
    argument, and None for any other, such as views."""
    schema = operation._schema
    if any(str(result.type) != "Tensor" for result in schema.returns) or not schema.returns:
        return None
    if not schema.is_mutable:
        return "new" if all(result.alias_info is None for result in schema.returns) else None
    changed = [place for place, one in enumerate(schema.arguments) if one.alias_info is not None]
    is_alone = changed == [0] and torch.Tag.pointwise in operation.tags and len(schema.returns) == 1
    return "in place" if is_alone else None


def _describe(value: Any) -> Hashable:
    """Return what a result may depend on.

    Raises:
        _DependsOnValues: the value has more than that.
    """
    if type(value) in _TENSORS:
        if not value.is_meta or value.layout is not torch.strided:
            raise _DependsOnValues
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_describe, value))
    if type(value) not in _PLAIN_TYPES:
        raise _DependsOnValues
    return type(value), value


def _is_meta(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return all(type(part) is Tensor and part.is_meta for part in parts)


def _form(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_form(part) for part in value]
    return tuple(value.shape), value.stride(), value.dtype


def _make(form: Any) -> Any:
    if isinstance(form, list):
        return tuple(map(_make, form))
    shape, stride, dtype = form
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
