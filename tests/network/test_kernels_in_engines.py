"""This package's kernels in engines: a file with kernels gives what the network gives; what the kernels cannot compute
is refused by name, and without their library the file is."""

from __future__ import annotations

import os
import re
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import Cap, Run, assert_same, covering, picture, slow
from exported import File
from networks import Composed, made_once, randomise, unverified
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.elements.backends.choose import compute
from cadsurgery.elements.backends.operators import KERNELS
from cadsurgery.elements.backends.works import PixelReading
from cadsurgery.elements.kernel_map import read_points
from cadsurgery.elements.lattice import Geometry, Lattice
from cadsurgery.kernels import build
from cadsurgery.kernels.build import find_compiler_of_cpp
from cadsurgery.kernels.dispatch import forget
from cadsurgery.kernels.isa import here
from cadsurgery.masks.scored import missed
from cadsurgery.network.dense_twin import dense_twin
from cadsurgery.network.export.engines import ENGINES, OnnxRuntime
from cadsurgery.network.export.in_bytes import round_weights, write_bytes
from cadsurgery.network.export.kernels import DOMAIN, IN_8_BITS, RESIZES, declare_kernels
from cadsurgery.support.kinds import HOW_TO_OPEN, KERNELS_KEY
from cadsurgery.tasks.sides.dense_file import write_dense

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
onnx_ir = pytest.importorskip("onnx_ir")
passes = pytest.importorskip("onnx_ir.passes.common")
pytest.importorskip("onnxscript")


def kinds(net: Any, x: Tensor) -> Tensor:
    """An ungrouped, a depthwise and two grouped convolutions behind a strided one; with residuals and activations."""
    x = net.down(torch.relu(net.stem(x)))
    x = torch.relu(net.whole(x) + x)
    x = nn.functional.relu6(net.depthwise(x))
    x = nn.functional.hardswish(net.pairs(x)) + x
    return net.groups(x)


def of_kinds(then: Any = kinds) -> nn.Module:
    """Which ends with one of the functions here."""
    torch.manual_seed(0)
    model = Composed(then, stem=nn.Conv2d(3, 16, 3, 2, 1), down=nn.Conv2d(16, 24, 3, 2, 1))
    model.whole = nn.Conv2d(24, 24, 3, 1, 1, bias=False)
    model.depthwise = nn.Conv2d(24, 24, 5, 1, 2, groups=24)
    model.pairs = nn.Conv2d(24, 24, 3, 1, 2, 2, groups=12)
    model.groups = nn.Conv2d(24, 18, 3, 1, 1, groups=6)
    with torch.random.fork_rng(devices=[]):
        model.last = nn.Conv2d(18, 5, 3, 1, 1)
    return model.eval()


@made_once
def net(mask: Any = "edges:threshold=0.9,dilation=3", **options: Any) -> cs.AdaptiveModel:
    return unverified(randomise(of_kinds()), mask, output_stride=(2, 4), **{"fill": "linear", **options})


CONVOLUTIONS = {
    "Convolve": 2,
    "ConvolveDepthwise": 1,
    "ConvolveGroups": 2,
}  # of a file with kernels
OF_LATTICES = {"FindCells": 2, "ReadTaps": 4, "ReadPixels": 1}


class WithKernels(File):
    """An ONNX file run by ONNX Runtime with the library of kernels."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(cs.kernels_for("onnxruntime"))
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class InOpenVino:
    """An ONNX file run by OpenVINO with the extension of kernels."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        ov = pytest.importorskip("openvino")
        self.core, self.threads = ov.Core(), threads
        self.core.add_extension(extension_of_openvino())
        self.model = self.core.read_model(path)

    def run(self, feed: dict[str, Any]) -> list[Any]:
        model = self.model.clone()
        model.reshape({name: list(value.shape) for name, value in feed.items()})
        exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": self.threads}
        outputs = self.core.compile_model(model, "CPU", exact)(feed)
        return [outputs[place].copy() for place in range(len(outputs))]

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        return {"output": torch.from_numpy(self.run({"image": image.numpy()})[0])}


def extension_of_openvino() -> str:
    """Return the extension; skip the test where none can be built."""
    if sys.platform != "linux" or find_compiler_of_cpp() is None:
        pytest.skip("no C++ compiler, or not Linux")
    return cs.kernels_for("openvino")


def in_openvino(path: Path) -> Any:
    """Return a function that runs a file in OpenVINO as ONNX Runtime's sessions do."""
    return lambda _, feed: InOpenVino(path).run(feed)


def runs_of(path: Path) -> tuple[Any, ...]:
    """Functions that run a file by the library in ONNX Runtime, and by the extension in OpenVINO."""
    return WithKernels(path).session.run, in_openvino(path)


def assert_refused(path: Path, feed: dict[str, Any], message: str, in_both: bool = True) -> None:
    """Both engines refuse a call; OpenVINO takes an empty input for a constant."""
    with pytest.raises(Exception, match=message):
        WithKernels(path).session.run(None, feed)
    if in_both:
        with pytest.raises(Exception, match=message):
            InOpenVino(path, threads=2).run(feed)


