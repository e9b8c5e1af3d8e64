"""From the graph of a network to the maps and steps of a walk in bands: one step for each operation, by its rule."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from cadsurgery.elements import functional
from cadsurgery.elements.axes import NCHW, image_dims
from cadsurgery.elements.backends.packed import PackedConv
from cadsurgery.elements.backends.weights import transpose_weight
from cadsurgery.elements.elements import Elements, SmallMap
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Geometry, Lattice, Pyramid
from cadsurgery.elements.on_rows import OnRows
from cadsurgery.elements.operations import Operation, operation_of
from cadsurgery.elements.resizing import Scaling
from cadsurgery.following.arguments import in_order
from cadsurgery.following.equivalence import meta_copy
from cadsurgery.following.graphs import module_of
from cadsurgery.following.guards import is_whole
from cadsurgery.following.slices import parts_of_index
from cadsurgery.network.bands import element_steps, steps
from cadsurgery.network.bands.element_steps import Cells, Grid
from cadsurgery.network.bands.steps import WholeImage
from cadsurgery.network.bands.walk import RowsRead, Stream
from cadsurgery.network.observing import observe, tensors_in
from cadsurgery.network.program import GraphInterpreter, Program
from cadsurgery.support.errors import CannotConvert
from cadsurgery.support.torch_internals import tree_map
from cadsurgery.support.torch_operations import Kind, is_kind, name_of
from cadsurgery.surgery.refusals import source_line
from cadsurgery.surgery.rewrite import ACTS, Operand, ask_mask
from cadsurgery.surgery.rule_arguments import arguments_of
from cadsurgery.surgery.treatment import Attribute, Call, Treatment

_NEEDS = {
    "image": "it reads a map of the whole picture at once",
    "batch": "it reads the whole batch at once",
    "window": "it reads neighbours in an order that bands do not know",
}  # by what an operation reads


class Statistics(NamedTuple):
    """Stands for mean and variance of a norm among the values of the whole image."""

    node: fx.Node


Key = fx.Node | Statistics
Axis = Literal["h", "w"]
Turned = TypeVar("Turned", Window, Scaling)
# Kinds of operations without weights that arrange values, or combine them along axes that they name.
_ARRANGING: tuple[Kind, ...] = (
    "copies",
    "converts",
    "reshapes",
    "permutes",
    "splits",
    "selects",
    "value",
    "values",
    "along",
)
_JOINING = ("cat", "concat", "concatenate", "stack")


class SeenGraph:
    """A graph, and what a run of it on the shapes of a call with one picture tells.

    Attributes:
        image: node of the picture.
        region: the node that asks the mask, if the graph has a region.
        shapes: shape of each tensor for one picture.
        grids: the lattices of each map of the region.
        channels: the number of values of each element of such a map.
        several: nodes of the region whose value is several maps.
        small: nodes whose value is a small map that the region reads.
        types: type of each tensor, and of the values of elements.
        numbers: numbers that follow from the size of the picture; in place of elements' rows of which only the type and
            device are read, an empty tensor.
        memories: the memory of the value of each node, which views share.
        changed: for each node that changes values in place, the nodes of these.
        device: of the picture; shapes are seen on meta tensors.
        own: runs single nodes of the graph on values.
    """

    def __init__(
        self, program: Program, graph: fx.Graph, arguments: dict[str, Any], counted: Program | None = None
    ) -> None:
        """Take a program, one of its graphs, the arguments of a call with one picture, and the program on meta tensors
        if there is one."""
        self.graph, self.own, self.net = graph, GraphInterpreter(program, graph), program.net
        self.image = next(node for node in graph.nodes if node.target == program.image_name)
        self.region = next((node for node in graph.nodes if node.target is ask_mask), None)
        self.device = arguments[program.image_name].device
        self.shapes, self.types = dict[fx.Node, torch.Size](), dict[fx.Node, torch.dtype]()
        self.grids, self.channels = dict[fx.Node, Grid](), dict[fx.Node, int]()
        self.several, self.small, self.numbers = set[fx.Node](), set[fx.Node](), dict[fx.Node, Any]()
        level = program.plan.max_level if program.own_level is None else program.own_level
        first = (partial(_lattice_of, program.geometry, level),) if self.region is not None else ()
        counted = counted or program.bind_to(meta_copy(program.net))
        found = observe(counted, graph, in_order(graph, arguments, *first))
        self.changed = {node: found.changed.get(node, []) for node in graph.nodes}
        self.memories = {
            node: {part.untyped_storage() for part in tensors_in(value)}
            for node, value in found.values.items()
        }
        for node, value in found.values.items():
            if isinstance(value, Tensor):
                self.shapes[node], self.types[node] = value.shape, value.dtype
            elif isinstance(value, Elements) and isinstance(value.rows, Tensor):
                self.grids[node] = Grid(value.lattice.stage, value.lattice.size)
                self.channels[node] = math.prod(value.rows.shape[1:])
                self.types[node] = value.rows.dtype
            elif isinstance(value, Elements):  # several maps in one
                self.several.add(node)
            elif isinstance(value, SmallMap):
                self.small.add(node)
            elif isinstance(value, torch.device):
                self.numbers[node] = self.device
            elif _is_number(value):
                self.numbers[node] = value
        for node in graph.nodes:
            is_rows = node.target is getattr and node.args[1] == "rows"
            if is_rows and node.users and all(_acts(user).kind == "shape" for user in node.users):
                self.numbers[node] = self.stand_in(node)

    def stand_in(self, node: fx.Node) -> Tensor:
        """Return an empty tensor with the type and device of a node's value."""
        return torch.empty(0, dtype=self.types[node], device=self.device)

    @property
    def returned(self) -> Any:
        """The output of the network and the fine map or lattice, with nodes in place of values."""
        return next(node for node in self.graph.nodes if node.op == "output").args[0]

    def size(self, node: fx.Node) -> tuple[int, int]:
        """Return height and width of a map (B, C, H, W)."""
        shape = self.shapes[node]
        return shape[2], shape[3]

    def fine_size(self) -> tuple[int, int]:
        """Return height and width of the fine map of the region."""
        fine: Any = self.returned[1] if self.region is None else self.region.args[2]
        return self.size(fine)


