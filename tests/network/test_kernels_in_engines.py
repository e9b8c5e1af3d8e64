"""This package's kernels in engines: with the library and without it a file gives what the network gives; what the
kernels cannot compute is refused by name."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cap, assert_same, picture
from exported import File
from networks import randomise
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.kernels.build import find_compiler_of_cpp
from cadsurgery.kernels.load import forget
from cadsurgery.network.dense_twin import dense_twin
from cadsurgery.network.export.dense import write_dense
from cadsurgery.network.export.engines import OnnxRuntime
from cadsurgery.network.export.kernels import DOMAIN, put_into_8_bits

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Kinds(nn.Module):
    """An ungrouped, a depthwise and two grouped convolutions behind a strided one; with residuals and activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.down = nn.Conv2d(16, 24, 3, 2, 1)
        self.whole = nn.Conv2d(24, 24, 3, 1, 1, bias=False)
        self.depthwise = nn.Conv2d(24, 24, 5, 1, 2, groups=24)
        self.pairs = nn.Conv2d(24, 24, 3, 1, 2, 2, groups=12)
        self.groups = nn.Conv2d(24, 18, 3, 1, 1, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(torch.relu(self.stem(x)))
        x = torch.relu(self.whole(x) + x)
        x = nn.functional.relu6(self.depthwise(x))
        x = nn.functional.hardswish(self.pairs(x)) + x
        return self.groups(x)


def net(mask: Any = "edges:threshold=0.9,dilation=3", **options: Any) -> cs.AdaptiveModel:
    torch.manual_seed(0)
    return cs.adaptify(
        randomise(Kinds()).eval(),
        mask,
        output_stride=(2, 4),
        verify_laws=False,
        **{"fill": "linear", **options},
    )


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


def calls(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node if node.domain == DOMAIN)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[cs.AdaptiveModel, Path, Any]:
    path, model = tmp_path_factory.mktemp("kernels") / "net.onnx", net()
    return model, path, cs.export(model, picture(2, 44, 52), path, dynamic=True, with_kernels=True)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["", "scalar", "sse4"])
def test_a_file_is_the_network_with_and_without_the_library(written: Any, isa: str, cap_kernels: Cap) -> None:
    model, path, report = written
    cap_kernels(isa)
    assert calls(path) == {"Convolve": 2, "ConvolveDepthwise": 1, "ConvolveGroups": 2}
    assert report.difference < 1e-4
    runs = File(path), WithKernels(path), InOpenVino(path)
    for size in ((2, 44, 52), (1, 37, 61), (3, 20, 24)):
        image = picture(*size)
        with torch.no_grad():
            expected = model(image)
        assert 0 < model.active_fraction < 1
        for run in runs:
            assert_same(run(image)["output"], expected, 1e-5)


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


@pytest.mark.slow
def test_a_file_in_8_bits_keeps_depthwise_kernels(tmp_path: Path) -> None:
    model, path = net("edges | budget:fraction=0.3"), tmp_path / "net.onnx"
    report = cs.export(model, picture(1, 44, 52), path, int8=picture(4, 44, 52), with_kernels=True)
    assert calls(path) == {"ConvolveDepthwiseIn8Bits": 1}
    assert report.fidelity is not None and report.fidelity.error < 0.05
    image = picture(1, 44, 52).flip(3)
    given, *others = (run(path)(image)["output"] for run in (File, WithKernels, InOpenVino))
    for other in others:
        assert_same(given, other, 1e-2)  # a sum at the edge between two steps of 8 bits may round either way
    with torch.no_grad():
        assert float((given - model(image)).square().mean().sqrt() / given.square().mean().sqrt()) < 0.1


@pytest.mark.slow
def test_without_kernels_a_file_calls_none(tmp_path: Path) -> None:
    cs.export(net("edges | budget:fraction=0.3"), picture(1, 44, 52), tmp_path / "net.onnx")
    assert not calls(tmp_path / "net.onnx")


