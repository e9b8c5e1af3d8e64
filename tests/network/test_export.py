"""Files for engines other than torch: what they give is what the network gives, at sizes, batches and masks the example
did not have; what cannot be written is refused, and nothing is left behind."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F
from conftest import Run, assert_same, images, picture, random_levels, slow, thorough
from exported import ENGINES_HERE, File, assert_same_file, in_openvino, net
from networks import Composed, Encoded, conv_norm, randomise, saved_segmenter, strided, unverified
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_symbols
from torch.utils._pytree import tree_leaves

import cadsurgery as cs
from cadsurgery.elements.backends import dense, portable, reference
from cadsurgery.masks.wrappers import Budget
from cadsurgery.network.export import compare
from cadsurgery.network.export import onnx as onnx_files
from cadsurgery.network.export.compare import check_difference, difference, more_images
from cadsurgery.network.export.engines import ENGINES, OnnxRuntime, engine_for
from cadsurgery.network.export.names import output_names
from cadsurgery.network.export.onnx import Exportable, _cut_awkwardly, _of_other_sizes, follow
from cadsurgery.network.export.quiet import quietly

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> tuple[cs.AdaptiveModel, Path, Any]:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    model = net()
    return model, path, cs.export(model, picture(1, 96, 128), path, dynamic=True)


@pytest.mark.slow
def test_a_dynamic_file_takes_any_size_and_batch(dynamic: Any) -> None:
    model, path, report = dynamic
    assert_same_file(path, model, *(picture(*size) for size in ((1, 96, 128), (3, 75, 101), (2, 64, 160))))
    assert report.image == (None, 3, None, None) and report.outputs == ("out", "levels")
    assert report.difference < 1e-4 and report.bytes == path.stat().st_size
    assert len({shape[2:] for shape in report.compared}) > 2


@pytest.mark.parametrize(
    ("number", "options"),
    [
        slow(0, {}),
        thorough(0, {"dynamic": True}),
        *(slow(number, {"dynamic": True, "level_map": True}) for number in (0, 2)),
        slow(1, {}),
    ],
)
def test_axes_have_the_same_names_in_inputs_and_outputs(
    number: int, options: dict[str, bool], tmp_path: Path
) -> None:
    """So that shape inference, and whoever fixes the number of images, reads one symbol; or they are of that number."""
    net = unverified(strided(3, 4).eval(), "edges", coarsest=8)
    path, fixed = tmp_path / "net.onnx", bool(number)
    report = cs.export(net, picture(number or 1, 32, 64), path, fixed_batch=fixed, **options)
    graph = onnx.load(path).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)}
    batches = {shape[0].dim_value if fixed else shape[0].dim_param for shape in shapes.values()}
    assert batches == {number or "batch"} and report.image[0] == (number or None)
    assert not fixed or {shape[0] for shape in report.compared} == batches
    sides = [[dim.dim_param for dim in shape] for shape in (shapes["image"][2:], shapes["levels"][1:])]
    assert sides == [["height", "width"] if "dynamic" in options else ["", ""]] * 2


@pytest.mark.slow
def test_a_file_says_what_it_was_made_of_and_has_standard_operations_alone(dynamic: Any) -> None:
    model, path, _ = dynamic
    file = onnx.load(str(path))
    said = {entry.key: entry.value for entry in file.metadata_props}
    assert said["cadsurgery.mask"] == model.mask.spec()
    assert cs.Plan.from_json(said["cadsurgery.plan"]) == model.plan
    assert torch.__version__.startswith(json.loads(said["cadsurgery.versions"])["torch"])
    assert json.loads(said["cadsurgery.options"]) == {"fill": "linear", "dynamic": True, "multiple": 1}
    assert {one.domain for one in file.opset_import} <= {"", "ai.onnx"} and not file.functions
    assert {node.domain for node in file.graph.node} <= {"", "ai.onnx"}


class Indexed(nn.Module):
    """Indices as torch has them: of one axis, of two, of a mask."""

    def forward(self, x: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        return x[rows], x[:, columns], x[rows, :, columns], x[:, rows, columns], x[x > 0.5]


@pytest.mark.slow
def test_indices_are_those_of_torch(tmp_path: Path) -> None:
    from cadsurgery.network.export.translate import TABLE

    inputs = (torch.rand(4, 5, 6), torch.tensor([3, -1, 0]), torch.tensor([1, 1, 4]))
    model = torch.onnx.export(
        Indexed().eval(), inputs, dynamo=True, verbose=False, custom_translation_table=TABLE
    )
    assert model is not None
    model.save(tmp_path / "net.onnx")
    for output, expected in zip(
        File(tmp_path / "net.onnx")(*inputs).values(), Indexed()(*inputs), strict=True
    ):
        assert torch.equal(output, expected)


@pytest.mark.slow
def test_large_weights_get_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cadsurgery.network.export.onnx._LARGEST_FILE", 64)
    model, path = net("edges | budget:fraction=0.3"), tmp_path / "net.onnx"
    report = cs.export(model, picture(1, 72, 104), path)
    assert report.image == (None, 3, 72, 104) and report.format == "onnx"
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert set(sizes) == {"net.onnx", "net.onnx.data"} and report.bytes == sum(sizes.values())
    assert_same_file(path, model, picture(3, 72, 104).flip(2) * 0.7)


class Steps(cs.MaskProvider):
    """Scores of four values, so that most patches are equal to others, whatever the precision."""

    def scores(self, image: Tensor, features: Tensor, grid: cs.masks.FineMapSpec) -> Tensor:
        rows, columns = (torch.arange(length) // grid.patch for length in grid.size)
        steps = (rows.unsqueeze(1) * 7 + columns * 5) % 4
        return steps.float().expand(grid.batch, -1, -1)


def fixed_levels() -> Tensor:
    torch.manual_seed(0)
    return random_levels(1, (36, 52), (2, 2))[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "fill", "dynamic"),
    [
        ("edges:threshold=0.35/0.1,dilation=11/21", "guided", True),  # `dynamic` is of edges, linear
        ("detail", "nearest", True),
        ("edges | budget:fraction=0.1/0.3", "linear", True),
        (Budget(Steps(), (0.1, 0.3)), "linear", True),
        (fixed_levels(), "linear", False),
        ("learned", "linear", False),
    ],
    ids=["guided", "nearest", "a budget", "equal scores", "a fixed map", "learned"],
)
def test_every_mask_and_fill_is_the_network(mask: Any, fill: str, dynamic: bool, tmp_path: Path) -> None:
    model, path, image = net(mask, fill=fill), tmp_path / "net.onnx", picture(1, 72, 104)
    with torch.no_grad():
        model(image)  # creates the weights of a learned mask
    assert 0 < model.active_fraction < 1
    report = cs.export(model, image, path, dynamic=dynamic)
    assert report.image == ((None, 3, None, None) if dynamic else (None, 3, 72, 104))
    sizes = ((2, 93, 75), (1, 64, 160)) if dynamic else ((3, 72, 104),)
    for opened in (File, in_openvino):
        assert_same_file(path, model, *(picture(*size).flip(2) * 0.7 for size in sizes), opened=opened)


@pytest.mark.parametrize(
    ("groups", "with_kernels", "is_said"),
    [
        (4, False, True),
        (4, True, False),
        thorough(1, False, False),
    ],
)
@pytest.mark.slow
def test_a_file_of_grouped_convolutions_without_kernels_warns(
    groups: int, with_kernels: bool, is_said: bool, tmp_path: Path
) -> None:
    """Such a file is slower than one with kernels, and perhaps than the dense network."""
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=groups), nn.Conv2d(8, 8, 3)
    )
    model = cs.adaptify(layers.eval(), "edges", example_input=picture(1, 48, 64))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        cs.export(model, picture(1, 48, 64), tmp_path / "net.onnx", with_kernels=with_kernels)
    said = [one for one in found if "with_kernels=True" in str(one.message)]
    assert len(said) == is_said and all("1 of 3 convolutions" in str(one.message) for one in said)
    assert all(one.filename == __file__ for one in said)  # it names the user's line


@pytest.mark.slow
def test_the_level_map_is_an_input(tmp_path: Path) -> None:
    model, path = net("edges | smooth"), tmp_path / "net.onnx"
    report = cs.export(model, picture(1, 96, 128), path, level_map=True)
    assert report.inputs == ("image", "level_map")
    image, run = picture(2, 75, 101), File(path)
    with torch.no_grad():
        model(image)
        for seed in range(2):
            torch.manual_seed(seed)
            levels = random_levels(2, tuple(model.levels.shape[1:]), model.geometry.strides)
            assert_same(run(image, levels.long())["out"], model(image, mask=levels)["out"], 1e-4)


def test_a_file_is_compared_on_other_images_in_both_memory_layouts() -> None:
    """Whatever the layout of the example, and of another image to compare on."""
    image = picture(1, 72, 104)
    assert not any(torch.equal(image, other) for other in more_images(image, None))
    for example in (image, image.contiguous(memory_format=torch.channels_last)):
        for other in (None, example):
            compared = more_images(example, other)
            assert any(one.is_contiguous() for one in compared)
            assert any(one.is_contiguous(memory_format=torch.channels_last) for one in compared)


@pytest.mark.slow
def test_half_precision_halves_the_file(dynamic: Any, tmp_path: Path) -> None:
    """Compared with a file of the same weights."""

    def bytes_of_weights(path: Path) -> int:
        weights = onnx.load(str(path)).graph.initializer
        return sum(np.prod(one.dims) * 4 for one in weights if one.data_type == onnx.TensorProto.FLOAT)

    model, path, image = net("edges | budget:fraction=0.3"), tmp_path / "half.onnx", picture(1, 72, 104)
    cs.export(model, image, path, precision="float16")
    with torch.no_grad():
        assert_same(File(path)(image.flip(2))["out"], model(image.flip(2))["out"], 2e-2)
    assert bytes_of_weights(path) < bytes_of_weights(dynamic[1]) / 2


def test_an_engine_without_kernels_is_refused_files_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of the user needs no twin with kernels."""
    monkeypatch.setitem(ENGINES, "mine", OnnxRuntime)
    assert engine_for("mine", with_kernels=False) is OnnxRuntime
    with pytest.raises(cs.UnknownName, match="with kernels named 'mine'"):
        engine_for("mine", with_kernels=True)


