"""This package's kernels in ONNX files: operations of the domain `cadsurgery`.

An engine runs them where the library of `kernels_for` is registered; without it, engines refuse the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cadsurgery.elements.backends.operators import KERNELS, Kernel
from cadsurgery.kernels import openvino
from cadsurgery.kernels.load import open_kernels
from cadsurgery.kernels.openvino import Unusable
from cadsurgery.support.errors import CadError, check_name

DOMAIN = "cadsurgery"
CONVOLUTIONS = {  # by the dimensions of the weight
    dimensions: name
    for kernel in KERNELS
    if isinstance(kernel.names, dict)
    for dimensions, name in kernel.names.items()
}
PICK = "Pick"
RESIZES = {  # by the coordinates of ONNX's operation
    "half_pixel": "ResizeLinear",
    "align_corners": "ResizeLinearAligned",
}
IN_8_BITS = "In8Bits"  # suffix of operations whose rows, residual and result are uint8, with a weight in int8
OF_8_BITS = tuple(f"{part}{of}" for of in ("", "_of_result", "_of_residual") for part in ("scale", "zero"))
# Inputs and results that are not whole numbers.
_FLOATS = ("rows", "shares", "weight", "bias", "residual", "out")


def schema(kernel: Kernel, name: str) -> Any:
    """Return the ONNX schema of a kernel, by one of its names."""
    from onnx.defs import OpSchema

    def named(names: Iterable[str]) -> list[Any]:
        kinds = ((one, "float" if one in _FLOATS else "int32") for one in names)
        return [OpSchema.FormalParameter(one, f"tensor({kind})") for one, kind in kinds]

    of_torch, kinds = kernel.operation._schema, kernel.kinds
    sizes = ["sizes"] if "int" in kinds.values() else []
    inputs = [*(one for one, kind in kinds.items() if kind == "Tensor"), *sizes]
    numbers = [
        OpSchema.Attribute(one, OpSchema.AttrType.FLOAT) for one, kind in kinds.items() if kind == "float"
    ]
    outputs = named(one.name for one in of_torch.returns)
    return OpSchema(name, DOMAIN, 1, inputs=named(inputs), outputs=outputs, attributes=numbers)


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
    path = open_kernels().path
    if path is None:
        raise CadError(
            "there is no library of compiled kernels.",
            where="cadsurgery.kernels_for",
            why=f"{open_kernels().reason}.",
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