def one_call(path: Path, table: list[list[int]], groups: int = 2) -> Any:
    """Write a file of one depthwise convolution of rows with two channels; return its inputs."""
    from cadsurgery.network.export.kernels import add_functions

    types = {"rows": 1, "table": 6, "sources": 6, "shares": 1}
    shapes = {"rows": [3, 2], "table": [len(table), 2], "sources": [1, 2], "shares": [1, 2]}
    weight = np.arange(2 * groups, dtype=np.float32).reshape(2, groups)
    constants = {"weight": weight, "bias": np.ones(groups, np.float32), "residual": np.zeros(1, np.float32)}
    node = onnx.helper.make_node(
        *("ConvolveDepthwise", [*types, *constants], ["out"]),
        domain=DOMAIN,
        **{"outside": -1.0, "low": 0.0, "high": 9.0},
    )
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info(name, types[name], shapes[name]) for name in types],
        [onnx.helper.make_tensor_value_info("out", 1, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(DOMAIN, 1)]
    import onnx_ir

    model = onnx_ir.from_proto(onnx.helper.make_model(graph, opset_imports=imports, ir_version=9))
    add_functions(model)
    onnx_ir.save(model, path)
    rows = np.array([[0, 1], [2, 3], [4, 5]], np.float32)
    return {
        "rows": rows,
        "table": np.array(table, np.int32),
        "sources": np.array([[0, 2]], np.int32),
        "shares": np.array([[0.5, 0.5]], np.float32),
    }


def test_the_body_says_what_the_kernel_computes(tmp_path: Path) -> None:
    path = tmp_path / "one.onnx"
    feed = one_call(path, [[0, 1], [2, 3], [4, 4], [3, 3]])  # 3 is outside, 4 the mean of rows 0 and 2
    expected = np.clip([[5.0, 11.0], [-1.0, 3.0], [5.0, 13.0], [-1.0, -3.0]], 0, 9)
    for run in (File, WithKernels):
        assert np.array_equal(run(path).session.run(None, feed)[0], expected)


def quantised_call(path: Path, channels: int, taps: int, low: float) -> dict[str, Any]:
    """Write a file of one depthwise convolution between quantised rows; return its inputs."""
    import onnx_ir

    from cadsurgery.network.export.kernels import add_functions

    random = np.random.default_rng(channels)
    rows, targets = 23, 17
    feed = {
        "numbers": random.integers(0, 256, (rows, channels)).astype(np.uint8),
        "table": random.integers(0, rows + 1 + 5, (targets, taps)).astype(np.int32),
        "sources": random.integers(0, rows, (5, 4)).astype(np.int32),
        "shares": random.dirichlet(np.ones(4), 5).astype(np.float32),
    }
    constants = {
        "weight": random.normal(size=(taps, channels)).astype(np.float32),
        "bias": random.normal(size=channels).astype(np.float32),
        "residual": np.zeros(1, np.float32),
        "scale": np.float32(0.03),
        "zero": np.uint8(90),
        "scale_of_result": np.float32(0.05),
        "zero_of_result": np.uint8(120),
    }
    make, names = onnx.helper.make_node, ("rows", "table", "sources", "shares", "weight", "bias", "residual")
    nodes = [
        make("DequantizeLinear", ["numbers", "scale", "zero"], ["rows"]),
        make(
            *("ConvolveDepthwise", names, ["values"]), domain=DOMAIN, outside=0.0, low=low, high=np.float32(4)
        ),
        make("QuantizeLinear", ["values", "scale_of_result", "zero_of_result"], ["out"]),
    ]
    types = [onnx.helper.np_dtype_to_tensor_dtype(value.dtype) for value in feed.values()]
    graph = onnx.helper.make_graph(
        nodes,
        "one",
        [
            onnx.helper.make_tensor_value_info(name, kind, value.shape)
            for (name, value), kind in zip(feed.items(), types, strict=True)
        ],
        [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.UINT8, (targets, channels))],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    imports = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(DOMAIN, 1)]
    model = onnx_ir.from_proto(onnx.helper.make_model(graph, opset_imports=imports, ir_version=9))
    add_functions(model)
    onnx_ir.save(model, path)
    return feed


@pytest.mark.parametrize("isa", ["", "scalar", "sse4"])
@pytest.mark.parametrize(("channels", "taps", "low"), [(2, 2, -4.0), (37, 9, 0.0), (64, 25, -np.inf)])
def test_a_convolution_between_8_bits_is_the_one_in_floating_point(
    channels: int, taps: int, low: float, isa: str, tmp_path: Path, cap_kernels: Cap
) -> None:
    """Values of the halo are rounded to 8 bits, too, so that a result may be a few steps away."""
    cap_kernels(isa)
    exact, path = tmp_path / "exact.onnx", tmp_path / "one.onnx"
    feed = quantised_call(exact, channels, taps, low)
    model = onnx.load(str(exact))
    put_into_8_bits(model)
    onnx.save(model, str(path))
    assert [node.op_type for node in model.graph.node] == ["ConvolveDepthwiseIn8Bits"]
    assert [one.name for one in model.functions] == ["ConvolveDepthwiseIn8Bits"]
    onnx.checker.check_model(str(path), full_check=True)
    (expected,) = File(exact).session.run(None, feed)
    body, kernel = (run(path).session.run(None, feed)[0].astype(int) for run in (File, WithKernels))
    assert kernel.min() < kernel.max()
    assert np.abs(kernel - body).max() <= 1 and (kernel != body).mean() < 0.01
    assert np.abs(kernel - expected.astype(int)).max() <= 0.03 * 0.5 / 0.05 * 4 * taps**0.5 + 1
    if not isa:
        assert np.array_equal(InOpenVino(path).run(feed)[0], kernel)


