"""Files in 8 bits: the level map of the float file, bit for bit, and nearly its outputs; what cannot be is refused."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TESTS, assert_same, images, picture, slow, thorough
from exported import File, net
from networks import Segmenter, made_once, seeded, unverified
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.utils import save_image

import cadsurgery as cs
import cadsurgery.network.export.int8 as in_8_bits
from cadsurgery.kernels import isa
from cadsurgery.network.calibration import images_to_calibrate
from cadsurgery.network.export.engine import Engine
from cadsurgery.network.export.engines import OnnxRuntime, OpenVino
from cadsurgery.network.export.int8 import quantise, to_8_bits
from cadsurgery.network.export.rounding import round_weight
from cadsurgery.network.fidelity_measure import measure
from cadsurgery.network.model import AdaptiveModel

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

# A mask that is a convolution, and rows: joined to a halo of means, padded by zeros and, before a maximum, by less.
GRAPH = """
<ir_version: 10, opset_import: ["": 20]>
rows (float[1, 3, 8, 8] image) => (float[64, 5] out, int8[1, 1, 8, 8] levels) {
    edges = Conv(image, filter)
    high = Greater(edges, nought)
    levels = Cast<to = 3>(high)
    features = Conv<pads = [1, 1, 1, 1]>(image, weight, bias)
    positive = Relu(features)
    last = Transpose<perm = [0, 2, 3, 1]>(positive)
    rows = Reshape(last, flat)
    pairs = Gather(rows, sources)
    shared = Mul(pairs, shares)
    halo = ReduceSum<keepdims = 0>(shared, one)
    joined = Concat<axis = 0>(rows, nought_row, halo)
    taps = Gather(joined, table)
    flat_taps = Reshape(taps, as_matrix)
    product = Gemm<transB = 1>(flat_taps, matrix, second_bias)
    lowest = Concat<axis = 0>(rows, least_row)
    windows = Gather(lowest, pool_table)
    pooled = ReduceMax<keepdims = 0>(windows, one)
    more = MatMul(pooled, square)
    out = Add(product, more)
}
"""


def constants() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    normal: Callable[..., Any] = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "filter": normal(1, 3, 1, 1),
        "nought": np.zeros((), np.float32),
        "weight": normal(4, 3, 3, 3),
        "bias": normal(4),
        "flat": np.array([-1, 4]),
        "sources": random.integers(0, 64, (6, 2)),
        "shares": np.full((6, 2, 1), 0.5, np.float32),
        "one": np.array([1]),
        "nought_row": np.zeros((1, 4), np.float32),
        "table": random.integers(0, 71, (64, 9)),
        "as_matrix": np.array([64, 36]),
        "matrix": normal(5, 36),
        "second_bias": normal(5),
        "least_row": np.full((1, 4), -np.inf, np.float32),
        "pool_table": random.integers(0, 65, (64, 3)),
        "square": normal(4, 5),
    }


def write(path: Path, text: str = GRAPH, **changed: np.ndarray[Any, Any]) -> Path:
    model = onnx.parser.parse_model(text)
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    used = {name for node in model.graph.node for name in node.input}
    values = {name: value for name, value in {**constants(), **changed}.items() if name in used}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for name, value in values.items()
    )
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def calls(*batches: Tensor) -> list[tuple[Tensor, ...]]:
    return [(batch,) for batch in batches]


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    source, target = write(tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    quantise(source, target, calls(*images(4, 8, 8).split(1)), OnnxRuntime)
    return source, target


def test_the_level_map_is_the_same_and_the_outputs_nearly(files: tuple[Path, Path]) -> None:
    exact, rounded = map(File, files)
    for image in images(8, 8, 8).flip(3).split(1):
        one, two = rounded(image), exact(image)
        assert torch.equal(one["levels"], two["levels"])
        assert 0 < relative(one["out"], two["out"]) < 0.05


def test_ranges_are_those_of_all_calibration_images(tmp_path: Path) -> None:
    source, target, batches = write(tmp_path / "float.onnx"), tmp_path / "int8.onnx", images(3, 8, 8)
    batches[1] *= 3
    quantise(source, target, calls(*batches.split(1)), OpenVino)  # for which no products become convolutions
    exact = onnx.load(source)
    exact.graph.output.extend(one for one in exact.graph.value_info if one.type.tensor_type.elem_type == 1)
    onnx.save(exact, every := tmp_path / "every.onnx")
    found = [File(every)(image) for image in batches.split(1)]
    graph = onnx.load(target).graph
    scales = {one.name: float(onnx.numpy_helper.to_array(one).max()) for one in graph.initializer}
    rounds = {node.input[0]: scales[node.input[1]] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert {"joined", "product", "pooled"} <= rounds.keys()
    # Ranges are of the network with rounded weights. A range of fewer images would be a third of them.
    for name in ("joined", "product", "pooled"):
        values = torch.stack([one[name] for one in found])
        assert rounds[name] == pytest.approx(
            float(values.max().relu() + (-values.min()).relu()) / 255, rel=0.02
        )


# Convolutions of every kind: plain, depthwise, of groups, and depthwise with two outputs for each input.
CONVOLUTIONS = """
<ir_version: 10, opset_import: ["": 20]>
convolutions (float[1, 3, 8, 8] image) => (float[1, 16, 8, 8] out) {
    first = Conv<pads = [1, 1, 1, 1]>(image, plain)
    second = Conv<pads = [1, 1, 1, 1], group = 8>(first, depthwise)
    third = Conv<pads = [1, 1, 1, 1], group = 2>(second, grouped)
    out = Conv<pads = [1, 1, 1, 1], group = 8>(third, twice)
}
"""


def convolutions() -> dict[str, np.ndarray[Any, Any]]:
    """Weights that differ little in size, as saturation needs several large ones."""
    random = np.random.default_rng(1)
    shapes = {"plain": (8, 3), "depthwise": (8, 1), "grouped": (8, 4), "twice": (16, 1)}
    return {
        name: random.uniform(-1, 1, (*shape, 3, 3)).round(1).astype(np.float32)
        for name, shape in shapes.items()
    }


def weights_of(path: Path) -> Iterator[tuple[Any, np.ndarray[Any, Any]]]:
    """The products of a file in 8 bits, each with its weights as whole numbers (outputs, weights of one)."""
    graph = onnx.load(path).graph
    values = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    exact = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[0] in exact:
            source, weight = exact[node.input[0]], exact[node.input[1]]
            assert values[source.input[2]].dtype == np.uint8
            whole = values[weight.input[0]]
            axis = next(one.i for one in weight.attribute if one.name == "axis")
            assert whole.dtype == np.int8 and values[weight.input[1]].shape == (whole.shape[axis],)
            yield node, np.moveaxis(whole, axis, 0).reshape(whole.shape[axis], -1).astype(np.int64)


def is_depthwise(node: Any, whole: np.ndarray[Any, Any]) -> bool:
    """Both engines widen the products of these convolutions to 32 bits, which other kinds of groups do not get."""
    groups = next((one.i for one in node.attribute if one.name == "group"), 1)
    return bool(node.op_type == "Conv" and groups == len(whole) and whole.shape[1] == 9)


def saturating_sum(features: np.ndarray[Any, Any], whole: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Sums of products as vpmaddubsw and vpmaddwd compute them: pairs of neighbours are added in 16 bits."""
    products = np.pad(features * whole, ((0, 0), (0, whole.shape[1] % 2)))
    pairs = products.reshape(len(whole), -1, 2).sum(2)
    sums: np.ndarray[Any, Any] = pairs.clip(-(1 << 15), (1 << 15) - 1).sum(1)
    return sums


