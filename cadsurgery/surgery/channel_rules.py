"""Rules of operations on the axes of a map. On elements, channel axes are the axes of a row behind its number.

An operation along channels runs on rows with its axes renumbered. Along an axis of the image it would join positions,
which only a dense map has. See `surgery/rules.py` for how rules are written.
"""

from __future__ import annotations

import operator
import string
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from cadsurgery.elements import functional
from cadsurgery.elements.axes import (
    NCHW,
    axis_word,
    channel_dims,
    channel_sizes,
    image_dims,
    normalise_neighbours,
    permute_axes,
    regroup_axes,
    roll_channels,
    row_dim,
    shuffle_channels,
)
from cadsurgery.elements.kernel_map import Window
from cadsurgery.following.facts import MapFacts
from cadsurgery.following.graphs import axes_order
from cadsurgery.following.slices import is_whole, parts_of_index
from cadsurgery.following.tracer import assign
from cadsurgery.support.torch_operations import spellings
from cadsurgery.surgery.rule_arguments import (
    DIM_NAMES,
    arguments_of,
    first_map,
    options_of,
    pools_with_indices,
    redirect,
)
from cadsurgery.surgery.treatment import Call, Treatment, barrier, operation_name, rule

# -- along channels ------------------------------------------------------------------------------------

_OVER_IMAGE = {"softmax": "softmax_over_image", "normalize": "normalize_over_image"}
# Index of the axes among the arguments, where it is not the second, and default.
_INDICES: dict[str, tuple[int, int | None]] = {
    "normalize": (2, 1),
    "cosine_similarity": (2, 1),
    **dict.fromkeys(("glu", "sort", "argsort", "mode"), (1, -1)),
    **dict.fromkeys(("topk", "kthvalue", "diff"), (2, -1)),
    **dict.fromkeys(("roll", "repeat_interleave"), (2, None)),
}
_FUNCTIONS: dict[type[nn.Module], Any] = {
    nn.Softmax: F.softmax,
    nn.LogSoftmax: F.log_softmax,
    nn.Softmin: F.softmin,
    nn.GLU: F.glu,
}


@rule(*spellings("along"))
def along_channels(node: fx.Node, facts: MapFacts) -> Treatment:
    """Over the channels of each element, which are the columns of its row."""
    layout, how = facts.layout(first_map(node, facts)), _name(node, facts)
    index, dim = _stated_axes(node, facts, how, layout)
    maps = [source for source in node.all_input_nodes if facts.layout(source)]
    if how in ("max", "min") and len(maps) == 2:
        return Treatment("join", "combines the values of one cell")
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    if not dims or not all(isinstance(axis, int) for axis in dims):
        return barrier(f"{how} without an axis joins the whole batch")
    dims = [axis % len(layout) for axis in dims]
    if how in _OVER_IMAGE and image_dims(layout) == tuple(dims):
        why = "over all positions, each weighed by its area"
        return Treatment("pointwise", why, _OVER_IMAGE[how], axes="", spaced=True)
    across = [axis_word(layout[axis]) for axis in dims if layout[axis] != "c"]
    if across:
        return barrier(f"{how} joins positions along {' and '.join(across)}")
    rows = [row_dim(layout, axis) for axis in dims]
    kind: Any = "join" if len(maps) > 1 else "pointwise"
    if node.op == "call_module":
        return Treatment(kind, rows=Call(_function_of(node, facts), (node.args[0], rows[0])))
    if how == "flip":
        return Treatment(kind, rows=Call(torch.flip, (node.args[0], rows)))
    call = redirect(node, index, tuple(rows) if isinstance(dim, (tuple, list)) else rows[0])
    if how == "roll":
        call = replace(call, target=roll_channels)
    return Treatment(kind, rows=call, layout=_after(node, facts, layout, dims))


def _name(node: fx.Node, facts: MapFacts) -> str:
    """Return the name of an operation as a function of torch."""
    if node.op == "call_module":
        return str(_function_of(node, facts).__name__)
    return operation_name(node, facts).removeprefix("Tensor.").removeprefix("special_")


def _function_of(node: fx.Node, facts: MapFacts) -> Any:
    """Return the function that a module applies."""
    return next(function for kind, function in _FUNCTIONS.items() if isinstance(facts.module(node), kind))