@pytest.mark.parametrize("broken", ["out", "aux"])
def test_the_largest_difference_of_any_output_decides(broken: str) -> None:
    expected = {"out": torch.ones(3), "aux": torch.full((2,), 4.0)}
    assert difference(expected, expected) == 0.0
    assert difference({**expected, "aux": torch.tensor([4.0, 3.0])}, expected) == 0.25
    no_number = difference({**expected, broken: expected[broken] * math.nan}, expected)
    assert math.isnan(no_number) and check_difference([0.0, 1e-6, 1e-7]) == pytest.approx(1e-6)
    for largest, words in ((1.0, "the written file differs"), (no_number, "nan")):
        with pytest.raises(cs.CannotConvert, match=words):
            check_difference([0.0, largest, 1e-7])


def test_outputs_are_named_by_their_structure() -> None:
    one = torch.ones(1)
    assert output_names(one) == ("output",)
    assert output_names({"out": one, "aux": one}) == ("out", "aux")
    assert output_names([one, (one, one)]) == ("0", "1_0", "1_1")


@pytest.mark.slow
def test_the_command_writes_a_file(tmp_path: Path, command_line: Run) -> None:
    saved, path = saved_segmenter(tmp_path / "net.safetensors"), tmp_path / "net.onnx"
    told = command_line("export", saved, "-o", path, "--size", "64x96", "--dynamic", "--trust", "--json")
    assert told.code == 0, told.err
    assert told.json["format"] == "onnx" and told.json["image"] == [None, 3, None, None] and path.is_file()