def can_saturate(whole: np.ndarray[Any, Any]) -> bool:
    """Whether any order of the weights and any features make a sum wrong: it suffices to try sorted weights, and 255
    for those of one sign."""
    ordered = np.sort(whole, 1)
    ends = ordered, ordered[:, ::-1]
    worst = [(255 * (sign * one > 0), one) for one in ends for sign in (1, -1)]
    return any((saturating_sum(*pair) != (pair[0] * pair[1]).sum(1)).any() for pair in worst)


@pytest.mark.parametrize("engine", [OnnxRuntime, OpenVino])
@pytest.mark.parametrize(
    ("text", "make", "products"), [(GRAPH, constants, 3), (CONVOLUTIONS, convolutions, 4)]
)
def test_no_sum_of_two_products_exceeds_16_bits(
    text: str, make: Any, products: int, engine: type[Engine], tmp_path: Path
) -> None:
    source, target = write(tmp_path / "float.onnx", text, **make()), tmp_path / "int8.onnx"
    quantise(source, target, calls(*images(4, 8, 8).split(1)), engine)
    found = list(weights_of(target))
    assert len(found) == products
    assert sum(is_depthwise(node, whole) for node, whole in found) == (make is convolutions)
    for node, whole in found:
        assert np.abs(whole).max() <= 127
        assert is_depthwise(node, whole) or not can_saturate(whole)