def _stated_axes(node: fx.Node, facts: MapFacts, how: str, layout: str) -> tuple[int, Any]:
    """Return the index of the argument that tells the axes, and the axes."""
    index, default = _INDICES.get(how, (1, None))
    if how in ("softmax", "log_softmax", "softmin"):  # torch's implicit choice
        default = 0 if len(layout) == 3 else 1
    if node.op == "call_module":
        module: Any = facts.module(node)
        return index, default if module.dim is None else module.dim
    by_name = next((node.kwargs[name] for name in DIM_NAMES if node.kwargs.get(name) is not None), None)
    if by_name is not None:
        return index, by_name
    if how == "flip":
        return index, node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return index, node.args[index] if len(node.args) > index and node.args[index] is not None else default


def _after(node: fx.Node, facts: MapFacts, layout: str, dims: list[int]) -> str:
    """Return the axes of a result, or of each of several results, from the number of axes on the example."""
    result = next((user for user in node.users if user.target is operator.getitem), node)
    result = node if node in facts.shapes else result
    if len(facts.shapes.get(result, layout)) == len(layout):
        return layout
    return "".join(axis for index, axis in enumerate(layout) if index not in dims)


@rule(nn.Softmax2d)
def softmax_of_channels(node: fx.Node, facts: MapFacts) -> Treatment:
    """Over the channels of each element, which are the columns of its row."""
    if facts.layout(node.args[0]) != NCHW:
        return barrier("its third axis from the right is not the axis of the channels")
    return Treatment("pointwise", rows=Call(F.softmax, (node.args[0], 1)))


@rule(nn.CosineSimilarity)
def cosine_similarity(node: fx.Node, facts: MapFacts) -> Treatment:
    """Over the channels of each element, which are the columns of its row."""
    module: Any = facts.module(node)
    layout = facts.layout(first_map(node, facts))
    row = row_dim(layout, module.dim)
    if row is None or len(node.args) != 2:
        return barrier(f"it joins positions along {axis_word(layout[module.dim])}")
    dim = module.dim % len(layout)
    call = Call(F.cosine_similarity, (*node.args, row, module.eps))
    return Treatment("join", rows=call, layout=layout[:dim] + layout[dim + 1 :])


@rule(nn.LocalResponseNorm, F.local_response_norm)
def local_response_norm(node: fx.Node, facts: MapFacts) -> Treatment:
    """Over neighbouring channels of each element."""
    options = options_of(node, facts, "input", "size", alpha=1e-4, beta=0.75, k=1.0)
    settings = (options[name] for name in ("size", "alpha", "beta", "k"))
    return _on_rows(node, facts, normalise_neighbours, *settings)


@rule(nn.ChannelShuffle, F.channel_shuffle, F.native_channel_shuffle, torch.channel_shuffle)
def channel_shuffle(node: fx.Node, facts: MapFacts) -> Treatment:
    """The channels of each element in another order."""
    return _on_rows(node, facts, shuffle_channels, options_of(node, facts, "input", "groups")["groups"])


def _on_rows(node: fx.Node, facts: MapFacts, function: Any, *settings: Any) -> Treatment:
    """Treat an operation on maps (B, C, H, W) by its function on rows (N, C)."""
    if facts.layout(node.args[0]) != NCHW:
        return barrier("its second axis is not the axis of the channels")
    return Treatment("pointwise", rows=Call(function, (node.args[0], *settings)))


@rule(torch.einsum)
def sum_of_letters(node: fx.Node, facts: MapFacts) -> Treatment:
    """Products summed over channels alone act on each element, as a convolution of one tap does."""
    equation, *given = node.args
    operands: list[Any] = list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    if not isinstance(equation, str):
        return barrier("only equations of letters are followed")
    equation = equation.replace(" ", "")
    if "..." in equation:
        terms = equation.partition("->")[0].split(",")
        missing = {
            len(facts.layout(operand)) - len(term) + 3
            for term, operand in zip(terms, operands, strict=True)
            if "..." in term
        }
        unused = [letter for letter in string.ascii_letters if letter not in equation]
        if len(missing) > 1 or min(missing) < 0 or "->" not in equation:
            return barrier("only equations with a letter for each axis are followed")
        equation = equation.replace("...", "".join(unused[: missing.pop()]))
    return _einsum(equation, operands, facts)