def assert_same_in_engines(path: Path, model: cs.AdaptiveModel, *sizes: tuple[int, int, int]) -> None:
    """In both engines a file gives what the network gives."""
    for size in sizes:
        image = picture(*size)
        with torch.no_grad():
            expected = model(image)
        assert 0 < model.active_fraction < 1
        for run in (WithKernels(path), InOpenVino(path)):
            assert_same(run(image)["output"], expected, 1e-5)


def calls(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node if node.domain == DOMAIN)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[cs.AdaptiveModel, Path, Any]:
    path, model = tmp_path_factory.mktemp("kernels") / "net.onnx", net()
    return model, path, cs.export(model, picture(2, 44, 52), path, dynamic=True, with_kernels=True)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["", "scalar", "sse4"])
def test_a_file_with_kernels_is_the_network(written: Any, isa: str, cap_kernels: Cap) -> None:
    model, path, report = written
    cap_kernels(isa)
    assert calls(path) == {**CONVOLUTIONS, **OF_LATTICES}
    assert report.difference < 1e-4
    assert_same_in_engines(path, model, (2, 44, 52), (1, 37, 61), (3, 20, 24))


@pytest.mark.slow
def test_with_nearest_fill_taps_read_the_cell_that_they_lie_in(tmp_path: Path) -> None:
    model, path = net(fill="nearest"), tmp_path / "net.onnx"
    cs.export(model, picture(2, 44, 52), path, dynamic=True, with_kernels=True)
    assert calls(path)["ReadNearTaps"] == 5 and not calls(path)["ReadTaps"]
    assert_same_in_engines(path, model, (2, 44, 52), (1, 37, 61))


@pytest.mark.slow
def test_several_threads_give_the_same(written: Any) -> None:
    _, path, _ = written
    image, results = picture(2, 120, 160), []
    for threads in (1, 3):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(cs.kernels_for())
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        results.append(session.run(["output"], {"image": image.numpy()})[0])
    results += [InOpenVino(path, threads).run({"image": image.numpy()})[0] for threads in (1, 3)]
    assert np.array_equal(*results[:2]) and np.array_equal(*results[2:])
    assert_same(*map(torch.from_numpy, results[1:3]), 1e-5)


@pytest.mark.filterwarnings("ignore:the outputs of the file in 8 bits differ")
@pytest.mark.slow
def test_in_a_file_in_8_bits_all_convolutions_of_rows_are_kernels(tmp_path: Path) -> None:
    model, path = net("edges | budget:fraction=0.3"), tmp_path / "net.onnx"
    report = cs.export(
        model, picture(1, 44, 52), path, precision="int8", calibration=picture(4, 44, 52), with_kernels=True
    )
    in_8_bits = {f"{name}In8Bits": number for name, number in CONVOLUTIONS.items()}
    assert calls(path) == {**in_8_bits, **OF_LATTICES}
    assert report.fidelity is not None and report.fidelity.error < 0.05
    image = picture(1, 44, 52).flip(3)
    given, other = (run(path)(image)["output"] for run in (WithKernels, InOpenVino))
    with torch.no_grad():
        exact = model(image)

    def apart(other: Tensor) -> float:
        return float((given - other).square().mean().sqrt() / given.square().mean().sqrt())

    # A sum at the edge between two steps of 8 bits may round either way.
    assert apart(other) < 5e-3 and apart(exact) < 0.1


def model_of(
    nodes: list[Any], feed: dict[str, Any], outputs: list[Any], constants: dict[str, Any] | None = None
) -> Any:
    """A file of nodes, whose inputs are those of the feed."""
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in feed.items()
    ]
    known = [
        onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()
    ]
    return onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "one", inputs, outputs, known),
        opset_imports=[onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=9,
    )


def one_call(path: Path, table: list[list[int]], groups: int = 2) -> Any:
    """Write a file of one depthwise convolution of rows with two channels; return its inputs."""
    feed = {
        "rows": np.array([[0, 1], [2, 3], [4, 5]], np.float32),
        "table": np.array(table, np.int32),
        "sources": np.array([[0, 2]], np.int32),
        "shares": np.array([[0.5, 0.5]], np.float32),
    }
    weight = np.arange(2 * groups, dtype=np.float32).reshape(2, groups)
    constants = {"weight": weight, "bias": np.ones(groups, np.float32), "residual": np.zeros(1, np.float32)}
    options = {"domain": DOMAIN, "outside": -1.0, "low": 0.0, "high": 9.0}
    node = onnx.helper.make_node("ConvolveDepthwise", [*feed, *constants], ["out"], **options)
    out = onnx.helper.make_tensor_value_info("out", 1, None)
    onnx.save(model_of([node], feed, [out], constants), path)
    return feed


def test_a_convolution_adds_the_bias_and_is_clipped(tmp_path: Path) -> None:
    path = tmp_path / "one.onnx"
    feed = one_call(path, [[0, 1], [2, 3], [4, 4], [3, 3]])  # 3 is outside, 4 the mean of rows 0 and 2
    expected = np.clip([[5.0, 11.0], [-1.0, 3.0], [5.0, 13.0], [-1.0, -3.0]], 0, 9)
    for run in runs_of(path):
        assert np.array_equal(run(None, feed)[0], expected)


class Kind(NamedTuple):
    """A convolution of rows: its function, the shape of its weight (taps first), and its numbers of channels."""

    name: str
    weight: tuple[int, ...]
    inputs: int
    outputs: int