@pytest.mark.parametrize("change", ["the result is returned", "the result has another reader", "exact rows"])
def test_what_is_not_between_8_bits_stays_in_floating_point(change: str, tmp_path: Path) -> None:
    quantised_call(tmp_path / "one.onnx", 8, 4, 0.0)
    model = onnx.load(str(tmp_path / "one.onnx"))
    if change == "the result is returned":
        model.graph.output.append(onnx.helper.make_tensor_value_info("values", 1, None))
    elif change == "the result has another reader":
        model.graph.node.append(onnx.helper.make_node("Relu", ["values"], ["more"]))
    else:
        model.graph.node[0].op_type = "Cast"
    before = model.SerializeToString()
    put_into_8_bits(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [("groups of two", "depthwise"), ("residual", "no residual"), ("scale", "not positive")],
)
def test_what_kernels_do_not_compute_in_8_bits_is_refused(change: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "one.onnx"
    feed = quantised_call(path, 8, 4, 0.0)
    model = onnx.load(str(path))
    put_into_8_bits(model)
    constants = {one.name: one for one in model.graph.initializer}
    if change == "groups of two":
        constants["weight"].CopyFrom(
            onnx.numpy_helper.from_array(np.ones((4, 4, 2, 2), np.float32), "weight")
        )
    elif change == "residual":
        constants["residual"].CopyFrom(onnx.numpy_helper.from_array(np.ones((17, 8), np.float32), "residual"))
    else:
        (scale,) = (one for one in model.graph.node[0].attribute if one.name == "scale")
        scale.f = -0.03
    onnx.save(model, str(path))
    with pytest.raises(Exception, match=message):
        WithKernels(path).session.run(None, feed)


@pytest.mark.parametrize("table", [[[0, 5]], [[-1, 0]]])
def test_a_table_that_names_rows_that_are_not_there_is_refused(
    table: list[list[int]], tmp_path: Path
) -> None:
    feed = one_call(tmp_path / "one.onnx", table)
    with pytest.raises(Exception, match="rows that do not exist"):
        WithKernels(tmp_path / "one.onnx").session.run(None, feed)
    with pytest.raises(Exception, match="rows that do not exist"):
        InOpenVino(tmp_path / "one.onnx", threads=2).run(feed)


def test_a_weight_of_other_channels_is_refused(tmp_path: Path) -> None:
    feed = one_call(tmp_path / "one.onnx", [[0, 1]], groups=3)
    with pytest.raises(Exception, match="do not fit the weight"):
        WithKernels(tmp_path / "one.onnx").session.run(None, feed)
    with pytest.raises(Exception, match="do not fit the weight"):
        InOpenVino(tmp_path / "one.onnx", threads=2).run(feed)


def test_refusals_name_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image, path = net("edges | budget:fraction=0.3"), picture(1, 44, 52), tmp_path / "net.onnx"
    with pytest.raises(cs.InvalidInput, match="with kernels"):
        cs.export(model, image, path, with_kernels=True, float16=True)
    with pytest.raises(cs.InvalidInput, match="with_kernels"):
        cs.export(model, image, tmp_path / "net.pt2", with_kernels=True)
    with pytest.raises(cs.UnknownName, match="openvino"):
        cs.kernels_for("tensorrt")
    monkeypatch.setenv("CADSURGERY_NATIVE", "0")
    forget()
    with pytest.raises(cs.CadError, match="no library of compiled kernels"):
        cs.kernels_for()
    monkeypatch.undo()
    forget()
    assert not list(tmp_path.iterdir())


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


@pytest.mark.slow
def test_a_file_is_compared_in_openvino(tmp_path: Path) -> None:
    extension_of_openvino()
    report = cs.export(
        net("edges | budget:fraction=0.3"),
        picture(1, 44, 52),
        tmp_path / "net.onnx",
        with_kernels=True,
        check_in="openvino",
    )
    assert report.difference < 1e-4 and calls(tmp_path / "net.onnx")


@pytest.mark.slow
def test_a_dense_file_takes_no_choice_that_was_made_for_torch(tmp_path: Path) -> None:
    model, image = net(fill="guided"), picture(1, 44, 52)
    dense_twin(model, 1, image)
    write_dense(model, 1, image, tmp_path / "net.onnx", OnnxRuntime)
    operations = {node.op_type for node in onnx.load(str(tmp_path / "net.onnx")).graph.node}
    assert "Loop" not in operations and "Conv" in operations


@pytest.mark.slow
def test_openvino_keeps_the_levels_of_patches_that_the_map_does_not_fill(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    image = picture(1, 42, 50)  # 21 x 25 samples, patches of 2 x 2
    report = cs.export(net("detail | budget:fraction=0.5"), image, tmp_path / "net.onnx", check_in="openvino")
    assert report.difference < 1e-4