class BandPlan:
    """The maps of a graph for one picture, and the steps that compute them.

    Attributes:
        seen: the graph, and what is known of its values.
        cells: of the picture, if the graph has a region.
        maps: the map of each node, in the order of the graph; the picture is the first.
        sums: values of the whole image.
        walk_of: for each map and each value, how many walks down the picture come before it.
        axis: the axis of each map that its rows are counted along.
        parts: the maps that values which are several maps, or a small one, are read from.
        behind: operations that only arrange and combine results, such as a head that flattens its maps to rows: they
            are computed when these are complete.
        only_first: of the maps that the graph returns, only the first is asked for.
        along: the axis of the picture that rows are counted along. By `"w"` the plan says which columns are read, as
            `"h"` does of rows: its grids, and `cells`, are those of the picture turned.
        grids: the lattices of each map of the region, along this axis and across.
        values: values of all that is no map, while a call runs.
    """

    def __init__(
        self,
        seen: SeenGraph,
        cells: Cells | None = None,
        *,
        only_first: bool = False,
        along: Axis = "h",
        computes: bool = True,
    ) -> None:
        """Read the graph; a plan that `computes` nothing only says what is read, along any axis.

        Raises:
            CannotConvert: an operation needs a whole map.
        """
        self.seen, self.cells, self.only_first, self.along = seen, cells, only_first, along
        self.grids = seen.grids
        if along == "w":
            self.grids = {node: Grid(grid.stage, grid.size[::-1]) for node, grid in seen.grids.items()}
        self.maps = dict[fx.Node, Stream]()
        self.sums, self.walk_of = dict[Key, WholeImage](), dict[Key, int]()
        self.axis, self.parts = dict[fx.Node, int](), dict[fx.Node, list[fx.Node]]()
        self.values, self.behind = dict[Key, Any](), dict[fx.Node, CannotConvert]()
        if computes:
            self._refuse_changes_that_others_read()
        for node in seen.graph.nodes:
            if node is seen.image:
                self._add(node, Stream())
            elif node.op in ("placeholder", "get_attr", "output") or node.target is ask_mask:
                continue
            elif node in seen.several or (node in seen.small and self._maps_of(node)):
                self.parts[node] = self._maps_of(node)
            elif any(one in seen.grids for one in (node, *node.all_input_nodes)):
                self._read_elements(node)
            elif any(self._has_map(one) or one in self.behind for one in self.awaited(node)):
                self._read_node(node)
            elif self._is_enlarged(node):
                self._add(node, self._enlarged(node))
            else:
                self.walk_of[node] = self._latest_walk(self.awaited(node))
        if not computes:
            self._read_what_is_changed()
        kept, returned = (
            sum(math.prod(seen.shapes.get(node, (0,))) for node in nodes)
            for nodes in (self.map_outputs, self.outputs)
        )
        if self.behind and kept > 2 * returned:  # a map of the network, of which little is returned
            raise next(iter(self.behind.values()))

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes of the output."""
        found = dict[fx.Node, None]()
        map_arg(self.seen.returned[0], lambda node: found.setdefault(node))
        return list(found)

    @property
    def map_outputs(self) -> list[fx.Node]:
        """The maps of the output that are asked for, and those that the output is arranged from."""
        found = [node for node in self.outputs if node in self.maps]
        if self.only_first:
            return found[:1]
        return list(dict.fromkeys((*found, *(one for node in self.behind for one in self._maps_of(node)))))

    def awaited(self, node: fx.Node) -> list[fx.Node]:
        """Return the values that a node reads, without maps of which it reads only the size, type or device."""
        if _acts(node).kind != "shape":
            return node.all_input_nodes
        converted = node.args[:1] if is_kind(node.target, "converts") else ()
        return [one for one in node.all_input_nodes if one not in self.maps or one in converted]

    def _has_map(self, node: fx.Node) -> bool:
        return node in self.maps or node in self.parts

    def _maps_of(self, node: fx.Node) -> list[fx.Node]:
        """The maps that a node reads, also through several values in one."""
        read = (self.parts.get(source, [source]) for source in node.all_input_nodes if self._has_map(source))
        return list(dict.fromkeys(one for some in read for one in some))

    def _latest_walk(self, nodes: Iterable[fx.Node]) -> int:
        return max((self.walk_of.get(node, 0) for node in nodes), default=0)

    def _read_node(self, node: fx.Node) -> None:
        if node in self.seen.numbers:
            return  # a size
        refusal = next((self.behind[one] for one in node.all_input_nodes if one in self.behind), None)
        if refusal is None:
            try:
                return self._read_rows(node)
            except CannotConvert as error:
                refusal = error
        if self.only_first or not self._arranges(node):
            raise refusal
        self.behind[node] = refusal

    def _arranges(self, node: fx.Node) -> bool:
        """True for an operation without weights whose result is no larger than what it reads."""
        sizes = [math.prod(self.seen.shapes.get(one, (0,))) for one in (node, *node.all_input_nodes)]
        module = self.module(node)
        known = (
            is_kind(node.target if module is None else type(module), *_ARRANGING)
            or name_of(node.target) in _JOINING
        )
        return known and sizes[0] <= sum(sizes[1:])

    def _read_rows(self, node: fx.Node) -> None:
        treatment = _acts(node)
        if node not in self.seen.shapes:
            self._refuse_unless_rowwise(node, treatment)
            self.parts[node] = self._maps_of(node)
            return
        if node.target in (functional.contiguous_gradient, functional.exact_layout):
            self._add(node, self._pointwise(node))
        elif treatment.kind == "global":
            source, covers = self._source(node), self._resolved(treatment.covers, node)
            if covers is not None and not is_whole(covers, self.seen.shapes[source], treatment.or_more):
                raise self.refusal(node, "its window was the whole map where the network was converted")
            self._read_sum(node, source, treatment.call, self._arguments(node))
        else:
            self._add(node, self._step(node, treatment))

    def _add(self, node: fx.Node, made: Stream) -> None:
        if self.seen.shapes.get(node, (1,))[0] != 1:
            raise self.refusal(node, "it joins images, or copies of them")
        seen, size, made.name = self.seen, self.seen.types[node].itemsize, self._name(node)
        if node in seen.grids:
            assert self.cells is not None
            grid = self.grids[node]
            made.height, made.row, made.chunk = grid.size[0], seen.channels[node] * size, self.cells.side
            made.elements = self.cells.elements_above(grid)
            made.lattice = element_steps.LATTICE * grid.size[1]
        else:
            shape, axis = seen.shapes[node], self._axis(node)
            self.axis[node], made.height = axis, shape[axis]
            made.row = math.prod(shape) // max(shape[axis], 1) * size if made.compute is not None else 0
        made.sources = [(self.maps[one], rows) for one, rows in made.reads if one in self.maps]
        if made.compute is not None:
            self.walk_of.setdefault(
                node, self._latest_walk((*node.all_input_nodes, *(one for one, _ in made.reads)))
            )
        self.maps[node] = made

    def _name(self, node: fx.Node) -> str:
        """The name of a node, or that of the layer that was fused."""
        held = [
            str(one.target) for one in (node, *node.all_input_nodes) if one.op in ("get_attr", "call_module")
        ]
        origins = (
            getattr(self.seen.net.get_submodule(path), "origin", "") for path in held if self._is_module(path)
        )
        return next(filter(None, origins), node.name)

    def module(self, node: fx.Node) -> Any:
        """Return the module that a node calls; None if it calls something else."""
        return self.seen.net.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _is_module(self, path: str) -> bool:
        owner, _, name = path.rpartition(".")
        return name in self.seen.net.get_submodule(owner)._modules

    # -- steps ---------------------------------------------------------------------------------------

    def _step(self, node: fx.Node, acts: Treatment) -> Stream:
        if acts.then and acts.kind != "pointwise":
            raise self.refusal(node, "it is several operations in one")
        if acts.window is not None and (acts.kind == "window" or acts.window.finer > 1):
            return self._windowed(node, acts, self._turned(acts.window))
        if (pads := self._pads(node, acts)) is not None:  # padding is a window of one tap
            return self._over(node, self._turned(pads), lambda x, *_: x, pads=False)
        if acts.kind == "broadcast":
            return self._enlarged(node)
        if acts.call is functional.pixel_shuffle:
            return self._windowed(node, acts, Window((acts.scale, acts.scale), finer=acts.scale))
        if acts.call is functional.resize:
            source, options = self._source(node), self._arguments(node)
            scaling = self._turned(_scaling(options))
            return steps.resized(source, self._size(source), scaling, self.seen.types[source])
        if acts.call is functional.group_norm:
            return self._group_norm(node, self._source(node), self._arguments(node))
        self._refuse_unless_rowwise(node, acts)
        return self._pointwise(node)

    def _over(self, node: fx.Node, window: Window, apply: Any, **options: Any) -> Stream:
        source = self._source(node)
        return steps.windowed(source, window, self._size(source), self._size(node)[1], apply, **options)

    def _windowed(self, node: fx.Node, acts: Treatment, window: Window) -> Stream:
        """Convolutions are given padded rows; any other operation with a window pads by itself."""
        source, module = self._source(node), self.module(node)
        size, stride, dilation = self._size(source), window.stride, window.dilation
        if isinstance(module, PackedConv):
            residual: Any = node.args[1] if len(node.args) > 1 else None
            if residual is not None and self.seen.shapes.get(residual) != self.seen.shapes[node]:
                raise self.refusal(node, "what it adds has another size")
            return self._over(node, window, steps.convolution_by(module, window), residual=residual)
        call: Callable[..., Any] = partial(self.call, node)
        if acts.call is functional.conv2d:
            held = self._arguments(node)
            weight, bias, groups = held["weight"], held.get("bias"), held.get("groups", 1)
            if bias is None and isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                bias = module.bias  # of a norm that was folded into it
            if window.finer == 1:
                return self._over(
                    *(node, window.fit(size)),
                    lambda x, left, _: F.conv2d(x, weight, bias, stride, (0, left), dilation, groups),
                )
            weight = transpose_weight(weight, groups).contiguous()
            cut = window.padding[::2]
            lengths = zip(self._size(node), size, window.kernel, cut, strict=True)
            more = [
                after - (before - 1) * window.finer - taps + 2 * pad for after, before, taps, pad in lengths
            ]

            def call(rows: dict[fx.Node, Any]) -> Any:
                return F.conv_transpose2d(rows[source], weight, bias, window.finer, cut, more, groups)

        return steps.called(source, window, size[0], call)

    def _pads(self, node: fx.Node, treatment: Treatment) -> Window | None:
        """The padding of an operation that pads or cuts a map, by the sizes of this picture; None for any other."""
        if node.target is F.pad:
            options = arguments_of(node, "input", "pad", mode="constant", value=None)
            pads, mode = self._number(options["pad"]), options["mode"]
            layout = layout_of(node.all_input_nodes[0])
            if layout != NCHW or mode == "circular" or not _is_number(pads) or any(pads[4:]):
                return None
            left, right, top, bottom = (*pads, 0, 0)[:4]
            mode = "zeros" if mode == "constant" else mode
            return Window((1, 1), padding=(top, bottom, left, right), mode=mode, outside=options["value"])
        if node.target is operator.getitem and (crop := self._crop(node)) is not None:
            return crop
        if treatment.kind != "pad" or treatment.window is None:
            return None
        window = treatment.window.fit(self.seen.size(self._source(node)))
        return Window((1, 1), padding=window.padding, mode=window.mode, outside=window.outside)

    def _crop(self, node: fx.Node) -> Window | None:
        """Negative padding for slices that cut a map (1, C, H, W), without steps; None for any other index."""
        source: Any = node.args[0]
        index = parts_of_index(node.args[1], 4)
        index += [slice(None)] * (4 - len(index))
        is_cut = all(isinstance(part, slice) for part in index) and index[:2] == [slice(None)] * 2
        if layout_of(source) != NCHW or len(index) != 4 or not is_cut:
            return None
        parts = [self._number(part) for part in index]
        lengths, pads = self.seen.size(self._source(node)), list[int]()
        for part, length in zip(parts[2:], lengths, strict=True):
            start, stop, step = part.indices(length)
            if step != 1:
                return None
            pads += [-start, stop - length]
        return Window((1, 1), padding=(pads[0], pads[1], pads[2], pads[3]))

    def _is_enlarged(self, node: fx.Node) -> bool:
        """True if a value of the whole image is resized, or repeated over a map."""
        treatment = _acts(node)
        is_resized = treatment.kind == "broadcast" or treatment.call is functional.resize
        return is_resized and len(self.seen.shapes.get(node, ())) == 4

    def _enlarged(self, node: fx.Node) -> Stream:
        """The map that a value of the whole image is resized to."""
        options = dict(_acts(node).arguments)
        source: Any = node.args[0] if node.args else node.kwargs["input"]
        self._note_axis(source, NCHW.index(self.along))
        align, mode = options.get("align_corners"), options.get("mode", "nearest")
        scaling = Scaling(self._size(node), mode=mode, align_corners=align)
        return steps.resized(source, self._size(source), scaling, self.seen.types[source])

    def _group_norm(self, node: fx.Node, source: fx.Node, options: dict[str, Any]) -> Stream:
        """Mean and variance are values of the whole image; the rest acts on each row, or element."""
        grid, groups, key = self.grids.get(source), options["groups"], Statistics(node)
        channels = self.seen.channels[source] if grid else self.seen.shapes[source][1]
        weight, bias = (self._resolved(options.get(name), node) for name in ("weight", "bias"))
        eps = options.get("eps", 1e-5)
        measure = partial(steps.sums, groups=groups, squares=True, are_equal=self._are_equal(grid))
        made = partial(steps.affine_of, channels=channels, weight=weight, bias=bias, eps=eps)
        self._add_sum(key, WholeImage(source, measure, made))
        self.walk_of[node] = self.walk_of[key]

        def apply(rows: dict[fx.Node, Any]) -> Any:
            x, (scale, shift) = rows[source], self.values[key]
            if isinstance(x, Elements):
                return Elements(steps.scaled(x.rows, scale, shift), x.lattice)
            return steps.scaled(x, scale.view(-1, 1, 1), shift.view(-1, 1, 1))

        return steps.pointwise([source], apply)

    def _are_equal(self, grid: Grid | None) -> bool:
        """True if all elements of a map weigh the same; those of dense maps do."""
        return grid is None or self.cells is None or self.cells.are_equal(grid)

    def _pointwise(self, node: fx.Node) -> Stream:
        maps, axis, shape = self._maps_of(node), self._axis(node), self.seen.shapes[node]
        if any(one not in self.seen.shapes for one in maps):  # elements
            raise self.refusal(node, "it joins a dense map with the region")
        values = self._values_with_rows(node, axis, shape)
        heights = {self.seen.shapes[one][self._axis(one)] for one in (*maps, node)}
        if len(heights) > 1:
            raise self.refusal(node, "it joins maps of several heights")
        if is_kind(node.target, "reshapes"):  # by numbers that are those of the whole map

            def reshape(rows: dict[fx.Node, Any]) -> Tensor:
                (x,) = rows.values()
                height = x.shape[self._axis(maps[0])]
                return x.reshape(*shape[:axis], height, *shape[axis + 1 :])

            return steps.pointwise(maps, reshape)
        return steps.pointwise([*maps, *values], partial(self.call, node))

    def _values_with_rows(self, node: fx.Node, axis: int, shape: torch.Size) -> list[fx.Node]:
        """The values of the whole image, such as coordinates, that have a row for each row of a map they are joined
        with."""
        found = []
        for one in node.all_input_nodes:
            own = self.seen.shapes.get(one, ())
            at = axis - len(shape) + len(own)  # as torch broadcasts
            if not self._has_map(one) and at >= 0 and own[at] == shape[axis] > 1:
                self._note_axis(one, at)
                found.append(one)
        return found

    def _note_axis(self, value: fx.Node, axis: int) -> None:
        if self.axis.setdefault(value, axis) != axis:
            raise self.refusal(value, "its rows are read along two axes")

    def _axis(self, node: fx.Node) -> int:
        return self.axis.get(node) or max(layout_of(node).find(self.along), 0) or NCHW.index(self.along)

    def call(self, node: fx.Node, rows: dict[fx.Node, Any], **more: Any) -> Any:
        """Call the operation of a node on rows of the maps that it reads, perhaps with other options, or on values
        that are no maps. What it changes in place is its own."""

        asks = _acts(node).kind == "shape"

        def value(read: fx.Node) -> Any:
            if asks and read not in self.awaited(node):
                return self.seen.stand_in(read)
            found = (
                self.call(read, rows) if read in self.parts else (rows if read in rows else self.values)[read]
            )
            return copied(found) if read in self.seen.changed[node] else found

        args, kwargs = map_arg(node.args, value), {**map_arg(node.kwargs, value), **more}
        result = getattr(self.seen.own, node.op)(node.target, args, kwargs)
        of_rows = isinstance(result, SmallMap) and node in self.parts  # it begins where the lattice does
        return replace(result, top=0) if of_rows else result

    # -- the region ----------------------------------------------------------------------------------

    def _read_elements(self, node: fx.Node) -> None:
        """Read an operation of the region, or one at its border."""
        operation, cells = operation_of(node.target), self.cells
        if node in self.seen.numbers or (node.users and self.seen.numbers.keys() >= node.users.keys()):
            return  # a size, or what only such is asked of
        if operation is None or cells is None:
            raise self.refusal(node, "it is no operation on elements")
        if operation.gives == "vector":
            source, options = self._maps_of(node)[0], self._options(node)
            self._read_sum(node, source, node.target, options)
            return
        maps = self._maps_of(node)
        if not maps and node.target is functional.to_elements:  # another input of the network
            maps = node.all_input_nodes[:1]
            self._note_axis(maps[0], self._options(node).get("layout", NCHW).find(self.along))
        if not maps:
            raise self.refusal(node, "it reads no map")
        self._add(node, self._element_step(node, maps[0], operation, cells))

    def _element_step(self, node: fx.Node, source: fx.Node, operation: Operation, cells: Cells) -> Stream:
        grids, options = self.grids, self._options(node)
        call = partial(self.call, node)
        if node.target is functional.to_elements:
            return element_steps.entering(cells, source, grids[node], options.get("layout", NCHW))
        if source not in grids:
            raise self.refusal(node, "it joins a dense map with the region")
        spacing, layout = options.get("spacing", 1), layout_of(node)
        if node.target is functional.to_dense and self.along in layout and not options.get("guide"):
            return element_steps.dense_map(
                cells, source, grids[source], spacing, call, layout.index(self.along)
            )
        if node.target is functional.resize_to_dense and cells.pyramid.geometry.fill == "linear":
            scaling, dtype = self._turned(_scaling(options)), self.seen.types[source]
            return element_steps.resized_at_exit(cells, source, grids[source], spacing, scaling, dtype)
        pair = grids[source], grids.get(node, grids[source])
        if node.target is functional.resize:
            mode, align = options.get("mode", "nearest"), bool(options.get("align_corners"))
            return element_steps.resized_elements(cells, source, pair, options["spacings"], mode, align)
        if node.target is functional.pixel_shuffle:
            return element_steps.of_neighbours(cells, source, pair, call)
        if operation.reads == "window" and "window" in options:
            window, residual = self._turned(options["window"]).fit(pair[0].size), options.get("residual")
            added = grids[residual] if residual is not None else None
            return element_steps.window_of_elements(cells, source, residual, window, (*pair, added), call)
        if node.target is functional.group_norm:
            return self._group_norm(node, source, options)
        if operation.reads != "element":
            raise self.refusal(node, _NEEDS.get(operation.reads, _NEEDS["image"]))
        if node.target in (functional.pad, functional.crop, functional.check_same_padding):
            return element_steps.border_of_elements(cells, source, pair, spacing, options.get("value", 0.0))
        maps, small = self._maps_of(node), [one for one in node.all_input_nodes if one in self.seen.small]
        dense = dict(self._rows_of_small(one, cells.side) for one in small if one in self.parts)
        if any(one not in grids and one not in dense for one in maps):
            raise self.refusal(node, "it joins a dense map with the region")
        return steps.pointwise([*maps, *(one for one in small if one not in self.parts)], call, dense)

    def _rows_of_small(self, node: fx.Node, side: int) -> tuple[fx.Node, RowsRead]:
        """The dense map that the region reads between its samples, and the rows of it that fine rows read."""
        (source,), options = self.parts[node], self._options(node)
        spacing: int = options["spacing"]
        if options.get("size") is not None or side % spacing:
            raise self.refusal(node, "it joins a dense map with the region")
        return source, RowsRead(lambda row: row // spacing, lambda row: row // spacing + 1)

    def _options(self, node: fx.Node) -> dict[str, Any]:
        """The arguments of an operation on elements by name; numbers in place of their nodes."""
        target: Any = node.target
        if isinstance(target, OnRows):
            return {}
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)
        return {name: self._number(value) for name, value in bound.arguments.items()}

    # -- values of the whole image -------------------------------------------------------------------

    def _read_sum(self, node: fx.Node, source: fx.Node, call: Any, options: dict[str, Any]) -> None:
        """Read a value of the whole image, of a dense map or of one of the region."""
        grid, how, dims = (
            self.grids.get(source),
            options.get("how", "mean"),
            options.get("dims", (2, 3)),
        )
        shape, dtype = self.seen.shapes[node], self.seen.types[node]
        size, spacing = (grid.size, options.get("spacing", 1)) if grid else (self._lengths(source), 1)
        sign, measure = -1 if how == "amin" else 1, None
        finish: Callable[..., Any] = torch.div
        join: Callable[[Tensor, Tensor], Tensor] = torch.add
        if call is functional.global_max or (call is functional.global_reduce and how in ("amax", "amin")):
            measure, join, finish = (
                partial(steps.largest, sign=sign),
                torch.maximum,
                lambda found: found * sign,
            )
        elif call in (functional.global_mean, functional.global_reduce):
            squares, samples = how in ("var", "std", "norm"), math.prod(-(-n // spacing) for n in size)
            measure = partial(steps.sums, squares=squares, are_equal=self._are_equal(grid))
            finish = partial(steps.reduced, how=how, samples=samples, correction=options.get("correction", 1))
        elif call is functional.pool_to_bins:
            kind: dict[str, Any] = {
                "size": size,
                "bins": options["size"],
                "is_largest": options.get("largest", False),
            }
            measure = partial(steps.bins_of_rows, **kind)
            if grid:
                more: dict[str, Any] = {"spacing": spacing, "are_equal": self._are_equal(grid)}
                measure = partial(element_steps.bins_of_elements, **kind, **more)
            if kind["is_largest"]:
                join, finish = torch.maximum, lambda found: found
        layout = options.get("layout", NCHW) if grid else layout_of(source)
        is_over_all = set(dims) == {1, 2, 3} and how in ("mean", "sum", "amax", "amin")
        if measure is None or not (tuple(dims) == image_dims(layout) or is_over_all):
            axes = "the whole batch" if 0 in dims else "a part of the axes of a map"
            raise self.refusal(node, _NEEDS["image"] if measure is None else f"it reads {axes} at once")
        of_map, order = measure, tuple(map(layout.index, NCHW)) if grid is None and layout != NCHW else None

        def measured(rows: Any, first: int) -> list[Tensor]:
            return of_map(rows.permute(order) if order else rows, first)

        def finished(*found: Tensor) -> Tensor:
            value = finish(*found)
            return (getattr(torch, how)(value, 1) if is_over_all else value).view(shape).to(dtype)

        self._add_sum(node, WholeImage(source, measured, finished, join))

    def _add_sum(self, key: Key, one: WholeImage) -> None:
        self.sums[key] = one
        self.walk_of[key] = self.walk_of.get(one.source, 0) + 1

    # -- reading the graph ---------------------------------------------------------------------------

    def _source(self, node: fx.Node) -> fx.Node:
        """The map that a node reads."""
        source: Any = node.args[0] if node.args else next(iter(node.kwargs.values()))
        if source not in self.maps:
            if len(self.seen.shapes.get(source, ())) != 4:
                raise self.refusal(node, "what it reads is no map")
            # a value that is there as a whole, such as another input
            self._note_axis(source, NCHW.index(self.along))
        return source

    def _lengths(self, node: fx.Node) -> tuple[int, int]:
        """Height and width of a map of any axes."""
        layout, shape = layout_of(node), self.seen.shapes[node]
        return shape[layout.index("h")], shape[layout.index("w")]

    def _size(self, node: fx.Node) -> tuple[int, int]:
        """The length of a map (B, C, H, W) along the axis of the plan, and across."""
        size = self.seen.size(node)
        return size if self.along == "h" else size[::-1]

    def _turned(self, what: Turned) -> Turned:
        """A window or scaling, of the axis of the plan first."""
        return what if self.along == "h" else what.transposed

    def _number(self, value: Any) -> Any:
        """A value with numbers in place of their nodes."""
        return map_arg(value, lambda read: self.seen.numbers.get(read, read))

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        """The arguments of a node's treatment, with the values of weights and numbers."""
        return {name: self._resolved(value, node) for name, value in _acts(node).arguments}

    def _resolved(self, value: Any, node: fx.Node) -> Any:
        """The value of an argument of a node's treatment."""
        if isinstance(value, Operand):
            if value.number < 0:
                raise self.refusal(node, "a window is computed from what it does not read")
            value = node.all_input_nodes[value.number]
        if isinstance(value, Attribute):
            return operator.attrgetter(value.path)(self.seen.net)
        if isinstance(value, Call):
            args = [self._resolved(part, node) for part in value.args]
            return value.target(*args, **value.kwargs) if callable(value.target) else args[0]
        if isinstance(value, (tuple, list)):
            return type(value)(self._resolved(part, node) for part in value)
        if isinstance(value, fx.Node):
            return self._constant(value)
        return value

    def _constant(self, node: fx.Node) -> Any:
        """The value of a node that does not depend on the call, such as a weight that is computed from another."""
        if node.op == "get_attr":
            return self.seen.own.fetch_attr(str(node.target))
        if node in self.seen.numbers:
            return self.seen.numbers[node]
        if node.op == "placeholder" or self._has_map(node) or node in self.sums:
            raise self.refusal(node, "a window is computed from it")
        args, kwargs = (map_arg(part, self._constant) for part in (node.args, node.kwargs))
        return getattr(self.seen.own, node.op)(node.target, args, kwargs)

    def _refuse_unless_rowwise(self, node: fx.Node, treatment: Treatment) -> None:
        """Refuse an operation that does not act on each row alone as it is called."""
        if node.target is operator.getitem and node.args[0] in self.parts:
            return
        operation, layouts = (
            treatment.operation,
            {layout_of(one) for one in self._maps_of(node)},
        )
        layouts |= {layout_of(node)} if node in self.seen.shapes else set()
        on_rows = operation is None or operation.reads == "element"
        if (
            treatment.kind not in ("pointwise", "join")
            or not on_rows
            or any(self.along not in one for one in layouts)
        ):
            raise self.refusal(node, treatment.why if treatment.kind == "barrier" else _NEEDS["image"])

    def _refuse_changes_that_others_read(self) -> None:
        """Refuse an operation in place if what it changes is read by something behind it, but through its result: rows
        are changed in a copy."""
        for node, _, _ in self._changes_that_others_read():
            raise self.refusal(node, "it changes in place what others read")

    def _read_what_is_changed(self) -> None:
        """Let what reads a map that was changed in place read the result of the change, too."""
        for node, other, user in self._changes_that_others_read():
            one = self.maps.get(user)
            reads = [(node, rows) for source, rows in one.reads if source is other] if one is not None else []
            if one is None or node not in self.maps or not reads:
                raise self.refusal(node, "it changes in place what others read")
            one.reads += reads
            one.sources += [(self.maps[node], rows) for _, rows in reads]

    def _changes_that_others_read(self) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
        """Yield each operation in place, a map that it changes, and what reads this behind it."""
        numbers = {node: number for number, node in enumerate(self.seen.graph.nodes)}
        for node, sources in self.seen.changed.items() if any(self.seen.changed.values()) else ():
            changed = set().union(*(self.seen.memories[source] for source in sources))
            for other, memories in self.seen.memories.items():
                if numbers[other] < numbers[node] and memories & changed:
                    yield from ((node, other, user) for user in other.users if numbers[user] > numbers[node])

    def refusal(self, node: fx.Node, why: str) -> CannotConvert:
        """Return the error for a node that is not computed in bands."""
        path = str(node.target) if node.op == "call_module" else module_of(node)
        return CannotConvert(
            "the network cannot be computed in bands of rows.",
            where=", ".join(filter(None, (node.name, path, source_line(node)))),
            why=f"{why.rstrip('.')}.",
            next="run it whole: net.optimize() without memory=.",
        )