def of_dictionary(net: Any, data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"scores": net.body(data["photo"])}


def of_dictionaries(net: Any, data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"scores": net.body(data["photo"]) * data["scale"].view(-1, 1, 1, 1)}


def scaled(image: Tensor, scale: float) -> dict[str, Tensor]:
    return {"scale": torch.full((len(image),), scale), "photo": image}


def of_scaled(mask: str = "edges") -> cs.AdaptiveModel:
    torch.manual_seed(0)
    example = (scaled(picture(1, 64, 96), 2.0),)
    model = Composed(of_dictionaries, body=strided(3, 8, outputs=3))
    return unverified(model.eval(), mask, example_input=example)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("then", "file"),
    [
        *((of_dictionary, "net.onnx"), thorough(of_dictionary, "net.pt2")),
        *((of_dictionaries, file) for file in ("net.onnx", "openvino.onnx", "net.pt2")),
    ],
)
@pytest.mark.filterwarnings("ignore:the network is compiled before it has seen a picture")
def test_every_tensor_of_a_dictionary_is_an_input_by_its_name(
    then: Callable[..., Any], file: str, tmp_path: Path
) -> None:
    """An image alone is the only tensor of a dictionary."""
    given = {"scale": torch.full((1,), 2.0)} if then is of_dictionaries else {}
    engine, path, mask = "onnx", tmp_path / file, "edges | budget:fraction=0.3"
    if file == "openvino.onnx":
        pytest.importorskip("openvino")
        engine = "openvino"
    image = picture(1, 64, 96)
    call = {**given, "photo": image}
    model = Composed(then, body=strided(3, 8, outputs=3)).eval()
    model = unverified(model, mask, example_input=(call,))
    report = cs.export(model, call if given else image, path, check_in=engine)
    run = File(path) if path.suffix == ".onnx" else torch.export.load(path).module()
    assert report.inputs == ("photo", *given)
    other = {**{name: -1.5 * value for name, value in given.items()}, "photo": image.flip(3)}
    with torch.no_grad():
        assert_same(
            run(other["photo"], *[other[name] for name in given])["scores"], model(other)["scores"], 1e-4
        )


@pytest.mark.filterwarnings("ignore:the outputs of the file in 8 bits differ")
@pytest.mark.slow
@pytest.mark.parametrize("form", [thorough("images"), "dictionaries"])
def test_a_file_in_8_bits_takes_every_tensor_of_a_dictionary(form: str, tmp_path: Path) -> None:
    model, image = of_scaled(), picture(1, 64, 96)
    batches: Any = [image, image.flip(3)]
    if form == "dictionaries":
        batches = [scaled(batch, 4.0) for batch in batches]
    report = cs.export(
        model, scaled(image, 2.0), tmp_path / "net.onnx", precision="int8", calibration=batches
    )
    run = File(tmp_path / "net.onnx")
    assert report.inputs == ("photo", "scale")
    outputs = [run(image, torch.full((1,), scale))["scores"] for scale in (2.0, 4.0)]
    assert_same(2 * outputs[0], outputs[1], 0.05)


