"""What graphs of ONNX say in their own way: padding by a word, sizes as tensors, slices, later sets of operators.

`build_model` compares each network with ONNX Runtime at two sizes; these tests compare it at others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import covering, slow, some
from torch import Tensor, nn

import cadsurgery as cs

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx2torch")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SHAPES = ((1, 3, 33, 50), (3, 3, 62, 47))


def written(
    path: Path,
    nodes: Sequence[Any],
    weights: dict[str, Tensor],
    opset: int = 13,
    shape: Sequence[int | str] = ("n", 3, "h", "w"),
) -> Path:
    """Write a graph of `image` to `output`."""
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape)
    output = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, None)
    held = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()]
    graph = onnx.helper.make_graph(list(nodes), "graph", [image], [output], initializer=held)
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


# -- padding by a word -----------------------------------------------------------------------------------------------

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


# -- sizes as tensors ------------------------------------------------------------------------------------------------


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


# -- slices ----------------------------------------------------------------------------------------------------------


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
    torch.testing.assert_close(net(image, mask="all"), as_onnx_runtime(path, image), rtol=1e-4, atol=1e-5)


# -- files -----------------------------------------------------------------------------------------------------------


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