KINDS = {
    "few": Kind("ConvolveDepthwise", (2, 2), 2, 2),
    "depthwise": Kind("ConvolveDepthwise", (9, 37), 37, 37),
    "wide": Kind("ConvolveDepthwise", (25, 200), 200, 200),
    "most taps": Kind("ConvolveDepthwise", (70, 5), 5, 5),
    "plain": Kind("Convolve", (9, 21, 70), 21, 70),
    "product": Kind("Convolve", (1, 64, 33), 64, 33),
    "pairs": Kind("ConvolveGroups", (9, 9, 2, 2), 18, 18),
    "groups": Kind("ConvolveGroups", (4, 3, 5, 40), 15, 120),
}


ROWS, RESULT, RESIDUAL = (0.03, 90), (0.05, 120), (0.02, 140)  # scale and zero point


def float_call(path: Path, kind: Kind, low: float = 0.0, residual: str = "none") -> dict[str, Any]:
    """Write a file of one convolution of floats that are steps of 8 bits; return its inputs."""
    random = np.random.default_rng(kind.inputs)
    rows, taps = 23, kind.weight[0]
    targets = rows if residual == "rows" else 17
    weight = random.normal(size=kind.weight).astype(np.float32)

    def values(shape: tuple[int, int], scale: float, zero: int) -> Any:
        return ((random.integers(0, 256, shape) - zero) * scale).astype(np.float32)

    feed = {
        "rows": values((rows, kind.inputs), *ROWS),
        "table": random.integers(0, rows + 1 + 5, (targets, taps)).astype(np.int32),
        "sources": random.integers(0, rows, (5, 4)).astype(np.int32),
        "shares": random.dirichlet(np.ones(4), 5).astype(np.float32),
    }
    if residual == "more":
        feed["more"] = values((targets, kind.outputs), *RESIDUAL)
    constants = {
        "weight": weight / np.float32(weight.size / kind.outputs) ** 0.5,
        "bias": random.normal(size=kind.outputs).astype(np.float32),
        "none": np.zeros(1, np.float32),
    }
    options = {"domain": DOMAIN, "outside": 0.0, "low": low, "high": np.float32(4)}
    names = [*list(feed)[:4], "weight", "bias", residual]
    node = onnx.helper.make_node(kind.name, names, ["values"], name="call", **options)
    out = onnx.helper.make_tensor_value_info("values", 1, (targets, kind.outputs))
    onnx.save(model_of([node], feed, [out], constants), path)
    return feed


def put_into_8_bits(path: Path, target: Path, for_onnxruntime: bool = True, mean: Any = None) -> Any:
    """Let the nodes of a file read and write 8 bits; return its ONNX message."""
    model = onnx_ir.load(path)
    steps, ranges = {"rows": ROWS, "more": RESIDUAL}, {}
    nodes = [node for node in model.graph if node.op_type != "Relu"]
    for value in {value for node in nodes for value in (*node.inputs, *node.outputs)}:
        scale, zero = steps.get(value.name, RESULT)
        ranges[value] = -zero * scale, (255 - zero) * scale
    weights = round_weights(model.graph, nodes, {} if mean is None else {nodes[-1].inputs[0]: mean})
    write_bytes(model.graph, nodes, weights, set(), ranges, for_onnxruntime)
    declare_kernels(model)
    onnx_ir.save(model, target)
    onnx.checker.check_model(str(target), full_check=True)
    return onnx.load(str(target))


def steps_of(run: Any, feed: dict[str, Any]) -> Any:
    """Return the 8 bits that a file's dequantised result stands for."""
    return in_steps(run(None, feed)[0])


def in_steps(values: Any) -> Any:
    """Return the 8 bits that a result stands for."""
    return np.rint(np.clip(values / RESULT[0] + RESULT[1], 0, 255)).astype(int)


def convolved(path: Path, feed: dict[str, Any]) -> Any:
    """Compute the one convolution of a file, in floats or between 8 bits, by its formula in double precision."""
    graph = onnx.load(str(path)).graph
    (call,) = (node for node in graph.node if node.domain == DOMAIN)
    options = {one.name: one.f for one in call.attribute}
    known = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    weight, bias = (known[name].astype(float) for name in call.input[4:6])
    rows, more, outside = feed["rows"].astype(float), feed.get("more", np.zeros(1)), options["outside"]
    halo = np.einsum("mk,mkc->mc", feed["shares"].astype(float), rows[feed["sources"]])
    if call.op_type.endswith("In8Bits"):
        weight = weight * known[call.input[7]]
        halo = (np.rint(halo / ROWS[0] + ROWS[1]) - ROWS[1]) * ROWS[0]
    every = np.concatenate([rows, np.full((1, rows.shape[1]), outside), halo])
    taps = every[feed["table"]]
    if weight.ndim == 2:
        sums = np.einsum("ntc,tc->nc", taps, weight)
    elif weight.ndim == 3:
        sums = np.einsum("ntc,tco->no", taps, weight)
    else:
        by_group = taps.reshape(*taps.shape[:2], *weight.shape[1:3])
        sums = np.einsum("ntgc,tgco->ngo", by_group, weight).reshape(len(taps), -1)
    return np.clip(sums + bias + more, options["low"], options["high"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "residual", "isa"), covering([*KINDS], ["none", "more"], ["", "avx2", "scalar", "sse4"])
)
def test_a_convolution_between_8_bits_is_the_one_in_floating_point(
    kind: str, residual: str, isa: str, tmp_path: Path, cap_kernels: Cap
) -> None:
    """Weights, and values of the halo, are rounded to 8 bits, too, so that a result may be a few steps away."""
    case = KINDS[kind]
    if isa and isa not in here():
        pytest.skip(f"no {isa} here")
    if residual == "more" and case.name == "ConvolveDepthwise":
        pytest.skip("depthwise kernels take no residual")
    cap_kernels(isa)
    exact, path = tmp_path / "exact.onnx", tmp_path / "rounded.onnx"
    feed = float_call(exact, case, -np.inf if kind == "wide" else -1.5, residual)
    model = put_into_8_bits(exact, path)
    assert calls(path) == {f"{case.name}In8Bits": 1} and not model.functions
    in_floats = WithKernels(exact).session.run(None, feed)[0]
    expected = convolved(exact, feed)
    assert np.abs(in_floats - expected).max() < 1e-4
    formula, expected = in_steps(convolved(path, feed)), in_steps(expected)
    kernel = steps_of(WithKernels(path).session.run, feed)
    assert kernel.min() < kernel.max()
    assert np.abs(kernel - formula).max() <= 1 and (kernel != formula).mean() < 0.01
    assert np.abs(kernel - expected).max() <= 4
    assert np.abs(kernel - expected).mean() < 0.5
    if not isa:
        assert np.array_equal(steps_of(in_openvino(path), feed), kernel)


