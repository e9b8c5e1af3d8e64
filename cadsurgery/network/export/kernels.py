"""This package's kernels in ONNX files: operations of the domain `cadsurgery`.

An engine runs them where the library of `kernels_for` is registered; without it, engines refuse the file.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from cadsurgery.kernels import openvino
from cadsurgery.kernels.library import find
from cadsurgery.kernels.openvino import Unusable
from cadsurgery.support.errors import CadError, check_name

DOMAIN = "cadsurgery"
CONVOLUTIONS = {2: "ConvolveDepthwise", 3: "Convolve", 4: "ConvolveGroups"}  # by the dimensions of the weight
PICK = "Pick"
CELLS, TAPS, NEAR_TAPS = "FindCells", "ReadTaps", "ReadNearTaps"
ERROR = "InterpolationError"
RESIZES = {  # by the coordinates of ONNX's operation
    "half_pixel": "ResizeLinear",
    "align_corners": "ResizeLinearAligned",
}
IN_8_BITS = "In8Bits"  # suffix of operations whose rows, residual and result are uint8, with a weight in int8
_INPUTS_OF_PICK = "rows, table, sources, shares"
_INPUTS = f"{_INPUTS_OF_PICK}, weight, bias, residual"
_INPUTS_OF_CELLS = "levels, sides"
_INPUTS_OF_TAPS = f"{_INPUTS_OF_CELLS}, anchors, index, targets, size, down, across"
_RESULTS = {CELLS: "anchors, index", TAPS: "table, sources, shares", NEAR_TAPS: "table"}
_NUMBERS = ("outside", "low", "high")
OF_8_BITS = tuple(f"{part}{of}" for of in ("", "_of_result", "_of_residual") for part in ("scale", "zero"))

_OF_LATTICES = {CELLS: _INPUTS_OF_CELLS, TAPS: _INPUTS_OF_TAPS, NEAR_TAPS: _INPUTS_OF_TAPS}
# The error is that of maps whose samples are rows.
_OF_MAPS = {**dict.fromkeys(RESIZES.values(), "maps, sizes"), ERROR: "rows, sizes"}


def schema(name: str) -> Any:
    """Return the ONNX schema of an operation on floats, or of one that finds cells or taps."""
    from onnx.defs import OpSchema

    def named(names: str, integers: Container[str]) -> list[Any]:
        return [
            OpSchema.FormalParameter(one, f"tensor({'int32' if one in integers else 'float'})")
            for one in names.split(", ")
        ]

    attributes: tuple[str, ...] = ()
    if name in _OF_LATTICES:
        names = _OF_LATTICES[name]
        integers: Container[str] = [*names.split(", "), "table", "sources"]
    elif name in _OF_MAPS:
        names, integers = _OF_MAPS[name], ("sizes",)
    else:
        names, attributes = (_INPUTS_OF_PICK, ()) if name == PICK else (_INPUTS, _NUMBERS)
        integers = ("table", "sources")
    numbers = [OpSchema.Attribute(attribute, OpSchema.AttrType.FLOAT) for attribute in attributes]
    inputs, outputs = named(names, integers), named(_RESULTS.get(name, "out"), integers)
    return OpSchema(name, DOMAIN, 1, inputs=inputs, outputs=outputs, attributes=numbers)


def kernels_for(engine: str = "onnxruntime") -> str:
    """Return the path of the library that brings this package's kernels to an engine, on the CPU.

    For files of `export(..., with_kernels=True)`, in ONNX Runtime 1.20 or newer:

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
        NotInstalled: OpenVINO is missing, for which an extension is built.
    """
    check_name("engine with kernels", engine, ("onnxruntime", "openvino"))
    path = find().path
    if path is None:
        raise CadError(
            "there is no library of compiled kernels.",
            where="cadsurgery.kernels_for",
            why=f"{find().reason}.",
            next="install a wheel, or from source with a C compiler; files without kernels need none.",
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


def resize_by_kernels(model: Any) -> None:
    """Let this package's kernels do the bilinear resizes of an ONNX model (onnx_ir).

    ONNX Runtime and OpenVINO take two to four times as long for them, which counts where the rest is in 8 bits.
    """
    import onnx_ir

    for node in [operation for operation in model.graph if operation.op_type == "Resize"]:
        maps, *_, sizes = [*node.inputs, None, None, None][:4]
        of = {name: attribute.value for name, attribute in node.attributes.items()}
        kernel = RESIZES.get(of.get("coordinate_transformation_mode", "half_pixel"))
        is_linear = of.get("mode") == "linear" and not of.get("antialias")
        is_known = maps is not None and maps.dtype == onnx_ir.DataType.FLOAT and len(maps.shape or ()) == 4
        if is_linear and is_known and kernel and sizes is not None:
            narrow = onnx_ir.node("Cast", [sizes], {"to": onnx_ir.DataType.INT32})
            model.graph.insert_before(node, narrow)
            node.domain, node.op_type = DOMAIN, kernel
            node.attributes.clear()
            node.resize_inputs(2)
            node.replace_input_with(1, narrow.outputs[0])


def declare_kernels(model: Any) -> bool:
    """Import the domain in an ONNX model (onnx_ir) that calls kernels; return True if it does."""
    calls = any(node.domain == DOMAIN for node in model.graph)
    if calls:
        model.graph.opset_imports[DOMAIN] = 1
    return calls