def awkward(random: Any, shape: tuple[int, ...]) -> list[Any]:
    """Weights of which a few are much larger than the others, halves between two whole numbers in many scales, weights
    of one sign, and equal ones."""
    spread, ties = random.standard_t(2, shape), random.integers(-255, 256, shape) / 255
    return [spread, ties, np.abs(spread), -np.abs(spread), np.zeros(shape), np.ones(shape)]


def rounded(values: Any, limited: str) -> tuple[Tensor, Tensor]:
    """Weights as whole numbers, and how many steps each was off, by outputs."""
    weight = torch.from_numpy(values).float()
    whole, scale = round_weight(weight, limited)
    error = (weight - whole * scale.view(-1, *[1] * (weight.dim() - 1))).abs().flatten(1).amax(1)
    assert (error <= 0.501 * scale).all()
    return whole, error / scale


@pytest.mark.parametrize("shape", [(64, 1), (64, 2), (64, 9), (64, 64), (8, 3, 5, 5)])
def test_weights_are_rounded_so_that_no_pair_saturates(shape: tuple[int, ...]) -> None:
    for values in awkward(np.random.default_rng(2), shape):
        whole, _ = rounded(values, "any")
        rows = whole.flatten(1).numpy().astype(np.int64)
        assert not can_saturate(rows)
        assert np.abs(rows).max() <= 127 and ((np.abs(rows).max(1) >= 64) | (not values.any())).all()


@pytest.mark.parametrize("shape", [(64, 1, 3, 3), (64, 2), (64, 9), (16, 65, 9), (8, 3, 2, 1), (8, 3, 5, 5)])
def test_weights_are_rounded_so_that_no_adjacent_channels_saturate(shape: tuple[int, ...]) -> None:
    for values in awkward(np.random.default_rng(2), shape):
        whole, error = rounded(values, "adjacent")
        rows = whole.int()[:, : shape[1] // 2 * 2].unflatten(1, (-1, 2))
        for sign in (1, -1):
            exceeds = (sign * rows).clamp_min(0).sum(2).flatten(1).gt(128).any(1)
            assert (error[exceeds] < 1e-3).all()  # whole numbers before: they are kept
        if shape[1] == 1:  # no channel has a neighbour
            assert torch.equal(whole, round_weight(torch.from_numpy(values).float())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 1, 3, 3), (5, 33, 1, 1), (3, 700, 7, 7)])
def test_weights_that_were_in_8_bits_stay_what_they_are(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of one scale for all outputs, too, most of which then do not reach 127."""
    numbers = torch.randint(-90, 91, shape) // torch.arange(1, shape[0] + 1).view(-1, 1, 1, 1)
    numbers[-1] = 0
    weight = 0.0123 * numbers.to(dtype)
    for limited in (None, "adjacent"):
        whole, scale = round_weight(weight, limited)
        assert whole.dtype == torch.int8 and scale.dtype == torch.float32
        assert_same(whole * scale.view(-1, 1, 1, 1), weight.float(), 1e-6)


@pytest.mark.parametrize("shape", [(64, 1, 3, 3), (16, 33, 3, 3)])
def test_no_weight_is_rounded_more_than_by_a_scale_of_its_largest(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    whole, scale = (one.double() for one in round_weight(weight))
    rows, largest = weight.double().flatten(1), weight.double().flatten(1).abs().amax(1, keepdim=True)
    plain = (rows * 127 / largest).round() * largest / 127
    error, of_plain = (
        (found - rows).square().sum(1) for found in (whole.flatten(1) * scale.unsqueeze(1), plain)
    )
    assert (error <= of_plain * (1 + 1e-5)).all() and (error < of_plain).float().mean() > 0.5


RUN = """
import sys
import numpy as np
engine, inputs, *files = sys.argv[1:]
images = np.load(inputs)
for file in files:
    if engine == "onnxruntime":
        import onnxruntime
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        run = lambda image: session.run(["out"], {"image": image})[0]
    else:
        import openvino
        model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        run = lambda image: model([image])["out"].copy()
    np.save(file + ".npy", np.stack([run(image[None]) for image in images]))
"""


@pytest.fixture(scope="module")
def hiding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that hides instruction sets from a process, see its source."""
    info = Path("/proc/cpuinfo")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if platform.machine() != "x86_64" or not info.exists() or "cpuid_fault" not in info.read_text().split():
        pytest.skip("instruction sets can be hidden on Linux on x86-64 processors with cpuid_fault alone")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("hiding") / "hide.so"
    source = TESTS / "hide_instructions.c"
    plain = {
        name: value for name, value in os.environ.items() if name != "LD_PRELOAD"
    }  # compilers handle faults
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], check=True, env=plain)
    return library


