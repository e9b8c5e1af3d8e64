"""Read a network's output map only at points of the image, directly from the elements without a dense map.

    rows = cs.read_at(net, image, [points], reach="receptive")

With `reach="receptive"`, after the mask only the elements that these points depend on are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from cadsurgery.elements import functional
from cadsurgery.elements.backends.works import pick
from cadsurgery.elements.elements import guided
from cadsurgery.elements.kernel_map import read_points
from cadsurgery.elements.lattice import Lattice
from cadsurgery.following.equivalence import meta_copy
from cadsurgery.following.guards import drop_dead_code
from cadsurgery.masks.context import keypoints_at
from cadsurgery.masks.detectors import points_of
from cadsurgery.masks.spec import resolve_mask
from cadsurgery.network.dependencies import Cone, reached
from cadsurgery.network.invocations import Invocation
from cadsurgery.network.model import AdaptiveModel, whole_program
from cadsurgery.network.observing import LatticeId, observe
from cadsurgery.network.program import GraphInterpreter, Program
from cadsurgery.network.regions import select_output
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput, UnknownName, check_name
from cadsurgery.support.meta_tensors import to_meta
from cadsurgery.support.torch_internals import BatchNorm, tree_leaves, tree_map

Reach = Literal["all", "receptive"]
Align = Literal["cell", "corners"]
REACHES, ALIGNMENTS = ("all", "receptive"), ("cell", "corners")
# Number of batch sizes for which the lattices of an output's nodes are cached.
MOST_SIZES = 8


@dataclass(frozen=True)
class ReachMacs:
    """Multiply-accumulates of reading at points, with `reach="all"` and `reach="receptive"`.

    Attributes:
        all: MACs of the whole network on the images, with its mask.
        receptive: MACs with `reach="receptive"`.
        elements: number of rows that window operations compute, with `all` and with `receptive`.
    """

    all: int
    receptive: int
    elements: tuple[int, int]


def read_at(
    net: AdaptiveModel,
    image: Tensor,
    points: Sequence[Tensor],
    *,
    mask: object = None,
    reach: Reach = "all",
    output: str | int | None = None,
    align: Align = "cell",
) -> list[Tensor]:
    """Return the values of the network's map at points, equal to those of its dense output.

    Args:
        net: a converted network whose output is a map that leaves the adaptive region unchanged.
        image: (B, C, H, W), as for a call.
        points: one tensor (n, 2) per image, x and y in image pixels; n may differ between images, and may be 0.
        mask: mask for this call only; the mask `keypoints` gets these points.
        reach: `"receptive"` computes only elements that the points depend on. The rows are then bit for bit the same in
            float32 for a network that runs on elements, with convolutions of at least 16 channels and ReLU, if torch's
            matrix product gives a row the same bits for any number of rows, as with AVX-512. They are the same up to
            rounding with AVX2, in other types, with fewer channels, with SiLU or GELU (torch computes the last values
            of a tensor differently), and for a uniform level map, which normally runs as ordinary convolutions.
        output: key or position of the map if there are several outputs.
        align: which sample of the fine map is read for a point: `"cell"`, the one that covers it, or `"corners"`, the
            nearest one if the outermost samples lie on the outermost pixels (as published for D2-Net).

    Returns:
        One tensor (n, C) per image.

    Raises:
        InvalidInput: invalid points, points outside the image or for another number of images; a network whose output
            is not a map that leaves the region unchanged, that is in training mode, or only hosts an adaptive part.
        UnknownName: no such reach, alignment or output.
    """
    program = _program(net, reach)
    differentiable = reach == "all" and not program.is_fused
    with torch.set_grad_enabled(torch.is_grad_enabled() and differentiable):
        run = _Run.of(net, image, points, mask, reach, output, align)
        return run.rows(run.parts() if reach == "receptive" else None)


def macs_at(
    net: AdaptiveModel,
    image: Tensor,
    points: Sequence[Tensor],
    *,
    mask: object = None,
    output: str | int | None = None,
    align: Align = "cell",
) -> ReachMacs:
    """Count the multiply-accumulates of `read_at` with and without `reach="receptive"`; see there for the arguments."""
    _program(net, "receptive")
    run = _Run.of(net, image, points, mask, "receptive", output, align)
    with keypoints_at(run.points):
        whole = net.macs(image, mask=run.mask)
    plain = net.counted
    with torch.no_grad():
        values = plain.before(plain.bind(image.to("meta")))
        counted = replace(run, program=plain, exit=_ReadOutput.of(plain, output), values=values)
        (every, rows), (needed, needed_rows) = (counted.macs(parts) for parts in (None, counted.parts()))
    return ReachMacs(whole.mask, whole.mask - every + needed, (rows, needed_rows))


def readable(net: AdaptiveModel, output: str | int | None = None) -> bool:
    """True if `read_at` can read an output of a network: a map that leaves the adaptive region unchanged."""
    try:
        _exit(_program(net, "all"), output)
    except (InvalidInput, UnknownName):
        return False
    return True


@dataclass(frozen=True)
class _ReadOutput:
    """The graph from the mask to the elements of one output.

    Attributes:
        graph: a graph that returns (elements, guide or None).
        node: the node of the elements.
        spacing: fine pixels between the samples of the dense output.
        lattice_ids: stage and fine size of its nodes, by the shapes of the inputs, for the last few shapes.
    """

    graph: fx.Graph
    node: fx.Node
    spacing: int
    lattice_ids: dict[Any, dict[str, LatticeId]] = field(default_factory=dict)

    @staticmethod
    def of(program: Program, output: str | int | None) -> _ReadOutput:
        """Build the exit of an output of a network."""
        source = program.halves.after
        value = select_output(next(node for node in source.nodes if node.op == "output").args[0][0], output)
        if not isinstance(value, fx.Node) or value.target is not functional.to_dense:
            last = value.target if isinstance(value, fx.Node) else describe(value)
            raise InvalidInput(
                f"the output is not read from the adaptive region: {getattr(last, '__name__', last)} makes it.",
                why="only a map that leaves the region unchanged can be read at points.",
                next="convert the part of the network that returns the map, or name an output that is one: output=.",
            )
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.graph_copy(source, copies)
        elements: Any = value.args[0]
        guide: Any = value.kwargs.get("guide")
        graph.output((copies[elements], copies[guide] if guide is not None else None))
        drop_dead_code(graph)
        spacing: Any = value.args[1] if len(value.args) > 1 else value.kwargs.get("spacing", 1)
        return _ReadOutput(graph, copies[elements], spacing)


_EXITS: WeakKeyDictionary[Program, dict[Any, _ReadOutput]] = WeakKeyDictionary()


def _exit(program: Program, output: str | int | None) -> _ReadOutput:
    """Return the exit of an output, built once."""
    exits = _EXITS.setdefault(program, {})
    return exits[output] if output in exits else exits.setdefault(output, _ReadOutput.of(program, output))


@dataclass
class _Run:
    """One call: the network's values before the mask, the lattice, and the points to read."""

    program: Program
    exit: _ReadOutput
    mask: Any
    points: list[Tensor]
    values: tuple[Any, ...]
    lattice: Lattice
    image: Tensor
    align: str

    @staticmethod
    def of(
        net: AdaptiveModel,
        image: Tensor,
        points: Sequence[Tensor],
        mask: object,
        reach: str,
        output: str | int | None,
        align: str,
    ) -> _Run:
        """Check the arguments and run the network up to the lattice."""
        check_name("reach", reach, REACHES)
        check_name("alignment", align, ALIGNMENTS)
        program = net.program
        call = Invocation(program, program.bind(image))
        with call.explained():
            if isinstance(points, Tensor) and points.dim() in (3, 4) and points.shape[-1] != 2:
                raise InvalidInput(
                    f"points are {describe(points)}.",
                    next="give a list with a tensor (n, 2) of x and y in pixels for each image; a score map has peaks: "
                    "cadsurgery.detection.peaks.",
                )
            points = points_of(points, image, 1, "")
            exit = _exit(program, output)
            provider = net.mask if mask is None else resolve_mask(mask)
            with keypoints_at(points):
                values = program.before(call.arguments)
                lattice = program.ask(program.masking(provider), values)
        net.finish(None, lattice)
        return _Run(program, exit, provider, points, values, lattice, image, align)

    def parts(self) -> dict[str, Lattice]:
        """Return the elements that the points depend on, for each operation that creates new elements."""
        lattice_ids = self._lattice_ids()
        exit = self.lattice.resample(*lattice_ids[self.exit.node.name])
        anchors = reached(exit, read_points(exit, self._pixels(exit)))
        return Cone(self.exit.graph, lattice_ids, self.lattice, self.exit.node, anchors).lattices

    def rows(self, parts: dict[str, Lattice] | None) -> list[Tensor]:
        """Return the values of the map at the points of each image."""
        runner = GraphInterpreter(self.program, self.exit.graph, parts)
        elements, guide = runner.run(lambda *_: self.lattice, *self.values)
        lattice, pixels = elements.lattice, self._pixels(elements.lattice)
        reading = read_points(lattice, pixels)
        if guide is not None and reading.sources.shape[0]:
            reading = guided(reading, pixels, lattice, guide)
        rows = pick(elements.rows.flatten(1), reading)
        return list(rows.split([len(part) for part in self.points]))

    def macs(self, parts: dict[str, Lattice] | None) -> tuple[int, int]:
        """Count the MACs after the mask, and the rows that window operations compute, on meta tensors."""
        seen = observe(self.program, self.exit.graph, [lambda *_: self.lattice, *self.values], parts)
        return sum(seen.macs.values()), seen.rows

    def _pixels(self, lattice: Lattice) -> Tensor:
        """Return the flat fine pixels of the dense output's samples at the points of all images."""
        (height, width), spacing = lattice.size, self.exit.spacing
        size, stride = (-(-height // spacing), -(-width // spacing)), self.program.plan.strides[0] * spacing
        pixels = []
        for image, points in enumerate(self.points):
            y, x = sample_at(points, self.image, size, stride, self.align)
            pixels.append((image * height + y * spacing) * width + x * spacing)
        return torch.cat(pixels).to(lattice.levels.device)

    def _lattice_ids(self) -> dict[str, LatticeId]:
        """Return stage and fine size of the graph's nodes for inputs of these shapes."""
        values = tree_map(to_meta, self.values)
        key = tuple(leaf.shape if isinstance(leaf, Tensor) else str(leaf) for leaf in tree_leaves(values))
        lattice_ids = self.exit.lattice_ids.pop(key, None)
        if lattice_ids is None:
            lattice, program = self.lattice, meta_copy(self.program.net).program
            low = program.geometry.uniform(program.geometry.max_level, lattice.batch, lattice.whole_size)
            lattice_ids = observe(program, self.exit.graph, [lambda *_: low, *values]).lattice_ids
        self.exit.lattice_ids[key] = lattice_ids  # ordered by last use
        for oldest in list(self.exit.lattice_ids)[:-MOST_SIZES]:
            self.exit.lattice_ids.pop(oldest, None)
        return lattice_ids


def sample_at(
    points: Tensor, like: Tensor, size: tuple[int, int], stride: float, align: str
) -> tuple[Tensor, Tensor]:
    """Return row and column, each (n,) int64, of the map's samples at points.

    Args:
        points: (n, 2) x and y in pixels.
        like: the image batch (B, C, H, W).
        size: (h, w) of the map.
        stride: pixels of the image per sample.
        align: see `read_at`.
    """
    axes = []
    for axis, length, pixels in ((1, size[0], like.shape[2]), (0, size[1], like.shape[3])):
        place = points[:, axis]
        if align == "corners":
            place = (place * ((length - 1) / max(pixels - 1, 1))).round()
        else:
            place = ((place + 0.5) / stride).floor()
        axes.append(place.long().clamp(0, length - 1))
    return axes[0], axes[1]


def _program(net: Any, reach: str) -> Program:
    """Return the program of a network; refuse networks that cannot be read at points."""
    part = "pass what cs.adaptify(...) gave for the part that returns the map."
    program = whole_program(net, "cannot be read at points", part)
    if reach == "receptive" and any(norm.training for norm in net.modules() if isinstance(norm, BatchNorm)):
        raise InvalidInput(
            "a network in training mode has no receptive field.",
            why="the statistics of a batch depend on every element.",
            next="call net.eval() first.",
        )
    return program
