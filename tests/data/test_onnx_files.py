"""Networks from ONNX files: they compute what ONNX Runtime does, or are refused with the reason."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Run, slow, thorough
from networks import build
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.support.kinds import HOW_TO_OPEN, KERNELS_KEY

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx2torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

DATA = os.environ.get("CADSURGERY_DATA", "")
EXPORTERS = ("script", pytest.param("dynamo", marks=pytest.mark.slow))


class Segmenter(nn.Module):
    """Strides to 8, a sum of two scales, and an output of the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.fine = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(12, 12, 3, 2, 1), nn.Hardswish())
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.fine(self.stem(image))
        coarse = F.interpolate(self.coarse(fine), fine.shape[-2:], mode="bilinear")
        return F.interpolate(self.head(fine + coarse), image.shape[-2:], mode="bilinear")


class Classifier(nn.Module):
    """Strides to 8, channels that are gated, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        )
        self.gate, self.last = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        features = self.layers(image)
        features = features * torch.sigmoid(self.gate(features.mean((2, 3), keepdim=True)))
        return self.last(features.mean((2, 3)).reshape(features.shape[0], -1))


def export(
    network: nn.Module, path: Path, exporter: str, *, dynamic: bool, size: Sequence[int] = (64, 96)
) -> Path:
    """Write a network by one of torch's exporters; without `dynamic` for one image of `size`."""
    image, free = torch.randn(2 if dynamic else 1, 3, *size), torch.export.Dim.DYNAMIC
    more: dict[str, Any] = {"dynamo": exporter == "dynamo", "external_data": False, "verbose": False}
    if dynamic and exporter == "dynamo":
        more["dynamic_shapes"] = ({0: free, 2: free, 3: free},)
    elif dynamic:
        more["dynamic_axes"] = {"image": {0: "n", 2: "h", 3: "w"}}
    torch.onnx.export(network, (image,), path, input_names=["image"], **more)
    return path


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter in a file, for any size."""
    return export(network(Segmenter), tmp_path_factory.mktemp("onnx") / "net.onnx", "script", dynamic=True)


def graph_of(
    path: Path, nodes: Sequence[Any], opset: int = 13, inputs: Sequence[Any] = (), weights: Sequence[Any] = ()
) -> Path:
    """Write a graph of `image` (n, 3, h, w) to `output`."""
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["n", 3, "h", "w"])
    output = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(
        list(nodes), "graph", list(inputs) or [image], [output], initializer=list(weights)
    )
    opsets = [onnx.helper.make_opsetid("", opset)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def tensor(name: str, values: Any, kind: torch.dtype = torch.float32) -> Any:
    return onnx.numpy_helper.from_array(torch.as_tensor(values, dtype=kind).numpy(), name)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", [Segmenter, Classifier])
def test_a_file_for_any_size_is_the_network_it_was_written_from(
    kind: type[nn.Module], exporter: str, tmp_path: Path
) -> None:
    original = network(kind)
    read = cs.build_model(str(export(original, tmp_path / "net.onnx", exporter, dynamic=True)))
    for shape in ((1, 3, 64, 96), (3, 3, 53, 47)):
        image = torch.randn(shape)
        torch.testing.assert_close(read(image), original(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exporter", ["script", slow("dynamo")])
def test_a_size_that_only_the_example_had_is_freed(exporter: str, tmp_path: Path) -> None:
    original, image = network(Classifier), torch.randn(3, 3, 53, 47)
    read = cs.build_model(str(export(original, tmp_path / "net.onnx", exporter, dynamic=False)))
    torch.testing.assert_close(read(image), original(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_size_that_the_graph_holds_is_kept_and_others_are_refused(exporter: str, tmp_path: Path) -> None:
    original, image = network(Segmenter), torch.randn(2, 3, 64, 96)
    read = cs.build_model(str(export(original, tmp_path / "net.onnx", exporter, dynamic=False)))
    torch.testing.assert_close(read(image), original(image), rtol=1e-4, atol=1e-5)
    assert cs.plan(read).example_shape[2:] == (64, 96)
    with pytest.raises(cs.InvalidInput, match=r"only images of .*64 x 96"):
        read(torch.randn(1, 3, 96, 64))


def test_sizes_are_followed_through_arithmetic(tmp_path: Path) -> None:
    """A crop to half the height, rounded up, computed with tensors as exporters write it."""
    make = onnx.helper.make_node
    nodes = [
        make("Shape", ["image"], ["shape"]),
        make("Gather", ["shape", "two"], ["height"]),
        make("Cast", ["height"], ["float"], to=onnx.TensorProto.FLOAT),
        make("Div", ["float", "divisor"], ["half"]),
        make("Ceil", ["half"], ["rounded"]),
        make("Cast", ["rounded"], ["end"], to=onnx.TensorProto.INT64),
        make("Unsqueeze", ["end", "zero"], ["ends"]),
        make("Slice", ["image", "zero", "ends", "axis"], ["output"]),
    ]
    weights = [tensor("two", 2, torch.int64), tensor("divisor", 2.0), tensor("zero", [0], torch.int64)]
    path = graph_of(tmp_path / "net.onnx", nodes, weights=[*weights, tensor("axis", [2], torch.int64)])
    image = torch.randn(1, 3, 41, 16)
    torch.testing.assert_close(cs.build_model(str(path))(image), image[:, :, :21])


def resize(mode: str, **more: Any) -> list[Any]:
    return [onnx.helper.make_node("Resize", ["image", "", "scales"], ["output"], mode=mode, **more)]


@pytest.mark.parametrize(
    ("mode", "places", "more"),
    [
        ("nearest", "half_pixel", {"nearest_mode": "round_prefer_ceil"}),
        ("linear", "align_corners", {}),
        ("cubic", "half_pixel", {}),
    ],
)
def test_resizing_is_what_the_file_says(mode: str, places: str, more: dict[str, Any], tmp_path: Path) -> None:
    """`build_model` compares it with ONNX Runtime."""
    nodes = resize(mode, coordinate_transformation_mode=places, **more)
    path = graph_of(tmp_path / "net.onnx", nodes, weights=[tensor("scales", [1, 1, 2.5, 2])])
    assert cs.build_model(str(path))(torch.randn(1, 3, 40, 40)).shape == (1, 3, 100, 80)


def test_a_network_that_computes_something_else_is_refused_with_the_figure(tmp_path: Path) -> None:
    nodes = resize("cubic", exclude_outside=1)
    path = graph_of(tmp_path / "net.onnx", nodes, weights=[tensor("scales", [1, 1, 2, 2])])
    with pytest.raises(
        cs.CannotConvert, match=r"(?s)something else than ONNX Runtime.*differs by \d\.\de-0\d"
    ):
        cs.build_model(str(path))


def test_a_quantised_file_is_refused(written: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(written, tmp_path / "int8.onnx")
    with pytest.raises(
        cs.CannotConvert, match=r"(?s)is quantised.*DynamicQuantizeLinear.*before quantisation"
    ):
        cs.build_model(str(tmp_path / "int8.onnx"))


def test_a_file_with_kernels_is_refused_as_converted_already(written: Path, tmp_path: Path) -> None:
    model = onnx.load(str(written))
    onnx.helper.set_model_props(model, {KERNELS_KEY: HOW_TO_OPEN})
    onnx.save(model, str(tmp_path / "kernels.onnx"))
    with pytest.raises(cs.CannotConvert, match=r"(?s)calls this package's kernels.*converted already"):
        cs.build_model(str(tmp_path / "kernels.onnx"))


def test_an_operator_that_cannot_be_read_is_named_with_its_opset(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Hardmax", ["image"], ["output"], axis=1)]
    with pytest.raises(cs.CannotConvert, match=r"(?s)Where: Hardmax \(opset \d+\)\n.*of opset 18"):
        cs.build_model(str(graph_of(tmp_path / "net.onnx", nodes, opset=18)))


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        (["n", 224, 224, 3], onnx.TensorProto.FLOAT, r"(?s)channels last.*channels first"),
        (["n", 3, "h", "w"], onnx.TensorProto.UINT8, "UINT8"),
        ([1, 10], onnx.TensorProto.FLOAT, r"\(1, 10\)"),
    ],
)
def test_an_input_that_is_no_image_is_refused(shape: Any, kind: int, message: str, tmp_path: Path) -> None:
    inputs = [onnx.helper.make_tensor_value_info("image", kind, shape)]
    nodes = [onnx.helper.make_node("Cast", ["image"], ["output"], to=onnx.TensorProto.FLOAT)]
    with pytest.raises(cs.CannotConvert, match=message):
        cs.build_model(str(graph_of(tmp_path / "net.onnx", nodes, inputs=inputs)))


@pytest.mark.parametrize("exporter", ["LSTM", "two inputs", "an engine's own"])
def test_what_is_refused_is_said_with_a_way_that_helps(exporter: str, tmp_path: Path) -> None:
    make, image = onnx.helper.make_node, onnx.helper.make_tensor_value_info("image", 1, ["n", 3, "h", "w"])
    inputs, nodes, weights = [image], [make("Relu", ["image"], ["output"])], []
    if exporter == "LSTM":
        weights = [tensor("w", torch.randn(1, 16, 4)), tensor("r", torch.randn(1, 16, 4))]
        weights += [tensor("shape", [1, -1, 4], torch.int64)]
        nodes = [make("Reshape", ["image", "shape"], ["rows"])]
        nodes += [make("LSTM", ["rows", "w", "r"], ["output"], hidden_size=4)]
    elif exporter == "two inputs":
        inputs.append(onnx.helper.make_tensor_value_info("other", 1, ["n", 3, "h", "w"]))
        nodes = [make("Add", ["image", "other"], ["output"])]
    else:
        nodes = [make("Gelu", ["image"], ["output"], domain="com.microsoft")]
    path = graph_of(tmp_path / "net.onnx", nodes, inputs=inputs, weights=weights)
    if exporter == "an engine's own":
        model = onnx.load(path)
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        onnx.save(model, path)
    with pytest.raises(cs.CannotConvert) as refusal:
        cs.build_model(str(path))
    expected = {"LSTM": "before the recurrent ones", "two inputs": "several arguments"}
    assert expected.get(exporter, "before it was optimised") in refusal.value.next
    assert "opset" not in refusal.value.next


@pytest.mark.parametrize(
    ("fixed", "images"), [((48, None), None), ((None, 96), 1), ((64, 320), None), ((None, None), 1)]
)
def test_sizes_that_the_graph_alone_fixes_are_found(
    fixed: tuple[int | None, int | None], images: int | None, tmp_path: Path
) -> None:
    """A Reshape to the size of the example, in a file that says that any size will do, and any number of images."""
    make, (height, width) = onnx.helper.make_node, fixed
    shape = tensor("shape", [images or 0, 3, height or 0, width or 0], torch.int64)
    weights = [shape, tensor("w", torch.randn(4, 3, 3, 3))]
    nodes = [
        make("Reshape", ["image", "shape"], ["map"]),
        make("Conv", ["map", "w"], ["output"], pads=[1] * 4),
    ]
    net = cs.build_model(str(graph_of(tmp_path / "net.onnx", nodes, weights=weights)))
    assert net(torch.randn(3, 3, height or 65, width or 87)).shape == (3, 4, height or 65, width or 87)
    if height or width:
        with pytest.raises(cs.InvalidInput, match=f"{height or 'any'} x {width or 'any'}"):
            net(torch.randn(1, 3, 33 if height else 40, 35 if width else 40))


def test_a_size_that_is_not_found_is_refused_with_the_line_that_fixes_it(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Reshape", ["image", "shape"], ["output"])]
    path = graph_of(tmp_path / "net.onnx", nodes, weights=[tensor("shape", [0, 3, 57, 61], torch.int64)])
    with pytest.raises(cs.CannotConvert, match=r"(?s)Reshape.*make_dynamic_shape_fixed"):
        cs.build_model(str(path))


def with_weights_in(written: Path, path: Path, location: str) -> Path:
    onnx.save(onnx.load(written), path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def test_weights_in_a_file_beside_it_are_read(written: Path, tmp_path: Path) -> None:
    path, image = with_weights_in(written, tmp_path / "net.onnx", "net.data"), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(cs.build_model(str(path))(image), cs.build_model(str(written))(image))
    (tmp_path / "net.data").unlink()
    with pytest.raises(cs.FileError, match=r"keeps its weights in net\.data, which is missing"):
        cs.build_model(str(path))


@pytest.mark.parametrize("link", [False, True])
def test_weights_elsewhere_are_not_read(link: bool, written: Path, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with_weights_in(written, tmp_path / "net.onnx", "net.data")
    model = onnx.load(tmp_path / "net.onnx", load_external_data=False)
    if link:
        (tmp_path / "inner" / "net.data").symlink_to(tmp_path / "net.data")
    else:
        for weight in model.graph.initializer:
            next(entry for entry in weight.external_data if entry.key == "location").value = "../net.data"
    onnx.save(model, tmp_path / "inner" / "net.onnx")
    with pytest.raises(cs.FileError, match="in a file elsewhere, which was not read"):
        cs.build_model(str(tmp_path / "inner" / "net.onnx"))


@pytest.mark.parametrize("content", [b"", b"no graph at all", None], ids=["empty", "text", "cut"])
def test_a_damaged_file_is_said_to_be_damaged(content: bytes | None, written: Path, tmp_path: Path) -> None:
    whole = written.read_bytes()
    (tmp_path / "net.onnx").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(cs.FileError, match=r"not a readable ONNX file"):
        cs.build_model(str(tmp_path / "net.onnx"))


def test_arguments_that_an_onnx_file_does_not_take_are_refused(written: Path) -> None:
    with pytest.raises(cs.InvalidInput, match="takes no argument num_classes"):
        cs.build_model(str(written), num_classes=3)


@pytest.fixture
def converted(written: Path, tmp_path: Path) -> Path:
    """A converted file beside its ONNX file."""
    shutil.copy(written, tmp_path / "net.onnx")
    net = cs.adaptify(cs.build_model(str(tmp_path / "net.onnx")), "edges", verify_laws=False)
    cs.save(net, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_a_converted_file_finds_its_onnx_file_beside_it(converted: Path) -> None:
    image = torch.rand(1, 3, 64, 96)
    expected = cs.adaptify(cs.build_model(str(converted.with_name("net.onnx"))), "edges", verify_laws=False)(
        image
    )
    torch.testing.assert_close(cs.load(converted)(image), expected)


def test_a_converted_file_without_its_onnx_file_asks_for_it(converted: Path, tmp_path: Path) -> None:
    path = converted.with_name("net.onnx")
    path.rename(elsewhere := tmp_path / "other.onnx")
    with pytest.raises(cs.FileError, match=r"(?s)net.onnx is not here.*beside the converted file"):
        cs.load(converted)
    assert cs.load(converted, cs.build_model(str(elsewhere))).plan.output_stride == (2, 8)


def test_another_onnx_file_of_the_same_name_is_refused(converted: Path) -> None:
    export(network(Segmenter), converted.with_name("net.onnx"), "script", dynamic=True, size=(32, 32))
    with converted.with_name("net.onnx").open("ab") as file:
        file.write(onnx.helper.make_model(onnx.GraphProto(), doc_string="changed").SerializeToString())
    with pytest.raises(cs.FileError, match="another ONNX file than the one"):
        cs.load(converted)


def test_commands_take_the_file_as_they_take_a_name(
    written: Path, command_line: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets").mkdir()
    shutil.copy(written, "nets/net.onnx")
    assert command_line("plan", "nets/net.onnx", "--json").json["output_stride"] == [2, 8]
    done = command_line("convert", "nets/net.onnx", "--size", "64x96", "--rounds", "0")
    assert done.code == 0 and "net-edges.safetensors holds the weights and names net.onnx" in done.out
    assert command_line("macs", "nets/net-edges.safetensors", "--size", "64x96").code == 0


def test_laws_hold_and_the_optimised_copy_computes_the_same(written: Path) -> None:
    """`adaptify` verifies the laws."""
    net = cs.adaptify(cs.build_model(str(written)), "edges").eval()
    assert len(net.checks) >= 3 and all(check.passed for check in net.checks)
    image = torch.rand(1, 3, 64, 96)
    torch.testing.assert_close(net.optimize()(image), net(image), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dynamic", "exporter"),
    [
        ("resnet18", True, "dynamo"),
        ("mobilenet_v3_small", False, "script"),
        thorough("deeplabv3_mobilenet_v3_large", True, "script"),
    ],
)
def test_networks_of_torchvision_convert_from_their_files(
    name: str, dynamic: bool, exporter: str, tmp_path: Path
) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = build(name, by=4)

        def forward(self, image: Tensor) -> Tensor:
            values = self.network(image)
            return values["out"] if isinstance(values, dict) else values

    original = Plain().eval()
    path = export(original, tmp_path / "net.onnx", exporter, dynamic=dynamic, size=(128, 160))
    read = cs.build_model(str(path))
    ours, theirs = cs.plan(read), cs.plan(original)
    assert ours.output_stride == theirs.output_stride
    assert ours.share("adapt", "keep") == pytest.approx(theirs.share("adapt", "keep"), abs=0.02)
    net = cs.adaptify(read, "edges", verify_laws=False).eval()
    assert net(torch.rand(1, 3, 128, 160)).isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="CADSURGERY_DATA names no folder with the text detector")
def test_the_text_detector_converts_from_its_file() -> None:
    """Its weights stand in Constant nodes, and it takes multiples of 32 alone."""
    read = cs.build_model(str(Path(DATA) / "text_detection" / "ch_PP-OCRv4_det_infer.onnx"))
    net = cs.adaptify(read, "edges", output_stride=(16, 32)).eval()
    assert all(check.passed for check in net.checks)
    image = torch.randn(1, 3, 128, 160)
    torch.testing.assert_close(net(image, mask="none"), read(image), rtol=1e-3, atol=1e-6)