@pytest.mark.parametrize(
    ("kind", "sums"), [("depthwise", "tc,c->c"), ("plain", "tco,c->o"), ("groups", "tgco,gc->go")]
)
def test_the_bias_corrects_the_mean_error_of_rounded_weights(kind: str, sums: str, tmp_path: Path) -> None:
    path, case = tmp_path / "exact.onnx", KINDS[kind]
    float_call(path, case)
    mean = torch.rand(case.inputs, dtype=torch.float64) + 3
    models = onnx.load(str(path)), put_into_8_bits(path, tmp_path / "rounded.onnx", mean=mean)
    before, after = (
        {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}
        for model in models
    )
    (call,) = (node for node in models[1].graph.node if node.domain == DOMAIN)
    rounded, scales = after[call.input[4]], after[call.input[7]]
    by_group = mean.numpy().reshape(*case.weight[1 : len(case.weight) - 1] if len(case.weight) > 2 else [-1])
    expected = before["bias"] + np.einsum(sums, before["weight"] - rounded * scales, by_group).ravel()
    assert np.abs(after[call.input[5]] - expected).max() < 1e-5
    assert np.abs(expected - before["bias"]).max() > 1e-3


PERMUTED = """
<ir_version: 10, opset_import: ["": 20]>
permuted (float[1, 4, 5, 3] rows) => (float[1, 2, 4, 5] out{more})
<float[2, 3, 1, 1] weight = {{1, 2, 3, 4, 5, -6}}>
{{
    map = Transpose<perm = [0, 3, 1, 2]>(rows)
    out = Conv(map, weight)
}}
"""


@pytest.mark.parametrize("more", ["", ", float[1, 3, 4, 5] map"])
def test_no_map_of_permuted_rows_is_quantised_again(more: str, tmp_path: Path) -> None:
    """Bytes are permuted for ONNX Runtime, and floats for OpenVINO; the outputs are the same bit for bit."""
    path, outputs = tmp_path / "exact.onnx", []
    onnx.save(onnx.parser.parse_model(PERMUTED.format(more=more)), path)
    feed = {"rows": np.random.default_rng(2).normal(size=(1, 4, 5, 3)).astype(np.float32)}
    for for_onnxruntime in (True, False):
        model = put_into_8_bits(path, tmp_path / "rounded.onnx", for_onnxruntime)
        kinds = Counter(node.op_type for node in model.graph.node)
        assert kinds["QuantizeLinear"] == 2  # of the rows and of the result
        outputs.append(File(tmp_path / "rounded.onnx").session.run(None, feed))
    assert all(map(np.array_equal, *outputs))


def test_rows_that_are_their_own_residual_are_read_once(tmp_path: Path) -> None:
    exact, path = tmp_path / "exact.onnx", tmp_path / "rounded.onnx"
    feed = float_call(exact, Kind("Convolve", (3, 8, 8), 8, 8), residual="rows")
    model = put_into_8_bits(exact, path)
    assert sorted(node.op_type for node in model.graph.node) == [
        "ConvolveIn8Bits",
        "DequantizeLinear",
        "QuantizeLinear",
    ]
    found, expected = (steps_of(WithKernels(file).session.run, feed) for file in (path, exact))
    assert np.abs(found - expected).max() <= 4