@pytest.mark.parametrize("hidden", ["vnni", slow("avx512")])
@pytest.mark.parametrize("engine", [OnnxRuntime, slow(OpenVino)])
def test_a_file_is_the_same_on_processors_without_vnni(
    engine: type[Engine], hidden: str, hiding: Path, tmp_path: Path
) -> None:
    """On a processor that has VNNI: on another, both runs are alike."""
    pytest.importorskip(engine.package)
    batches, inputs = images(4, 8, 8), tmp_path / "images.npy"
    np.save(inputs, batches.numpy())
    files = []
    for text, make in ((GRAPH, constants), (CONVOLUTIONS, convolutions)):
        source = write(tmp_path / f"{make.__name__}.onnx", text, **make())
        target = source.with_name(f"{make.__name__}_8.onnx")
        quantise(source, target, calls(*batches.split(1)), engine)
        files += [source, target]

    def run(**environment: str) -> list[Tensor]:
        command = [sys.executable, "-c", RUN, engine.package, inputs, *files]
        subprocess.run(command, check=True, env={**os.environ, **environment})
        return [torch.from_numpy(np.load(f"{file}.npy")) for file in files]

    here, there = run(), run(HIDE=hidden, LD_PRELOAD=str(hiding))
    for exact, rounded, other in zip(here[::2], here[1::2], there[1::2], strict=True):
        # Sums of integers are equal; what is done to them in floating point may depend on the processor.
        assert relative(other, rounded) < 0.05 * relative(rounded, exact)


def test_products_and_gathered_rows_are_in_8_bits_and_the_mask_is_not(files: tuple[Path, Path]) -> None:
    graph = onnx.load(files[1]).graph
    makers = {name: node for node in graph.node for name in node.output}
    by_type: dict[str, list[Any]] = {}
    for node in graph.node:
        by_type.setdefault(node.op_type, []).append(node)
    assert not by_type.keys() & {"Gemm", "MatMul"} and len(by_type["Conv"]) == 4
    for node in by_type["Conv"]:
        is_mask = "filter" in node.input
        assert {makers[name].op_type for name in node.input if name in makers} == (
            {"Identity"}
            if is_mask and node.input[0] in makers
            else set()
            if is_mask
            else {"DequantizeLinear"}
        )
    inferred = onnx.shape_inference.infer_shapes(onnx.load(files[1])).graph.value_info
    in_bytes = {
        value.name for value in inferred if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    }
    gathered = [node.input[0] in in_bytes for node in by_type["Gather"]]
    assert sum(gathered) == 2  # of the halo and of the taps; rows that are padded by -inf have no range
    integers = {value.name for value in graph.initializer if value.data_type == onnx.TensorProto.INT8}
    assert len(integers & {node.input[0] for node in by_type["DequantizeLinear"]}) == 3


