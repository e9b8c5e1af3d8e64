"""Quantise the weights and activations of ONNX files to 8 bits, calibrated by images; the mask stays in float.

One file serves every engine that supports QuantizeLinear and DequantizeLinear; ONNX Runtime and OpenVINO fuse these
with the operations between them. Needs onnx, onnxscript and onnxruntime, which are imported when a file is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadsurgery.kernels import isa
from cadsurgery.network.export.engine import Engine, import_package
from cadsurgery.network.export.engines import OnnxRuntime, OnnxRuntimeWithKernels
from cadsurgery.network.export.in_bytes import (
    MOVES,
    PRODUCTS,
    indices_of_values,
    is_convolution_of_rows,
    options_of,
    round_weights,
    write_bytes,
)
from cadsurgery.network.export.kernels import DOMAIN, declare_kernels
from cadsurgery.network.export.quiet import quietly
from cadsurgery.network.export.tidy import LARGEST
from cadsurgery.network.fidelity_measure import UNSAID, Fidelity, measure
from cadsurgery.support.errors import CannotConvert, as_refusal, describe_error, warn
from cadsurgery.support.progress import Step, counted, silent

_BESIDE = ("Add", "Clip", "MaxPool", "Relu")  # operations that engines fuse with a product or run in 8 bits
_MOVING = ("Concat", *MOVES)  # rows are quantised before they are gathered for every tap
_LEVELS = "levels"


class _Measuring(OnnxRuntime):
    frees_early = True  # every value is measured: the largest need gigabytes if they are kept


class _MeasuringWithKernels(OnnxRuntimeWithKernels):
    frees_early = True


def to_8_bits(
    path: Path,
    engine: type[Engine],
    calls: Sequence[tuple[Tensor, ...]],
    others: Sequence[tuple[Tensor, ...]] = (),
    step: Step = silent,
) -> Fidelity:
    """Replace a float file by its 8-bit version, in the form that is fastest in an engine.

    Args:
        path: an ONNX file.
        engine: engine that the file is for; it runs both files.
        calls: inputs for calibration, the image batch first.
        others: further inputs on which the file is run.
        step: progress callback; gets the calibration images.

    Raises:
        CannotConvert: the network cannot be quantised, an engine refuses the file, or it returns NaN, or another level
            map though its mask sees the image alone.
    """
    import_package(OnnxRuntime.package)  # it runs the file that is measured
    rounded = path.with_name(f"8-bit-{path.name}")
    refusal = as_refusal(
        lambda error: CannotConvert(
            "the file cannot be put into 8 bits.",
            why=describe_error(error),
            next='leave it in float; precision="float16" halves it.',
        )
    )
    with refusal, quietly():
        outputs, keeps_levels = quantise(path, rounded, calls, engine, step)
    float_engine, int8_engine = engine(path), engine(rounded)

    def run(*inputs: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        values, expected = int8_engine(*inputs), float_engine(*inputs)
        has_same_levels = outputs[-1] != _LEVELS or torch.equal(values.pop(), expected.pop())
        if keeps_levels and not has_same_levels:
            raise CannotConvert(
                "the file in 8 bits has another level map than the float one.",
                why="the mask, in floating point, sees only the image, so it should be the same; nothing was written.",
                next="report it with the mask; give the level map as an input meanwhile: level_map=True.",
            )
        if not all(value.isfinite().all() for value in values):
            raise _not_finite()
        return inputs[0], values, expected

    shown = counted(calls, step, "comparing in 8 bits, image", size=_images)
    fidelity = measure(run(*inputs) for inputs in shown)
    for inputs in others:
        run(*inputs)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    rounded.replace(path)
    fidelity = replace(fidelity, taken_in=f"{engine.name} {version(engine.package)} ({_instruction_set()})")
    _warn_of_error(fidelity)
    return fidelity


def _warn_of_error(fidelity: Fidelity) -> None:
    """Warn of a file in 8 bits whose outputs are far from those of the float one."""
    if fidelity.error > UNSAID:
        warn(
            f"the outputs of the file in 8 bits differ from those of the float one by {100 * fidelity.error:.2g} % of "
            f"their size on the calibration images, in {fidelity.taken_in}. Other engines round in other places: "
            "compare by check_in=. Calibrate by more images like those it will see, or leave the file in float; "
            'precision="float16" halves it.'
        )


def _not_finite() -> CannotConvert:
    return CannotConvert(
        "the file in 8 bits gives values that are not finite.",
        next="give other images to calibrate by, or leave the file in float.",
    )


def _images(inputs: tuple[Tensor, ...]) -> int:
    """Return the number of images in the inputs of a file."""
    return len(inputs[0])


def _instruction_set() -> str:
    """Return the widest instruction set of this processor, which decides how engines multiply bytes."""
    return next(reversed(isa.here()), torch.backends.cpu.get_cpu_capability())


def quantise(
    source: Path,
    target: Path,
    calls: Sequence[tuple[Tensor, ...]],
    engine: type[Engine],
    step: Step = silent,
) -> tuple[tuple[str, ...], bool]:
    """Quantise a float file: weights symmetrically per output channel, activations by the value range of each map.

    The mean error that rounded weights cause on the calibration images is corrected in the biases (Nagel et al. 2019,
    equation 15, with measured means).

    The operations of the mask stay in floating point, so that a mask that sees the image alone chooses the same
    patches. The features that a mask sees are those of the network in 8 bits. The integer sums are exact on every
    processor, with or without VNNI: see `round_weight`.

    Args:
        source: an ONNX file.
        target: file to write.
        calls: inputs for calibration.
        engine: engine that the file is for. ONNX Runtime gets products of rows as convolutions, which are fastest
            there; OpenVINO would transpose their inputs.
        step: progress callback; gets the calibration images.

    Returns:
        The names of the outputs, and True if the level map stays as it is.

    Raises:
        CannotConvert: there is nothing to quantise.
    """
    import onnx
    import onnx_ir
    from onnx_ir.passes import common

    model = onnx_ir.external_data.load_to_model(onnx_ir.load(source))
    outputs = tuple(str(output.name) for output in model.graph.outputs)
    chosen, mask = _choose_nodes(model, engine)
    keeps_levels = not any(
        value is not None and value.producer() in chosen for node in mask for value in node.inputs
    )
    common.NameFixPass()(model)
    shown = counted(calls, step, "measuring means, image", size=_images)
    weights = round_weights(model.graph, chosen, _means(model, chosen, shown, target))
    shown = counted(calls, step, "calibrating, image", "quantising", size=_images)
    ranges = _ranges(model, chosen, shown, target)  # with rounded weights
    write_bytes(model.graph, chosen, weights, mask, ranges, issubclass(engine, OnnxRuntime))
    declare_kernels(model)
    common.RemoveUnusedNodesPass()(model)
    common.NameFixPass()(model)
    message = onnx_ir.to_proto(model)
    onnx.save(message, target)
    onnx.checker.check_model(str(target), full_check=True)
    return outputs, keeps_levels


def _choose_nodes(model: Any, engine: type[Engine]) -> tuple[list[Any], set[Any]]:
    """Bring a file (onnx_ir) into the form that an engine multiplies fastest; return the nodes to quantise, and those
    of the mask, which stay in floating point.

    Raises:
        CannotConvert: there is nothing to quantise.
    """
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    def fold() -> None:
        fold_constants(model, input_size_limit=LARGEST, output_size_limit=LARGEST)
        common.LiftConstantsToInitializersPass(lift_all_constants=True)(model)
        common.RemoveUnusedNodesPass()(model)

    fold()
    mask = _needed_for(_LEVELS, model.graph) - _features(model.graph)
    if issubclass(engine, OnnxRuntime):
        _multiply_by_convolutions(model.graph, mask)
        fold()
    else:
        _copy_maps_for_rows(model.graph, mask)
    chosen = _in_8_bits(model.graph, mask)
    if not chosen:
        raise CannotConvert(
            "there is nothing to quantise.",
            why="the level map, which must stay as it is, depends on every product with weights.",
            next="give the level map as an input: level_map=True.",
        )
    return chosen, mask


def _needed_for(output: str, graph: Any) -> set[Any]:
    """Return the nodes on whose values an output depends; of what is before a `Shape` only the size counts."""
    nodes = {result.producer() for result in graph.outputs if result.name == output}
    for node in reversed(graph):
        if node in nodes:
            nodes.update(before for before in node.predecessors() if before.op_type not in ("Shape", "Size"))
    return nodes


def _features(graph: Any) -> set[Any]:
    """Return the nodes on whose values an output depends as on numbers, not by the elements that are chosen."""
    from onnx_ir import DataType

    nodes = {result.producer() for result in graph.outputs if result.name != _LEVELS}
    for node in reversed(graph):
        if node in nodes:
            nodes.update(
                value.producer()
                for value in node.inputs
                if value is not None and value.dtype == DataType.FLOAT and value.producer() is not None
            )
    return nodes


def _multiply_by_convolutions(graph: Any, mask: set[Any]) -> None:
    """Replace products of rows (N, C) with weights by convolutions of a map (1, C, 1, N), which compute the same sums.

    ONNX Runtime's 8-bit convolutions are 1.25 to 1.6 times as fast as its products (measured on a CPU with
    AVX512-VNNI). It computes them with channels last, so nothing is transposed.
    """
    import numpy as np
    from onnx_ir import convenience, tape, tensor

    for node in list(graph):
        if node in mask or node.op_type == "Conv" or not _has_weights(node):
            continue
        rows, weight, *bias = node.inputs
        options = options_of(node)
        if rows.shape is None or len(rows.shape) != 2:
            continue
        steps = tape.Tape(graph)
        first, last = (
            steps.initializer(tensor(np.array(axes)), f"{node.name}.{name}")
            for name, axes in (("first", (0, 1)), ("last", (2, 3)))
        )
        kernel = weight if options.get("transB") else steps.op("Transpose", [weight], {"perm": [1, 0]})
        image = steps.op("Transpose", [steps.op("Unsqueeze", [rows, first])], {"perm": [0, 3, 1, 2]})
        product = steps.op("Conv", [image, steps.op("Unsqueeze", [kernel, last]), *bias])
        out = steps.op("Squeeze", [steps.op("Transpose", [product], {"perm": [0, 2, 3, 1]}), first])
        for step in steps.nodes:
            step.outputs[0].dtype = rows.dtype
        convenience.replace_nodes_and_values(graph, node, [node], steps.nodes, node.outputs, [out])


def _is_plain(options: Mapping[str, Any]) -> bool:
    """True if a product has no factors, and its rows are not transposed."""
    return {options.get(name, 1.0) for name in ("alpha", "beta")} == {1.0} and not options.get("transA")


def _copy_maps_for_rows(graph: Any, mask: set[Any]) -> None:
    """Copy maps (B, C, H, W) that are read as rows and as maps, by a pooling of single pixels.

    The rows of a map lie in OpenVINO's memory as they are needed, but it sees that only where nothing else reads the
    map; otherwise it permutes the map, which takes ten times as long as the copy (OpenVINO 2026.4).
    """
    from onnx_ir import tape

    for node in graph:
        value = node.inputs[0] if node.inputs else None
        is_to_rows = node.op_type == "Transpose" and list(node.attributes["perm"].value) == [0, 2, 3, 1]
        if not is_to_rows or node in mask or value is None or len(list(value.uses())) < 2:
            continue
        steps = tape.Tape()
        copy = steps.op("MaxPool", [value], {"kernel_shape": [1, 1]})
        copy.dtype, copy.shape = value.dtype, value.shape
        graph.insert_before(node, steps.nodes)
        node.replace_input_with(0, copy)


def _means(
    model: Any, chosen: Sequence[Any], calls: Iterable[tuple[Tensor, ...]], target: Path
) -> dict[Any, Tensor]:
    """Return the mean (C,) in each channel of rows and maps that the chosen nodes multiply."""
    values = [node.inputs[0] for node in chosen if node.op_type in PRODUCTS or is_convolution_of_rows(node)]
    axes = {value: {2: [0], 4: [0, 2, 3]}.get(len(value.shape or ())) for value in values}
    asked = [("ReduceMean", value, over) for value, over in axes.items() if over]
    means = _reduce(model, asked, calls, target)
    return {value: means["ReduceMean", value].double().mean(0) for _, value, _ in asked}


def _ranges(
    model: Any, chosen: Sequence[Any], calls: Iterable[tuple[Tensor, ...]], target: Path
) -> dict[Any, tuple[float, float]]:
    """Return the smallest and the largest of the values that the chosen nodes read and write in 8 bits.

    Raises:
        CannotConvert: a value is not finite.
    """
    values = dict.fromkeys(
        value
        for node in chosen
        for value in (*(node.inputs[index] for index in indices_of_values(node)), node.outputs[0])
        if not value.is_initializer()
    )
    asked = [(kind, value, None) for value in values for kind in ("ReduceMin", "ReduceMax")]
    ends, ranges = _reduce(model, asked, calls, target), dict[Any, tuple[float, float]]()
    for value in values:
        low, high = float(ends["ReduceMin", value].min()), float(ends["ReduceMax", value].max())
        if low > high:  # inf and -inf: there were no values
            low = high = 0.0
        if not math.isfinite(low) or not math.isfinite(high):
            raise _not_finite()
        ranges[value] = low, high
    return ranges


def _reduce(
    model: Any,
    asked: Sequence[tuple[str, Any, list[int] | None]],
    calls: Iterable[tuple[Tensor, ...]],
    target: Path,
) -> dict[tuple[str, Any], Tensor]:
    """Run a float file on the calibration images and reduce its values.

    Args:
        model: the file (onnx_ir).
        asked: kind of reduction, a value, and the axes; None for all axes.
        calls: inputs for calibration.
        target: file beside which a temporary one is written.

    Returns:
        By kind and value, the numbers of all calls, (calls, numbers).
    """
    import numpy as np
    import onnx
    import onnx_ir
    from onnx import TensorProto, helper, numpy_helper

    if not asked:
        return {}
    message = onnx_ir.to_proto(model)
    del message.graph.output[:]
    for kind, value, axes in asked:
        result, inputs = f"{value.name}.{kind}", [value.name]
        if axes is not None:
            inputs.append(f"{result}.axes")
            message.graph.initializer.append(numpy_helper.from_array(np.array(axes), inputs[-1]))
        # Without the dimensions, old versions of ONNX Runtime refuse values without elements.
        message.graph.node.append(helper.make_node(kind, inputs, [result], keepdims=1))
        message.graph.output.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, None))
    file = target.with_name(f"measuring-{target.name}")
    try:
        onnx.save(message, file)
        has_kernels = any(node.domain == DOMAIN for node in model.graph)
        run = (_MeasuringWithKernels if has_kernels else _Measuring)(file)
        runs = [[numbers.flatten() for numbers in run(*call)] for call in calls]
    finally:
        file.unlink(missing_ok=True)
    by_value = map(torch.stack, zip(*runs, strict=True))
    return {(kind, value): numbers for (kind, value, _), numbers in zip(asked, by_value, strict=True)}


def _in_8_bits(graph: Any, mask: set[Any]) -> list[Any]:
    """Return the products with weights, and the operations between them that can run in 8 bits."""
    import numpy as np
    from onnx_ir import DataType

    chosen: dict[Any, None] = {}

    def is_chosen(value: Any) -> bool:
        return value is not None and value.producer() in chosen

    nodes = [node for node in graph if node not in mask and node.outputs[0].dtype == DataType.FLOAT]
    for node in nodes:
        values = node.inputs if node.op_type in ("Add", "Concat") else node.inputs[:1]
        constants = [value.const_value.numpy() for value in values if value.is_initializer()]
        values = [value for value in values if not value.is_initializer()]
        # A halo is computed in floating point but concatenated in 8 bits.
        enough = any if node.op_type == "Concat" else all
        if (
            _has_weights(node)
            or is_convolution_of_rows(node)
            or (
                node.op_type in (*_MOVING, *_BESIDE)
                and values
                and enough(map(is_chosen, values))
                and all(np.isfinite(constant).all() for constant in constants)
            )
        ):
            chosen[node] = None
    for node in reversed(nodes):
        users = node.successors()
        if node.op_type in _MOVING and users and all(user in chosen for user in users):
            chosen[node] = None
    return [node for node in graph if node in chosen]


def _has_weights(node: Any) -> bool:
    """True for a product with constant weights that engines support in 8 bits; grouped products of rows are not."""
    if node.op_type not in PRODUCTS or not all(
        value is None or value.is_initializer() for value in node.inputs[1:]
    ):
        return False
    options, (weight, *biases) = options_of(node), node.inputs[1:]
    if node.op_type == "Conv":
        return True
    outputs = weight.shape[0 if options.get("transB") else -1]
    has_bias_of_outputs = all(bias is None or bias.const_value.size == outputs for bias in biases)
    return len(weight.shape) == 2 and _is_plain(options) and has_bias_of_outputs
