"""Networks from ONNX files: they compute what ONNX Runtime does, or are refused with the reason."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Run, covering, slow, some, thorough
from networks import build
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.support.kinds import HOW_TO_OPEN, KERNELS_KEY

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx2torch")
onnxruntime = pytest.importorskip("onnxruntime")
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
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter in a file, for any size."""
    return export(network(Segmenter), tmp_path_factory.mktemp("onnx") / "net.onnx", "script", dynamic=True)


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
    nodes = [
        node("Shape", ["image"], "shape"),
        node("Gather", ["shape", "two"], "height"),
        node("Cast", ["height"], "float", to=onnx.TensorProto.FLOAT),
        node("Div", ["float", "divisor"], "half"),
        node("Ceil", ["half"], "rounded"),
        node("Cast", ["rounded"], "end", to=onnx.TensorProto.INT64),
        node("Unsqueeze", ["end", "zero"], "ends"),
        node("Slice", ["image", "zero", "ends", "axis"], "output"),
    ]
    weights = {"two": integers(2)[0], "divisor": torch.tensor(2.0), "zero": integers(0), "axis": integers(2)}
    image = torch.randn(1, 3, 41, 16)
    path = written(tmp_path / "net.onnx", nodes, weights)
    torch.testing.assert_close(cs.build_model(str(path))(image), image[:, :, :21])


@pytest.mark.parametrize(
    ("fixed", "images"), [((48, None), None), ((None, 96), 1), ((64, 320), None), ((None, None), 1)]
)
def test_sizes_that_the_graph_alone_fixes_are_found(
    fixed: tuple[int | None, int | None], images: int | None, tmp_path: Path
) -> None:
    """A Reshape to the size of the example, in a file that says that any size will do, and any number of images."""
    height, width = fixed
    weights = {"shape": integers(images or 0, 3, height or 0, width or 0), "w": torch.randn(4, 3, 3, 3)}
    nodes = [
        node("Reshape", ["image", "shape"], "map"),
        node("Conv", ["map", "w"], "output", pads=[1] * 4),
    ]
    net = cs.build_model(str(written(tmp_path / "net.onnx", nodes, weights)))
    assert net(torch.randn(3, 3, height or 65, width or 87)).shape == (3, 4, height or 65, width or 87)
    if height or width:
        with pytest.raises(cs.InvalidInput, match=f"{height or 'any'} x {width or 'any'}"):
            net(torch.randn(1, 3, 33 if height else 40, 35 if width else 40))