def test_a_halo_has_the_range_of_the_rows_it_is_joined_to(files: tuple[Path, Path]) -> None:
    """Its own may be narrower, or nothing: all zero on the images it was calibrated by."""
    graph = onnx.load(files[1]).graph
    ranges = {node.input[0]: node.input[1:] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert ranges["halo"] == ranges["joined"]


# A value in floating point that is moved, and joined to one of a hundred times its range.
JOINED = """
<ir_version: 10, opset_import: ["": 20]>
joined (float[1, 3, 8, 8] image) => (float[1, 3, 8, 8] out, float[1, 3, 8, 8] more) {
    value = Tanh(image)
    turned = Transpose<perm = [0, 1, 3, 2]>(value)
    more = Conv(turned, point)
    wide = Conv(image, large)
    both = Concat<axis = 1>(wide, value)
    out = Conv(both, last)
}
"""


@pytest.mark.parametrize("engine", [OnnxRuntime, OpenVino])
def test_a_value_keeps_its_scale_where_it_is_joined_to_larger_ones(
    engine: type[Engine], tmp_path: Path
) -> None:
    pytest.importorskip(engine.package)
    random = np.random.default_rng(3)
    point = random.normal(size=(3, 3, 1, 1)).astype(np.float32)
    weights = {"point": point, "large": 100 * point, "last": np.concatenate([point, point], 1)}
    source, target = write(tmp_path / "float.onnx", JOINED, **weights), tmp_path / "int8.onnx"
    image = images(1, 8, 8)
    quantise(source, target, calls(image), engine)
    exact, rounded = (engine(path)(image) for path in (source, target))
    assert all(0 < error < 0.05 for error in map(relative, rounded, exact))


def test_a_mask_that_sees_features_sees_them_in_8_bits(tmp_path: Path) -> None:
    """The file says that its level map may differ; products that only the mask needs stay in floating point."""
    text = GRAPH.replace("Greater(edges, nought)", "Greater(out, nought)").replace(
        "int8[1, 1, 8, 8] levels", "int8[64, 5] levels"
    )
    head, *body = text.strip().splitlines()
    late = [line for line in body if "= Greater" in line or "= Cast" in line]
    kept = [line for line in body if line not in late and line != "}"]
    source = write(tmp_path / "float.onnx", "\n".join([head, *kept, *late, "}"]))
    outputs, keeps_levels = quantise(source, tmp_path / "int8.onnx", calls(images(1, 8, 8)), OnnxRuntime)
    assert outputs == ("out", "levels") and not keeps_levels
    assert quantise(write(source), tmp_path / "int8.onnx", calls(images(1, 8, 8)), OnnxRuntime)[1]


def test_without_products_but_those_of_the_mask_there_is_nothing_to_quantise(tmp_path: Path) -> None:
    head, name, *body = GRAPH.strip().splitlines()
    of_mask = [line for line in body if any(f"{name} =" in line for name in ("edges", "high", "levels"))]
    name = name.replace("[64, 5]", "[1, 3, 8, 8]")
    text = "\n".join([head, name, "    out = Relu(image)", *of_mask, "}"])
    with pytest.raises(cs.CannotConvert, match="nothing to quantise"):
        quantise(
            write(tmp_path / "float.onnx", text), tmp_path / "int8.onnx", calls(images(1, 8, 8)), OnnxRuntime
        )


def test_fidelity_is_over_all_images_and_classes_are_those_of_pixels() -> None:
    image, exact = torch.zeros(2, 3, 4, 6), torch.zeros(2, 5, 4, 6)
    exact[:, 1] = 2.0
    rounded = exact.clone()
    rounded[0, 3, 0] = 3.0  # 6 of 48 pixels of another class
    found = measure([(image, [rounded], [exact]), (image, [exact], [exact])])
    assert found.agreement == 1 - 6 / 96 and found.images == 4
    assert found.error == pytest.approx((6 * 9 / (96 * 4)) ** 0.5)
    assert measure([(image, [torch.ones(2, 5, 2, 3)], [torch.ones(2, 5, 2, 3)])]).agreement is None
    assert measure([(image, [torch.eye(2)], [torch.eye(2).flip(0)])]).agreement == 0


@pytest.mark.parametrize(
    ("broken", "message"),
    [("levels", "another level map"), ("out", "not finite"), ("file", "cannot be put into 8 bits")],
)
def test_a_file_in_8_bits_that_is_wrong_is_not_taken(
    broken: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(source: Path, target: Path, *arguments: Any, **options: Any) -> tuple[tuple[str, ...], bool]:
        changed = {
            "levels": {"filter": -constants()["filter"]},
            "out": {"bias": np.full(4, np.nan, np.float32)},
        }
        write(target, **changed[broken])
        return ("out", "levels"), True

    monkeypatch.setattr("cadsurgery.network.export.int8.quantise", wrong)
    path, image = write(tmp_path / "net.onnx"), images(1, 8, 8)
    before = path.read_bytes()
    with pytest.raises(cs.CannotConvert, match=message):
        to_8_bits(path, OnnxRuntime, calls(image))
    assert path.read_bytes() == before


@pytest.mark.filterwarnings("ignore:the outputs of the file in 8 bits differ")
def test_the_same_file_in_8_bits_in_every_engine(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    images_of_both, found = images(4, 8, 8).split(1), []
    for engine in (OnnxRuntime, OpenVino):
        path = write(tmp_path / f"{engine.package}.onnx")
        found.append(to_8_bits(path, engine, calls(*images_of_both[:2]), calls(*images_of_both)))
        products = {node.op_type for node in onnx.load(path).graph.node} & {"Gemm", "MatMul"}
        assert bool(products) == (engine is OpenVino)
    assert all(0 < one.error < 0.05 and one.images == 2 for one in found)
    assert [one.taken_in.split(" (")[0] for one in found] == [
        f"{engine.name} {version(engine.package)}" for engine in (OnnxRuntime, OpenVino)
    ]
    assert all((isa.here() or ("",))[-1] in one.taken_in for one in found)


@pytest.mark.parametrize("engine", [OnnxRuntime, OpenVino])
def test_what_an_engine_refuses(engine: type[Engine], tmp_path: Path) -> None:
    pytest.importorskip(engine.package)
    path = write(tmp_path / "net.onnx")
    with pytest.raises(cs.CannotConvert, match=f"{engine.name} does not run the file on .1, 2, 8, 8."):
        engine(path)(images(1, 8, 8)[:, :2])
    path.write_bytes(b"no file")
    with pytest.raises(cs.CannotConvert, match=f"{engine.name} does not take the file"):
        engine(path)


def test_signals_are_handled_after_files_were_open_in_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path, image, came = write(tmp_path / "net.onnx"), images(1, 8, 8), []
    open_files = [OpenVino(path), OpenVino(path)]
    one, other = (open_file(image) for open_file in open_files)
    assert all(map(torch.equal, one, other))
    before = signal.signal(signal.SIGTERM, lambda *arguments: came.append(arguments))
    try:
        while open_files:
            open_files.pop(0)  # the first first
            signal.raise_signal(signal.SIGTERM)  # with the stack of one that went, the process ends here
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(came) == 2


@pytest.mark.filterwarnings("ignore:the outputs of the file in 8 bits differ")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "options"),
    [thorough("edges | budget:fraction=0.3", {}), ("edges | smooth", {"level_map": True})],
)
def test_an_exported_network_in_8_bits(mask: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, path = net(mask), tmp_path / "net.onnx"
    calibration = [picture(2, 72, 104), picture(1, 72, 104).flip(3)]
    report = cs.export(
        model, picture(2, 72, 104), path, precision="int8", calibration=iter(calibration), **options
    )
    assert report.fidelity is not None and report.fidelity.images == 3 and report.difference < 1e-4
    assert report.fidelity.error < 0.03 and (report.fidelity.agreement or 0) > 0.9
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"] and report.bytes == path.stat().st_size
    image = picture(3, 72, 104).flip(2)
    with torch.no_grad():
        expected = model(image)
    levels = model.levels
    given = File(path)(*([image, levels.long()] if "level_map" in options else [image]))
    assert torch.equal(given["levels"], levels) and relative(given["out"], expected["out"]) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "unsaid"), [("onnx", 0.001), thorough("openvino", 0.5)])
