"""Find which maps show a moved copy of the picture, such as a flipped one: the mask lies on the picture as it came.

A view is what happened to the positions of a map since the picture, () if nothing did: its values at a place are of
that place of the picture. Moves that undo each other cancel, as where the result of a flipped copy is flipped back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

from cadsurgery.elements.axes import NCHW
from cadsurgery.following.facts import MapFacts
from cadsurgery.following.slices import parts_of_index
from cadsurgery.support.torch_operations import asks, name_of

# Shifts by no more samples than that are those of windows: paddings, and what transposed convolutions leave over.
_FEW = 2


class Move(NamedTuple):
    """A move of positions.

    Attributes:
        kind: `flip`, `shift`, `roll`, `turn`, `transposition`, or another operation's name.
        by: axes of a flip; pixels by axis of a shift or roll; quarters of a turn.
        what: the copy in words, for plans.
        node: name of the node that moves.
    """

    kind: str
    by: tuple[Any, ...]
    what: str
    node: str


View = tuple[Move, ...]


def view_of(
    node: fx.Node,
    maps: Sequence[fx.Node],
    views: dict[fx.Node, View],
    facts: MapFacts,
    grids: dict[fx.Node, int],
) -> View:
    """Return the view of a map that a node returns.

    Args:
        node: the node.
        maps: the maps that it reads.
        views: views of the maps before.
        facts: facts about the network, with the axes of the maps so far.
        grids: output strides of the maps so far.
    """
    if not maps or (len(maps) > 1 and not all(views[source] for source in maps)):
        return ()
    source, joined = maps[0], tuple(facts.shapes.get(node, ()))
    before = tuple(facts.shapes.get(source, ()))
    if len(joined) == 4 and before[2:] == joined[2:] == facts.example.shape[2:] and joined[0] > before[0]:
        return ()  # images are joined along the batch: masks read these
    move = _move_of(node, source, facts, grids)
    if move is None or (move.kind == "shift" and _is_alone(source)):
        return views[source]
    return _joined(views[source], move)


def _is_alone(source: fx.Node) -> bool:
    """True if a single node reads the values of a map: what it returns is the picture for all that follows."""
    return sum(not asks(user) for user in source.users) == 1


def _joined(view: View, move: Move) -> View:
    """Return a view after another move."""
    last = view[-1] if view else None
    if last is None or last.kind != move.kind:
        return (*view, move)
    if move.kind in ("flip", "transposition"):
        return view[:-1] if last.by == move.by else (*view, move)
    if move.kind not in ("shift", "roll", "turn"):
        return (*view, move)
    by = tuple(a + b for a, b in zip(last.by, move.by, strict=True))
    rest = by[0] % 4 if move.kind == "turn" else any(by)
    return (*view[:-1], last._replace(by=by)) if rest else view[:-1]


def _move_of(node: fx.Node, source: fx.Node, facts: MapFacts, grids: dict[fx.Node, int]) -> Move | None:
    """Return how an operation moves the positions of a map; None if it does not."""
    layout, grid = facts.layout(source), grids[source]
    if node.target is operator.getitem:
        return _crop(node, layout, source, facts, grid)
    module = facts.module(node) if node.op == "call_module" else None
    name = "pad" if isinstance(module, _PADDINGS) else name_of(node.target)
    if name in _SWAPS:
        return _swap(node, layout, facts)
    if _is_swapped(layout) and not _is_swapped(facts.layout(node)):
        return Move("transposition", (), "transposed", node.name)
    read = _READERS.get(name)
    if read is not None and layout:
        return read(node, layout, facts, grid)
    return _resize(node, source, facts, grids) if node in facts.images and source in facts.images else None


def _is_swapped(layout: str) -> bool:
    """True if the width of a map comes before its height, as a rule for transpositions notes it."""
    return "w" in layout and layout.find("w") < layout.find("h")


def _swap(node: fx.Node, layout: str, facts: MapFacts) -> Move | None:
    """Return the move of a transposition that no rule follows, else it shows in the axes of the result."""
    after = facts.layout(node)
    name, dims = name_of(node.target), facts.number(tuple(node.args[1:]))
    if name in ("permute", "movedim", "moveaxis"):
        order = dims[0] if dims and isinstance(dims[0], (tuple, list)) else dims
        is_swap = name == "permute" and _is_swapped("".join(_axes(order, layout)))
    else:
        is_swap = sorted(_axes(dims, layout)) == ["h", "w"] or not dims
    return Move("transposition", (), "transposed", node.name) if is_swap and not _is_swapped(after) else None


def _resize(node: fx.Node, source: fx.Node, facts: MapFacts, grids: dict[fx.Node, int]) -> Move | None:
    """Return the move of a resize by what is no output stride, so that the picture has another size."""
    if "interpolate" not in name_of(node.target) and "sample" not in name_of(node.target):
        return None
    pairs = zip(facts.images[node], facts.images[source], strict=True)
    lengths = [(after * grids[node], before * grids[source]) for after, before in pairs]
    changed = any(abs(a - b) > max(2 * grids[node], 0.1 * b) for a, b in lengths)
    return Move("resize", (node.name,), "resized", node.name) if changed else None


def _options(node: fx.Node, facts: MapFacts, *names: str) -> dict[str, Any]:
    """Return the arguments behind the first by name, as numbers on the example."""
    given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    return {name: facts.number(value) for name, value in given.items()}


def _axes(dims: Any, layout: str) -> list[str]:
    """Return the letters of axes that are given by their numbers; "?" for what is no number."""
    several = dims if isinstance(dims, (tuple, list)) else (dims,)
    known = [dim for dim in several if isinstance(dim, int) and -len(layout) <= dim < len(layout)]
    return [layout[dim] for dim in known] + ["?"] * (len(several) - len(known))


def _flip(node: fx.Node, layout: str, facts: MapFacts, grid: int) -> Move | None:
    name = name_of(node.target)
    dims: Any = {"fliplr": 1, "flipud": 0}.get(name)
    if dims is None:
        given = node.kwargs.get("dims", node.args[1] if len(node.args) == 2 else node.args[1:])
        dims = facts.number(given)
    moved = tuple(sorted({axis for axis in _axes(dims, layout) if axis != "c"}))
    return Move("flip", moved, "flipped", node.name) if moved else None


def _roll(node: fx.Node, layout: str, facts: MapFacts, grid: int) -> Move | None:
    options = _options(node, facts, "shifts", "dims")
    shifts, dims = options.get("shifts"), options.get("dims")
    if dims in (None, ()):  # over the flattened tensor
        return Move("roll of all", (node.name,), "rolled", node.name)
    shifts = shifts if isinstance(shifts, (tuple, list)) else (shifts,)
    by = dict.fromkeys("bhw", 0)
    for axis, shift in zip(_axes(dims, layout), shifts, strict=False):
        if axis == "?" or not isinstance(shift, int):
            return Move("unknown roll", (node.name,), "rolled", node.name)
        if axis != "c":
            by[axis] += shift * (1 if axis == "b" else grid)
    moved = any(abs(shift) > _FEW * (1 if axis == "b" else grid) for axis, shift in by.items())
    return Move("roll", tuple(by.values()), "rolled", node.name) if moved or by["b"] else None


def _turn(node: fx.Node, layout: str, facts: MapFacts, grid: int) -> Move | None:
    options = _options(node, facts, "k", "dims")
    times, axes = options.get("k", 1), _axes(options.get("dims", (0, 1)), layout)
    if not isinstance(times, int) or sorted(axes) != ["h", "w"]:
        return Move("unknown turn", (node.name,), "turned", node.name)
    times = times if axes == ["h", "w"] else -times
    return Move("turn", (times,), "turned", node.name) if times % 4 else None


def _crop(node: fx.Node, layout: str, source: fx.Node, facts: MapFacts, grid: int) -> Move | None:
    """Return the shift of a crop; parts of a map that another operation cut are taken for moved."""
    if source not in facts.shapes:  # one of several values
        return _part(node, source, facts)
    if not layout:
        return None
    parts = [part for part in parts_of_index(node.args[1], len(layout)) if part is not None]
    by = dict.fromkeys("hw", 0)
    for axis, part, length in zip(layout, parts, facts.shapes[source], strict=False):
        if axis not in by:
            continue
        if not isinstance(part, slice):
            return Move("selection", (node.name,), "rearranged", node.name)
        start = facts.number(part.start) or 0
        if not isinstance(start, int):
            return Move("selection", (node.name,), "rearranged", node.name)
        by[axis] = grid * (start if start >= 0 else max(0, length + start))
    return _shift(node, by, "cropped", grid)


def _part(node: fx.Node, parts: fx.Node, facts: MapFacts) -> Move | None:
    """Return the move of a part of a map that was cut along its height or width, unless it is the first."""
    name, cut = name_of(parts.target), parts.args[0] if parts.args else None
    layout = facts.layout(cut)
    if name not in ("chunk", "split", "tensor_split", "hsplit", "vsplit") or not layout or node.args[1] == 0:
        return None
    dims = {"hsplit": 1, "vsplit": 0}.get(name, _options(parts, facts, "parts", "dim").get("dim", 0))
    across = set(_axes(dims, layout)) & set("hw?")
    return Move("part", (node.name,), "cut", node.name) if across else None


def _narrow(node: fx.Node, layout: str, facts: MapFacts, grid: int) -> Move | None:
    options = _options(node, facts, "dim", "start", "length")
    axis, start = _axes(options.get("dim"), layout)[0], options.get("start")
    if axis not in "hw?":
        return None
    if axis == "?" or not isinstance(start, int):
        return Move("selection", (node.name,), "cropped", node.name)
    return _shift(node, {**dict.fromkeys("hw", 0), axis: grid * start}, "cropped", grid)


def _select(node: fx.Node, layout: str, facts: MapFacts, grid: int) -> Move | None:
    axis = _axes(_options(node, facts, "dim").get("dim"), layout)[0]
    return Move("selection", (node.name,), "rearranged", node.name) if axis in "bhw?" else None


def _sample(node: fx.Node, layout: str, facts: MapFacts, grid: int) -> Move | None:
    return Move("sampling", (node.name,), "resampled", node.name)


def _pad(node: fx.Node, layout: str, facts: MapFacts, grid: int) -> Move | None:
    if node.op == "call_module":
        pads = getattr(facts.module(node), "padding", ())
    else:
        pads = _options(node, facts, "pad").get("pad", ())
    if layout != NCHW or not isinstance(pads, (tuple, list)) or not all(isinstance(pad, int) for pad in pads):
        return None
    starts = [*pads[0:4:2], 0, 0][:2]
    by = {"h": -grid * starts[1], "w": -grid * starts[0]}
    return _shift(node, by, "padded", grid) if _is_more_than_windows(node, max(starts), facts) else None


def _is_more_than_windows(node: fx.Node, most: int, facts: MapFacts) -> bool:
    """True if a map is padded by more samples than the windows that read it reach."""
    reach = _FEW
    for user in node.users:
        module: Any = facts.module(user) if user.op == "call_module" else None
        sides, steps = getattr(module, "kernel_size", 0), getattr(module, "dilation", 1)
        if user.op == "call_function" and len(user.args) > 1 and isinstance(user.args[1], fx.Node):
            sides = facts.shapes.get(user.args[1], (0,))[2:]
        sides, steps = (value if isinstance(value, (tuple, list)) else (value,) for value in (sides, steps))
        reach = max(reach, (max(sides, default=0) - 1) * max(steps))
    return abs(most) > reach


def _shift(node: fx.Node, by: dict[str, int], what: str, grid: int) -> Move | None:
    moved = max(map(abs, by.values())) > _FEW * grid
    return Move("shift", (by["h"], by["w"]), what, node.name) if moved else None


_PADDINGS = (nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
_SWAPS = frozenset(
    ("transpose", "swapaxes", "swapdims", "t", "adjoint", "permute", "movedim", "moveaxis", "transpose_")
)
_Reader = Callable[[fx.Node, str, MapFacts, int], Move | None]
_READERS: dict[str, _Reader] = {
    **dict.fromkeys(("flip", "fliplr", "flipud"), _flip),
    **dict.fromkeys(("roll",), _roll),
    **dict.fromkeys(("rot90",), _turn),
    **dict.fromkeys(("narrow",), _narrow),
    **dict.fromkeys(("index_select", "gather", "take_along_dim", "scatter"), _select),
    **dict.fromkeys(
        ("grid_sample", "grid_sampler", "grid_sampler_2d", "affine", "rotate", "perspective"), _sample
    ),
    **dict.fromkeys(("pad",), _pad),
}
