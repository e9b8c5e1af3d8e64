"""Let the nodes of an ONNX graph (onnx_ir) read and write 8 bits.

A value is quantised once, behind the node that computes it, and dequantised once for all nodes that read floats.
Engines fuse QuantizeLinear and DequantizeLinear with the operation between them. This package's functions read and
write the 8 bits themselves, and in ONNX Runtime so do operations that only move values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cadsurgery.network.export.kernels import CONVOLUTIONS, DOMAIN, IN_8_BITS, OF_8_BITS, PICK
from cadsurgery.network.export.rounding import QuantParams, mean_error, round_weight

PRODUCTS = ("Conv", "Gemm", "MatMul")
# Operations that only move values, which keep their scale and zero point.
MOVES = ("Gather", PICK, "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_TO_MAP = [0, 3, 1, 2]  # permutation of rows to a map (B, C, H, W)
Rounded = tuple[Tensor, Tensor]  # integers of a weight, outputs first, and the scale (O,) of each output
_LARGEST_BIAS = 1 << 30  # of the integers of a bias: half of what 32 bits hold


def is_convolution_of_rows(node: Any) -> bool:
    """True for a convolution by this package's kernels."""
    return node.domain == DOMAIN and node.op_type in CONVOLUTIONS.values()


def options_of(node: Any) -> dict[str, Any]:
    """Return the attributes of a node by name."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def indices_of_values(node: Any) -> list[int]:
    """Return the indices of the inputs of a node that are in 8 bits, but for its weight."""
    if node.op_type in ("Add", "Concat"):
        return list(range(len(node.inputs)))
    return [0, len(node.inputs) - 1] if is_convolution_of_rows(node) and _adds_residual(node) else [0]


def round_weights(graph: Any, nodes: Sequence[Any], means: Mapping[Any, Tensor]) -> dict[Any, Rounded]:
    """Round the weights of nodes to what 8 bits hold, in floating point, and correct the mean error that this causes in
    their biases.

    Args:
        graph: it is changed.
        nodes: nodes that will read and write 8 bits.
        means: of what products and functions read the mean (C,) in each channel.

    Returns:
        For each of the nodes with a weight its integers, outputs first, and the scale (O,) of each output.
    """
    weights: dict[Any, Rounded] = {}
    for node in nodes:
        if node.op_type not in PRODUCTS and not _can_be_in_8_bits(node):
            continue
        index, rows = _index_of_weight(node), node.inputs[0]
        exact, groups, limited = _weight_of(node)
        whole, scale = weights[node] = round_weight(exact, limited)
        rounded = whole * scale.view(-1, *[1] * (whole.dim() - 1))
        # New names, because another node may share the weight and stay in floating point.
        name = f"{node.inputs[index].name}.{node.name}"
        bias = node.inputs[index + 1] if len(node.inputs) > index + 1 else None
        node.replace_input_with(index, add_constant(graph, name, _as_stored(node, rounded)))
        if node.op_type != "MatMul" and rows in means:
            shift = mean_error(exact - rounded, means[rows], groups)
            before = 0.0 if bias is None else _constant_of(bias).flatten()
            node.resize_inputs(max(len(node.inputs), index + 2))
            corrected = add_constant(graph, f"{name}.bias", (before + shift).float())
            node.replace_input_with(index + 1, corrected)
    return weights


def write_bytes(
    graph: Any,
    nodes: Sequence[Any],
    weights: Mapping[Any, Rounded],
    mask: set[Any],
    ranges: Mapping[Any, tuple[float, float]],
    for_onnxruntime: bool,
) -> None:
    """Let nodes of a graph read and write 8 bits.

    Args:
        graph: it is changed; nodes without readers are left in it.
        nodes: the nodes, in the order of the graph.
        weights: their weights, from `round_weights`.
        mask: nodes of the mask. They see what the nodes write in 8 bits, and all else in floating point; other nodes
            read every value in 8 bits that one of the nodes reads in 8 bits.
        ranges: of all values that the nodes read and write in 8 bits, but for constants.
        for_onnxruntime: True if the engine of the file is ONNX Runtime.
    """
    writer = _Writer(graph, nodes, weights, dict(ranges), for_onnxruntime)
    readers = [
        (use.node, use.idx, value)
        for value in writer.parameters
        for use in value.uses()
        if not value.is_initializer()
        and use.node not in writer.nodes
        and (use.node not in mask or value.producer() in writer.nodes)
    ]
    for node in writer.nodes:
        writer.visit(node)
    for node, index, value in readers:
        node.replace_input_with(index, writer.as_floats(value))


class _Writer:
    """Writes the nodes that quantise and dequantise the values of a graph."""

    def __init__(
        self,
        graph: Any,
        nodes: Sequence[Any],
        weights: Mapping[Any, Rounded],
        ranges: dict[Any, tuple[float, float]],
        for_onnxruntime: bool,
    ) -> None:
        self.graph, self.weights, self.ranges, self.for_onnxruntime = graph, weights, ranges, for_onnxruntime
        self.nodes = dict.fromkeys(nodes)
        for node in nodes:
            self._absorb(node)
        # OpenVINO follows values in floating point from one quantisation to the next.
        has_kernels = any(map(_can_be_in_8_bits, nodes))
        self.moves = MOVES if for_onnxruntime else (PICK, "Reshape") if has_kernels else ()
        self.parameters = self._choose_parameters()
        self._bytes: dict[Any, Any] = {}
        self._floats: dict[Any, Any] = {}

    def _absorb(self, node: Any) -> None:
        """Remove an activation whose bounds are those of the 8 bits that the product or sum before it then writes, also
        where values are moved between the two."""
        from onnx_ir import convenience

        if not _bounds_around_zero(node) or node.outputs[0].is_graph_output():
            return
        values = [node.inputs[0]]
        while (maker := values[-1].producer()) in self.nodes and maker.op_type in MOVES:
            values.append(maker.inputs[0])
        is_seen = any(len(value.uses()) > 1 or value.is_graph_output() for value in values)
        if maker in self.nodes and maker.op_type in (*PRODUCTS, "Add") and not is_seen:
            self.ranges |= dict.fromkeys(values, self.ranges[node.outputs[0]])
            convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            self.graph.remove(node, safe=True)
            del self.nodes[node]

    def _choose_parameters(self) -> dict[Any, QuantParams]:
        """Return the quantisation parameters of all values in 8 bits.

        What only moves values, or takes the largest, keeps the parameters of its input. What is computed to be joined
        to rows, such as a halo (means of rows), has those of the joint: it may be all zero on the calibration images.
        """
        parameters: dict[Any, QuantParams] = {}
        for node in self.nodes:
            if node.op_type == "Concat":
                joint = self._parameters_of(node.outputs[0])
                for value in node.inputs:
                    is_joined_alone = value.producer() not in self.nodes and len(value.uses()) == 1
                    if value.is_initializer() or is_joined_alone:
                        parameters[value] = joint
        for node in self.nodes:
            values, result = [node.inputs[index] for index in indices_of_values(node)], node.outputs[0]
            parameters |= {value: self._parameters_of(value) for value in values if value not in parameters}
            keeps = node.op_type in (*MOVES, "MaxPool")
            parameters[result] = parameters[values[0]] if keeps else self._parameters_of(result)
        return parameters

    def _parameters_of(self, value: Any) -> QuantParams:
        """Return quantisation parameters for the range of a value."""
        if value.is_initializer():
            return QuantParams.of_range(*map(float, _constant_of(value).aminmax()))
        return QuantParams.of_range(*self.ranges[value])

    def visit(self, node: Any) -> None:
        """Let a node read 8 bits or dequantised values, and a graph that returns its result return it dequantised."""
        source, result = node.inputs[0], node.outputs[0]
        if _can_be_in_8_bits(node):
            self._convolve(node)
        elif node.op_type in self.moves:
            node.replace_input_with(0, self._as_bytes(source))
            node.op_type += IN_8_BITS if node.op_type == PICK else ""
            self._write_bytes(result)
        else:
            for index in indices_of_values(node):
                node.replace_input_with(index, self.as_floats(node.inputs[index]))
            if node.op_type in PRODUCTS:
                self._multiply(node, source)
            # OpenVINO keeps channels last in memory, so that nothing has to be permuted, but it sees that only where a
            # permutation and a convolution have nothing between them (OpenVINO 2026.4).
            if not self.for_onnxruntime and list(options_of(node).get("perm", ())) == _TO_MAP:
                self._floats[result] = result
        if result.is_graph_output() and (floats := self.as_floats(result)) is not result:
            result.name, floats.name = f"{result.name}.exact", result.name
            for index, value in enumerate(self.graph.outputs):
                if value is result:
                    self.graph.outputs[index] = floats

    # -- weights -----------------------------------------------------------------------------------

    def _convolve(self, node: Any) -> None:
        """Let a function read and write 8 bits, and multiply by a weight in 8 bits."""
        import onnx_ir

        (rows, *_, stored, bias, residual), result = node.inputs, node.outputs[0]
        name, (whole, scale) = node.name, self.weights[node]
        more, of_residual = self._constant("nothing", torch.zeros(1, dtype=torch.uint8)), QuantParams(1.0, 0)
        if _adds_residual(node):
            more, of_residual = self._as_bytes(residual), self.parameters[residual]
        inputs = (
            self._constant(f"{name}.weight", _as_stored(node, whole)),
            self._constant(f"{name}.bias", _constant_of(bias)),
            more,
            self._constant(
                f"{name}.scales", scale.view(stored.shape[1], 1, -1) if len(stored.shape) == 4 else scale
            ),
        )
        numbers = (*self.parameters[rows], *self.parameters[result], *of_residual)
        for option, number in zip(OF_8_BITS, numbers, strict=True):
            node.attributes[option] = onnx_ir.AttrFloat32(option, float(number))
        node.resize_inputs(8)
        for index, value in ((0, self._as_bytes(rows)), *enumerate(inputs, 4)):
            node.replace_input_with(index, value)
        node.op_type += IN_8_BITS
        self._write_bytes(result)

    def _multiply(self, node: Any, source: Any) -> None:
        """Let a product read a weight in 8 bits, and a bias in 32 bits, in the scale of its sums.

        Where a bias would not fit into 32 bits, the weights are tiny beside it, and their scale is larger.
        """
        (whole, scale), name = self.weights[node], f"{node.inputs[1].name}.{node.name}"
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias, step = _constant_of(node.inputs[2]).flatten(), self.parameters[source].scale
            least = (bias.abs() / (_LARGEST_BIAS * step)).float()
            factor = (scale / scale.maximum(least)).view(-1, *[1] * (whole.dim() - 1))
            whole, scale = (whole * factor).round().to(torch.int8), scale.maximum(least)
            sums = (scale.double() * step).float()
            node.replace_input_with(2, self._dequantise(f"{name}.bias", (bias / sums).round().int(), sums, 0))
        node.replace_input_with(
            1, self._dequantise(name, _as_stored(node, whole), scale, _axis_of_outputs(node))
        )

    # -- values ------------------------------------------------------------------------------------

    def _as_bytes(self, value: Any) -> Any:
        """Return a value in 8 bits."""
        if value not in self._bytes:
            inputs = [value, *self._numbers(self.parameters[value])]
            self._bytes[value] = self._insert("QuantizeLinear", inputs)
        return self._bytes[value]

    def as_floats(self, value: Any) -> Any:
        """Return a value in floating point that was in 8 bits."""
        if value not in self._floats:
            inputs = [self._as_bytes(value), *self._numbers(self.parameters[value])]
            self._floats[value] = self._insert("DequantizeLinear", inputs)
        return self._floats[value]

    def _write_bytes(self, result: Any) -> None:
        from onnx_ir import DataType

        self._bytes[result], result.dtype = result, DataType.UINT8

    def _dequantise(self, name: str, whole: Tensor, scale: Tensor, axis: int) -> Any:
        """Return integers times the scale of each output."""
        zero = torch.zeros(len(scale), dtype=whole.dtype)
        tensors = {"whole": whole.contiguous(), "scale": scale, "zero": zero}
        inputs = [self._constant(f"{name}.{part}", tensor) for part, tensor in tensors.items()]
        return self._insert("DequantizeLinear", inputs, axis=axis)

    def _insert(self, kind: str, inputs: list[Any], **options: int) -> Any:
        """Insert a node that quantises or dequantises its first input, behind what computes that."""
        from onnx_ir import DataType, tape

        steps, maker = tape.Tape(), inputs[0].producer()
        result = steps.op(kind, inputs, options)
        result.dtype = DataType.UINT8 if kind == "QuantizeLinear" else DataType.FLOAT
        result.shape = inputs[0].shape
        if maker is None:
            self.graph.insert_before(self.graph[0], steps.nodes)
        else:
            self.graph.insert_after(maker, steps.nodes)
        return result

    def _numbers(self, parameters: QuantParams) -> list[Any]:
        """Return scale and zero point as constants of the graph."""
        return [
            self._constant(f"scale.{parameters.scale!r}", torch.tensor(parameters.scale)),
            self._constant(f"zero.{parameters.zero}", torch.tensor(parameters.zero, dtype=torch.uint8)),
        ]

    def _constant(self, name: str, values: Tensor) -> Any:
        return add_constant(self.graph, name, values)


def add_constant(graph: Any, name: str, values: Tensor) -> Any:
    """Return the constant of a graph that has a name, which is added if there is none."""
    from onnx_ir import tape, tensor

    if name not in graph.initializers:
        tape.Tape(graph).initializer(tensor(values.contiguous().numpy()), name)
    return graph.initializers[name]


def _index_of_weight(node: Any) -> int:
    return 4 if is_convolution_of_rows(node) else 1


def _axis_of_outputs(product: Any) -> int:
    return int(product.op_type != "Conv" and not options_of(product).get("transB"))


def _weight_of(node: Any) -> tuple[Tensor, int, Literal["any", "adjacent"] | None]:
    """Return the weight of a node, outputs first, (O, C / groups, ...), its groups, and how its integers are limited.

    No two weights of an output of a product sum to more than 128 (see `round_weight`), so that sums are exact on every
    processor. Depthwise convolutions use all 8 bits, because both engines widen their products to 32 bits (measured
    without VNNI in ONNX Runtime 1.32 and OpenVINO 2026.4). This package's kernels are exact with any weights, and
    faster where those of adjacent channels are limited.
    """
    weight = _constant_of(node.inputs[_index_of_weight(node)])
    if is_convolution_of_rows(node):  # (taps, C), (taps, C, O) or (taps, groups, C / groups, O / groups)
        by_tap = {2: weight[:, :, None, None], 3: weight[:, None]}.get(weight.dim(), weight)
        return by_tap.permute(1, 3, 2, 0).flatten(0, 1), by_tap.shape[1], "adjacent"
    by_output, groups = weight.movedim(_axis_of_outputs(node), 0), options_of(node).get("group", 1)
    is_depthwise = node.op_type == "Conv" and by_output.shape[:2] == (groups, 1)
    return by_output, groups, None if is_depthwise else "any"


def _as_stored(node: Any, by_output: Tensor) -> Tensor:
    """Return a weight whose outputs are first in the order in which a node reads it; see `_weight_of`."""
    shape = list(node.inputs[_index_of_weight(node)].shape)
    if not is_convolution_of_rows(node):
        return by_output.movedim(0, _axis_of_outputs(node))
    groups = 1 if len(shape) == 3 else shape[1]
    return by_output.unflatten(0, (groups, -1)).permute(3, 0, 2, 1).reshape(shape)


def _adds_residual(node: Any) -> bool:
    """True if a function adds a residual; that of a single number, 0, adds nothing."""
    residual = node.inputs[-1]
    maker = residual.producer()
    return not residual.is_initializer() and (maker is None or maker.op_type != "ConstantOfShape")


def _can_be_in_8_bits(node: Any) -> bool:
    """True for a function with a constant weight; depthwise kernels in 8 bits add no residual."""
    if not is_convolution_of_rows(node):
        return False
    has_constants = all(_constant_of(value) is not None for value in node.inputs[4:6])
    return has_constants and not (node.op_type == CONVOLUTIONS[2] and _adds_residual(node))


def _bounds_around_zero(node: Any) -> bool:
    """True for an activation that bounds values by constants, which 0 lies between."""
    if node.op_type != "Clip":
        return bool(node.op_type == "Relu")
    limits = [limit.const_value.numpy() if limit is not None else None for limit in node.inputs[1:]]
    low, high = [*limits, None, None][:2]
    return (low is None or low <= 0) and (high is None or high >= 0)


def _constant_of(value: Any) -> Any:
    """Return the tensor of a constant, or of a number repeated in a constant shape; None for any other value."""
    if value.is_initializer():
        return torch.from_numpy(value.const_value.numpy().copy())
    maker = value.producer()
    if maker is None or maker.op_type != "ConstantOfShape" or not maker.inputs[0].is_initializer():
        return None
    number = maker.attributes["value"].value.numpy().item() if maker.attributes else 0.0
    return torch.full(maker.inputs[0].const_value.numpy().tolist(), number, dtype=torch.float32)