@pytest.mark.parametrize(("kind", "residual"), [("plain", "none"), ("depthwise", "more")])
def test_what_kernels_cannot_compute_in_8_bits_stays_in_floating_point(
    kind: str, residual: str, tmp_path: Path
) -> None:
    """A computed weight, and a residual of a depthwise convolution; rows and result are rounded nevertheless."""
    exact, path = tmp_path / "exact.onnx", tmp_path / "rounded.onnx"
    feed = float_call(exact, KINDS[kind], residual=residual)
    model = onnx.load(str(exact))
    if kind == "plain":
        next(value for value in model.graph.initializer if value.name == "weight").name = "given"
        model.graph.node.insert(0, onnx.helper.make_node("Relu", ["given"], ["weight"]))
        onnx.save(model, str(exact))
    put_into_8_bits(exact, path)
    assert calls(path) == {KINDS[kind].name: 1}
    found, expected = (steps_of(WithKernels(file).session.run, feed) for file in (path, exact))
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (-1, np.ones(36, np.float32), "scales of a weight"),
        (-2, np.ones((17, 37), np.uint8), "take no residual"),
        (None, -0.03, "not positive"),
    ],
)
def test_what_kernels_do_not_compute_in_8_bits_is_refused(
    place: int | None, value: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "rounded.onnx"
    feed = float_call(tmp_path / "exact.onnx", KINDS["depthwise"])
    model = put_into_8_bits(tmp_path / "exact.onnx", path)
    (call,) = (node for node in model.graph.node if node.domain == DOMAIN)
    if place is None:
        next(option for option in call.attribute if option.name == "scale").f = value
    else:
        given = next(one for one in model.graph.initializer if one.name == call.input[place])
        given.CopyFrom(onnx.numpy_helper.from_array(value, given.name))
    onnx.save(model, str(path))
    with pytest.raises(Exception, match=message):
        WithKernels(path).session.run(None, feed)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["", "scalar"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_pick_takes_rows_and_mixes_the_halo(dtype: Any, isa: str, tmp_path: Path, cap_kernels: Cap) -> None:
    cap_kernels(isa)
    random, path = np.random.default_rng(0), tmp_path / "pick.onnx"
    rows = random.integers(0, 256, (11, 37)).astype(dtype)
    feed = {
        "rows": rows,
        "table": np.array([[0], [10], [11], [12], [15], [3]], np.int32),
        "sources": random.integers(0, 11, (4, 4)).astype(np.int32),
        "shares": random.dirichlet(np.ones(4), 4).astype(np.float32),
    }
    in_8_bits = dtype == np.uint8
    node = onnx.helper.make_node("PickIn8Bits" if in_8_bits else "Pick", list(feed), ["out"], domain=DOMAIN)
    out = onnx.helper.make_tensor_value_info("out", onnx.helper.np_dtype_to_tensor_dtype(rows.dtype), (6, 37))
    model = model_of([node], feed, [out])
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    halo = np.einsum("mk,mkc->mc", feed["shares"], rows[feed["sources"]].astype(np.float32))
    every = np.concatenate([rows.astype(np.float32), np.zeros((1, 37), np.float32), halo])
    expected = every[feed["table"][:, 0]]
    (found,) = WithKernels(path).session.run(None, feed)
    assert found.dtype == dtype
    assert np.abs(found.astype(np.float32) - expected).max() <= (0.501 if in_8_bits else 1e-4)
    wrong = {**feed, "sources": feed["sources"] + 8}
    assert_refused(path, wrong, "rows that do not exist", in_both=not isa)
    if not isa:
        assert np.array_equal(InOpenVino(path).run(feed)[0], found)


@pytest.mark.parametrize(
    ("table", "groups", "message"),
    [
        ([[0, 5]], 2, "rows that do not exist"),
        ([[-1, 0]], 2, "rows that do not exist"),
        ([[0, 1]], 3, "do not fit the weight"),
    ],
)
def test_tables_and_weights_that_do_not_fit_the_rows_are_refused(
    table: list[list[int]], groups: int, message: str, tmp_path: Path
) -> None:
    feed = one_call(tmp_path / "one.onnx", table, groups)
    assert_refused(tmp_path / "one.onnx", feed, message)


INT, FLOAT = onnx.TensorProto.INT32, onnx.TensorProto.FLOAT
RESULTS = {  # type and dimensions
    "FindCells": ((INT, 1), (INT, 1)),
    "ReadTaps": ((INT, 2), (INT, 2), (FLOAT, 2)),
    "ReadNearTaps": ((INT, 2),),
    "ResizeLinear": ((FLOAT, 4),),
    "ResizeLinearAligned": ((FLOAT, 4),),
    "InterpolationError": ((FLOAT, 3),),
    "ReadPixels": ((FLOAT, 4),),
}


def call_of(path: Path, name: str, feed: dict[str, Any], fits: bool = True) -> Path:
    """Write a file that calls a kernel without attributes; return its path. Results that do not fit have no shape."""
    outputs = [
        onnx.helper.make_tensor_value_info(f"result {place}", kind, [None] * rank if fits else None)
        for place, (kind, rank) in enumerate(RESULTS[name])
    ]
    node = onnx.helper.make_node(name, list(feed), [one.name for one in outputs], domain=DOMAIN)
    model = model_of([node], feed, outputs)
    if fits:
        onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return path


def numbers(*values: Any) -> list[Any]:
    return [np.asarray(value, np.int32) for value in values]


def lattice_of(strides: tuple[int, ...], size: tuple[int, int], images: int) -> Lattice:
    """Return the finest adaptive lattice of random levels, behind all stages but one."""
    geometry = Geometry(strides, fill="linear")
    side, random = geometry.sides[-1], torch.Generator().manual_seed(size[0])
    patches = (images, *(-(-length // side) for length in size))
    levels = torch.randint(0, len(geometry.sides), patches, generator=random)
    whole = levels.repeat_interleave(side, 1).repeat_interleave(side, 2)
    return geometry.lattice(whole[:, : size[0], : size[1]]).at(len(strides) - 1 or 1)


def taps_of(lattice: Lattice, down: list[int], across: list[int], next_stage: bool) -> dict[str, Any]:
    """Return the inputs of a kernel map: around each cell of a lattice, or of the next stage, cropped."""
    size = (lattice.size[0] - 1, lattice.size[1] - 2) if next_stage else lattice.size
    targets = lattice.at(lattice.stage + next_stage, size).anchors
    names = "levels", "sides", "anchors", "index", "targets", "size", "down", "across"
    cells = lattice.levels, lattice.geometry.sides, lattice.anchors, lattice.index
    return dict(zip(names, numbers(*cells, targets, size, down, across), strict=True))


LATTICES = [((2, 2), (13, 10), 2), ((3,), (7, 11), 3), ((2, 2, 2), (8, 16), 1), ((2,), (1, 1), 1)]


@pytest.mark.parametrize("lattice", LATTICES, ids=str)
def test_cells_in_engines_are_those_of_the_lattice(lattice: Any, tmp_path: Path) -> None:
    source = lattice_of(*lattice)
    feed = dict(zip(("levels", "sides"), numbers(source.levels, source.geometry.sides), strict=True))
    path = call_of(tmp_path / "cells.onnx", "FindCells", feed)
    for run in runs_of(path):
        anchors, index = run(None, feed)
        assert np.array_equal(anchors, source.anchors) and np.array_equal(index, source.index)


@pytest.mark.parametrize(
    ("lattice", "steps", "next_stage"),
    covering(
        LATTICES[:3], [([-1, 0, 1], [-2, 0, 2]), ([0], [0]), ([-5, 0], [3]), ([1], [-1, 4])], [False, True]
    ),
)
def test_taps_in_engines_are_those_of_the_kernel_map(
    lattice: Any, steps: Any, next_stage: bool, tmp_path: Path
) -> None:
    source, images = lattice_of(*lattice), lattice[2]
    feed = taps_of(source, *steps, next_stage)
    found = {}
    for name in ("ReadTaps", "ReadNearTaps"):
        path = call_of(tmp_path / f"{name}.onnx", name, feed)
        found[name] = [run(None, feed) for run in runs_of(path)]
        for other in found[name][1:]:
            assert all(map(np.array_equal, found[name][0][:2], other[:2]))
    (height, width), (high, wide) = feed["size"].tolist(), source.size
    image, y, x = torch.unravel_index(
        torch.from_numpy(feed["targets"]).long().view(-1, 1), (images, height, width)
    )
    down, across = (torch.from_numpy(feed[name]).long() for name in ("down", "across"))
    y, x = y + down.repeat_interleave(len(across)), x + across.repeat(len(down))
    inside = (y >= 0) & (y < high) & (x >= 0) & (x < wide)
    points = (image * high + y.clamp(0, high - 1)) * wide + x.clamp(0, wide - 1)
    expected = read_points(source, points, inside)
    table, sources, _ = found["ReadTaps"][0]
    assert np.array_equal(table, expected.table) and np.array_equal(sources, expected.sources)
    assert all(np.abs(one[2] - expected.mix.numpy()).max(initial=0) < 1e-7 for one in found["ReadTaps"])
    near = torch.where(inside, source.index[points], source.count)
    assert np.array_equal(found["ReadNearTaps"][0][0], near)


def pixels_of(lattice: Lattice, rows: np.ndarray, step: int) -> dict[str, Any]:
    """Return the inputs of a reading of every so many-th pixel."""
    cells = numbers(lattice.levels, lattice.geometry.sides, lattice.index, [step])
    return {"rows": rows, **dict(zip(("levels", "sides", "index", "sizes"), cells, strict=True))}


@pytest.mark.parametrize(("lattice", "channels", "step"), covering(LATTICES, [1, 3, 33], [1, 2, 4]), ids=str)
def test_pixels_in_engines_are_those_of_the_reading(
    lattice: Any, channels: int, step: int, tmp_path: Path
) -> None:
    source = lattice_of(*lattice)
    rows = np.random.default_rng(0).standard_normal((source.count, channels)).astype(np.float32)
    work = PixelReading(torch.from_numpy(rows), source, step)
    expected = compute(work.picking).view(work.shape).numpy()
    feed = pixels_of(source, rows, step)
    path = call_of(tmp_path / "pixels.onnx", "ReadPixels", feed)
    for run in runs_of(path):
        assert np.abs(run(None, feed)[0] - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("sizes", "corners", "isa"),
    covering(
        [
            *(((5, 7), (40, 56)), ((9, 4), (5, 1500)), ((1, 1), (3, 2)), ((6, 1100), (1, 2201))),
            ((3, 3), (3, 3)),
        ],
        [False, True],
        ["", "avx2", "scalar"],
    ),
)
def test_maps_are_resized_as_by_torch(
    sizes: tuple[tuple[int, int], tuple[int, int]], corners: bool, isa: str, tmp_path: Path, cap_kernels: Cap
) -> None:
    cap_kernels(isa)
    size, new = sizes
    maps = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.interpolate(maps, size=new, mode="bilinear", align_corners=corners).numpy()
    feed = {"maps": maps.numpy(), "sizes": np.array([2, 3, *new], np.int32)}
    name = "ResizeLinearAligned" if corners else "ResizeLinear"
    path = call_of(tmp_path / "resize.onnx", name, feed)
    for run in runs_of(path):
        assert np.abs(run(None, feed)[0] - expected).max() < 1e-5 * np.abs(maps).max() * max(*size, 10)


@pytest.mark.parametrize(
    ("size", "isa"), covering([(6, 8), (5, 7), (4, 7), (1, 1), (2, 1), (1, 5)], ["", "avx2", "scalar"])
)
def test_the_error_of_interpolation_is_that_of_the_mask(
    size: tuple[int, int], isa: str, tmp_path: Path, cap_kernels: Cap
) -> None:
    cap_kernels(isa)
    features = torch.randn(3, 21, *size, generator=torch.Generator().manual_seed(0))
    expected = missed(features).square().sum(1).numpy()
    rows = features.permute(0, 2, 3, 1).reshape(-1, 21)
    feed = {"rows": rows.numpy(), "sizes": np.array([3, *size], np.int32)}
    path = call_of(tmp_path / "error.onnx", "InterpolationError", feed)
    for run in runs_of(path):
        found = run(None, feed)[0]
        assert found.shape == expected.shape and np.abs(found - expected).max() < 1e-5 * max(
            expected.max(), 1
        )


def named(names: str, *values: Any) -> dict[str, Any]:
    return dict(zip(names.split(), numbers(*values), strict=True))


FOUR, SIDES = np.zeros((1, 2, 2)), [1, 2, 4]
RESIZE = {"maps": np.zeros((2, 3, 4, 5), np.float32), **named("sizes", [2, 3, 8, 8])}
TAPS = "levels sides anchors index targets size down across"
# Inputs of each kernel that it computes, and changes of them that it refuses.
GOOD: dict[str, dict[str, Any]] = {
    "FindCells": named("levels sides", FOUR, SIDES),
    "ReadTaps": named(TAPS, FOUR, SIDES, *[range(4)] * 3, (2, 2), [0], [0]),
    "ReadPixels": {
        "rows": np.zeros((4, 3), np.float32),
        **named("levels sides index sizes", FOUR, SIDES, range(4), [1]),
    },
    "ResizeLinear": RESIZE,
    "ResizeLinearAligned": RESIZE,
    "InterpolationError": {"maps": np.zeros((6, 4), np.float32), **named("sizes", [1, 2, 3])},
}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *(
        (name, change, message)
        for name in ("ReadTaps", "FindCells")
        for change, message in (
            ({"levels": [[[0, 3], [0, 0]]]}, "without a side"),
            ({"levels": [[[0, -1], [0, 0]]]}, "without a side"),
            ({"sides": [1, 2, 0]}, "without a side"),
            ({"levels": [[0, 1], [0, 0]]}, "no such dimensions"),
        )
    ),
    ("ReadTaps", {"targets": [0, 4]}, "outside its size"),
    ("ReadTaps", {"index": [0, 1, 2, 4]}, "do not fit its level map"),
    ("ReadTaps", {"anchors": [0, 1, 2, 4]}, "do not fit its level map"),
    ("ReadTaps", {"index": [0, 1, 2]}, "do not fit its level map"),
    ("ReadTaps", {"size": [2, 2, 1]}, "not height and width"),
    ("ReadTaps", {"down": []}, "no taps"),
    ("ReadTaps", {"across": [[0]]}, "no vector"),
    ("ReadPixels", {"levels": [[[0, 3], [0, 0]]]}, "without a side"),
    ("ReadPixels", {"index": [0, 1, 2, 4]}, "do not fit their level map"),
    ("ReadPixels", {"index": [0, 1, -1, 2]}, "do not fit their level map"),
    ("ReadPixels", {"rows": [0, 0, 0, 0]}, "do not fit their level map"),
    ("ReadPixels", {"sizes": [0]}, "not one number"),
    ("ReadPixels", {"sizes": [1, 1]}, "not one number"),
    ("ResizeLinear", {"sizes": [1, 3, 8, 8]}, "only height and width"),
    ("ResizeLinear", {"sizes": [2, 3, 8, 0]}, "empty or too large"),
    ("ResizeLinearAligned", {"sizes": [2, 3, 8]}, "no four dimensions|another number of sizes"),
    ("ResizeLinear", {"maps": np.zeros((2, 3, 4))}, "no four dimensions"),
    ("InterpolationError", {"sizes": [2, 3, 4]}, "another number of rows"),
    ("InterpolationError", {"maps": np.zeros((2, 3, 4))}, "are no rows"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=str)
def test_what_a_kernel_of_maps_cannot_compute_is_refused(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    feed = {one: np.asarray(change.get(one, value), value.dtype) for one, value in GOOD[name].items()}
    path = call_of(tmp_path / "call.onnx", name, feed, fits=False)
    in_both = all(value.size for value in feed.values()) and "rows" not in change
    assert_refused(path, feed, message, in_both=in_both)


def decodes(net: Any, x: Tensor) -> Tensor:
    """The network with an output that is upsampled twice, where it leaves the region, and by torch, and convolved."""
    half = nn.functional.interpolate(kinds(net, x), scale_factor=2, mode="bilinear")
    size = tuple(x.shape[2:])
    return net.last(nn.functional.interpolate(torch.tanh(half), size, mode="bilinear", align_corners=True))


@pytest.mark.slow
def test_what_masks_and_decoders_do_with_maps_are_kernels(tmp_path: Path) -> None:
    options: dict[str, Any] = {"output_stride": (2, 4), "fill": "linear"}
    model = unverified(of_kinds(decodes), "detail | budget:fraction=0.3", **options)
    path, image = tmp_path / "net.onnx", picture(2, 45, 57)
    cs.export(model, image, path, with_kernels=True, dynamic=True)
    assert calls(path)["ResizeLinearAligned"] == calls(path)["InterpolationError"] == 1
    for size in ((33, 64), (50, 41)):
        other = picture(3, *size)
        for run in (WithKernels, InOpenVino):
            assert_same(run(path)(other)["output"], model(other), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("with_kernels", [True, slow(False)])
@pytest.mark.filterwarnings("ignore:.*convolutions of rows in the file are depthwise or grouped")
def test_a_file_says_how_it_is_opened_and_is_refused_elsewhere(
    tmp_path: Path, command_line: Run, with_kernels: bool
) -> None:
    model, image, path = net("edges | budget:fraction=0.3"), picture(1, 44, 52), tmp_path / "net.onnx"
    cs.export(model, image, path, with_kernels=with_kernels)
    written = onnx.load(str(path))
    assert bool(calls(path)) is with_kernels
    text = {one.key: one.value for one in written.metadata_props}.get("cadsurgery.kernels", "")
    assert text == written.doc_string
    (tmp_path / "photo.png").write_bytes(b"")
    refusals = [command_line("run", path, "photo.png").err]
    for told in [text, *refusals]:
        assert ('add_extension(cadsurgery.kernels_for("openvino"))' in " ".join(told.split())) is with_kernels
    assert all("onnxruntime.InferenceSession" in told and "cs.save" in told for told in refusals)
    with pytest.raises(cs.FileError, match="is an ONNX file, not"):
        cs.load(path)


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_without_the_library_a_file_with_kernels_is_refused_in_words(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    one_call(path, [[0, 1]])
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {KERNELS_KEY: HOW_TO_OPEN})
    onnx.save(model, path)
    pytest.importorskip(ENGINES[engine].package)
    with pytest.raises(
        cs.CannotConvert, match=r"(?s)with this package's kernels.*kernels_for\(\""
    ) as refusal:
        ENGINES[engine](path)
    assert "export the network without kernels" in refusal.value.next


def test_the_table_of_operations_names_what_engines_register() -> None:
    """Each operation of the table, those that take rows in 8 bits as well, and resizes: no name more, none less."""
    text = (build.SOURCES / "convolve.h").read_text().partition("#define OPERATIONS(")[2]
    registered = re.findall(r"^ +[A-Z_]+\((\w+),", text, re.MULTILINE)
    named = [(one, [one.names] if isinstance(one.names, str) else [*one.names.values()]) for one in KERNELS]
    every = [name for _, names in named for name in names]
    in_8_bits = [name + IN_8_BITS for one, names in named if "table" in one.kinds for name in names]
    assert len(every) >= 8 and sorted(registered) == sorted([*every, *in_8_bits, *RESIZES.values()])


def test_without_its_library_nothing_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(cs.UnknownName, match="openvino"):
        cs.kernels_for("tensorrt")
    monkeypatch.setenv("CADSURGERY_NATIVE", "0")
    forget()
    with pytest.raises(cs.CadError, match="no library of compiled kernels"):
        cs.kernels_for()
    monkeypatch.undo()
    forget()


def test_an_extension_that_cannot_be_built_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler; one that fails; and nothing of it stays in the cache."""
    extension_of_openvino()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("cadsurgery.kernels.build.find_compiler_of_cpp", lambda: None)
    with pytest.raises(cs.CadError, match=r"(?s)no kernels for OpenVINO.*no C\+\+ compiler"):
        cs.kernels_for("openvino")
    failing = tmp_path / "failing"
    failing.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec echo 1\necho "error: not today" >&2\nexit 1\n'
    )
    failing.chmod(0o755)
    monkeypatch.setattr("cadsurgery.kernels.build.find_compiler_of_cpp", lambda: [str(failing)])
    with pytest.raises(cs.CadError, match="failing says error: not today"):
        cs.kernels_for("openvino")
    assert not list(tmp_path.rglob("openvino-*.so"))


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="file systems as of Linux")
def test_a_cache_on_a_file_system_without_code_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    extension_of_openvino()
    status = os.statvfs

    def without_code(path: Any) -> Any:
        return types.SimpleNamespace(f_flag=status(path).f_flag | os.ST_NOEXEC)

    monkeypatch.setattr(os, "statvfs", without_code)
    with pytest.raises(cs.CadError, match=r"(?s)noexec.*XDG_CACHE_HOME"):
        cs.kernels_for("openvino")


@pytest.mark.slow
def test_a_dense_file_takes_no_choice_that_was_made_for_torch(tmp_path: Path) -> None:
    model, image = net(fill="guided"), picture(1, 44, 52)
    dense_twin(model, 1, image)
    write_dense(model, 1, image, tmp_path / "net.onnx", OnnxRuntime)
    operations = {node.op_type for node in onnx.load(str(tmp_path / "net.onnx")).graph.node}
    assert "Loop" not in operations and "Conv" in operations
