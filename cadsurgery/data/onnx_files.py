"""Read networks from ONNX files; a network is used only if it computes what ONNX Runtime does.

Nothing in a file is executed. Weights in files of their own are read only where these lie beside the ONNX file.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cadsurgery.data.onnx_graphs import inputs_of, is_known, opset_of, version_of, write_plainly
from cadsurgery.data.onnx_reference import Reference
from cadsurgery.support import files
from cadsurgery.support.errors import (
    CannotConvert,
    FileError,
    InvalidInput,
    describe_error,
    import_optional,
)
from cadsurgery.support.kinds import has_kernels

SUFFIX = ".onnx"
_MOST_CHANNELS = 16  # an input (N, 224, 224, 3) has its channels behind; (N, 12, 64, 3) may have them before
_CHANNELS_FIRST = (
    "write the file with channels first: tf2onnx has --inputs-as-nchw NAME:0, and in Python the network itself can be "
    "exported so."
)
_NESTED = 8  # how deep ONNX's definitions of operators by others are followed
_QUANTISED = re.compile("Quantize|^QLinear|^QGemm|^QAttention|Integer$")  # names of operators
_SEQUENCES = {"LSTM", "GRU", "RNN"}
_BRANCHES = {"If", "Loop", "Scan"}
_LARGEST = 2**31  # bytes that one ONNX message can have, and values up to which constants are computed
_INSTALL = "pip install 'cadsurgery[onnx]'"


class OnnxNetwork(nn.Module):
    """A network that was read from an ONNX file.

    Args:
        layers: the graph as torch operations.
        size: height and width of its images if the file fixes one of them; images of other sizes are refused.
        is_free: whether the file leaves the height free, and the width.
    """

    def __init__(
        self,
        layers: nn.Module,
        channels: int,
        size: tuple[int, int] | None,
        is_free: tuple[bool, ...],
    ) -> None:
        super().__init__()
        self.layers, self.size = layers, size
        self._sizes = [None if free else length for length, free in zip(size or (), is_free, strict=False)]
        if size is not None:
            self.pretrained_cfg = {"input_size": (channels, *size), "fixed_input_size": True}

    def forward(self, image: Tensor) -> Any:
        """Compute the outputs of the ONNX graph: a tensor, or a list of them."""
        for axis, length in enumerate(self._sizes):
            if length is not None and image.shape[2 + axis] != length:
                raise InvalidInput(
                    f"this network takes only images of {' x '.join(str(one or 'any') for one in self._sizes)}.",
                    why="the graph of its ONNX file fixes the sizes of maps inside.",
                    next="give images of this size (--size); others need a file that was exported with dynamic axes "
                    "for height and width.",
                )
        return self.layers(image)


def is_onnx(network: object) -> bool:
    """True if a text names an ONNX file."""
    return isinstance(network, str) and network.lower().endswith(SUFFIX)


def digest(path: Path) -> str:
    """Return the SHA-256 of an ONNX file and of the files of its weights.

    Raises:
        FileError: see `read_onnx`.
    """
    model = _parse(path)
    sums = hashlib.sha256()
    for place in (path, *sorted({path.parent / name for name in _external_names(path, model)})):
        sums.update(place.read_bytes())
    return sums.hexdigest()


def read_onnx(path: Path) -> OnnxNetwork:
    """Read a network from an ONNX file and check it against ONNX Runtime.

    Axes that the file fixes are freed where its graph computes at other sizes, too; see `Reference`.

    Raises:
        FileError: the file is missing or damaged, or its weights lie elsewhere.
        CannotConvert: it is quantised, takes no image, has operators that cannot be read, or the network that was read
            computes something else than ONNX Runtime.
        NotInstalled: a package is not installed.
    """
    for package in ("onnx", "onnxruntime", "onnxscript", "onnx2torch"):
        import_optional(package, f"ONNX files are read through {package}.", _INSTALL)
    model = _with_weights(path, _parse(path))
    _name_free_axes(model)
    if has_kernels(path):
        raise CannotConvert(
            f"{path} calls this package's kernels.",
            why="it was exported with kernels, from a network that is converted already.",
            next="give the network that it was made from; cs.save and cs.load keep a converted one.",
        )
    _refuse_quantised(path, model)
    shape = _image_shape(path, model)
    with _quietly():
        reference = Reference(path, model, shape)
        layers = _import(reference)
        network = OnnxNetwork(layers, reference.channels, reference.fixed_size, reference.is_free).eval()
        reference.check(network)
    return network


# -- the file --------------------------------------------------------------------------------------------------------


def _parse(path: Path) -> Any:
    """Return the content of an ONNX file, without weights in other files."""
    onnx = import_optional("onnx", "ONNX files are read through onnx.", _INSTALL)
    if not files.is_file(path):
        raise files.absent(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors for broken files differ between its versions
        raise _damaged(path, describe_error(error)) from error
    if not model.graph.node:
        raise _damaged(path, "it holds no graph.")
    return model


def _damaged(path: Path, why: str) -> FileError:
    return FileError(
        f"{path} is not a readable ONNX file.", why=why, next="write it again with torch.onnx.export."
    )


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield the tensors that a graph and its subgraphs hold."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _external_names(path: Path, model: Any) -> set[str]:
    """Return the names of the files beside an ONNX file that hold its weights.

    Raises:
        FileError: a file lies elsewhere, or is missing.
    """
    entries = (entry for tensor in _tensors(model.graph) for entry in tensor.external_data)
    names = {entry.value for entry in entries if entry.key == "location"}
    for name in sorted(names):
        place = path.parent / name
        if Path(name).name != name or place.is_symlink():
            raise FileError(
                f"{path} keeps weights in a file elsewhere, which was not read.",
                where=f"{name:.200}",
                why="a file of somebody else can name any place; weights are read only from files beside it.",
                next="write the network into one file: onnx.save(onnx.load(path), new_path).",
            )
        if not files.is_file(place):
            raise FileError(
                f"{path} keeps its weights in {name}, which is missing.", next="put it beside the ONNX file."
            )
    return names


def _with_weights(path: Path, model: Any) -> Any:
    """Return the content of an ONNX file with all weights."""
    import onnx

    names = _external_names(path, model)
    if path.stat().st_size + sum((path.parent / name).stat().st_size for name in names) >= _LARGEST:
        raise CannotConvert(
            f"{path} has weights of 2 GB or more.",
            why="ONNX's own tools, through which it is read, take only smaller ones.",
            next="load the network where it was trained: cs.adaptify(model).",
        )
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # a range outside the file, no permission
        raise _damaged(path, describe_error(error)) from error
    return model


def _name_free_axes(model: Any) -> None:
    """Name the axes of the inputs that some exporters mark as free by a negative length."""
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_value < 0:
                dim.dim_param = f"{value.name}_{axis}"


def _refuse_quantised(path: Path, model: Any) -> None:
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        if _QUANTISED.search(node.op_type):
            raise CannotConvert(
                f"{path} is quantised.",
                where=f"{node.op_type} {node.name}".strip(),
                why="a conversion changes what layers read, and needs their weights in floating point.",
                next="give the file as it was before quantisation; cs.export quantises the converted network.",
            )


def _image_shape(path: Path, model: Any) -> tuple[int | str, ...]:
    """Return the shape of the image that a graph takes; axes that are not fixed are texts.

    Raises:
        CannotConvert: it takes something else than an image in floating point, (B, C, H, W).
    """
    import onnx

    inputs = inputs_of(model)
    why = f"its inputs are {', '.join(value.name for value in inputs) or 'none'}."
    advice = "give a network whose input is a batch of images."
    if len(inputs) == 1:
        given = inputs[0].type.tensor_type
        shape = tuple(dim.dim_value or dim.dim_param for dim in given.shape.dim)
        kind = onnx.TensorProto.DataType.Name(given.elem_type)
        if kind == "FLOAT" and len(shape) == 4 and isinstance(shape[1], int) and not _is_channels_last(shape):
            return shape
        sizes = ", ".join(str(size or "?") for size in shape)
        why = f"its input {inputs[0].name} is {kind} of shape ({sizes})."
        if len(shape) == 4 and _is_channels_last(shape):
            why, advice = f"{why[:-1]}, with channels last.", _CHANNELS_FIRST
        elif len(shape) == 4 and kind != "FLOAT":
            advice = "export the network without what prepares its pictures, so that it takes float32."
    elif inputs:
        advice = "load it where it was trained, cs.adaptify(model), which takes calls with several arguments."
    raise CannotConvert(
        f"{path} takes something else than an image.",
        why=f"{why} One image batch (B, C, H, W) in float32 is expected, with a fixed number of channels.",
        next=advice,
    )


def _is_channels_last(shape: tuple[int | str, ...]) -> bool:
    """True if the last axis of an input is one of channels, and the second one is not."""
    return shape[3] in (1, 3, 4) and not (isinstance(shape[1], int) and shape[1] <= _MOST_CHANNELS)


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress the logs and warnings of ONNX's tools; what they warn of is measured in the end."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)


# -- from ONNX to torch ----------------------------------------------------------------------------------------------


def _import(reference: Reference) -> nn.Module:
    """Return the graph of an ONNX model as torch operations."""
    candidate, opset = _simplify(reference.model), opset_of(reference.model)
    for _ in range(_NESTED):  # operators that ONNX itself defines by others
        missing = {(node.domain, node.op_type) for node in candidate.graph.node if not is_known(node, opset)}
        if not missing:
            break
        expanded = _expanded(candidate, opset, missing)
        if expanded is None:
            break
        candidate = _simplify(expanded)
    _refuse_unknown(reference.path, candidate, opset)
    return write_plainly(*_with_shapes(candidate, reference), reference.batch)


def _expanded(model: Any, opset: int, kinds: set[tuple[str, str]]) -> Any:
    """Return a model whose operators of some kinds are written by others as ONNX defines them; None if it does not."""
    import onnx
    from onnx.inliner import inline_selected_functions

    typed = onnx.shape_inference.infer_shapes(model)  # definitions depend on types
    for node in typed.graph.node:
        if (node.domain, node.op_type) in kinds and version_of(node, opset) is not None:
            schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
            stated = {attribute.name for attribute in node.attribute}
            defaults = (attribute.default_value for attribute in schema.attributes.values())
            node.attribute.extend(value for value in defaults if value.name and value.name not in stated)
    try:
        expanded = inline_selected_functions(typed, sorted(kinds), False, True)
    except Exception:  # protobuf's and the inliner's errors have no common type
        return None
    del expanded.graph.value_info[:]
    return expanded


def _refuse_unknown(path: Path, model: Any, opset: int) -> None:
    """Refuse a graph with operators that are not read.

    Raises:
        CannotConvert: see above.
    """
    unknown = [node for node in model.graph.node if not is_known(node, opset)]
    if unknown:
        named = sorted({_named(node, opset) for node in unknown})
        raise CannotConvert(
            f"{path} has operators that cannot be read.",
            where=", ".join(named[:6]) + ", ..." * (len(named) > 6),
            why="neither this package nor onnx2torch has them, and ONNX does not define them by others; the file's "
            f"operators are those of opset {opset}.",
            next=_instead(unknown),
        )


def _named(node: Any, opset: int) -> str:
    return f"{node.op_type} ({node.domain or 'opset'} {version_of(node, opset) or ''})".replace(" )", ")")


def _instead(unknown: list[Any]) -> str:
    """Return what to do about operators that are not read."""
    if any(node.op_type in _SEQUENCES for node in unknown):
        return (
            "convert the layers before the recurrent ones where the network was trained: "
            "cs.adaptify(model.backbone)."
        )
    if any(node.op_type in _BRANCHES for node in unknown):
        return "export the network in evaluation mode and for one size, so that no branch depends on a value."
    if any(node.domain not in ("", "ai.onnx") for node in unknown):
        return "give the file as it was before it was optimised or compiled for an engine, with ONNX's own operators."
    return "write these steps with other operators, or load the network where it was trained: cs.adaptify(model)."


def _with_shapes(model: Any, reference: Reference) -> tuple[Any, dict[str, tuple[int | None, ...]]]:
    """Return a model with the shapes of all its values in it, and the lengths of the axes, None where they are free.

    Where shape inference loses them, as behind a Reshape to a computed shape, ONNX Runtime gives the number of axes.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(model)
    graph, shapes = model.graph, {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    lost = [name for node in graph.node for name in node.output if name and name not in shapes]
    if lost:
        shapes |= reference.ranks(model, lost)
    kind = onnx.TensorProto.FLOAT  # which nobody asks for
    graph.value_info.extend(onnx.helper.make_tensor_value_info(name, kind, shapes[name]) for name in lost)
    return model, shapes


def _decided(model: Any) -> Any:
    """Return an ONNX model with the branches that a number of axes or a fixed length decides."""
    import onnx
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    for _ in range(_NESTED):
        if not any(node.op_type == "If" for node in model.graph.node):
            break
        graph = onnx_ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model, data_prop=True))
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
        for node in [*graph.graph]:
            if node.op_type == "Gather" and (lengths := _lengths_read(node)) is not None:
                node.outputs[0].replace_all_uses_with(_held(graph, node.outputs[0].name, lengths))
        fold_constants(graph, onnx_shape_inference=True, output_size_limit=_LARGEST)
        model = onnx_ir.serde.serialize_model(graph)
        del model.graph.value_info[:]
    return model


