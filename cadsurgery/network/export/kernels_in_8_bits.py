"""This package's functions in quantised ONNX files: between quantised values they read and write 8 bits themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cadsurgery.network.export.kernels import CONVOLUTIONS, DOMAIN, IN_8_BITS, OF_8_BITS, PICK, function
from cadsurgery.network.quantise import mean_error, round_weight

FUNCTIONS = (*CONVOLUTIONS.values(), PICK)


def teach_quantiser(graph: Any) -> None:
    """Teach ONNX Runtime's quantiser the functions in a graph (onnx_ir): rows, result and residual are quantised, and
    nothing else. Picked rows keep their scale and zero point."""
    from onnxruntime.quantization.operators.qdq_base_operator import QDQOperatorBase
    from onnxruntime.quantization.registry import QDQRegistry

    residuals = {
        node.name: node.inputs[-1].name
        for node in graph
        if node.domain == DOMAIN and node.op_type in CONVOLUTIONS.values() and not _is_single(node.inputs[-1])
    }

    class Convolution(QDQOperatorBase):
        def quantize(self) -> None:
            for value in (self.node.input[0], self.node.output[0], residuals.get(self.node.name)):
                if value is not None:
                    self.quantizer.quantize_activation_tensor(value)

    class Pick(QDQOperatorBase):
        def quantize(self) -> None:
            rows, picked = self.node.input[0], self.node.output[0]
            self.quantizer.quantize_activation_tensor(rows)
            self.quantizer.quantize_output_same_as_input(picked, rows, self.node.name)

    QDQRegistry.update({**dict.fromkeys(CONVOLUTIONS.values(), Convolution), PICK: Pick})


def _is_single(residual: Any) -> bool:
    """True for a residual of one number, which adds nothing."""
    maker = residual.producer()
    return residual.is_initializer() or (maker is not None and maker.op_type == "ConstantOfShape")


class _Message:
    """An ONNX message with its constants, and the nodes that write and read its values."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.constants = {weight.name: weight for weight in model.graph.initializer}
        self.makers: dict[str, Any] = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.returned = {output.name for output in model.graph.output}

    def value(self, name: str) -> Any:
        """Return the value of a constant, or zeros of a constant shape; None of other values."""
        import numpy as np
        from onnx import numpy_helper

        if name in self.constants:
            return numpy_helper.to_array(self.constants[name])
        maker = self.makers.get(name)
        if maker is None or maker.op_type != "ConstantOfShape" or maker.input[0] not in self.constants:
            return None
        return np.zeros(self.value(maker.input[0]), np.float32)

    def steps(self, node: Any, kind: str) -> list[float] | None:
        """Return scale and zero point of a node that quantises, or dequantises, a whole tensor of uint8."""
        if node is None or node.op_type != kind:
            return None
        found = [self.value(name) for name in node.input[1:]]
        is_plain = len(found) == 2 and all(one is not None and one.size == 1 for one in found)
        if not is_plain or found[1].dtype != "uint8":
            return None
        return [float(one.reshape(-1)[0]) for one in found]

    def is_single(self, name: str) -> bool:
        """True for one number, which as a residual adds nothing."""
        value = self.value(name)
        return value is not None and value.size == 1

    def add(self, name: str, value: Any) -> str:
        """Add a constant; return its name."""
        from onnx import numpy_helper

        self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def ends(self, node: Any) -> _Ends | None:
        """Return what quantises the rows and the result of a node; None unless that is all that is done to them."""
        rows, result = node.input[0], node.output[0]
        after = self.readers.get(result, [])
        if len(after) != 1 or result in self.returned:
            return None
        of_rows = self.steps(self.makers.get(rows), "DequantizeLinear")
        of_result = self.steps(after[0], "QuantizeLinear")
        return _Ends(rows, after[0], of_rows, of_result) if of_rows and of_result else None

    def leave(self, node: Any, name: str) -> None:
        """Note that a node no longer reads a value; what computes it goes with its last reader."""
        self.readers[name].remove(node)
        if not self.readers[name] and name not in self.returned and name in self.makers:
            maker = self.makers.pop(name)
            self.model.graph.node.remove(maker)
            for before in maker.input:
                self.readers[before].remove(maker)


class _Ends(NamedTuple):
    """The `DequantizeLinear` before a node and the `QuantizeLinear` after it.

    Attributes:
        rows: the value between.
        after: the node after it.
        of_rows: scale and zero point of the rows.
        of_result: scale and zero point of the result.
    """

    rows: str
    after: Any
    of_rows: list[float]
    of_result: list[float]

    def take(self, node: Any, message: _Message) -> None:
        """Let the node take the place of both."""
        node.input[0] = message.makers[self.rows].input[0]
        message.readers[node.input[0]].append(node)
        message.leave(node, self.rows)
        node.output[0] = self.after.output[0]
        message.makers[node.output[0]] = node
        message.model.graph.node.remove(self.after)


def put_into_8_bits(model: Any, means: Mapping[str, Tensor]) -> None:
    """Let convolutions between quantised values (an ONNX message) read and write their 8 bits themselves.

    The operation then takes the place of its `DequantizeLinear` and `QuantizeLinear`, and its weights are rounded to 8
    bits. Only those of adjacent channels are limited, because the kernels' sums are exact on every processor.

    Args:
        model: it is changed.
        means: by the name of rows their mean (C,) in each channel, by which the mean error of rounded weights is
            corrected in the bias.
    """
    message = _Message(model)
    changed = {
        node.op_type
        for node in [call for call in model.graph.node if call.domain == DOMAIN and call.op_type in FUNCTIONS]
        if (
            _pick_in_8_bits(node, message)
            if node.op_type == PICK
            else _convolve_in_8_bits(node, message, means)
        )
    }
    if not changed:
        return
    _reshape_in_8_bits(message)
    (opset,) = (one.version for one in model.opset_import if one.domain == "")
    model.functions.extend(function(name, opset) for name in sorted(changed))
    called = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    for one in [one for one in model.functions if one.domain == DOMAIN and one.name not in called]:
        model.functions.remove(one)


