"""Export dense twins in the usual form: maps (B, C, H, W) everywhere, and only torch operations in the graph.

On a uniform level map the rows of a network are a map, and the recorded operations are torch's. But rows are viewed as
a map for every convolution, and as rows again. Such views cost nothing in torch; other engines transpose each time,
which takes a tenth of a ResNet's time in ONNX Runtime and would make the comparison unfair to the dense network.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from cadsurgery.network.dense_twin import dense_twin, record
from cadsurgery.network.export.compare import check_difference, difference
from cadsurgery.network.export.engine import Engine, check_packages
from cadsurgery.network.export.programs import follow
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.running import portable
from cadsurgery.support.torch_internals import tree_leaves, tree_map

_ATEN = torch.ops.aten
_LAST, _FIRST = [0, 2, 3, 1], [0, 3, 1, 2]  # permutations from channels first to last and back
_SAME_VALUES = (_ATEN.view.default, _ATEN.reshape.default, _ATEN.clone.default, _ATEN.alias.default)


def write_dense(net: AdaptiveModel, level: int, image: Tensor, path: Path, engine: type[Engine]) -> None:
    """Write the dense network at a uniform level (see `dense_twin`) for an engine, in the form an ordinary network has.

    Args:
        net: a converted network.
        level: the level of all cells.
        image: batch (B, C, H, W) of the file's size; the outputs of file and network are compared on it.
        path: file to write.
        engine: engine that the file is for.

    Raises:
        CannotConvert: torch cannot follow the network, or the file's outputs differ.
        NotInstalled: a required package is not installed.
    """
    check_packages(engine)
    from cadsurgery.network.export.onnx import translate  # with torch's exporter
    from cadsurgery.network.export.translate import OWN

    program = dense_program(net, level, image)
    translate(program, "measure it in torch.", custom_translation_table=OWN).save(path)
    expected = tree_leaves(dense_twin(net, level, image)(image))
    check_difference([difference(engine(path)(image), expected)])


def dense_program(net: AdaptiveModel, level: int, image: Tensor) -> torch.export.ExportedProgram:
    """Export the dense network at a uniform level as a program of torch's operations.

    Raises:
        CannotConvert: torch.export cannot follow the network.
    """
    with portable():
        twin = record(net, level, image, in_place=False)
    _resize_as_users_do(twin.graph)
    stay_on_maps(twin)
    return follow(twin, image)


# Recording leaves the inner form of these, which torch's exporter writes as gathers, four for each resize.
_RESIZES = {
    _ATEN.upsample_bilinear2d.default: _ATEN.upsample_bilinear2d.vec,
    _ATEN.upsample_bicubic2d.default: _ATEN.upsample_bicubic2d.vec,
}


def _resize_as_users_do(graph: fx.Graph) -> None:
    """Replace the recorded form of resizes by the one that the exporter of an ordinary network meets."""
    for node in graph.nodes:
        if node.target in _RESIZES:
            image, size, align_corners, *scales = node.args
            given = None not in scales and len(scales) == 2
            node.target = _RESIZES[node.target]
            node.args = (image, None if given else size, align_corners, scales if given else None)


def stay_on_maps(module: fx.GraphModule) -> None:
    """Let a recorded graph compute on maps instead of rows where the results are the same: pointwise operations,
    operations on the channels of each position, and means over an image."""
    maps = _DenseMaps(module)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.all_input_nodes:
            with module.graph.inserting_before(node):
                maps.visit(node)
    module.graph.eliminate_dead_code()
    module.recompile()


class _DenseMaps:
    """For nodes with values of shape (..., C), the map (B, C, H, W) that has the same values."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.graph = module.graph
        self.of: dict[fx.Node, fx.Node] = {}
        self.constants = {
            node: attrgetter(node.target)(module) for node in module.graph.nodes if node.op == "get_attr"
        }

    def visit(self, node: fx.Node) -> None:
        """Record the map with the values of a node, or replace the node by an operation on maps."""
        first, target = node.all_input_nodes[0], node.target
        if all(source in self.constants for source in node.all_input_nodes):
            arguments, keywords = _exchange(node, self.constants)
            self.constants[node] = target(*arguments, **keywords)  # type: ignore[operator]
        elif target is _ATEN.permute.default and node.args[1] == _LAST:
            self.of[node] = first
        elif target is _ATEN.permute.default and node.args[1] == _FIRST and first in self.of:
            if _shape(node) == _shape(self.of[first]):
                node.replace_all_uses_with(self.of[first])
        elif target is _ATEN.mm.default and (rows := node.all_input_nodes[-1]) in self.of:
            self._visit_product(node, self.of[rows])
        elif first in self.of and (target in _SAME_VALUES or _takes_all(node, first)):
            if _shape(node)[-1] == _shape(self.of[first])[1]:
                self.of[node] = self.of[first]
        elif target is _ATEN.cat.default:
            self._visit_joint(node)
        elif torch.Tag.pointwise in getattr(target, "tags", ()):
            self._visit_pointwise(node)

    def _visit_product(self, node: fx.Node, whole: fx.Node) -> None:
        """Replace a product of rows with equal weights per image, (B, B H W), by a mean over the map."""
        shares, (batch, _, height, width) = self.constants.get(node.all_input_nodes[0]), _shape(whole)
        equal = torch.eye(batch).repeat_interleave(height * width, 1) / (height * width)
        if (
            shares is not None
            and shares.shape == equal.shape
            and torch.allclose(shares.to(equal), equal, atol=0)
        ):
            node.replace_all_uses_with(self.graph.call_function(_ATEN.mean.dim, (whole, [2, 3])))

    def _visit_pointwise(self, node: fx.Node) -> None:
        """Replace a pointwise operation on rows of maps, scalars, and vectors with one value per channel."""
        shape, wide = _shape(node), {}
        rows = [source for source in node.all_input_nodes if source in self.of and _shape(source) == shape]
        for source in node.all_input_nodes:
            vector = source.args[0] if source.target is _ATEN.expand.default else source
            if source in rows:
                wide[source] = self.of[source]
            elif _shape(vector) in (shape[-1:], (1, *shape[-1:])):
                wide[source] = self.graph.call_function(_ATEN.view.default, (vector, [-1, 1, 1]))
            elif _shape(source) not in ((), (1,)):
                return
        if len({_shape(wide[source]) for source in rows}) == 1:
            self.of[node] = self._call(node, wide, _shape(wide[rows[0]]))

    def _visit_joint(self, node: fx.Node) -> None:
        """Replace a concatenation of rows along the channels by one of maps."""
        parts = [self.of.get(part) for part in node.all_input_nodes]
        shapes = {(_shape(part)[:1], _shape(part)[2:]) for part in parts}
        if None not in parts and len(shapes) == 1 and node.args[1] == len(_shape(node)) - 1:
            first = _shape(parts[0])
            wide = self.graph.call_function(_ATEN.cat.default, (parts, 1))
            wide.meta["val"] = torch.empty(first[0], _shape(node)[-1], *first[2:], device="meta")
            self.of[node] = wide

    def _call(self, node: fx.Node, operands: dict[fx.Node, fx.Node], shape: tuple[int, ...]) -> fx.Node:
        """Add the operation of a node with other operands."""
        result = self.graph.call_function(node.target, *_exchange(node, operands))  # type: ignore[arg-type]
        result.meta["val"] = torch.empty(shape, device="meta")
        return result


def _exchange(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[Any, Any]:
    """Return the arguments of a node with some of its inputs replaced."""
    return tree_map(
        lambda one: values.get(one, one) if isinstance(one, fx.Node) else one, (node.args, dict(node.kwargs))
    )


def _takes_all(node: fx.Node, first: fx.Node) -> bool:
    return node.target is _ATEN.slice.Tensor and _shape(node) == _shape(first)


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()
