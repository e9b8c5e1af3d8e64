"""This package's kernels in ONNX files: functions of the domain `cadsurgery`, with standard operations as their bodies.

An engine in which the library of `kernels_for` is registered runs its kernels in place of the functions. Others run the
bodies, but for OpenVINO, which does not know functions and refuses the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cadsurgery.kernels import openvino
from cadsurgery.kernels.library import Unusable, path_of_library
from cadsurgery.network.quantise import round_weight
from cadsurgery.support.errors import CadError, check_name

DOMAIN = "cadsurgery"
_IN_8_BITS = "In8Bits"  # suffix of functions in 8 bits
_INPUTS = "rows, table, sources, shares, weight, bias, residual"
_TAKE = """
    one = Constant <value_ints = [1]> ()
    number = Constant <value_float: float = @outside> ()
    channels = Shape <start = 1> (rows)
    size = Concat <axis = 0> (one, channels)
    beyond = Expand (number, size)
    near = Gather (rows, sources)
    share = Unsqueeze (shares, one)
    mixed = MatMul (share, near)
    halo = Squeeze (mixed, one)
    all = Concat <axis = 0> (rows, beyond, halo)
    taps = Gather (all, table)"""
_SUMS = {
    "Convolve": """
    flat = Flatten <axis = 1> (taps)
    rest = Constant <value_ints = [-1]> ()
    outputs = Shape (bias)
    sides = Concat <axis = 0> (rest, outputs)
    matrix = Reshape (weight, sides)
    sums = MatMul (flat, matrix)""",
    "ConvolveDepthwise": """
    products = Mul (taps, weight)
    sums = ReduceSum <keepdims = 0> (products, one)""",
    "ConvolveGroups": """
    same = Constant <value_ints = [0, 0]> ()
    groups = Shape <start = 1, end = 3> (weight)
    sides = Concat <axis = 0> (same, groups)
    split = Reshape (taps, sides)
    products = Einsum <equation = "ntgc,tgco->ngo"> (split, weight)
    sums = Flatten <axis = 1> (products)""",
}
_FINISH = """
    low = Constant <value_float: float = @low> ()
    high = Constant <value_float: float = @high> ()
    shifted = Add (sums, bias)
    added = Add (shifted, residual)
    out = Clip (added, low, high)"""
BY_RANK = {2: "ConvolveDepthwise", 3: "Convolve", 4: "ConvolveGroups"}

_INPUTS_IN_8_BITS = f"{_INPUTS}, scales"
_OF_8_BITS = tuple(f"{part}{of}" for of in ("", "_of_result", "_of_residual") for part in ("scale", "zero"))
# Rows, residual and result are uint8, and the weight int8; the halo is rounded, as by the kernel.
_TAKE_8_BITS = """
    one = Constant <value_ints = [1]> ()
    s = Constant <value_float: float = @scale> ()
    z = Constant <value_float: float = @zero> ()
    least = Constant <value_float = 0.0> ()
    most = Constant <value_float = 255.0> ()
    numbers = Cast <to = 1> (rows)
    number = Constant <value_float: float = @outside> ()
    steps = Div (number, s)
    moved = Add (steps, z)
    inside = Clip (moved, least, most)
    whole = Round (inside)
    channels = Shape <start = 1> (rows)
    size = Concat <axis = 0> (one, channels)
    beyond = Expand (whole, size)
    near = Gather (numbers, sources)
    share = Unsqueeze (shares, one)
    mixed = MatMul (share, near)
    average = Squeeze (mixed, one)
    halo = Round (average)
    all = Concat <axis = 0> (numbers, beyond, halo)
    read = Gather (all, table)
    from_zero = Sub (read, z)
    taps = Mul (from_zero, s)
    integers = Cast <to = 1> (integer_weight)
    weight = Mul (integers, scales)"""
_FINISH_8_BITS = """
    step = Constant <value_float: float = @scale_of_result> ()
    origin = Constant <value_float: float = @zero_of_result> ()
    more_step = Constant <value_float: float = @scale_of_residual> ()
    more_origin = Constant <value_float: float = @zero_of_residual> ()
    more_number = Cast <to = 1> (residual)
    more_moved = Sub (more_number, more_origin)
    more = Mul (more_moved, more_step)
    based = Add (sums, bias)
    added = Add (based, more)
    low = Constant <value_float: float = @low> ()
    high = Constant <value_float: float = @high> ()
    clipped = Clip (added, low, high)
    scaled = Div (clipped, step)
    placed = Add (scaled, origin)
    bounded = Clip (placed, least, most)
    rounded = Round (bounded)
    out = Cast <to = 2> (rounded)"""
_NUMBERS = ("outside", "low", "high")


def schema(name: str) -> Any:
    """Return the ONNX schema of a function: floats, but for the table and the sources of the halo."""
    from onnx.defs import OpSchema

    integers = ("table", "sources")
    one = OpSchema.FormalParameter
    inputs = [
        one(name, f"tensor({'int32' if name in integers else 'float'})") for name in _INPUTS.split(", ")
    ]
    numbers = [OpSchema.Attribute(name, OpSchema.AttrType.FLOAT) for name in _NUMBERS]
    return OpSchema(name, DOMAIN, 1, inputs=inputs, outputs=[one("out", "tensor(float)")], attributes=numbers)


def kernels_for(engine: str = "onnxruntime") -> str:
    """Return the path of the library that brings this package's kernels to an engine, on the CPU.

    For files of `export(..., with_kernels=True)`, in ONNX Runtime 1.17 or newer:

        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(cadsurgery.kernels_for("onnxruntime"))
        session = onnxruntime.InferenceSession("net.onnx", options)

    The library depends on nothing; a copy of it can be registered where this package is not installed.

    In OpenVINO, whose extension is compiled for the installed version, once, by a C++ compiler:

        core = openvino.Core()
        core.add_extension(cadsurgery.kernels_for("openvino"))
        model = core.read_model("net.onnx")

    It loads the library for ONNX Runtime from its own folder, if a copy is there.

    Args:
        engine: name of the engine's package: `onnxruntime` or `openvino`.

    Raises:
        UnknownName: there are no kernels for this engine.
        CadError: there is no compiled library; or the extension cannot be built.
    """
    check_name("engine with kernels", engine, ("onnxruntime", "openvino"))
    path = path_of_library()
    if path is None:
        raise CadError(
            "there is no library of compiled kernels.",
            where="cadsurgery.kernels_for",
            why="none came with the package, and none could be compiled; or CADSURGERY_NATIVE=0.",
            next="install a wheel or a C compiler; ONNX Runtime runs the file without it, on its own operations.",
        )
    if engine == "onnxruntime":
        return str(path)
    try:
        return str(openvino.extension(path))
    except Unusable as error:
        raise CadError(
            "there are no kernels for OpenVINO.",
            where="cadsurgery.kernels_for",
            why=f"{error}.",
            next=error.next,
        ) from error


def add_functions(model: Any) -> None:
    """Add the functions that an ONNX model (onnx_ir) calls."""
    import onnx_ir

    called = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for name in sorted(called):
        body = _function(
            name, _INPUTS, _NUMBERS, _TAKE + _SUMS[name] + _FINISH, model.graph.opset_imports[""]
        )
        function = onnx_ir.serde.deserialize_function(body)
        model.functions[function.identifier()] = function
    if called:
        model.graph.opset_imports[DOMAIN] = 1


def _function(name: str, inputs: str, numbers: Sequence[str], body: str, opset: int) -> Any:
    """Return a function of the domain as an ONNX message."""
    import onnx.parser

    return onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{name} <{', '.join(numbers)}> ({inputs}) => (out) {{{body}\n}}"
    )


def quantise_rows(graph: Any) -> None:
    """Teach ONNX Runtime's quantiser the functions in a graph (onnx_ir): rows, result and residual are quantised, and
    nothing else."""
    from onnxruntime.quantization.operators.qdq_base_operator import QDQOperatorBase
    from onnxruntime.quantization.registry import QDQRegistry

    quantised: dict[str, list[str]] = {}
    for node in (one for one in graph if one.domain == DOMAIN):
        rows, *_, residual = node.inputs
        maker = residual.producer()
        is_single = residual.is_initializer() or (maker is not None and maker.op_type == "ConstantOfShape")
        quantised[node.name] = [
            one.name for one in (rows, node.outputs[0], *([] if is_single else [residual]))
        ]

    class Rows(QDQOperatorBase):
        def quantize(self) -> None:
            for value in quantised[self.node.name]:
                self.quantizer.quantize_activation_tensor(value)

    QDQRegistry.update(dict.fromkeys(BY_RANK.values(), Rows))


class _Message:
    """An ONNX message with its constants, and the nodes that write and read its values."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.constants = {one.name: one for one in model.graph.initializer}
        self.makers: dict[str, Any] = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.returned = {one.name for one in model.graph.output}

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

    def leave(self, node: Any, name: str) -> None:
        """Note that a node no longer reads a value; what computes it goes with its last reader."""
        self.readers[name].remove(node)
        if not self.readers[name] and name not in self.returned and name in self.makers:
            self.model.graph.node.remove(self.makers[name])