@rule(torch.tensordot)
def tensor_product(node: fx.Node, facts: MapFacts) -> Treatment:
    """Products summed over channels alone act on each element, as a convolution of one tap does."""
    stated = arguments_of(node, "a", "b", dims=2)
    first, second, dims = stated["a"], stated["b"], stated["dims"]
    ranks = [len(facts.layout(value) or facts.shapes.get(value, ())) for value in (first, second)]
    if isinstance(dims, int):
        dims = [[*range(ranks[0] - dims, ranks[0])], [*range(dims)]]
    left, right = string.ascii_letters[: ranks[0]], [*string.ascii_letters[ranks[0] : sum(ranks)]]
    lost = [[int(dim) % rank for dim in part] for part, rank in zip(dims, ranks, strict=True)]
    for one, other in zip(*lost, strict=True):
        right[other] = left[one]
    rest = (letter for letter in (*left, *right) if letter not in {left[dim] for dim in lost[0]})
    return _einsum(f"{left},{''.join(right)}->{''.join(rest)}", [first, second], facts)


def _einsum(equation: str, operands: list[Any], facts: MapFacts) -> Treatment:
    """Treat an equation of `torch.einsum`, in which the letters of batch and positions must be in each map and the
    result, as one over rows."""
    sources, arrow, result = equation.partition("->")
    terms = sources.split(",")
    if not arrow:  # letters that occur once, in their order
        result = "".join(sorted(letter for letter in set(sources) - {","} if sources.count(letter) == 1))
    layouts = [facts.layout(operand) for operand in operands]
    maps = [(term, layout) for term, layout in zip(terms, layouts, strict=True) if layout]
    axes = {letter: axis for letter, axis in zip(*maps[0], strict=True) if axis != "c"}
    for term, layout in zip(terms, layouts, strict=True):
        own = (
            {letter: axis for letter, axis in zip(term, layout, strict=True) if axis != "c"} if layout else {}
        )
        if layout and own != axes:
            return barrier("it joins different places of two maps")
        if not layout and axes.keys() & set(term):
            return barrier("it weighs places of the map")
    summed = [axis for letter, axis in axes.items() if letter not in result]
    if summed:
        return barrier(f"it sums over {axis_word(summed[-1])}")
    if axes.get(result[:1]) != "b":
        return barrier("its result does not begin with the batch")
    number = next(letter for letter in string.ascii_letters if letter not in equation)

    def of_rows(term: str, layout: str | None) -> str:
        return number + "".join(letter for letter in term if letter not in axes) if layout else term

    rows = ",".join(of_rows(term, layout) for term, layout in zip(terms, layouts, strict=True))
    call = Call(torch.einsum, (f"{rows}->{of_rows(result, 'c')}", *operands))
    layout = "".join(axes.get(letter, "c") for letter in result)
    if len(maps) > 1:
        return Treatment("join", rows=call, layout=layout)
    reads = next(operand for operand, own in zip(operands, layouts, strict=True) if own)
    return Treatment("pointwise", rows=call, layout=layout, reads=reads)


@rule("repeat", torch.tile, "tile")
def repetition(node: fx.Node, facts: MapFacts) -> Treatment:
    """The channels of each element, several times."""
    layout = facts.layout(node.args[0])
    stated: Any = node.args[1:] or tuple(node.kwargs.values())
    times = list(stated[0] if isinstance(stated[0], (tuple, list)) else stated)
    times = [1] * (len(layout) - len(times)) + times
    if len(times) != len(layout) or any(
        count != 1 for axis, count in zip(layout, times, strict=True) if axis != "c"
    ):
        return barrier("it puts copies of the image or of the batch side by side")
    counts = [times[dim] for dim in channel_dims(layout)]
    return Treatment("pointwise", rows=Call("repeat", (node.args[0], 1, *counts)))


# -- axes: the same rows under another name ------------------------------------------------------------