def _lengths_read(node: Any) -> Any:
    """Return the lengths of axes that a Gather reads of a Shape; None if one of them is free."""
    import numpy as np

    shape, index = node.inputs[0].producer(), node.inputs[1].const_value
    if shape is None or shape.op_type != "Shape" or shape.attributes or index is None:
        return None
    sizes, places = shape.inputs[0].shape, index.numpy()
    if sizes is None or any(not isinstance(sizes[place], int) for place in places.flatten().tolist()):
        return None
    return np.array([sizes[place] for place in places.flatten().tolist()], np.int64).reshape(places.shape)


def _held(graph: Any, name: str, values: Any) -> Any:
    """Add a constant to a graph of onnx_ir; return its value."""
    import onnx_ir

    tensor = onnx_ir.tensor(values, name=f"{name}_known")
    kind = onnx_ir.TensorType(tensor.dtype)
    held = onnx_ir.Value(name=tensor.name, shape=onnx_ir.Shape(values.shape), type=kind, const_value=tensor)
    graph.graph.register_initializer(held)
    return held


def _simplify(model: Any) -> Any:
    """Return an ONNX model without functions, with constants computed and written as initialisers."""
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    graph = onnx_ir.serde.deserialize_model(_decided(model))
    common.InlinePass()(graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    fold_constants(graph, input_size_limit=_LARGEST, output_size_limit=_LARGEST)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    common.RemoveUnusedNodesPass()(graph)
    for node in graph.graph:
        if node.op_type == "Reshape" and node.inputs[1] is not None:
            shape = node.inputs[1].const_value
            if (
                shape is None or 0 not in shape.numpy()
            ):  # sizes of maps are not zero; then this changes nothing
                node.attributes.pop("allowzero", None)
    return onnx_ir.serde.serialize_model(graph)
