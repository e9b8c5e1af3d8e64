"""Fresh symbols for sizes of maps, while torch.export follows a network for images of any size.

After each stage the size of a map is an expression of the image's size, with one rounded division in the other. torch
simplifies and bounds these expressions at every operation: for a network of 22 kernel maps that took 98 % of an export
of more than seven minutes. Here each expression is replaced by a new symbol, so that the next stage starts from a plain
one. The two operations that do so compute nothing; `drop_fresh` takes them out of the program again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cadsurgery.elements.backends.operators import define
from cadsurgery.elements.sizes import limit
from cadsurgery.support.running import running

T = TypeVar("T")

# For each export the symbols by the expressions that they stand for.
_SYMBOLS: WeakKeyDictionary[Any, dict[Any, int]] = WeakKeyDictionary()


def _vector(length: int) -> Tensor:
    """Return a vector with a new symbol as its length; where torch has to decide, it looks at the example."""
    size = torch.library.get_ctx().new_dynamic_size(min=2)
    node: Any = cast(torch.SymInt, size).node
    node.shape_env.set_real_tensor_prop_unbacked_vals(node.expr, _in_example(cast(torch.SymInt, length).node))
    return torch.empty(size)


def _map(map: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=map.dtype, device=map.device)


define("fresh_length(SymInt length) -> Tensor", _vector)
define("fresh_shape(Tensor map, SymInt[] shape) -> Tensor", _map)


def fresh_length(length: int, *limits: int) -> int:
    """Return a symbol for a length that is an expression of symbols; return any other length itself.

    Equal expressions have the same symbol. It is known not to exceed those of `limits` that the length does not exceed.
    """
    if not _is_expression(length):
        return length
    node = cast(torch.SymInt, length).node
    symbols = _SYMBOLS.setdefault(node.shape_env, {})
    if node.expr not in symbols:
        symbols[node.expr] = symbol = torch.ops.cadsurgery.fresh_length(length).shape[0]
        limit(symbol, length, (longest for longest in limits if isinstance(longest, torch.SymInt)))
    return symbols[node.expr]


def _is_expression(length: int) -> bool:
    """Return True for an expression in an export that is more than a multiple of a symbol; a length of one is fixed in
    a file and stays as it is."""
    if not isinstance(length, torch.SymInt) or not running.is_exported:
        return False
    expression = length.node.expr.as_coeff_Mul()[1]
    return bool(expression.free_symbols) and not expression.is_Symbol and (_in_example(length.node) or 0) > 1


def _in_example(node: Any) -> int | None:
    """Return the value of an expression for the example; None if it depends on the data."""
    env = node.shape_env
    value = node.expr.xreplace(env.real_tensor_prop_unbacked_vals).xreplace(env.backed_var_to_val)
    return int(value) if value.is_number else None


def fresh_map(value: T) -> T:
    """Return a map (B, C, H, W) with symbols for lengths that are expressions; return any other value itself."""
    if not isinstance(value, Tensor) or value.dim() != 4 or not any(map(_is_expression, value.shape[2:])):
        return value
    shape = (*value.shape[:2], *map(fresh_length, value.shape[2:]))
    return cast(T, torch.ops.cadsurgery.fresh_shape(value, shape))


def of_size(value: Tensor, size: Sequence[int]) -> Tensor:
    """Return a map (B, H, W) whose size is known to be `size`, in whatever terms it was computed."""
    if not running.is_exported or all(isinstance(length, int) for length in value.shape[1:]):
        return value
    return cast(Tensor, torch.ops.cadsurgery.fresh_shape(value, (value.shape[0], *size)))


def in_multiples(image: Tensor, multiple: int) -> Tensor:
    """Return images (B, C, H, W) whose sides are known to be multiples of a number: then the sizes of all maps are
    multiples of two symbols, and those that must be equal are known to be."""
    sides = (multiple * fresh_length(length // multiple) for length in image.shape[2:])
    return cast(Tensor, torch.ops.cadsurgery.fresh_shape(image, (*image.shape[:2], *sides)))


def drop_fresh(program: torch.export.ExportedProgram) -> None:
    """Take the operations of this module out of a program's graph: maps and lengths stand for themselves. The exporter,
    which goes on with the graph, writes its code."""
    operations, graph = torch.ops.cadsurgery, program.graph
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.args else None
        if node.target is operations.fresh_shape.default:
            source.meta["val"] = node.meta["val"]
            program.graph_signature.replace_all_uses(node.name, source.name)
            node.replace_all_uses_with(source)
        elif getattr(source, "target", None) is operations.fresh_length.default:
            node.replace_all_uses_with(source.args[0])
    graph.eliminate_dead_code()