@rule(*spellings("reshapes"))
def reshaping(node: fx.Node, facts: MapFacts) -> Treatment:
    """Regroups channels, or flattens the image: the rows keep their order, only their shape changes."""
    source: Any = node.args[0]
    if not facts.layout(source):
        return barrier("is computed from values that are no map")
    layout, shape, new = facts.layout(source), facts.shapes[source], facts.shapes[node]
    after, reason = regroup_axes(layout, shape, new, facts.images[source])
    if after is None:
        return barrier(reason)
    sizes = channel_sizes(after, new)
    call = Call(None, (source,))
    if sizes != channel_sizes(layout, shape):
        call = Call("reshape", (source, -1, *sizes))
    return Treatment("pointwise", rows=call, layout=after)


@rule(*spellings("permutes"))
def permutation(node: fx.Node, facts: MapFacts) -> Treatment:
    """Orders the axes of the map: the channels of a row stay in the row."""
    source, layout = node.args[0], facts.layout(node.args[0])
    order = axes_order(node, len(layout))
    if order is None:
        return barrier("its axes are not written out")
    after, rows = permute_axes(layout, order)
    moved = list(rows) != sorted(rows)
    call = Call(torch.permute, (source, rows)) if moved else Call(None, (source,))
    return Treatment("pointwise", rows=call, layout=after)


@rule(*spellings("splits"))
def split(node: fx.Node, facts: MapFacts) -> Treatment:
    """Parts of the channels of each element."""
    layout = facts.layout(node.args[0])
    options = arguments_of(node, "x", "sections", dim=0)
    if (row := row_dim(layout, options["dim"])) is None:
        return barrier("it cuts the image or the batch into parts")
    return Treatment("pointwise", rows=redirect(node, 2, row))


@rule(*spellings("selects"))
def selection(node: fx.Node, facts: MapFacts) -> Treatment:
    """Some channels of each element."""
    layout = facts.layout(node.args[0])
    options = arguments_of(node, "x", dim=0)
    if (row := row_dim(layout, options["dim"])) is None:
        return barrier("it takes parts of the image or the batch")
    dim = options["dim"] % len(layout)
    after = layout if "narrow" in str(node.target) else layout[:dim] + layout[dim + 1 :]
    return Treatment("pointwise", rows=redirect(node, 1, row), layout=after)


@rule(operator.getitem)
def indexing(node: fx.Node, facts: MapFacts) -> Treatment:
    """One of several values, some channels of each element, every so many-th sample, or a crop that moves no anchor."""
    source, asked = node.args
    if source not in facts.shapes:  # a part of a split, or a result of a pooling with indices
        is_index = asked == 1 and pools_with_indices(source, facts)
        if len(facts.shapes.get(node, ())) not in (0, len(facts.layout(source))):
            return barrier("it is one of several results, whose axes are not those of a map")
        return Treatment("pointwise", leaves_by=functional.dense_indices if is_index else None)
    layout = facts.layout(source)
    index = _read_index(asked, layout, facts)
    if isinstance(index, str):
        return barrier(index)
    if not index.crops:
        return Treatment("pointwise", rows=Call(operator.getitem, (source, index.rows)), layout=index.layout)
    if index.rows != (slice(None), slice(None)):
        return barrier("it takes parts of the image and of the channels at once")
    parts = [index.crops.get(axis, slice(None)) for axis in "hw"]
    if any(part.step not in (None, 1) for part in parts):
        return _every_so_many(parts)
    arguments = (("starts", tuple(p.start for p in parts)), ("stops", tuple(p.stop for p in parts)))
    return Treatment("pointwise", call=functional.crop, arguments=arguments, spaced=True)


def _every_so_many(parts: list[slice]) -> Treatment:
    """Treat slices with a step as a window of one tap with a stride, as in the space to depth of some detectors."""
    (step, other), starts = (part.step or 1 for part in parts), [part.start or 0 for part in parts]
    if step != other:
        return barrier(f"stride {(step, other)} differs between the axes")
    window = Window((1, 1), step, padding=(-starts[0], 0, -starts[1], 0))
    return Treatment(
        "window",
        "It takes every so many-th sample, as a stride does.",
        window=window,
        call=functional.max_pool2d,
    )


