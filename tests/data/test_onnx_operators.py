"""Operators of ONNX in each opset in which they mean something new: read, and equal to ONNX Runtime at two sizes.

What is not read is refused with the operator's name, never computed as something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import thorough

import cadsurgery as cs

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx2torch")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FIRST, LAST = 6, 23
CHANNELS = 8
SIZES = ((1, 3, 40, 56), (2, 3, 32, 64))
MAP, OTHER = "map", "other"  # maps that the operator reads
WINDOW = {"kernel_shape": [3, 3]}
SCALE, SHIFT = (np.linspace(start, 1.2, CHANNELS, dtype="f") for start in (0.4, -0.5))


def per_channel(*shape: int) -> np.ndarray:
    return np.linspace(0.1, 0.5, CHANNELS, dtype="f").reshape(shape)


POINTWISE = """
Abs Exp Sin Atan Cosh Asinh Erf Floor Relu Sigmoid Elu Selu Celu HardSigmoid HardSwish LeakyRelu Softplus Gelu Mish
ThresholdedRelu Shrink Dropout Reciprocal Round Softmax LogSoftmax MeanVarianceNormalization GlobalMaxPool GlobalLpPool
"""
# A row: the operator, and what it is given by the names of ONNX's own definitions, as attributes or as inputs, as the
# opset has them. `of` lists the maps that it reads.
Row = tuple[str, dict[str, Any]]
OPERATORS: dict[str, Row] = {
    **{kind: (kind, {}) for kind in POINTWISE.split()},
    "Gelu tanh": ("Gelu", {"approximate": "tanh"}),
    "Softmax of channels": ("Softmax", {"axis": 1}),
    "Clip": ("Clip", {"min": np.float32(-0.3), "max": np.float32(0.4)}),
    "Clip from below": ("Clip", {"min": np.float32(-0.3)}),
    "PRelu of channels": ("PRelu", {"slope": per_channel(CHANNELS, 1, 1)}),
    "PRelu of a batch": ("PRelu", {"slope": per_channel(1, CHANNELS, 1, 1)}),
    **{
        f"{kind} of {name}": (kind, {"of": of, **more})
        for kind in ("Sum", "Max", "Min", "Mean")
        for name, of, more in (
            ("three", [MAP, OTHER, "third"], {}),
            ("one", [MAP], {}),
            ("a constant", [MAP], {"constant": np.array([0.2], dtype="f")}),
            ("channels", [MAP], {"constant": per_channel(1, CHANNELS, 1, 1)}),
        )
    },
    **{kind: (kind, {"of": [MAP, OTHER]}) for kind in ("Add", "Sub", "Mul", "Div")},
    **{
        f"{kind} over {name}": (kind, {"axes": axes, **more})
        for kind in (
            "ReduceMax",
            "ReduceMean",
            "ReduceSum",
            "ReduceL2",
            "ReduceSumSquare",
        )
        for name, axes, more in (
            ("channels", [1], {}),
            ("the map", [2, 3], {}),
            ("rows, which go", [-2], {"keepdims": 0}),
        )
    },
    "ReduceLogSumExp": ("ReduceLogSumExp", {"axes": [1]}),
    "DepthToSpace DCR": ("DepthToSpace", {"blocksize": 2}),
    "DepthToSpace CRD": ("DepthToSpace", {"blocksize": 2, "mode": "CRD"}),
    "SpaceToDepth": ("SpaceToDepth", {"blocksize": 2}),
    "MaxPool": ("MaxPool", WINDOW | {"strides": [2, 2], "pads": [1] * 4}),
    "MaxPool dilated": ("MaxPool", WINDOW | {"dilations": [2, 2], "pads": [2] * 4}),
    "MaxPool on one side": ("MaxPool", WINDOW | {"strides": [2, 2], "pads": [0, 0, 1, 1]}),
    "AveragePool": ("AveragePool", WINDOW | {"pads": [1] * 4}),
    "AveragePool on one side": (
        "AveragePool",
        {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 1, 1]},
    ),
    "AveragePool on the other side": ("AveragePool", WINDOW | {"strides": [2, 2], "pads": [1, 0, 0, 0]}),
    "LpPool padded": ("LpPool", WINDOW | {"pads": [1] * 4, "p": 3}),
    "LpNormalization": ("LpNormalization", {"axis": 1, "p": 2}),
    "LRN": ("LRN", {"size": 3}),
    "GroupNormalization": ("GroupNormalization", {"num_groups": 2, "scale": SCALE, "bias": SHIFT}),
    "InstanceNormalization": ("InstanceNormalization", {"scale": SCALE, "B": SHIFT}),
    "BatchNormalization": (
        "BatchNormalization",
        {"scale": SCALE, "B": SHIFT, "mean": SHIFT, "input_mean": SHIFT, "var": SCALE, "input_var": SCALE},
    ),
    "Slice": ("Slice", {"starts": [1, 0], "ends": [-1, 2**31 - 1], "axes": [2, 1], "steps": [2, 1]}),
    "Slice backwards": ("Slice", {"starts": [-1], "ends": [-9999], "axes": [1], "steps": [-1]}),
    "Pad": ("Pad", {"pads": [0, 0, 1, 2, 0, 0, 2, 1]}),
    "Pad with a value": (
        "Pad",
        {"pads": [0, 0, 1, 2, 0, 0, 2, 1], "value": 0.5, "constant_value": np.float32(0.5)},
    ),
    "Pad by mirrors": ("Pad", {"pads": [0, 0, 1, 2, 0, 0, 2, 1], "mode": "reflect"}),
    "Pad by the edge": ("Pad", {"pads": [0, 0, 1, 2, 0, 0, 2, 1], "mode": "edge"}),
    "Split": ("Split", {"axis": 1, "split": [3, 5]}),
    "Squeeze and Unsqueeze": ("Unsqueeze", {"axes": [0, -1]}),
    "Reshape": ("Reshape", {"shape": [0, 2, -1]}),
    "Flatten": ("Flatten", {"axis": 2}),
    "Expand": ("Expand", {"shape": [2, 1, 1, 1, 1]}),
    "Concat": ("Concat", {"axis": 1, "of": [MAP, OTHER]}),
    "ArgMax": ("ArgMax", {"axis": 1}),
    "Gather a channel": ("Gather", {"axis": 1, "indices": np.int64(-2)}),
    "Gather rows of channels": ("Gather", {"axis": -3, "indices": np.array([[0, 1], [2, 3]])}),
    "CumSum": ("CumSum", {"axis": np.int64(1)}),
    "CumSum backwards": ("CumSum", {"axis": np.int64(-3), "reverse": 1, "exclusive": 1}),
    "TopK": ("TopK", {"axis": 1, "k": 2, "K": [2]}),
    "Conv on one side": (
        "Conv",
        {
            "W": np.linspace(-1, 1, CHANNELS * CHANNELS * 9, dtype="f").reshape(CHANNELS, CHANNELS, 3, 3),
            "pads": [0, 1, 2, 1],
        },
    ),
    "ConvTranspose on one side": (
        "ConvTranspose",
        {
            "W": np.linspace(-1, 1, CHANNELS * 2 * 9, dtype="f").reshape(CHANNELS, 2, 3, 3),
            "pads": [0, 1, 1, 1],
            "strides": [2, 2],
        },
    ),
    "Upsample": ("Upsample", {"scales": [1.0, 1.0, 2.0, 2.0], "mode": "nearest"}),
    "Upsample linear": ("Upsample", {"scales": [1.0, 1.0, 2.0, 2.0], "mode": "linear"}),
    **{
        f"Resize {mode} {places} {rounding} by {factor}": (
            "Resize",
            {
                "scales": [1.0, 1.0, factor, factor],
                "mode": mode,
                "coordinate_transformation_mode": places,
                "nearest_mode": rounding,
            },
        )
        for mode, places, rounding in (
            ("nearest", "half_pixel", "round_prefer_floor"),
            ("nearest", "half_pixel", "round_prefer_ceil"),
            ("nearest", "asymmetric", "round_prefer_floor"),
            ("linear", "half_pixel", "round_prefer_floor"),
            ("linear", "asymmetric", "round_prefer_floor"),
            ("linear", "align_corners", "round_prefer_floor"),
            ("cubic", "half_pixel", "round_prefer_floor"),
        )
        for factor in (2.0, 3.0)
    },
}
# Refused in words; everything else above is read.
REFUSED = {"Resize nearest asymmetric round_prefer_floor by 3.0"}


def schema_of(kind: str, opset: int) -> Any:
    try:
        schema = onnx.defs.get_schema(kind, max_inclusive_version=opset, domain="")
    except onnx.defs.SchemaError:
        return None
    return None if schema.deprecated or schema.since_version > opset else schema


def versions(kind: str) -> Iterator[int]:
    """Yield the opsets in which an operator got another meaning, and the last one."""
    found = {
        schema.since_version: opset
        for opset in range(LAST, FIRST - 1, -1)
        if (schema := schema_of(kind, opset))
    }
    yield from sorted({*found.values()} | ({LAST} if schema_of(kind, LAST) else set()))


def write(path: Path, kind: str, given: dict[str, Any], opset: int) -> Path:
    """Write a convolution and an operator behind it, given what this opset has attributes or inputs for."""
    schema, held, options = schema_of(kind, opset), [], {}

    def hold(value: Any) -> str:
        held.append(onnx.numpy_helper.from_array(np.asarray(value), f"constant{len(held)}"))
        return held[-1].name

    random = np.random.default_rng(0)
    kernels = {
        name: random.standard_normal((CHANNELS, 3, 3, 3)).astype("f") / 3 for name in (MAP, OTHER, "third")
    }
    if kind in ("Div", "Reciprocal"):  # divisors near zero magnify rounding
        given = given | {"of": [*given.get("of", [MAP])[:-1], "far"]}
    nodes = [
        onnx.helper.make_node("Conv", ["image", hold(kernel)], [name], pads=[1] * 4)
        for name, kernel in kernels.items()
    ]
    nodes.append(onnx.helper.make_node("HardSigmoid", [OTHER], ["far"], alpha=0.02))
    inputs = list(given.get("of", [MAP]))
    if kind == "Expand":
        nodes.append(onnx.helper.make_node("ReduceMean", [MAP], ["small"], keepdims=1))
        inputs = ["small"]
    if "constant" in given:
        inputs.append(hold(given["constant"]))
    names = [one.name for one in schema.inputs]
    for name, value in given.items():
        if name in schema.attributes:
            options[name] = value.item() if isinstance(value, np.generic) else value
        elif name in names and name not in ("of", "constant"):
            inputs += [""] * (names.index(name) + 1 - len(inputs))
            array = np.asarray(value)
            inputs[names.index(name)] = hold(
                array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
            )
    outputs = ["output", "rest"] if kind in ("TopK", "Split") else ["output"]
    nodes.append(onnx.helper.make_node(kind, inputs, outputs, **options))
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["n", 3, "h", "w"])
    results = [onnx.ValueInfoProto(name="output")]
    graph = onnx.helper.make_graph(nodes, "graph", [image], results, initializer=held)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path)
    return path


# The newest form of each: one of four by default, since their families are read alike.
CASES = [
    ((name, opset) if opset == max(versions(kind)) and not at % 4 else thorough(name, opset, few=3))
    for at, (name, (kind, given)) in enumerate(OPERATORS.items())
    for opset in versions(kind)
    if not (opset < 10 and "steps" in given) and not (opset == 10 and given.get("mode") == "cubic")
]


@pytest.mark.parametrize(("name", "opset"), CASES)
def test_an_operator_is_read_as_onnx_runtime_computes_it(name: str, opset: int, tmp_path: Path) -> None:
    kind, given = OPERATORS[name]
    path = write(tmp_path / "net.onnx", kind, given, opset)
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        images = [torch.randn(size) for size in SIZES]
        every = [session.run(None, {"image": image.numpy()})[0] for image in images]
    except Exception as error:
        pytest.skip(f"ONNX Runtime does not run it: {str(error)[:80]}")
    if name in REFUSED and opset > 10:
        with pytest.raises(cs.CannotConvert, match=kind):
            cs.build_model(str(path))
        return
    network = cs.build_model(str(path))
    for image, expected in zip(images, map(torch.from_numpy, every), strict=True):
        found = network(image)
        found = found if isinstance(found, torch.Tensor) else found[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
