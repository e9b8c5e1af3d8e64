"""Let the nodes of an ONNX graph (onnx_ir) read and write 8 bits.

A value is quantised once, behind the node that computes it, and dequantised once for all nodes that read floats. Engines
fuse QuantizeLinear and DequantizeLinear with the operation between them. This package's functions read and write the 8
bits themselves, and so do operations that only move values, where an engine does not have to look through them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cadsurgery.elements.backends.integer import QuantParams
from cadsurgery.network.export.kernels import CONVOLUTIONS, DOMAIN, IN_8_BITS, OF_8_BITS, PICK

PRODUCTS = ("Conv", "Gemm", "MatMul")
# Operations that only move values, which keep their scale and zero point.
MOVES = ("Gather", PICK, "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_KEEPING = (*MOVES, "MaxPool")
_LARGEST_BIAS = (
    2**31 - 2**8
)  # the largest integer of a bias that single precision does not round up beyond 32 bits
_TO_MAP = [0, 3, 1, 2]  # permutation of rows to a map (B, C, H, W)


class RoundedWeight(NamedTuple):
    """A weight in 8 bits, as its node reads it.

    Attributes:
        whole: integers (int8), in the order of the node's weight.
        scale: factor of each output, (O,), or in the shape that multiplies the integers of a function.
        axis: the axis of the outputs.
        bias: (O,) in floating point, or None.
    """

    whole: Tensor
    scale: Tensor
    axis: int
    bias: Tensor | None


def is_convolution_of_rows(node: Any) -> bool:
    """True for a convolution by this package's kernels."""
    return node.domain == DOMAIN and node.op_type in CONVOLUTIONS.values()


def adds_residual(node: Any) -> bool:
    """True if a convolution by this package's kernels adds a residual; that of a single number, 0, adds nothing."""
    residual = node.inputs[-1]
    maker = residual.producer()
    return not residual.is_initializer() and (maker is None or maker.op_type != "ConstantOfShape")


def is_bound(node: Any) -> bool:
    """True for an activation that bounds values by constants."""
    return node.op_type == "Relu" or (
        node.op_type == "Clip" and all(limit is None or limit.is_initializer() for limit in node.inputs[1:])
    )


def places_of_values(node: Any) -> list[int]:
    """Return the places of the inputs of a node that are in 8 bits, but for its weight."""
    if node.op_type in ("Add", "Concat"):
        return list(range(len(node.inputs)))
    return [0, len(node.inputs) - 1] if is_convolution_of_rows(node) and adds_residual(node) else [0]


def choose_parameters(
    nodes: Collection[Any], ranges: Mapping[str, tuple[float, float]]
) -> dict[Any, QuantParams]:
    """Return the quantisation parameters of all values that nodes read and write in 8 bits.

    What only moves values, or takes the largest, keeps the parameters of its input. What is joined to rows, such as a
    halo (means of rows), has those of the joint: it may be all zero on the calibration images.

    Args:
        nodes: nodes in the order of the graph.
        ranges: by name the smallest and the largest of the values.
    """
    parameters, inside = dict[Any, QuantParams](), set(nodes)

    def of(value: Any) -> QuantParams:
        if value.is_initializer():
            return QuantParams.of_range(*map(float, constant_of(value).aminmax()))
        return QuantParams.of_range(*ranges[value.name])

    for node in nodes:
        values, result = [node.inputs[place] for place in places_of_values(node)], node.outputs[0]
        if node.op_type == "Concat":
            parameters[result] = of(result)
            parameters |= dict.fromkeys(
                (value for value in values if value.producer() not in inside), parameters[result]
            )
            continue
        parameters |= {value: of(value) for value in values if value not in parameters}
        parameters[result] = parameters[values[0]] if node.op_type in _KEEPING else of(result)
    return parameters


def constant_of(value: Any) -> Any:
    """Return the tensor of a constant, or zeros of a constant shape; None for any other value."""
    if value.is_initializer():
        return torch.from_numpy(value.const_value.numpy().copy())
    maker = value.producer()
    if maker is None or maker.op_type != "ConstantOfShape" or not maker.inputs[0].is_initializer():
        return None
    return torch.zeros(maker.inputs[0].const_value.numpy().tolist())


