"""Files in 8 bits: the level map of the float file, bit for bit, and nearly its outputs; what cannot be is refused."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import images
from test_export import File, net, picture
from torch import Tensor
from torchvision.utils import save_image

import cadsurgery as cs
from cadsurgery.network.export.engines import Engine, OnnxRuntime, OpenVino
from cadsurgery.network.export.int8 import measure, quantise, to_8_bits

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
    quantise(source, target, calls(*images(4, 8, 8).split(1)), products_by_convolution=True)
    return source, target


def test_the_level_map_is_the_same_and_the_outputs_nearly(files: tuple[Path, Path]) -> None:
    exact, rounded = map(File, files)
    for image in images(8, 8, 8).flip(3).split(1):
        one, two = rounded(image), exact(image)
        assert torch.equal(one["levels"], two["levels"])
        assert 0 < relative(one["out"], two["out"]) < 0.05


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
    held = [makers[node.input[0]].op_type == "DequantizeLinear" for node in by_type["Gather"]]
    assert sum(held) == 2  # of the halo and of the taps; rows that are padded by -inf have no range
    integers = {one.name for one in graph.initializer if one.data_type == onnx.TensorProto.INT8}
    assert sum(name.endswith("_quantized") for name in integers) == 3


def test_a_halo_has_the_range_of_the_rows_it_is_joined_to(files: tuple[Path, Path]) -> None:
    """Its own may be narrower, or nothing: all zero on the images it was calibrated by."""
    graph = onnx.load(files[1]).graph
    ranges = {node.input[0]: node.input[1:] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert ranges["halo"] == ranges["joined"]


def test_a_mask_that_depends_on_every_product_leaves_nothing_to_quantise(tmp_path: Path) -> None:
    text = GRAPH.replace("Greater(edges, nought)", "Greater(out, nought)").replace(
        "int8[1, 1, 8, 8] levels", "int8[64, 5] levels"
    )
    head, *body = text.strip().splitlines()
    late = [line for line in body if "= Greater" in line or "= Cast" in line]
    kept = [line for line in body if line not in late and line != "}"]
    source = write(tmp_path / "float.onnx", "\n".join([head, *kept, *late, "}"]))
    with pytest.raises(cs.CannotConvert, match="nothing to quantise"):
        quantise(source, tmp_path / "int8.onnx", calls(images(1, 8, 8)), True)


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


def test_what_cannot_be_calibrated_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    image, path = picture(1, 72, 104), tmp_path / "net.onnx"
    model = net("edges | budget:fraction=0.3")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"int8": []}, "no images"),
        ({"int8": [image[0]]}, "an image of int8"),
        ({"int8": ["folder"]}, "an image of int8"),
        ({"int8": [picture(1, 64, 104)]}, "dynamic=True"),
        ({"int8": [image], "float16": True}, "leave out one"),
        ({"int8": [image], "to": "pt2"}, "cannot be int8"),
    ]
    for options, message in refused:
        with pytest.raises(cs.InvalidInput, match=message):
            cs.export(model, image, path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("broken", "message"), [("levels", "another level map"), ("out", "no numbers"), ("file", "does not take")]
)
def test_a_file_in_8_bits_that_is_wrong_is_not_taken(
    broken: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(source: Path, target: Path, *arguments: Any, **options: Any) -> tuple[str, ...]:
        changed = {
            "levels": {"filter": -constants()["filter"]},
            "out": {"bias": np.full(4, np.nan, np.float32)},
        }
        write(target, **changed[broken])
        return "out", "levels"

    monkeypatch.setattr("cadsurgery.network.export.int8.quantise", wrong)
    path, image = write(tmp_path / "net.onnx"), images(1, 8, 8)
    before = path.read_bytes()
    with pytest.raises(cs.CannotConvert, match=message):
        to_8_bits(path, OnnxRuntime, calls(image))
    assert path.read_bytes() == before


def test_the_same_file_in_8_bits_in_every_engine(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    images_of_both, found = images(4, 8, 8).split(1), []
    for engine in (OnnxRuntime, OpenVino):
        path = write(tmp_path / f"{engine.package}.onnx")
        found.append(to_8_bits(path, engine, calls(*images_of_both[:2]), calls(*images_of_both)))
        products = {node.op_type for node in onnx.load(path).graph.node} & {"Gemm", "MatMul"}
        assert bool(products) == (engine is OpenVino)
    assert all(0 < one.error < 0.05 and one.images == 2 for one in found)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "options"),
    [("edges | budget:fraction=0.3", {}), ("edges | smooth", {"level_map": True})],
)
def test_an_exported_network_in_8_bits(mask: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, path = net(mask), tmp_path / "net.onnx"
    calibration = [picture(2, 72, 104), picture(1, 72, 104).flip(3)]
    report = cs.export(model, picture(2, 72, 104), path, int8=iter(calibration), **options)
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
def test_the_command_calibrates_by_a_folder(tmp_path: Path, command_line: Any) -> None:
    saved, folder, path = tmp_path / "net.safetensors", tmp_path / "images", tmp_path / "net.onnx"
    folder.mkdir()
    cs.save(cs.adaptify(cs.build_model("squeezenet1_1", "none"), "edges | budget", verify_laws=False), saved)
    command = ["export", str(saved), "-o", str(path), "--size", "64x96", "--int8", str(folder), "--json"]
    refused = command_line(*command)
    assert refused.code == 1 and "no images" in refused.out + refused.err and not path.exists()
    for seed in range(2):
        save_image(cs.images.street_scene(64, 96, seed), folder / f"{seed}.png")
    told = command_line(*command)
    assert told.code == 0, told.err
    assert json.loads(told.out)["fidelity"]["images"] == 2