def _acts(node: fx.Node) -> Treatment:
    """Return how a node acts on dense maps; see `rewrite.acts_of`."""
    return node.meta.get(ACTS) or Treatment("barrier", f"no rule for {node.name}")


def layout_of(node: fx.Node) -> str:
    """Return the axes of a node's value; "" if it is no map."""
    return _acts(node).layout


def copied(value: Any) -> Any:
    """Return a tensor, elements, or several, in memory of their own."""
    if isinstance(value, Elements):
        return Elements(copied(value.rows), value.lattice)
    return tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, value)


def _scaling(options: dict[str, Any]) -> Scaling:
    """Return the scaling of a resize with some options."""
    names = ("size", "scale_factor", "align_corners", "recompute_scale_factor")
    return Scaling(**{name: options.get(name) for name in names}, mode=options.get("mode", "nearest"))


def uniform(geometry: Geometry, level: int, size: tuple[int, int], batch: int = 1) -> Lattice:
    """Return the lattice of pictures with all cells at a level, without memory for its level map."""
    levels = torch.tensor(level, dtype=torch.int8).expand(batch, *size)
    return Pyramid(levels, geometry).lattice(geometry.stage_of_levels, size)


def _lattice_of(geometry: Geometry, level: int, image: Tensor, features: Tensor) -> Lattice:
    """Return the lattice of a fine map with all cells at a level; at the network's own, shapes follow from those of
    ordinary operations on dense maps."""
    return uniform(geometry, level, (features.shape[2], features.shape[3]), len(features))


def _is_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_number, value))
    return isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device))