def with_weights_in(segmenter: Path, path: Path, location: str) -> Path:
    onnx.save(onnx.load(segmenter), path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def test_weights_in_a_file_beside_it_are_read(segmenter: Path, tmp_path: Path) -> None:
    path, image = with_weights_in(segmenter, tmp_path / "net.onnx", "net.data"), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(cs.build_model(str(path))(image), cs.build_model(str(segmenter))(image))
    (tmp_path / "net.data").unlink()
    with pytest.raises(cs.FileError, match=r"keeps its weights in net\.data, which is missing"):
        cs.build_model(str(path))


@pytest.mark.parametrize("link", [False, True])
def test_weights_elsewhere_are_not_read(link: bool, segmenter: Path, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with_weights_in(segmenter, tmp_path / "net.onnx", "net.data")
    model = onnx.load(tmp_path / "net.onnx", load_external_data=False)
    if link:
        (tmp_path / "inner" / "net.data").symlink_to(tmp_path / "net.data")
    else:
        for weight in model.graph.initializer:
            next(entry for entry in weight.external_data if entry.key == "location").value = "../net.data"
    onnx.save(model, tmp_path / "inner" / "net.onnx")
    with pytest.raises(cs.FileError, match="in a file elsewhere, which was not read"):
        cs.build_model(str(tmp_path / "inner" / "net.onnx"))


@pytest.fixture
def converted(segmenter: Path, tmp_path: Path) -> Path:
    """A converted file beside its ONNX file."""
    shutil.copy(segmenter, tmp_path / "net.onnx")
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
    segmenter: Path, command_line: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets").mkdir()
    shutil.copy(segmenter, "nets/net.onnx")
    assert command_line("plan", "nets/net.onnx", "--json").json["output_stride"] == [2, 8]
    done = command_line("convert", "nets/net.onnx", "--size", "64x96", "--rounds", "0")
    assert done.code == 0 and "net-edges.safetensors holds the weights and names net.onnx" in done.out
    assert command_line("macs", "nets/net-edges.safetensors", "--size", "64x96").code == 0


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


# -- what graphs say in their own way: `build_model` compares at two sizes, these tests at others ------


SHAPES = ((1, 3, 33, 50), (3, 3, 62, 47))


def written(
    path: Path,
    nodes: Sequence[Any],
    weights: Mapping[str, Any],
    opset: int = 13,
    shape: Sequence[int | str] = ("n", 3, "h", "w"),
    kind: int = 1,
    more: Sequence[Any] = (),
) -> Path:
    """Write a graph of `image`, of floating-point numbers or another kind, and more inputs to `output`."""
    image = onnx.helper.make_tensor_value_info("image", kind, shape)
    output = onnx.ValueInfoProto(name="output")  # of any type
    held = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = onnx.helper.make_graph(list(nodes), "graph", [image, *more], [output], initializer=held)
    opsets = [onnx.helper.make_opsetid("", opset)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def as_onnx_runtime(path: Path, image: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])


def assert_reads(path: Path, shapes: Sequence[Sequence[int]] = SHAPES) -> nn.Module:
    """Assert that the network of a file computes what ONNX Runtime does; return it."""
    network = cs.build_model(str(path))
    for shape in shapes:
        image = torch.randn(shape)
        torch.testing.assert_close(network(image), as_onnx_runtime(path, image), rtol=1e-4, atol=1e-5)
    return network


def node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, list(inputs), [output], **attributes)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


WINDOWS = {
    "even kernel": {"kernel_shape": [2, 4]},
    "stride": {"kernel_shape": [3, 3], "strides": [2, 2]},
    "even kernel with stride": {"kernel_shape": [4, 2], "strides": [2, 3]},
    "samples left out": {"kernel_shape": [1, 2], "strides": [3, 3]},
}  # ONNX Runtime refuses dilations here
LAYERS: dict[str, dict[str, Any]] = {
    "Conv": {},
    "MaxPool": {},
    "AveragePool with its padding": {"count_include_pad": 1},
    "ConvTranspose": {},
}


@pytest.mark.parametrize(
    ("layer", "auto_pad", "window"),
    covering(list(LAYERS), ["SAME_UPPER", "SAME_LOWER", "VALID"], list(WINDOWS)),
)
def test_auto_pad_is_padding_for_every_size(layer: str, auto_pad: str, window: str, tmp_path: Path) -> None:
    kind, options = layer.split()[0], dict(WINDOWS[window])
    if "Pool" in kind and window == "samples left out":  # ONNX Runtime does not pool so
        options["strides"] = options["kernel_shape"]
    weight = torch.randn(3, 3, *options["kernel_shape"])
    inputs, weights = (["image", "weight"], {"weight": weight}) if "Conv" in kind else (["image"], {})
    nodes = [node(kind, inputs, "output", auto_pad=auto_pad, **LAYERS[layer], **options)]
    assert_reads(written(tmp_path / "net.onnx", nodes, weights, 11))


def padded_by_a_word(auto_pad: str, path: Path) -> Path:
    """Write three layers with strides to 8."""
    weights = {f"w{i}": torch.randn(8, 3 if i == 0 else 8, 3, 3) / 5 for i in range(3)}
    nodes = []
    for i, name in enumerate(["image", "b0", "b1"]):
        nodes.append(node("Conv", [name, f"w{i}"], f"a{i}", auto_pad=auto_pad, strides=[2, 2]))
        nodes.append(node("Relu", [f"a{i}"], f"b{i}"))
    pool = node("MaxPool", ["b2"], "output", auto_pad=auto_pad, kernel_shape=[2, 2])
    return written(path, [*nodes, pool], weights)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_padding_that_depends_on_the_size_belongs_to_the_region(auto_pad: str, tmp_path: Path) -> None:
    """`adaptify` verifies the laws; everything but the first window has a lattice to read."""
    path = padded_by_a_word(auto_pad, tmp_path / "net.onnx")
    net = cs.adaptify(cs.build_model(str(path)), "edges", coarsest=16).eval()
    assert all(check.passed for check in net.checks) and net.plan.share("adapt", "keep") > 0.99
    for shape in ((1, 3, 65, 46), (2, 3, 32, 31)):
        image = torch.randn(shape)
        torch.testing.assert_close(net(image, mask="all"), as_onnx_runtime(path, image), rtol=1e-4, atol=1e-5)


class Detector(nn.Module):
    """Boxes at two strides around anchors that are made of the sizes of the maps, as in files for any size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU())
        self.heads = nn.ModuleList(nn.Conv2d(8, 4 * 6 + 3, 1) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        fine = self.stem(image)
        maps = [head(x) for head, x in zip(self.heads, (fine, self.down(fine)), strict=True)]
        anchors, strides = [], []
        for x, stride in zip(maps, (4, 8), strict=True):
            height, width = x.shape[-2:]
            across = torch.arange(end=width, dtype=x.dtype, device=x.device) + 0.5
            down = torch.arange(end=height, dtype=x.dtype, device=x.device) + 0.5
            grid = torch.meshgrid(down, across, indexing="ij")
            anchors.append(torch.stack((grid[1], grid[0]), -1).view(-1, 2))
            strides.append(torch.full((height * width, 1), stride, dtype=x.dtype, device=x.device))
        values = torch.cat([x.view(x.shape[0], 27, -1) for x in maps], 2)
        bins, scores = values.split((24, 3), 1)
        weights = bins.view(bins.shape[0], 4, 6, -1).softmax(2)
        sides = (weights * torch.arange(6, dtype=weights.dtype).view(1, 1, 6, 1)).sum(2)
        before, behind = sides.chunk(2, 1)
        centres = torch.cat(anchors).transpose(0, 1).unsqueeze(0)
        boxes = torch.cat((centres - before, centres + behind), 1) * torch.cat(strides).transpose(0, 1)
        return torch.cat((boxes, scores.sigmoid()), 1)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    network, path = Detector().eval(), tmp_path_factory.mktemp("onnx") / "net.onnx"
    axes = {"image": {0: "n", 2: "h", 3: "w"}}
    torch.onnx.export(
        network,
        (torch.randn(1, 3, 64, 96),),
        path,
        input_names=["image"],
        dynamic_axes=axes,
        dynamo=False,
        opset_version=18,
        do_constant_folding=False,
    )
    return network, path


def test_anchors_are_made_of_the_sizes_in_each_call(detector: tuple[nn.Module, Path]) -> None:
    network, path = detector
    kinds = {one.op_type for one in onnx.load(path).graph.node}
    assert {"Range", "ConstantOfShape", "Expand", "Split"} <= kinds
    read = assert_reads(path)
    image = torch.randn(2, 3, 40, 72, dtype=torch.float64)
    torch.testing.assert_close(read.double()(image), network.double()(image))
    network.float()


def test_a_detector_for_any_size_gets_floors(detector: tuple[nn.Module, Path]) -> None:
    network, path = detector
    net = cs.adaptify(cs.build_model(str(path)), "edges", coarsest=16).eval()
    assert all(check.passed for check in net.checks) and net.plan.share("adapt", "keep") > 0.99
    for shape in SHAPES:
        image = torch.randn(shape)
        torch.testing.assert_close(net(image, mask="all"), network(image), rtol=1e-4, atol=1e-4)


def branch(condition: str, *kinds: str) -> Any:
    """A node If, which gives one of two operations on the map."""
    value = onnx.helper.make_empty_tensor_value_info("found")
    graphs = [onnx.helper.make_graph([node(kind, ["map"], "found")], kind, [], [value]) for kind in kinds]
    options = dict(zip(("then_branch", "else_branch"), graphs, strict=True))
    return node("If", [condition], "output", **options)


DECIDED = {  # what decides, and whether a file for any size can know it
    "rank": (["Shape", "Size"], integers(4)[0], True),
    "channels": (["Shape", 1], integers(4)[0], True),
    "several": (["Shape", 1, "Neg"], integers(-4)[0], True),
    "height": (["Shape", 2], integers(40)[0], False),
}


@pytest.mark.parametrize("decides", some(DECIDED))
def test_branches_that_ranks_and_fixed_lengths_decide_are_taken(decides: str, tmp_path: Path) -> None:
    """A branch that a size decides is refused."""
    steps, known, is_known = DECIDED[decides]
    weights = {"kernel": torch.randn(4, 3, 3, 3), "known": known}
    nodes, last = [node("Conv", ["image", "kernel"], "map")], "map"
    for number, step in enumerate(steps):
        if isinstance(step, int):
            weights["axis"] = integers(step)[0]
        kind, *more = ("Gather", "axis") if isinstance(step, int) else (step,)
        nodes.append(node(kind, [last, *more], f"value{number}"))
        last = f"value{number}"
    nodes += [node("Equal", [last, "known"], "is_so"), branch("is_so", "Relu", "Neg")]
    path = written(tmp_path / "net.onnx", nodes, weights)
    if is_known:
        assert_reads(path)
        return
    with pytest.raises(cs.CannotConvert, match="cannot be read") as refusal:
        cs.build_model(str(path))
    assert "If" in refusal.value.where and "no branch depends on a value" in refusal.value.next


SIDES = [
    node("Shape", ["image"], "shape"),
    node("Gather", ["shape", "two"], "h"),
    node("Gather", ["shape", "three"], "w"),
]
CHOICES: dict[str, list[Any]] = {  # of the height of a result
    "the least": [node("Min", ["h", "w"], "side")],
    "equal sizes": [node("Equal", ["h", "w"], "same"), node("Where", ["same", "two", "h"], "side")],
    "a quotient of a difference": [  # towards zero, where Python rounds down
        node("Sub", ["three", "h"], "less"),
        node("Div", ["less", "two"], "half"),
        node("Sub", ["h", "half"], "side"),
    ],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_sizes_that_depend_on_comparisons_are_computed(choice: str, tmp_path: Path) -> None:
    weights = {"two": integers(2)[0], "three": integers(3)[0], "first": integers(0)}
    weights |= {"mean": torch.randn(1, 3, 1, 1)}
    nodes = [
        *SIDES,
        *CHOICES[choice],
        node("Unsqueeze", ["side", "first"], "rows"),
        node("Concat", ["ones", "rows", "one_more"], "final", axis=0),
        node("Expand", ["mean", "final"], "large"),
        node("ReduceMean", ["large"], "small", axes=[2, 3], keepdims=1),
        node("ReduceSum", ["large", "axes"], "summed", keepdims=1),
        node("Mul", ["small", "summed"], "factor"),
        node("Mul", ["image", "factor"], "output"),
    ]
    weights |= {
        "one": integers(1)[0],
        "ones": integers(1, 1),
        "one_more": integers(3),
        "axes": integers(2, 3),
    }
    assert_reads(
        written(tmp_path / "net.onnx", nodes, weights), [(1, 3, 37, 52), (2, 3, 48, 48), (1, 3, 61, 40)]
    )


@pytest.mark.parametrize(
    ("kind", "dynamo"),
    [("pad", False), ("crop", False), slow("picked", False), slow("pad", True), slow("crop", True)],
)
def test_what_torch_writes_for_computed_places_is_read(kind: str, dynamo: bool, tmp_path: Path) -> None:
    """Paddings and cuts of computed widths, and indices."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, 2, 1)
            self.register_buffer("order", torch.tensor([3, 1, 0, 2]))
            self.order: Tensor

        def forward(self, x: Tensor) -> Tensor:
            height, width = x.shape[-2:]
            if kind == "pad":
                return self.first(nn.functional.pad(x, (0, -width % 32, 0, -height % 32)))
            found = self.first(x).relu()
            if kind == "crop":
                larger = nn.functional.interpolate(self.first(found[:, :3]), scale_factor=2.0)
                down, across = (found.shape[axis] - larger.shape[axis] for axis in (2, 3))
                widths = (across // 2, across - across // 2, down // 2, down - down // 2)
                return nn.functional.pad(larger, widths) + found
            return found[:, self.order]

    torch.manual_seed(0)
    path, image = tmp_path / "net.onnx", torch.rand(2, 3, 64, 96)
    axes = {0: "n", 2: "h", 3: "w"}
    if dynamo:
        options: dict[str, Any] = {
            "dynamic_shapes": (dict.fromkeys(axes, torch.export.Dim.AUTO),),
            "verbose": False,
        }
    else:
        options = {"dynamic_axes": {"x": axes}, "input_names": ["x"], "opset_version": 17}
    torch.onnx.export(Network().eval(), (image,), str(path), dynamo=dynamo, **options)
    assert_reads(path, [(1, 3, 97, 129), (3, 3, 64, 64)])


def test_a_space_to_depth_of_slices_gets_floors(tmp_path: Path) -> None:
    """One axis after the other, as exporters write it, and with an end that no axis reaches."""
    weights = {f"at{start}": integers(start) for start in (0, 1)}
    weights |= {f"axis{axis}": integers(axis) for axis in (2, 3)}
    weights |= {"end": integers(2**63 - 1), "two": integers(2)}
    weights |= {"w0": torch.randn(8, 12, 3, 3) / 10, "w1": torch.randn(8, 8, 3, 3) / 8}
    nodes, parts = [], []
    for across in (0, 1):
        for down in (0, 1):
            rows, part = f"rows{down}{across}", f"part{down}{across}"
            nodes.append(node("Slice", ["image", f"at{down}", "end", "axis2", "two"], rows))
            nodes.append(node("Slice", [rows, f"at{across}", "end", "axis3", "two"], part))
            parts.append(part)
    nodes += [
        node("Concat", parts, "stacked", axis=1),
        node("Conv", ["stacked", "w0"], "first", pads=[1, 1, 1, 1]),
        node("Relu", ["first"], "second"),
        node("Conv", ["second", "w1"], "output", pads=[1, 1, 1, 1], strides=[2, 2]),
    ]
    path = written(tmp_path / "net.onnx", nodes, weights)
    net = cs.adaptify(cs.build_model(str(path)), "edges", coarsest=16).eval()
    assert all(check.passed for check in net.checks) and net.plan.share("adapt", "keep") == 1
    image = torch.randn(2, 3, 46, 70)
    torch.testing.assert_close(net.optimize()(image), net(image), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(image, mask="all"), as_onnx_runtime(path, image), rtol=1e-4, atol=1e-5)


def test_an_axis_of_negative_length_is_free(tmp_path: Path) -> None:
    nodes = [node("Relu", ["image"], "output")]
    read = assert_reads(written(tmp_path / "net.onnx", nodes, {}, shape=(-1, 3, -1, -1)))
    assert read.size is None


def test_a_file_fixes_one_axis_alone(tmp_path: Path) -> None:
    """As text recognisers do: lines of one height, which their graph holds, and of any length."""
    nodes = [node("Add", ["image", "rows"], "output")]
    path = written(tmp_path / "net.onnx", nodes, {"rows": torch.randn(1, 1, 32, 1)}, shape=("n", 3, 32, "w"))
    read = assert_reads(path, [(1, 3, 32, 40), (2, 3, 32, 71)])
    assert read.size[0] == 32
    with pytest.raises(cs.InvalidInput, match="only images of 32 x any"):
        read(torch.randn(1, 3, 33, 40))


# -- what is refused -------------------------------------------------------------------------------------------------


def quantised(path: Path, segmenter: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(segmenter, path)


def with_kernels(path: Path, segmenter: Path) -> None:
    model = onnx.load(segmenter)
    onnx.helper.set_model_props(model, {KERNELS_KEY: HOW_TO_OPEN})
    onnx.save(model, path)


def of_an_engine(path: Path, segmenter: Path) -> None:
    model = onnx.load(written(path, [node("Gelu", ["image"], "output", domain="com.microsoft")], {}))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)


def recurrent(path: Path, segmenter: Path) -> None:
    weights = {"w": torch.randn(1, 16, 4), "r": torch.randn(1, 16, 4), "shape": integers(1, -1, 4)}
    nodes = [node("Reshape", ["image", "shape"], "rows")]
    written(path, [*nodes, node("LSTM", ["rows", "w", "r"], "output", hidden_size=4)], weights)


def of(nodes: Sequence[Any], weights: Any = (), **options: Any) -> Callable[[Path, Path], object]:
    return lambda path, segmenter: written(path, nodes, dict(weights), **options)


CAST = [node("Cast", ["image"], "output", to=1)]
CUBIC = [node("Resize", ["image", "", "scales"], "output", mode="cubic", exclude_outside=1)]
OTHER = onnx.helper.make_tensor_value_info("other", 1, ["n", 3, "h", "w"])
UNREADABLE = "not a readable ONNX file"
REFUSED: dict[str, tuple[Callable[[Path, Path], object], type[cs.CadError], str]] = {
    "another result": (
        of(CUBIC, {"scales": torch.tensor([1.0, 1, 2, 2])}),
        cs.CannotConvert,
        r"something else than ONNX Runtime.*differs by \d\.\de-0\d",
    ),
    "quantised": (quantised, cs.CannotConvert, "is quantised.*DynamicQuantizeLinear.*before quantisation"),
    "with kernels": (with_kernels, cs.CannotConvert, "calls this package's kernels.*converted already"),
    "an operator": (
        of([node("Hardmax", ["image"], "output", axis=1)], opset=18),
        cs.CannotConvert,
        r"Where: Hardmax \(opset \d+\)\n.*of opset 18",
    ),
    "channels last": (
        of(CAST, shape=("n", 224, 224, 3)),
        cs.CannotConvert,
        "channels last.*channels first",
    ),
    "bytes": (of(CAST, kind=onnx.TensorProto.UINT8), cs.CannotConvert, "UINT8"),
    "no image": (of(CAST, shape=(1, 10)), cs.CannotConvert, r"\(1, 10\)"),
    "recurrent": (recurrent, cs.CannotConvert, "before the recurrent ones"),
    "two inputs": (
        of([node("Add", ["image", "other"], "output")], more=[OTHER]),
        cs.CannotConvert,
        "Next.*several arguments",
    ),
    "of an engine": (of_an_engine, cs.CannotConvert, "Next.*before it was optimised"),
    "a size that is not found": (
        of([node("Reshape", ["image", "shape"], "output")], {"shape": integers(0, 3, 57, 61)}),
        cs.CannotConvert,
        "Reshape.*make_dynamic_shape_fixed",
    ),
    "empty": (lambda path, segmenter: path.write_bytes(b""), cs.FileError, UNREADABLE),
    "text": (lambda path, segmenter: path.write_bytes(b"no graph at all"), cs.FileError, UNREADABLE),
    "cut": (
        lambda path, segmenter: path.write_bytes(segmenter.read_bytes()[: segmenter.stat().st_size // 2]),
        cs.FileError,
        UNREADABLE,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_read_is_refused_with_a_way_that_helps(
    case: str, segmenter: Path, tmp_path: Path
) -> None:
    make, error, words = REFUSED[case]
    make(tmp_path / "net.onnx", segmenter)
    with pytest.raises(error, match=f"(?s){words}") as refusal:
        cs.build_model(str(tmp_path / "net.onnx"))
    assert case not in ("recurrent", "two inputs", "of an engine") or "opset" not in refusal.value.next


def test_arguments_that_an_onnx_file_does_not_take_are_refused(segmenter: Path) -> None:
    with pytest.raises(cs.InvalidInput, match="takes no argument num_classes"):
        cs.build_model(str(segmenter), num_classes=3)


# -- operators in each opset in which they mean something new: equal to ONNX Runtime, or refused by name


FIRST, LAST = 6, 23
CHANNELS = 8
SIZES = ((1, 3, 40, 56), (2, 3, 32, 64))
MAP, SECOND = "map", "other"  # maps that the operator reads
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
            ("three", [MAP, SECOND, "third"], {}),
            ("one", [MAP], {}),
            ("a constant", [MAP], {"constant": np.array([0.2], dtype="f")}),
            ("channels", [MAP], {"constant": per_channel(1, CHANNELS, 1, 1)}),
        )
    },
    **{kind: (kind, {"of": [MAP, SECOND]}) for kind in ("Add", "Sub", "Mul", "Div")},
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
    "Concat": ("Concat", {"axis": 1, "of": [MAP, SECOND]}),
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
    "Resize nearest by 2.5": (
        "Resize",
        {"scales": [1.0, 1.0, 2.5, 2.0], "mode": "nearest", "nearest_mode": "round_prefer_ceil"},
    ),
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
NOT_READ = {"Resize nearest asymmetric round_prefer_floor by 3.0"}


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
    schema, held, options = schema_of(kind, opset), dict[str, Any](), {}

    def hold(value: Any) -> str:
        held[name := f"constant{len(held)}"] = value
        return name

    random = np.random.default_rng(0)
    kernels = {
        name: random.standard_normal((CHANNELS, 3, 3, 3)).astype("f") / 3 for name in (MAP, SECOND, "third")
    }
    if kind in ("Div", "Reciprocal"):  # divisors near zero magnify rounding
        given = given | {"of": [*given.get("of", [MAP])[:-1], "far"]}
    nodes = [
        onnx.helper.make_node("Conv", ["image", hold(kernel)], [name], pads=[1] * 4)
        for name, kernel in kernels.items()
    ]
    nodes.append(onnx.helper.make_node("HardSigmoid", [SECOND], ["far"], alpha=0.02))
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
    return written(path, nodes, held, opset)


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
    if name in NOT_READ and opset > 10:
        with pytest.raises(cs.CannotConvert, match=kind):
            cs.build_model(str(path))
        return
    network = cs.build_model(str(path))
    for image, expected in zip(images, map(torch.from_numpy, every), strict=True):
        found = network(image)
        found = found if isinstance(found, torch.Tensor) else found[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