def write_bytes(
    graph: Any,
    nodes: Collection[Any],
    weights: Mapping[Any, RoundedWeight],
    parameters: Mapping[Any, QuantParams],
    for_onnxruntime: bool,
) -> None:
    """Let nodes of a graph read and write 8 bits.

    Args:
        graph: it is changed; nodes without readers are left in it.
        nodes: the nodes, in the order of the graph.
        weights: weights of those that multiply; a function without a weight stays in floating point.
        parameters: see `choose_parameters`.
        for_onnxruntime: the engine of the file is ONNX Runtime, for which all moves are moves of bytes. OpenVINO
            follows values in floating point from one quantisation to the next, so only what is between functions moves
            bytes there.
    """
    has_functions = any(map(is_convolution_of_rows, weights))
    moves = MOVES if for_onnxruntime else (PICK, "Reshape") if has_functions else ()
    writer = _Writer(graph, nodes, weights, parameters, moves, not for_onnxruntime)
    for node in nodes:
        writer.visit(node)


class _Writer:
    """Writes the nodes that quantise and dequantise the values of a graph.

    Attributes:
        moves: operations that move bytes.
        permutes_floats: rows in floating point become maps (B, C, H, W) without being quantised again, as OpenVINO needs
            it: it keeps channels last in memory, so that nothing has to be permuted, but it sees that only where a
            permutation and a convolution have nothing between them (OpenVINO 2026.4).
    """

    def __init__(
        self,
        graph: Any,
        nodes: Collection[Any],
        weights: Mapping[Any, RoundedWeight],
        parameters: Mapping[Any, QuantParams],
        moves: Collection[str],
        permutes_floats: bool,
    ) -> None:
        self.graph, self.nodes, self.weights, self.parameters = graph, set(nodes), weights, parameters
        self.moves, self.permutes_floats = moves, permutes_floats
        self._bytes: dict[Any, Any] = {}
        self._floats: dict[Any, Any] = {}
        self._before_activation: dict[Any, Any] = {}
        self._constants: dict[QuantParams, list[Any]] = {}

    def visit(self, node: Any) -> None:
        """Let a node, and all that read its result, read 8 bits or dequantised values."""
        result = node.outputs[0]
        others = [(use.node, use.idx) for use in result.uses() if use.node not in self.nodes]
        if is_convolution_of_rows(node) and node in self.weights:
            self._convolve(node)
        elif node.op_type in self.moves:
            node.replace_input_with(0, self._as_bytes(node.inputs[0]))
            node.op_type += IN_8_BITS if node.op_type == PICK else ""
            self._writes_bytes(node)
        elif self._is_absorbed(node):
            self._before_activation[result] = node.inputs[0]
        else:
            source = self.parameters[node.inputs[0]]
            for place in places_of_values(node):
                node.replace_input_with(place, self._as_floats(node.inputs[place]))
            if node in self.weights:
                self._multiply(node, source)
            if self.permutes_floats and node.op_type == "Transpose" and _permutation(node) == _TO_MAP:
                self._floats[result] = result
        for reader, place in others:
            reader.replace_input_with(place, self._as_floats(result))
        if result.is_graph_output():
            self._return(result)

    def _is_absorbed(self, node: Any) -> bool:
        """True for an activation whose bounds are those of the 8 bits that the operation before it writes."""
        before = node.inputs[0]
        if not is_bound(node) or before.producer() not in self.nodes or before.is_graph_output():
            return False
        low, high = _bounds(node)
        is_at_sums = before.producer().op_type in (*PRODUCTS, "Add") and len(before.uses()) == 1
        return low <= 0 <= high and is_at_sums

    def _convolve(self, node: Any) -> None:
        """Let a function read and write 8 bits, and multiply by a weight in 8 bits."""
        import onnx_ir

        weight, rows, residual = self.weights[node], node.inputs[0], node.inputs[-1]
        more, of_residual = torch.zeros(1, dtype=torch.uint8), QuantParams(1.0, 0)
        if has_residual := adds_residual(node):
            of_residual = self.parameters[residual]
        numbers = (*self.parameters[rows], *self.parameters[node.outputs[0]], *of_residual)
        node.attributes.update(
            (name, onnx_ir.AttrFloat32(name, float(number)))
            for name, number in zip(OF_8_BITS, numbers, strict=True)
        )
        inputs = (
            self._constant(f"{node.name}.weight", weight.whole),
            self._constant(f"{node.name}.bias", weight.bias),
            self._as_bytes(residual) if has_residual else self._constant(f"{node.name}.none", more),
            self._constant(f"{node.name}.scales", weight.scale),
        )
        node.resize_inputs(8)
        node.replace_input_with(0, self._as_bytes(rows))
        for place, value in enumerate(inputs, 4):
            node.replace_input_with(place, value)
        node.op_type += IN_8_BITS
        self._writes_bytes(node)

    def _multiply(self, node: Any, source: QuantParams) -> None:
        """Let a product read its weight, and its bias in 32 bits, in the scale of the sums.

        Where such a bias would not fit, the scale of the weight is larger; the weight is then tiny beside it.
        """
        whole, scale, axis, bias = self.weights[node]
        name = node.inputs[1].name
        if bias is not None:
            least = bias.abs().double() / (_LARGEST_BIAS * source.scale)
            factor = (scale / torch.maximum(scale.double(), least)).view(-1, *[1] * (whole.dim() - 1))
            whole = (whole.movedim(axis, 0) * factor).round().to(torch.int8).movedim(0, axis)
            scale = torch.maximum(scale, least.float())
            sums = scale.double() * source.scale
            integers = (bias.double() / sums.float()).round().clamp(-_LARGEST_BIAS, _LARGEST_BIAS).int()
            node.resize_inputs(3)
            node.replace_input_with(2, self._dequantised(f"{name}.bias_in_32_bits", integers, sums.float(), 0))
        node.replace_input_with(1, self._dequantised(f"{name}.in_8_bits", whole, scale, axis))

    def _dequantised(self, name: str, whole: Tensor, scale: Tensor, axis: int) -> Any:
        zeros = torch.zeros(len(scale), dtype=whole.dtype)
        parts = {"": whole.contiguous(), ".scale": scale, ".zero": zeros}
        inputs = [self._constant(f"{name}{part}", tensor) for part, tensor in parts.items()]
        return self._insert("DequantizeLinear", inputs, inputs[0], axis=axis)

    def _as_bytes(self, value: Any) -> Any:
        if value not in self._bytes:
            parameters = self.parameters[value]
            if value.is_initializer():
                whole = parameters.quantise(constant_of(value))
                self._bytes[value] = self._constant(f"{value.name}.in_8_bits", whole)
            else:
                exact = self._before_activation.get(value, value)
                inputs = [exact, *self._numbers(parameters)]
                self._bytes[value] = self._insert("QuantizeLinear", inputs, exact)
        return self._bytes[value]

    def _as_floats(self, value: Any) -> Any:
        if value not in self._floats:
            whole = self._as_bytes(value)
            inputs = [whole, *self._numbers(self.parameters[value])]
            self._floats[value] = self._insert("DequantizeLinear", inputs, whole)
        return self._floats[value]

    def _writes_bytes(self, node: Any) -> None:
        from onnx_ir import DataType

        self._bytes[node.outputs[0]] = node.outputs[0]
        node.outputs[0].dtype = DataType.UINT8

    def _insert(self, kind: str, inputs: list[Any], behind: Any, **options: int) -> Any:
        """Insert a node that quantises or dequantises a value, behind the one that computes it."""
        from onnx_ir import DataType, tape

        steps = tape.Tape()
        result = steps.op(kind, inputs, options)
        result.dtype = DataType.UINT8 if kind == "QuantizeLinear" else DataType.FLOAT
        result.shape = behind.shape
        if behind.producer() is None:
            self.graph.insert_before(self.graph[0], steps.nodes)
        else:
            self.graph.insert_after(behind.producer(), steps.nodes)
        return result

    def _numbers(self, parameters: QuantParams) -> list[Any]:
        """Return scale and zero point as constants of the graph."""
        if parameters not in self._constants:
            name = f"parameters_{len(self._constants)}"
            self._constants[parameters] = [
                self._constant(f"{name}.scale", torch.tensor(parameters.scale, dtype=torch.float32)),
                self._constant(f"{name}.zero", torch.tensor(parameters.zero, dtype=torch.uint8)),
            ]
        return self._constants[parameters]

    def _constant(self, name: str, values: Any) -> Any:
        from onnx_ir import tape, tensor

        return tape.Tape(self.graph).initializer(tensor(values.numpy()), name)

    def _return(self, result: Any) -> None:
        """Let the graph return dequantised values under the name of the exact ones."""
        floats, outputs, name = self._as_floats(result), self.graph.outputs, result.name
        if floats is not result:
            result.name, floats.name = f"{name}.exact", name
            for place in [place for place, value in enumerate(outputs) if value is result]:
                outputs[place] = floats


def _bounds(activation: Any) -> tuple[float, float]:
    """Return the bounds of a `Clip` or `Relu`; see `is_bound`."""
    if activation.op_type == "Relu":
        return 0.0, math.inf
    limits = [*activation.inputs[1:], None, None][:2]
    low, high = (
        default if limit is None else limit.const_value.numpy().item()
        for limit, default in zip(limits, (-math.inf, math.inf), strict=True)
    )
    return low, high


def _permutation(node: Any) -> list[int]:
    return list(node.attributes["perm"].value)