def of_pair() -> cs.AdaptiveModel:
    example = {"image": picture(1, 64, 96), "other": picture(1, 64, 96)}
    return unverified(Pair().eval(), "edges", example_input=example)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = strided()

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        return self.layers(image) + other.mean()


def of_places() -> cs.AdaptiveModel:
    """A network that gives a dictionary whose keys are tuples."""
    model = Composed(lambda net, x: {("scores", 0): net.body(x)}, body=strided(3, 8, outputs=3))
    return unverified(model.eval(), BUDGET, output_stride=(2, 8))


def small(height: int, width: int) -> dict[str, Any]:
    return {"image": images(1, height, width), "dynamic": True}


BUDGET, IMAGE = "edges | budget:fraction=0.3", picture(1, 72, 104)
FLAT = torch.zeros(18, 26, dtype=torch.int8)
IN_8_BITS = {"precision": "int8", "calibration": [IMAGE]}
SEVERAL = {"image": scaled(IMAGE, 2.0), "dynamic": True}
# A network; what is given in place of an image of 72 x 104 and of `net.onnx`, and options; the error, and its words.
REFUSED: list[tuple[Any, dict[str, Any], type[cs.CadError], str]] = [
    (lambda: net("edges"), {"path": "net.pt2"}, cs.InvalidInput, r"budget:fraction=0\.3"),
    *(
        (partial(net, mask), {"dynamic": True}, cs.InvalidInput, "level_map=True")
        for mask in ("edges | smooth", "trimap", FLAT)
    ),
    *(
        (partial(net, output_stride=(4, 8)), small(*size), cs.InvalidInput, words)
        for size in ((1, 1), (4, 96), (96, 3))
        for words in (f"(?s){size[0]} x {size[1]} pixels is too small.*dynamic=False",)
    ),
    (of_places, {"path": "net.pt2"}, cs.CannotConvert, r"cannot return .* the key \('scores', 0\)"),
    (lambda: of_scaled(), {}, cs.InvalidInput, "reads 'scale', 'photo' from x"),
    (lambda: of_scaled(), SEVERAL, cs.InvalidInput, "inputs photo, scale cannot be dynamic"),
    (of_pair, {}, cs.InvalidInput, "takes image, other, and only the image is given"),
    (lambda: net(BUDGET).train(), {"path": "net.pt2"}, cs.InvalidInput, "eval"),
    *(
        (partial(net, BUDGET), options, error, words)
        for options, error, words in [
            ({"path": "net.pt2", "dynamic": True}, cs.InvalidInput, "cannot be dynamic"),
            ({"path": "net.pt2", "image": IMAGE[0]}, cs.InvalidInput, "image"),
            ({"path": "net.pt2", "with_kernels": True}, cs.InvalidInput, "with_kernels"),
            ({"with_kernels": True, "precision": "float16"}, cs.InvalidInput, "with kernels"),
            ({"to": "tflite"}, cs.InvalidInput, "no format"),
            ({"check_in": "tvm"}, cs.UnknownName, "tvm"),
            ({**IN_8_BITS, "calibration": []}, cs.InvalidInput, "no images"),
            ({**IN_8_BITS, "calibration": [IMAGE[0, 0]]}, cs.InvalidInput, "no images"),
            ({**IN_8_BITS, "calibration": ["folder"]}, cs.InvalidInput, "no images"),
            ({**IN_8_BITS, "calibration": [picture(1, 64, 104)]}, cs.InvalidInput, "dynamic=True"),
            ({**IN_8_BITS, "to": "pt2"}, cs.InvalidInput, "cannot be int8"),
            ({"precision": "int8"}, cs.InvalidInput, "int8 lacks images"),
            ({**IN_8_BITS, "precision": "float16"}, cs.InvalidInput, "float16 takes no images"),
            ({"precision": "float", "calibration": []}, cs.InvalidInput, "float takes no images"),
            ({"precision": "bfloat16"}, cs.UnknownName, "float, float16, int8"),
        ]
    ),
]


@pytest.mark.parametrize(("make", "given", "error", "words"), REFUSED)
def test_what_is_not_written_is_refused_and_leaves_nothing(
    make: Any, given: dict[str, Any], error: type[cs.CadError], words: str, tmp_path: Path
) -> None:
    given = {"image": IMAGE, "path": "net.onnx", **given}
    with pytest.raises(error, match=words) as caught:
        cs.export(make(), given.pop("image"), tmp_path / given.pop("path"), **given)
    assert caught.value.next and not list(tmp_path.iterdir())


