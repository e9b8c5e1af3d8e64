"""This package's kernels in ONNX files: functions of the domain `cadsurgery`, with standard operations as their bodies.

An engine in which the library of `kernels_for` is registered runs its kernels in place of the functions. Others run the
bodies, but for OpenVINO, which does not know functions and refuses the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cadsurgery.kernels import openvino
from cadsurgery.kernels.library import Unusable, path_of_library
from cadsurgery.support.errors import CadError, check_name

DOMAIN = "cadsurgery"
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


IN_8_BITS = "ConvolveDepthwiseIn8Bits"  # of rows and results uint8; the halo is rounded, as by the kernel
_BYTES_BODY = """
    one = Constant <value_ints = [1]> ()
    s = Constant <value_float: float = @scale> ()
    z = Constant <value_float: float = @zero> ()
    step = Constant <value_float: float = @scale_of_result> ()
    origin = Constant <value_float: float = @zero_of_result> ()
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
    flat = Squeeze (mixed, one)
    halo = Round (flat)
    all = Concat <axis = 0> (numbers, beyond, halo)
    taps = Gather (all, table)
    shifted = Sub (taps, z)
    values = Mul (shifted, s)
    products = Mul (values, weight)
    sums = ReduceSum <keepdims = 0> (products, one)
    based = Add (sums, bias)
    added = Add (based, residual)
    low = Constant <value_float: float = @low> ()
    high = Constant <value_float: float = @high> ()
    clipped = Clip (added, low, high)
    scaled = Div (clipped, step)
    placed = Add (scaled, origin)
    bounded = Clip (placed, least, most)
    rounded = Round (bounded)
    out = Cast <to = 2> (rounded)"""
_NUMBERS = ("outside", "low", "high")
_NUMBERS_OF_8_BITS = ("scale", "zero", "scale_of_result", "zero_of_result")


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
        function = onnx_ir.serde.deserialize_function(
            _function(name, _NUMBERS, _TAKE + _SUMS[name] + _FINISH, model.graph.opset_imports[""])
        )
        model.functions[function.identifier()] = function
    if called:
        model.graph.opset_imports[DOMAIN] = 1


def _function(name: str, numbers: Sequence[str], body: str, opset: int) -> Any:
    """Return a function of the domain as an ONNX message."""
    import onnx.parser

    return onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{name} <{', '.join(numbers)}> ({_INPUTS}) => (out) {{{body}\n}}"
    )


def put_into_8_bits(model: Any) -> None:
    """Let depthwise convolutions between quantised values (an ONNX message) read and write their 8 bits themselves.

    The operation then takes the place of its `DequantizeLinear` and `QuantizeLinear`; the weights stay in float.
    """
    from onnx import helper, numpy_helper

    constants = {one.name: one for one in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    returned = {one.name for one in model.graph.output}

    def steps(node: Any) -> list[float] | None:
        """Scale and zero point of a whole tensor of uint8."""
        found = [numpy_helper.to_array(constants[name]) for name in node.input[1:] if name in constants]
        is_plain = len(found) == 2 and found[1].dtype == "uint8" and all(one.size == 1 for one in found)
        return [float(one.reshape(-1)[0]) for one in found] if is_plain else None

    def has_no_residual(node: Any) -> bool:
        """True if the residual is one number: a constant, or zeros of the constant shape (1,)."""
        name = node.input[-1]
        maker = makers.get(name)
        if maker is not None and maker.op_type == "ConstantOfShape":
            shape = constants.get(maker.input[0])
            return shape is not None and numpy_helper.to_array(shape).tolist() == [1]
        return name in constants and numpy_helper.to_array(constants[name]).size == 1

    changed = False
    for node in [one for one in model.graph.node if one.domain == DOMAIN]:
        before, after = makers.get(node.input[0]), readers.get(node.output[0], [])
        if (node.op_type, len(after)) != (BY_RANK[2], 1) or before is None or node.output[0] in returned:
            continue
        if (before.op_type, after[0].op_type) != ("DequantizeLinear", "QuantizeLinear"):
            continue
        of_rows, of_result = steps(before), steps(after[0])
        if of_rows is None or of_result is None or not has_no_residual(node):
            continue
        node.op_type, node.input[0], node.output[0] = IN_8_BITS, before.input[0], after[0].output[0]
        numbers = zip(_NUMBERS_OF_8_BITS, (*of_rows, *of_result), strict=True)
        node.attribute.extend(helper.make_attribute(name, number) for name, number in numbers)
        model.graph.node.remove(after[0])
        readers[before.output[0]].remove(node)
        if not readers[before.output[0]] and before.output[0] not in returned:
            model.graph.node.remove(before)
        changed = True
    if not changed:
        return
    (opset,) = (one.version for one in model.opset_import if one.domain == "")
    model.functions.append(_function(IN_8_BITS, _NUMBERS + _NUMBERS_OF_8_BITS, _BYTES_BODY, opset))
    called = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    for function in [one for one in model.functions if one.domain == DOMAIN and one.name not in called]:
        model.functions.remove(function)