@rule(assign)
def assignment(node: fx.Node, facts: MapFacts) -> Treatment:
    """New values for some channels of each element, or for those that a map of truth values chooses."""
    values: Any
    values, asked, part = node.args
    layout = facts.layout(values) or NCHW  # a tensor of zeros to be filled is no map yet
    why = "Other values for some channels of each element."
    if isinstance(asked, fx.Node) and facts.layout(asked):
        if facts.shapes[asked] != facts.shapes.get(values) or part in facts.shapes:
            return barrier("it writes to chosen values of a map other values than one number")
        return Treatment("join", why, rows=Call(assign, (values, asked, part)))
    index = _read_index(asked, layout, facts)
    if isinstance(index, str) or index.crops:
        return barrier("it writes to parts of the image or of the batch")
    if any(part in facts.shapes for part in index.rows if isinstance(part, fx.Node)):
        return barrier("it writes to channels that a tensor chooses")
    other = facts.layout(part) if isinstance(part, fx.Node) else ""
    if other not in ("", index.layout) or (other and other != NCHW and not facts.layout(values)):
        return barrier("it writes to a map what has other axes")
    return Treatment("join", why, rows=Call(assign, (values, index.rows, part)), layout=layout, axes="")


class _Index(NamedTuple):
    """An index of a map.

    Attributes:
        rows: the same index of rows.
        layout: axes of the result.
        crops: slices of the height and the width that keep the first rows and columns.
    """

    rows: tuple[Any, ...]
    layout: str
    crops: dict[str, slice]


def _read_index(asked: Any, layout: str, facts: MapFacts) -> _Index | str:
    """Return what an index takes of a map, or the reason why elements cannot be indexed so."""
    index = parts_of_index(asked, len(layout))
    rows: list[Any] = [slice(None)]
    after, dim, crops = "", 0, dict[str, slice]()
    for part in index:
        if part is None:
            rows, after = [*rows, None], after + "c"
            continue
        axis, dim = layout[dim], dim + 1
        if axis in "hw" and layout == NCHW and _is_crop(part, facts):
            crops[axis] = part
        elif axis == "c" and _takes_channels(part, rows, facts):
            rows.append(part)
        elif not is_whole(part):
            return f"it takes parts of {axis_word(axis)}"
        after += axis if not isinstance(part, int) else ""
    return _Index(tuple(rows), after + layout[dim:], crops)


def _takes_channels(part: Any, rows: list[Any], facts: MapFacts) -> bool:
    """True if a part of an index takes some channels: a number, a slice, or the only list of numbers."""
    if isinstance(part, (int, slice)):
        return not isinstance(part, bool)
    is_list = isinstance(part, list) and all(type(number) is int for number in part)
    is_tensor = part in facts.shapes and len(facts.shapes[part]) == 1 if isinstance(part, fx.Node) else False
    return (is_list or is_tensor) and all(isinstance(former, slice) for former in rows)


def _is_crop(part: Any, facts: MapFacts) -> bool:
    """True if a slice takes the first rows or columns of a map, perhaps not all, or every so many-th to the end."""
    if not isinstance(part, slice):
        return False
    if part.step not in (None, 1):
        has_start = type(part.start) is int and part.start >= 0
        return type(part.step) is int and part.stop is None and (part.start is None or has_start)
    start, stop = facts.number(part.start), facts.number(part.stop)
    return start in (None, 0) and isinstance(stop, int)


@rule(torch.cat, torch.concat, torch.concatenate)
def concatenation(node: fx.Node, facts: MapFacts) -> Treatment:
    """Channels side by side, cell by cell."""
    options = arguments_of(node, "tensors", dim=0)
    dim, first = options.get("axis", options["dim"]), first_map(node, facts)
    row = row_dim(facts.layout(first), dim)
    if row is None:
        return barrier("it puts images or batches side by side")
    return Treatment("join", rows=Call(torch.cat, (options["tensors"], row)))


@rule(torch.stack)
def stacking(node: fx.Node, facts: MapFacts) -> Treatment:
    """Values of one cell along a new channel axis."""
    options = arguments_of(node, "tensors", dim=0)
    layout = facts.layout(first_map(node, facts))
    dim = options["dim"] % (len(layout) + 1)
    row = 1 + layout[:dim].count("c")
    call = Call(torch.stack, (options["tensors"], row))
    return Treatment("join", rows=call, layout=f"{layout[:dim]}c{layout[dim:]}")