def test_without_its_package_no_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(cs.CadError, match=r"cadsurgery\[export\]"):
        cs.export(net(BUDGET), IMAGE, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def of_multiples(net: Any, image: Tensor) -> Tensor:
    """Refuses sizes that are no multiples of 16 with an error of its own, where its maps are as deep."""
    height, width = image.shape[2:]
    cells = image.view(len(image), 3, height // 16, 16, width // 16, 16)
    return net.body(image) + cells.mean((3, 5))


def test_examples_of_any_size_are_those_that_the_network_accepts() -> None:
    image, model = picture(1, 64, 96), Composed(of_multiples, body=strided(4, 8, outputs=3)).eval()
    net = unverified(model, "edges", output_stride=(2, 16), example_input=image)
    with torch.no_grad():
        assert _cut_awkwardly(net, image).image.shape == image.shape
        sizes = [tuple(answer.image.shape) for answer in _of_other_sizes(net, image)]
    assert sizes == [(2, 3, 80, 32)]


def joined(net: Any, image: Tensor) -> Tensor:
    """A pyramid whose maps are added where they have the same size: sides of images are multiples of 8."""
    maps = [image]
    for layer in net.down:
        maps.append(layer(maps[-1]).relu())
    y = net.up[0](maps[3])
    for layer, beside in zip(net.up[1:], maps[2:0:-1], strict=True):
        y = layer(beside + F.interpolate(y, scale_factor=2.0))
    return y


def of_joined(image: Tensor) -> cs.AdaptiveModel:
    down = nn.ModuleList(nn.Conv2d(c, 4, 3, stride=2, padding=1, bias=False) for c in (3, 4, 4))
    model = Composed(joined, down=down, up=nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    return unverified(model.eval(), "edges", coarsest=8, example_input=image)


@pytest.mark.slow
@pytest.mark.parametrize("level_map", [False, True])
def test_files_for_multiples_derive_each_lattice_once_and_refuse_other_sizes(
    level_map: bool, tmp_path: Path
) -> None:
    """Maps that are joined have one size for all images, so files have the lattices of one way through the strides."""
    net = of_joined(picture(1, 64, 96))
    report = cs.export(
        net, picture(1, 64, 96), tmp_path / "net.onnx", dynamic=True, level_map=level_map, with_kernels=True
    )
    assert report.multiple == 8
    nodes = onnx.load(tmp_path / "net.onnx").graph.node
    assert sum(node.op_type == "FindCells" for node in nodes) <= net.geometry.stages
    run = engine_for("onnx", with_kernels=True)(tmp_path / "net.onnx", 1)
    for height, width in ((40, 72), (16, 24), (128, 64)):
        image = picture(2, height, width)
        expected = net(image)
        found, levels = run(image, *((net.levels.long(),) if level_map else ()))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(levels, net.levels)
    image = picture(1, 60, 96)
    rest = (torch.zeros(1, *net.levels.shape[1:]).long(),) if level_map else ()
    with pytest.raises(cs.CannotConvert, match="does not run the file"):
        run(image, *rest)


@pytest.mark.slow
def test_an_image_that_a_network_accepts_by_chance_has_a_file(tmp_path: Path) -> None:
    """95 is halved to 48, 24 and 12: maps are joined, although 95 is no multiple of 8."""
    image = picture(1, 95, 64)
    net = of_joined(image)
    report = cs.export(net, image, tmp_path / "net.onnx", dynamic=True)
    assert report.multiple == 1 and report.compared[0] == (1, 3, 95, 64)


def other_pool(y: Tensor) -> Tensor:
    return F.avg_pool2d(y, (3, 2), 1, (1, 0), divisor_override=4)


def translated(net: Any, x: Tensor, y: Tensor) -> Tensor:
    """torch.export asks of rolls and norms of neighbours whether there are values; torch's translation to ONNX does not
    know dropout of channels, and leaves out the divisor of a pooling."""
    y = y + y.unflatten(1, (2, -1)).roll((1, -1), (1, 2)).flatten(1, 2)
    y = F.local_response_norm(other_pool(y), 3, alpha=0.5)
    return net.head(other_pool(F.dropout2d(F.interpolate(y, size=x.shape[2:]), 0.5, net.training)))


def stretched(net: Any, x: Tensor) -> Tensor:
    """A map is halved without padding, and resized to the size before: 24 samples to 50, of which the 25th reads the
    12th, or by a little less the 11th."""
    x = net.stem(x)
    return net.last(net.rest(x + F.interpolate(net.down(x), size=x.shape[-2:])))


def gated_in_front(net: Any, x: Tensor) -> Tensor:
    """In front of the region channels are weighted by windows of the map's size."""
    x = net.stem(x)
    gate = F.avg_pool2d(x, (x.size(2), x.size(3))) + F.max_pool2d(x, x.shape[2:], x.shape[2:])
    return net.rest(x * gate.sigmoid())


def rounded_up(net: Any, x: Tensor, y: Tensor) -> Tensor:
    """Sizes and positions rounded up by way of negative numbers, as in Python."""
    bins = F.adaptive_avg_pool2d(y, 3)
    y = net.head(y + F.interpolate(bins, size=y.shape[2:], mode="bilinear"))
    y = F.interpolate(y, size=[-(-side // 3) for side in x.shape[2:]])
    return y - (-torch.arange(y.shape[3]) // 4)


def several_kinds(net: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """What torch decides by the example's size: bins of a dense map, a line of numbers, a norm by the batch; for images
    that the network joins along the batch, too."""
    x = net.norm(net.layers(torch.cat([image, image.flip(3)], 0)))
    dense = torch.linalg.vector_norm(x.flip(3), dim=1, keepdim=True)  # a flip ends the region
    line = torch.linspace(-1, 1, x.shape[3]).view(1, 1, 1, -1)
    return net.last(torch.cat([x, x.flip(3) + line], 1)).mean((2, 3)), F.adaptive_avg_pool2d(dense, (3, 5))


def conv(inputs: int, stride: int, padding: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, 4, 3, stride, padding)


SIZES = ((64, 96), (75, 101), (128, 160))
STRETCHED = tuple((68, width) for width in range(60, 130, 3))  # of each remainder by 4
# A network, options of its conversion, the sizes of images, and how far its files may be.
OF_ANY_SIZE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Any, float]] = {
    "translated otherwise": (lambda: Encoded(translated, 4), {}, SIZES, 1e-4),
    "stretched": (
        lambda: Composed(stretched, stem=conv(3, 2), down=conv(4, 2, 0), rest=conv(4, 2), last=conv(4, 1)),
        *({"mask": "none", "output_stride": (2, 4)}, STRETCHED, 1e-4),
    ),
    "gated in front": (
        lambda: Composed(gated_in_front, stem=conv(3, 2), rest=strided(3, 4, inputs=4)),
        *({"output_stride": (4, 16)}, SIZES, 1e-5),
    ),
    "rounded up": (lambda: Encoded(rounded_up), {}, SIZES, 1e-5),
    "several kinds": (
        lambda: Composed(
            several_kinds,
            layers=strided(3, 8),
            norm=nn.BatchNorm2d(8, track_running_stats=False),
            last=nn.Conv2d(16, 4, 1),
        ),
        *({}, ((96, 120), (75, 101), (128, 64)), 1e-3),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_what_torch_decides_or_translates_otherwise_is_the_networks_at_any_size(
    name: str, tmp_path: Path
) -> None:
    make, options, sizes, tolerance = OF_ANY_SIZE[name]
    example, path = picture(1, 64, 96), tmp_path / "net.onnx"
    net = unverified(make().eval(), **{"mask": "edges", "example_input": example, **options})
    assert cs.export(net, example, path, dynamic=True).difference < 1e-4
    for engine in ENGINES_HERE if name == "rounded up" else ("onnx",):
        run = ENGINES[engine](path)
        for image in (picture(2, *size) for size in sizes):
            *outputs, levels = run(image)
            with torch.no_grad():
                expected = tree_leaves(net(image, mask=levels.long()))
            for one, other in zip(outputs, expected, strict=True):
                assert_same(one, other, tolerance)
            net(image)
            assert engine != "onnx" or name == "several kinds" or torch.equal(levels, net.levels)


def test_a_file_of_a_large_example_is_compared_on_smaller_images_of_other_sizes() -> None:
    """One side is longer than the traced example's."""
    image = picture(1, 300, 520)
    model = unverified(strided(4, 8, outputs=3), "edges", output_stride=(2, 8), example_input=image)
    with torch.no_grad():
        answers = [*_of_other_sizes(model, image)]
        assert all(torch.equal(answer.output, model(answer.image)) for answer in answers)
    sizes = [tuple(answer.image.shape) for answer in answers]
    assert sizes == [(1, 3, 123, 253), (2, 3, 248, 64)]


def test_an_example_smaller_than_a_cell_is_not_cut() -> None:
    image = picture(1, 64, 96)
    for stride in (1, 4):
        net = unverified(strided(6, 4), "edges", output_stride=(stride, 64), example_input=image)
        with torch.no_grad():
            height, width = _cut_awkwardly(net, image).image.shape[2:]
        assert height == 64 and width > 64


# -- sizes in programs for any size stay short: each stage starts from symbols of its own ----------


def stages(count: int) -> nn.Module:
    """Stages whose sizes are rounded down (pools) and up (convolutions)."""
    layers, widths = [conv_norm(3, 6)], [6 + 2 * stage for stage in range(count + 1)]
    for place, (a, b) in enumerate(pairwise(widths)):
        layers.append(conv_norm(a, b, 2) if place % 2 else nn.Sequential(nn.MaxPool2d(2, 2), conv_norm(a, b)))
    return randomise(nn.Sequential(*layers))


def of_stages(count: int, mask: object = "edges") -> cs.AdaptiveModel:
    torch.manual_seed(0)
    example = torch.rand(1, 3, 96, 128)
    return unverified(stages(count), mask, example_input=example).eval()


def followed(net: cs.AdaptiveModel, image: Tensor) -> Any:
    with torch.no_grad():
        program, free = follow(Exportable(net, float16=False), (image,), dynamic=True)
    assert free == {0, 2, 3}
    return program


def longest_size(stages: int) -> int:
    program = followed(of_stages(stages), torch.rand(1, 3, 125, 155))
    values = (node.meta.get("val") for node in program.graph.nodes)
    lengths = (length for value in values if isinstance(value, Tensor) for length in value.shape)
    return max(int(sympy.count_ops(one.node.expr)) for one in lengths if isinstance(one, torch.SymInt))


@pytest.mark.slow
def test_sizes_do_not_grow_with_the_number_of_stages() -> None:
    assert longest_size(5) == longest_size(3)


class Cancels(nn.Sequential):
    """Sums in which large numbers cancel, so that float32 rounds to some ten thousandths."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 256, 3, 2, 1),
            nn.Conv2d(256, 64, 1, 2),  # no border, where less would cancel
            nn.ReLU(),
            nn.Conv2d(64, 4, 3, 1, 1),
        )
        with torch.no_grad():
            self[0].bias.fill_(500.0)
            self[1].weight.sub_(self[1].weight.mean((1, 2, 3), keepdim=True))


@pytest.mark.slow
def test_a_file_may_differ_by_what_its_network_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 3, 64, 96)
    net = unverified(Cancels().eval(), "edges", example_input=image)
    own = compare.rounding_of(net, [image])
    assert own > 1e-4
    monkeypatch.setattr(onnx_files, "TOLERANCE", 1e-12)  # less than any file differs
    assert 1e-12 < cs.export(net, image, tmp_path / "net.onnx").difference < 4 * own
    monkeypatch.setattr(compare, "_TIMES_ROUNDING", 1e-9)
    with pytest.raises(cs.CannotConvert, match="whose own rounding, in float32 instead of float64, is"):
        cs.export(net, image, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


SHORT = "all"  # a mask that asks for no operations: for what raises whatever the file computes
FILES = [("net.onnx", {"dynamic": True}), ("net.pt2", {})]
ADVICE = {"dynamic": "write a file for one size", "net.onnx": "level_map=True", "net.pt2": "to='onnx'"}


@pytest.mark.slow
@pytest.mark.parametrize(("file", "options"), FILES)
def test_what_torch_raises_names_the_operation_and_another_file(
    file: str, options: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = "edges | budget:fraction=0.3"
    net = unverified(strided(3, outputs=4, kernel=3), mask, example_input=torch.randn(1, 3, 64, 96))

    def fail(*args: object, **options: object) -> Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("Eq(u1, 0)")
        return convolve(*args, **options)

    convolve = dense.convolve
    monkeypatch.setattr(dense, "convolve", fail)
    monkeypatch.setattr(reference.Expression, "convolve", lambda self, work: fail())
    monkeypatch.setattr(portable.Portable, "convolve", lambda self, work: fail())
    with pytest.raises(cs.CannotConvert) as refusal:
        cs.export(net, torch.randn(1, 3, 64, 96), tmp_path / file, **options)
    error = refusal.value
    assert ("fused_conv2d, in the original" if file == "net.onnx" else "conv2d") in error.where
    assert "Eq(u1, 0)" in error.why
    assert {name for name, words in ADVICE.items() if words in error.next} == {file, *options}
    assert not list(tmp_path.iterdir())


def chosen() -> nn.Module:
    return Composed(lambda _, x: x + torch.masked_select(x, x > x.mean()).split(7)[0].mean())


def test_what_others_print_while_torch_is_silent_is_seen_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Progress bars are drawn on stderr while a network is traced."""
    with quietly():
        print("tracing", file=sys.stderr)
        assert capfd.readouterr().err == "tracing\n"


# What raises while a file is written: the owner's module, and the function's name in it.
# What raises while a file is written; what is given a path has written a half of it.
PHASES = {
    ("net.onnx", "copy"): "cadsurgery.network.export.onnx.Exportable",
    ("net.onnx", "export"): "torch.export.export",
    ("net.onnx", "decompositions"): "cadsurgery.network.export.onnx.decompose",
    ("net.onnx", "translation"): "torch.onnx._internal.exporter._core._translate_fx_graph",
    ("net.onnx", "optimisation"): "onnxscript.optimizer.fold_constants_ir",
    ("net.onnx", "saving"): "torch.onnx.ONNXProgram.save",
    ("net.onnx", "checking"): "onnx.checker.check_model",
    ("net.onnx", "opening"): "onnxruntime.InferenceSession",
    ("net.onnx", "comparison"): "cadsurgery.network.export.onnx.difference",
    ("net.onnx", "ranges of 8 bits"): "cadsurgery.network.export.int8._reduce",
    ("net.onnx", "weights of 8 bits"): "cadsurgery.network.export.in_bytes.round_weight",
    ("net.onnx", "comparison of 8 bits"): "cadsurgery.network.export.int8.measure",
    ("net.pt2", "export"): "torch.export.export",
    ("net.pt2", "saving"): "torch.export.save",
    ("net.pt2", "loading"): "torch.export.load",
    ("net.pt2", "comparison"): "cadsurgery.network.export.programs.difference",
}


@pytest.mark.parametrize(
    ("file", "phase"), [case if case[1] in ("copy", "export") else thorough(*case, few=4) for case in PHASES]
)
def test_whatever_raises_is_refused_and_leaves_nothing(
    file: str, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was there before stays as it was."""
    path = tmp_path / file
    path.write_bytes(b"an older file")
    net = unverified(strided(2, outputs=4), SHORT, example_input=torch.randn(1, 3, 64, 96))

    def fail(*args: object, **options: object) -> object:
        for part in args:
            if phase == "saving" and isinstance(part, str | Path):
                Path(part).write_bytes(b"half")
        raise RuntimeError("not today")

    monkeypatch.setattr(PHASES[file, phase], fail)
    in_8_bits: Any = {"precision": "int8", "calibration": torch.randn(2, 3, 64, 96)}
    options = in_8_bits if phase.endswith("8 bits") else {}
    with pytest.raises(cs.CannotConvert) as refusal:
        cs.export(net, torch.randn(1, 3, 64, 96), path, **options)
    assert "not today" in refusal.value.why and refusal.value.next
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [(file, b"an older file")]


def bessel() -> nn.Module:
    return Composed(lambda _, x: torch.special.bessel_j1(x))


# A module between a strided network and its last layer; the file; words of the refusal, and its place.
AT_AN_OPERATION: list[Any] = [
    *((chosen, *file, "data-dependent", "split (test_export.py:") for file in FILES),
    *(
        (bessel, *file, "No ONNX function found", "special_bessel_j1 (test_export.py:")
        for file in (("net.onnx", {}), FILES[0])
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "file", "options", "words", "where"), AT_AN_OPERATION)
def test_what_no_file_can_hold_is_refused_at_its_operation_and_nothing_is_printed(
    kind: Any,
    file: str,
    options: dict[str, bool],
    words: str,
    where: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of values torch raises GuardOnDataDependentSymNode, and prints the graph so far."""
    model = nn.Sequential(strided(2, outputs=4), kind(), nn.Conv2d(4, 4, 1)).eval()
    net = unverified(model, SHORT, example_input=torch.rand(1, 3, 64, 96))
    capfd.readouterr()
    with pytest.raises(cs.CannotConvert, match=words) as refusal:
        cs.export(net, torch.rand(1, 3, 64, 96), tmp_path / file, **options)
    assert refusal.value.where.startswith(where) and refusal.value.next
    assert kind is chosen or refusal.value.where.endswith(", in the original 1")
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["net.onnx", "net.pt2"])
def test_a_full_disk_is_said_and_leaves_nothing(file: str, tmp_path: Path) -> None:
    """Files cannot grow beyond some bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    net, limit = of_stages(2, SHORT), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
    try:
        with pytest.raises(cs.FileError, match=r"cannot be written[\s\S]*File too large"):
            cs.export(net, torch.rand(1, 3, 96, 128), tmp_path / file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_path_that_cannot_be_written_is_refused_before_any_work(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"folder.{suffix}").mkdir()
    (tmp_path / f"mine.{suffix}").write_bytes(b"mine")
    (tmp_path / f"mine.{suffix}").chmod(0o444)
    net, steps = of_stages(1, mask="edges | budget:fraction=0.3"), list[str]()
    for name in ("no/net", "mine", "folder"):
        with pytest.raises(cs.FileError, match=name.split("/")[0]):
            path = tmp_path / f"{name}.{suffix}"
            cs.export(net, torch.rand(1, 3, 96, 128), path, step=lambda text, *more: steps.append(text))
    assert not steps and len(list(tmp_path.iterdir())) == 2


def residual_blocks(count: int) -> nn.Module:
    """Residual blocks of factorised and dilated convolutions behind two strides."""

    def block() -> nn.Module:
        wide = nn.Conv2d(8, 8, (3, 1), padding=(2, 0), dilation=(2, 1))
        return Composed(lambda net, x: F.relu(x + net.body(x)), body=nn.Sequential(wide, conv_norm(8, 8)))

    return randomise(nn.Sequential(conv_norm(3, 8, 2), conv_norm(8, 8, 2), *(block() for _ in range(count))))


def work_for(blocks: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count what torch does while it follows a network: operations, symbols, and decisions about sizes."""
    counts: Counter[str] = Counter()
    decide = ShapeEnv._evaluate_expr

    def count(self: ShapeEnv, *args: Any, **options: Any) -> Any:
        counts["decisions"] += 1
        return decide(self, *args, **options)

    monkeypatch.setattr(ShapeEnv, "_evaluate_expr", count)
    image = torch.rand(1, 3, 61, 93)
    net = unverified(residual_blocks(blocks), "edges", example_input=image).eval()
    program = followed(net, image)
    monkeypatch.undo()
    values = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    symbols = {symbol for x in values for length in x.shape for symbol in free_symbols(length)}
    return counts + Counter(operations=len(program.graph.nodes), symbols=len(symbols))


@pytest.mark.slow
def test_each_block_of_a_network_adds_as_much_work_as_the_one_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So twice the blocks take at most twice the time."""
    few, more, most = (work_for(blocks, monkeypatch) for blocks in (2, 3, 4))
    assert few["operations"] < more["operations"] and few["symbols"] > 2
    assert {name: more[name] - few[name] for name in more} == {name: most[name] - more[name] for name in more}