def quantise_permuted_maps_once(model: Any) -> None:
    """Remove what quantises rows again when they have become a map (B, C, H, W); scale and zero point are the same.

    OpenVINO keeps channels last in memory, so that nothing has to be permuted, but it sees that only where a
    permutation and a convolution have nothing between them (OpenVINO 2026.4).
    """
    message = _Message(model)
    for node in [one for one in model.graph.node if one.op_type == "Transpose"]:
        ends, is_to_map = (
            message.ends(node),
            [list(attribute.ints) for attribute in node.attribute] == [[0, 3, 1, 2]],
        )
        if not ends or not is_to_map or ends.of_rows != ends.of_result:
            continue
        exact = message.readers.get(ends.after.output[0], [])
        if [message.steps(neighbour, "DequantizeLinear") for neighbour in exact] != [ends.of_result]:
            continue
        again = exact[0].output[0]
        if again not in message.returned:
            for reader in message.readers.get(again, []):
                for place, name in enumerate(reader.input):
                    if name == again:
                        reader.input[place] = node.output[0]
            model.graph.node.remove(ends.after)
            model.graph.node.remove(exact[0])


def _reshape_in_8_bits(message: _Message) -> None:
    """Let reshapes of quantised values move their 8 bits; engines would convert them twice."""
    for node in [reshape for reshape in message.model.graph.node if reshape.op_type == "Reshape"]:
        ends = message.ends(node)
        if ends and ends.of_rows == ends.of_result:
            readers = message.readers[ends.after.output[0]]
            if all(
                reader.op_type.endswith(IN_8_BITS) or reader.op_type == "DequantizeLinear"
                for reader in readers
            ):
                ends.take(node, message)


def _pick_in_8_bits(node: Any, message: _Message) -> bool:
    """Let a pick of quantised rows copy their 8 bits; return True if so."""
    if not (ends := message.ends(node)) or ends.of_rows != ends.of_result:
        return False
    node.op_type += IN_8_BITS
    ends.take(node, message)
    return True


def _convolve_in_8_bits(node: Any, message: _Message, means: Mapping[str, Tensor]) -> bool:
    """Put a convolution into 8 bits if its rows, its residual and its result are quantised; return True if so."""
    import numpy as np
    from onnx import helper

    *_, weight, bias, residual = node.input
    has_residual, of_residual = not message.is_single(residual), [1.0, 0.0]
    if has_residual:
        found = message.steps(message.makers.get(residual), "DequantizeLinear")
        if found is None or node.op_type == CONVOLUTIONS[2]:  # depthwise kernels take none
            return False
        of_residual = found
    values, offset, ends = message.value(weight), message.value(bias), message.ends(node)
    if values is None or offset is None or ends is None:
        return False
    whole, scales, shift = _round(values, means.get(ends.rows.removesuffix("_DequantizeLinear_Output")))
    prefix = f"{node.name or node.output[0]}.in_8_bits"
    none = np.zeros(1, np.uint8)
    inputs = [
        message.add(f"{prefix}.weight", whole),
        message.add(f"{prefix}.bias", (torch.from_numpy(offset.copy()) + shift).float().numpy()),
        message.makers[residual].input[0] if has_residual else message.add(f"{prefix}.none", none),
        message.add(f"{prefix}.scales", scales),
    ]
    if has_residual:
        message.readers[inputs[2]].append(node)
        message.leave(node, residual)
    del node.input[4:]
    node.input.extend(inputs)
    node.op_type += IN_8_BITS
    ends.take(node, message)
    numbers = zip(OF_8_BITS, (*ends.of_rows, *ends.of_result, *of_residual), strict=True)
    node.attribute.extend(helper.make_attribute(name, number) for name, number in numbers)
    return True


def _round(weight: Any, mean: Tensor | None) -> tuple[Any, Any, Any]:
    """Round the weight of a function to 8 bits.

    Args:
        weight: (taps, C) of a depthwise convolution, (taps, C, O), or (taps, groups, C / groups, O / groups).
        mean: (C,), mean of the rows in each channel; None if it is not known.

    Returns:
        The rounded weight, the scales of its outputs, which multiply it, and the mean error (O,) of their sums; 0
        without a mean.
    """
    exact = torch.from_numpy(weight.copy())
    whole = {2: exact[:, :, None, None], 3: exact[:, None]}.get(exact.dim(), exact)
    _, groups, _, outputs = whole.shape
    by_output = whole.permute(1, 3, 2, 0).flatten(0, 1)  # (O, C / groups, taps)
    rounded, scale = round_weight(by_output, "adjacent")
    shift = 0 if mean is None else mean_error(by_output - rounded * scale.view(-1, 1, 1), mean, groups)
    rounded = rounded.unflatten(0, (groups, outputs)).permute(3, 0, 2, 1).reshape(exact.shape)
    scales = scale.view(groups, 1, outputs) if exact.dim() == 4 else scale
    return rounded.contiguous().numpy(), scales.numpy(), shift