def put_into_8_bits(model: Any) -> None:
    """Let convolutions between quantised values (an ONNX message) read and write their 8 bits themselves.

    The operation then takes the place of its `DequantizeLinear` and `QuantizeLinear`, and its weights are rounded to 8
    bits. All 8 are used, because the sums are exact on every processor.
    """
    message, changed = _Message(model), set()
    for node in [one for one in model.graph.node if one.domain == DOMAIN]:
        if _put_into_8_bits(node, message):
            changed.add(node.op_type)
    if not changed:
        return
    (opset,) = (one.version for one in model.opset_import if one.domain == "")
    for name in sorted(changed):
        body = _TAKE_8_BITS + _SUMS[name.removesuffix(_IN_8_BITS)] + _FINISH_8_BITS
        inputs = _INPUTS_IN_8_BITS.replace("weight", "integer_weight")
        model.functions.append(_function(name, inputs, _NUMBERS + _OF_8_BITS, body, opset))
    called = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    for function in [one for one in model.functions if one.domain == DOMAIN and one.name not in called]:
        model.functions.remove(function)


def _put_into_8_bits(node: Any, message: _Message) -> bool:
    """Put one convolution into 8 bits if its rows, its residual and its result are quantised; return True if so."""
    import numpy as np
    from onnx import helper

    rows, *_, weight, bias, residual = node.input
    result = node.output[0]
    after = message.readers.get(result, [])
    if len(after) != 1 or result in message.returned:
        return False
    of_rows = message.steps(message.makers.get(rows), "DequantizeLinear")
    of_result = message.steps(after[0], "QuantizeLinear")
    has_residual, of_residual = not message.is_single(residual), [1.0, 0.0]
    if has_residual:
        found = message.steps(message.makers.get(residual), "DequantizeLinear")
        if found is None or node.op_type == BY_RANK[2]:
            return False
        of_residual = found
    values, offset = message.value(weight), message.value(bias)
    if of_rows is None or of_result is None or values is None or offset is None:
        return False
    whole, scales = _round(values)
    node.op_type += _IN_8_BITS
    prefix = f"{node.name or result}.in_8_bits"
    inputs = [message.makers[rows].input[0], *node.input[1:4]]
    inputs += [message.add(f"{prefix}.weight", whole)]
    inputs.append(bias if bias in message.constants else message.add(f"{prefix}.bias", offset))
    inputs.append(
        message.makers[residual].input[0]
        if has_residual
        else message.add(f"{prefix}.none", np.zeros(1, np.uint8))
    )
    inputs.append(message.add(f"{prefix}.scales", scales))
    for name in dict.fromkeys((rows, residual) if has_residual else (rows,)):
        message.leave(node, name)
    del node.input[:]
    node.input.extend(inputs)
    node.output[0] = after[0].output[0]
    message.makers[node.output[0]] = node
    message.model.graph.node.remove(after[0])
    numbers = zip(_OF_8_BITS, (*of_rows, *of_result, *of_residual), strict=True)
    node.attribute.extend(helper.make_attribute(name, number) for name, number in numbers)
    return True


def _round(weight: Any) -> tuple[Any, Any]:
    """Round the weight of a function to 8 bits; return it with the scales of its outputs, which multiply it."""
    import torch

    exact = torch.from_numpy(weight.copy())
    # Outputs first: of (taps, C), (taps, C, O) and (taps, groups, C, O).
    by_output = exact.movedim(-1, 0) if exact.dim() < 4 else exact.permute(1, 3, 0, 2).flatten(0, 1)
    whole, scale = round_weight(by_output.flatten(1))
    whole = whole.view(by_output.shape)
    if exact.dim() == 4:
        groups, outputs = exact.shape[1], exact.shape[3]
        whole = whole.unflatten(0, (groups, outputs)).permute(2, 0, 3, 1)
        return whole.to(torch.int8).contiguous().numpy(), scale.float().view(groups, 1, outputs).numpy()
    return whole.movedim(0, -1).to(torch.int8).contiguous().numpy(), scale.float().numpy()
