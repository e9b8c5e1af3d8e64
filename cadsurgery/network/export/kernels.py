"""This package's kernels in ONNX files: functions of the domain `cadsurgery`, with standard operations as their bodies.

An engine in which the library of `kernels_for` is registered runs its kernels in place of the functions. Others run the
bodies, but for OpenVINO, which does not know functions and refuses the file.
"""

from __future__ import annotations

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


def schema(name: str) -> Any:
    """Return the ONNX schema of a function: floats, but for the table and the sources of the halo."""
    from onnx.defs import OpSchema

    integers = ("table", "sources")
    one = OpSchema.FormalParameter
    inputs = [
        one(name, f"tensor({'int32' if name in integers else 'float'})") for name in _INPUTS.split(", ")
    ]
    numbers = [OpSchema.Attribute(name, OpSchema.AttrType.FLOAT) for name in ("outside", "low", "high")]
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
    import onnx.parser
    import onnx_ir

    called = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for name in sorted(called):
        text = (
            f'<domain: "{DOMAIN}", opset_import: ["" : {model.graph.opset_imports[""]}]>\n'
            f"{name} <outside, low, high> ({_INPUTS}) => (out) {{{_TAKE}{_SUMS[name]}{_FINISH}\n}}"
        )
        function = onnx_ir.serde.deserialize_function(onnx.parser.parse_function(text))
        model.functions[function.identifier()] = function
    if called:
        model.graph.opset_imports[DOMAIN] = 1