def test_a_file_in_8_bits_that_is_far_from_the_float_one_says_so(
    engine: str, unsaid: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[engine])
    monkeypatch.setattr(in_8_bits, "UNSAID", unsaid)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()]
    image = picture(1, 64, 64)
    adaptive = cs.adaptify(nn.Sequential(*layers, nn.Conv2d(16, 2, 1)).eval(), "edges", verify_laws=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options: Any = {"precision": "int8", "calibration": [image], "check_in": engine}
        report = cs.export(adaptive, image, tmp_path / "net.onnx", **options)
    said = [str(one.message) for one in caught if "file in 8 bits differ" in str(one.message)]
    assert report.fidelity is not None and (report.fidelity.error > unsaid) == bool(said) == (unsaid < 0.1)
    assert all(report.fidelity.taken_in in words for words in said)


@pytest.mark.filterwarnings("ignore:the outputs of the file in 8 bits differ")
@pytest.mark.slow
def test_the_command_calibrates_by_a_folder(tmp_path: Path, command_line: Any) -> None:
    saved, folder, path = tmp_path / "net.safetensors", tmp_path / "images", tmp_path / "net.onnx"
    folder.mkdir()
    cs.save(cs.adaptify(cs.build_model("squeezenet1_1", "none"), "edges | budget", verify_laws=False), saved)
    command = ["export", str(saved), "-o", str(path), "--size", "64x96", "--precision", "int8", "--json"]
    alone = command_line(*command)
    assert alone.code == 1 and "--calibration FOLDER" in alone.out + alone.err
    command += ["--calibration", str(folder)]
    refused = command_line(*command)
    assert refused.code == 1 and "no images" in refused.out + refused.err and not path.exists()
    for seed in range(2):
        save_image(cs.images.street_scene(64, 96, seed), folder / f"{seed}.png")
    told = command_line(*command)
    assert told.code == 0, told.err
    assert json.loads(told.out)["fidelity"]["images"] == 2


@pytest.mark.parametrize("engine", [OnnxRuntime, OpenVino])
def test_the_mean_error_of_rounded_weights_is_corrected(
    engine: type[Engine], files: tuple[Path, Path]
) -> None:
    """Sums of positive rows would all be off in the same direction."""
    source, target = files
    torch.manual_seed(0)
    given = torch.rand(4, 64, 8, 8) + 8
    weight = torch.randn(6, 64, 1, 1)
    weight -= weight.mean(1, keepdim=True)
    text = """
    <ir_version: 10, opset_import: ["": 20]>
    sums (float[1, 64, 8, 8] image) => (float[1, 6, 8, 8] out) { out = Conv(image, weight) }
    """
    write(source, text, weight=weight.numpy())
    quantise(source, target, calls(*given.split(1)), engine)
    exact = torch.conv2d(given, weight).mean((0, 2, 3))
    (found,) = zip(*(engine(target)(one) for one in given.split(1)), strict=True)
    error = (torch.cat(found).mean((0, 2, 3)) - exact).abs()
    whole, scale = round_weight(weight, "any")
    uncorrected = torch.conv2d(given, weight - whole * scale.view(-1, 1, 1, 1)).mean((0, 2, 3)).abs()
    assert float(error.max()) < 0.1 * float(uncorrected.max())


SCENES = cs.open_data("scene:4,height=48,width=64")


@made_once
def adapted(**options: Any) -> AdaptiveModel:
    options = {"normalisation": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), **options}
    return unverified(seeded(Segmenter, torch.float32), "edges", **options)


