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
CONVOLUTIONS = {2: "ConvolveDepthwise", 3: "Convolve", 4: "ConvolveGroups"}  # by the dimensions of the weight
PICK = "Pick"
IN_8_BITS = (
    "In8Bits"  # suffix of functions whose rows, residual and result are uint8, and whose weight is int8
)
_INPUTS_OF_PICK = "rows, table, sources, shares"
_INPUTS = f"{_INPUTS_OF_PICK}, weight, bias, residual"
_INPUTS_IN_8_BITS = f"{_INPUTS_OF_PICK}, integer_weight, bias, residual, scales"
_NUMBERS = ("outside", "low", "high")
OF_8_BITS = tuple(f"{part}{of}" for of in ("", "_of_result", "_of_residual") for part in ("scale", "zero"))

# The rows that are read, `taps`: the elements, a row outside, and the halo.
_READ = """
    one = Constant <value_ints = [1]> ()
    channels = Shape <start = 1> (numbers)
    size = Concat <axis = 0> (one, channels)
    beyond = Expand (number, size)
    near = Gather (numbers, sources)
    share = Unsqueeze (shares, one)
    mixed = MatMul (share, near)
    halo = Squeeze (mixed, one){round}
    all = Concat <axis = 0> (numbers, beyond, {halo})
    {read} = Gather (all, table)"""
_TAKE = """
    numbers = Identity (rows)
    number = Constant <value_float: float = @outside> ()""" + _READ.format(round="", halo="halo", read="taps")
# In 8 bits the halo is rounded, as by the kernel.
_TAKE_8_BITS = (
    """
    s = Constant <value_float: float = @scale> ()
    z = Constant <value_float: float = @zero> ()
    least = Constant <value_float = 0.0> ()
    most = Constant <value_float = 255.0> ()
    numbers = Cast <to = 1> (rows)
    far = Constant <value_float: float = @outside> ()
    steps = Div (far, s)
    moved = Add (steps, z)
    inside = Clip (moved, least, most)
    number = Round (inside)"""
    + _READ.format(round="\n    whole_halo = Round (halo)", halo="whole_halo", read="read")
    + """
    from_zero = Sub (read, z)
    taps = Mul (from_zero, s)
    integers = Cast <to = 1> (integer_weight)
    weight = Mul (integers, scales)"""
)
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
_BOUND = """
    low = Constant <value_float: float = @low> ()
    high = Constant <value_float: float = @high> ()
    based = Add (sums, bias)
    added = Add (based, more)
    clipped = Clip (added, low, high)"""
_FINISH = f"""
    more = Identity (residual){_BOUND}
    out = Identity (clipped)"""
_FINISH_8_BITS = f"""
    step = Constant <value_float: float = @scale_of_result> ()
    origin = Constant <value_float: float = @zero_of_result> ()
    more_step = Constant <value_float: float = @scale_of_residual> ()
    more_origin = Constant <value_float: float = @zero_of_residual> ()
    more_number = Cast <to = 1> (residual)
    more_moved = Sub (more_number, more_origin)
    more = Mul (more_moved, more_step){_BOUND}
    scaled = Div (clipped, step)
    placed = Add (scaled, origin)
    bounded = Clip (placed, least, most)
    rounded = Round (bounded)
    out = Cast <to = 2> (rounded)"""
_BODY_OF_PICK = (
    """
    number = Constant <value_float = 0.0> ()
    numbers = Cast <to = 1> (rows)"""
    + _READ.format(round="", halo="halo", read="taken")
    + """
    picked = Squeeze (taken, one)"""
)
_FINISH_PICK = """
    out = Identity (picked)"""
_FINISH_PICK_8_BITS = """
    rounded = Round (picked)
    out = Cast <to = 2> (rounded)"""


def function(name: str, opset: int) -> Any:
    """Return a function of the domain as an ONNX message."""
    import onnx.parser

    kind, is_in_8_bits = name.removesuffix(IN_8_BITS), name.endswith(IN_8_BITS)
    if kind == PICK:
        inputs, numbers = _INPUTS_OF_PICK, ""
        body = _BODY_OF_PICK + (_FINISH_PICK_8_BITS if is_in_8_bits else _FINISH_PICK)
    elif is_in_8_bits:
        inputs, numbers = _INPUTS_IN_8_BITS, ", ".join(_NUMBERS + OF_8_BITS)
        body = _TAKE_8_BITS + _SUMS[kind] + _FINISH_8_BITS
    else:
        inputs, numbers = _INPUTS, ", ".join(_NUMBERS)
        body = _TAKE + _SUMS[kind] + _FINISH
    attributes = f"<{numbers}>" if numbers else ""
    return onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{name} {attributes} ({inputs}) => (out) {{{body}\n}}"
    )


def schema(name: str) -> Any:
    """Return the ONNX schema of a function of floats, whose table and sources of the halo are integers."""
    from onnx.defs import OpSchema

    one = OpSchema.FormalParameter
    names, attributes = (_INPUTS_OF_PICK, ()) if name == PICK else (_INPUTS, _NUMBERS)
    inputs = [
        one(name, f"tensor({'int32' if name in ('table', 'sources') else 'float'})")
        for name in names.split(", ")
    ]
    numbers = [OpSchema.Attribute(name, OpSchema.AttrType.FLOAT) for name in attributes]
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
        made = onnx_ir.serde.deserialize_function(function(name, model.graph.opset_imports[""]))
        model.functions[made.identifier()] = made
    if called:
        model.graph.opset_imports[DOMAIN] = 1