def expected() -> Tensor:
    return torch.cat([cs.images.normalise(image, None)[None] for image, _ in SCENES])


def folder(path: Path) -> Path:
    for place, (image, _) in enumerate(SCENES):
        save_image(image, path / f"{place}.png")
    return path


FORMS: dict[str, Any] = {
    "a batch": lambda path: expected(),
    "batches": lambda path: list(expected().split(2)),
    "images": lambda path: list(expected()),
    "pairs": lambda path: [(image, SCENES[at][1]) for at, image in enumerate(expected())],
    "a loader of pairs": lambda path: DataLoader(FORMS["pairs"](path), 2),  # type: ignore[arg-type]
    "a folder": folder,
    "the name of a folder": lambda path: str(folder(path)),
    "data": lambda path: SCENES,
    "a spec of data": lambda path: f"images:{folder(path)}",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form: str, tmp_path: Path) -> None:
    batches = images_to_calibrate(adapted(), FORMS[form](tmp_path))
    torch.testing.assert_close(torch.cat(batches), expected(), rtol=0, atol=0.02)  # PNGs have 8 bits


TAKEN, RAW = ("(B, C, H, W)", "folder"), ('net.normalisation = "raw"',)
PIXELS = torch.stack([image for image, _ in SCENES])


@pytest.mark.parametrize(
    ("images", "words", "instead"),
    [
        ([], "empty", TAKEN),
        (3, "int 3", TAKEN),
        ([torch.zeros(48, 64)], r"list of a float32 tensor of shape \(48, 64\)", TAKEN),
        ([{"image": torch.zeros(3, 48, 64)}], "list of dict", TAKEN),
        ((torch.zeros(1, 3, 48, 64), torch.zeros(1, 48, 64).long()), "tuple of a int64 tensor", TAKEN),
        (PIXELS, r"look like 0\.\.1, not normalised", RAW),
        (255 * PIXELS, r"look like 0\.\.255", RAW),
    ],
)
def test_what_is_no_images_of_the_network_is_refused_with_what_is(
    images: Any, words: str, instead: tuple[str, ...]
) -> None:
    with pytest.raises(cs.InvalidInput, match=words) as refusal:
        images_to_calibrate(adapted(), images)
    assert all(word in refusal.value.next for word in instead)
    if instead is RAW:
        assert torch.equal(images_to_calibrate(adapted(normalisation="raw"), images)[0], images)
