"""Files for engines other than torch: what they give is what the network gives, at sizes, batches and masks the example
did not have; what cannot be written is refused, and nothing is left behind."""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images, picture, random_levels, slow, thorough
from exported import ENGINES_HERE, File, assert_same_file, net
from networks import randomise, saved_segmenter, strided, unverified
from torch import Tensor, nn

import cadsurgery as cs
from benchmarks import export_matrix
from cadsurgery.network.export.compare import check_difference, difference, more_images
from cadsurgery.network.export.engines import ENGINES, OnnxRuntime, engine_for
from cadsurgery.network.export.names import output_names
from cadsurgery.network.export.onnx import _cut_awkwardly, _of_other_sizes

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
    ("dynamic", "level_map"),
    [slow(False, False), thorough(True, False), slow(True, True)],
)
def test_axes_have_the_same_names_in_inputs_and_outputs(
    dynamic: bool, level_map: bool, tmp_path: Path
) -> None:
    """So that shape inference, and whoever fixes the number of images, reads one symbol."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 2, 1)
    ).eval()
    net = cs.adaptify(network, "edges", coarsest=8, verify_laws=False)
    cs.export(net, torch.rand(1, 3, 32, 64), tmp_path / "net.onnx", dynamic=dynamic, level_map=level_map)
    graph = onnx.load(tmp_path / "net.onnx").graph
    shapes = {
        value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert {shape[0] for shape in shapes.values()} == {"batch"}
    sides = ["height", "width"] if dynamic else ["", ""]
    assert shapes["image"][2:] == shapes["levels"][1:] == sides


@pytest.mark.parametrize(
    ("number", "options"),
    [slow(1, {}), slow(2, {"dynamic": True, "level_map": True})],
)
def test_a_file_may_take_as_many_images_as_its_example_alone(
    number: int, options: dict[str, bool], tmp_path: Path
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, 2, 1)).eval()
    net = cs.adaptify(network, "edges", coarsest=8, verify_laws=False)
    report = cs.export(net, picture(number, 32, 64), tmp_path / "net.onnx", fixed_batch=True, **options)
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert [value.type.tensor_type.shape.dim[0].dim_value for value in (*graph.input, *graph.output)] == (
        [number] * len([*graph.input, *graph.output])
    )
    assert report.image[0] == number and {shape[0] for shape in report.compared} == {number}


@pytest.mark.slow
def test_a_file_says_what_it_was_made_of(dynamic: Any) -> None:
    model, path, _ = dynamic
    said = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    assert said["cadsurgery.mask"] == model.mask.spec()
    assert cs.Plan.from_json(said["cadsurgery.plan"]) == model.plan
    assert torch.__version__.startswith(json.loads(said["cadsurgery.versions"])["torch"])
    assert json.loads(said["cadsurgery.options"]) == {"fill": "linear", "dynamic": True, "multiple": 1}


@pytest.mark.slow
def test_a_file_has_standard_operations_alone(dynamic: Any) -> None:
    _, path, _ = dynamic
    model = onnx.load(str(path))
    assert {one.domain for one in model.opset_import} <= {"", "ai.onnx"} and not model.functions
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}


class Indexed(nn.Module):
    """Indices as torch has them: of one axis, of two, of a mask."""

    def forward(self, x: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        return x[rows], x[:, columns], x[rows, :, columns], x[:, rows, columns], x[x > 0.5]


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


def fixed_levels() -> Tensor:
    torch.manual_seed(0)
    return random_levels(1, (36, 52), (2, 2))[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "fill", "dynamic"),
    [
        ("edges:threshold=0.35/0.1,dilation=11/21", "guided", True),  # `dynamic` is of edges, linear
        thorough("detail", "nearest", True),
        ("edges | budget:fraction=0.1/0.3", "linear", True),
        (fixed_levels(), "linear", False),
    ],
    ids=["guided", "nearest", "a budget", "a fixed map"],
)
def test_every_mask_and_fill_is_the_network(mask: Any, fill: str, dynamic: bool, tmp_path: Path) -> None:
    model, path = net(mask, fill=fill), tmp_path / "net.onnx"
    report = cs.export(model, picture(1, 72, 104), path, dynamic=dynamic)
    assert report.image == ((None, 3, None, None) if dynamic else (None, 3, 72, 104))
    sizes = ((2, 93, 75), (1, 64, 160)) if dynamic else ((3, 72, 104),)
    assert_same_file(path, model, *(picture(*size).flip(2) * 0.7 for size in sizes))


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


@pytest.mark.slow
def test_a_cell_of_the_matrix_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "networks:segmenter"
    monkeypatch.setitem(export_matrix.NETWORKS, name, {"output_stride": (8, 16)})
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # which would last
    row = export_matrix.export((name, "learned", "linear", "static"))
    assert row["result"] == "agrees" and row["difference"] < 1e-4 and 0 < row["active_fraction"] < 1


def test_a_file_is_compared_in_both_memory_layouts() -> None:
    """Whatever the layout of the example, and of another image to compare on."""
    image = picture(1, 72, 104)
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


@pytest.mark.filterwarnings("ignore:.*convolutions of rows in the file are depthwise or grouped")
def test_refusals_name_the_alternative_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, path = picture(1, 72, 104), tmp_path / "net.onnx"
    budget = net("edges | budget:fraction=0.3")
    with pytest.raises(cs.InvalidInput, match=r"budget:fraction=0\.3"):
        cs.export(net("edges"), image, tmp_path / "net.pt2")
    for mask in ("edges | smooth", "trimap", torch.zeros(18, 26, dtype=torch.int8)):
        with pytest.raises(cs.InvalidInput, match="level_map=True"):
            cs.export(net(mask), image, path, dynamic=True)
    with pytest.raises(cs.InvalidInput, match="cannot be dynamic"):
        cs.export(budget, image, tmp_path / "net.pt2", dynamic=True)
    with pytest.raises(cs.InvalidInput, match="no format"):
        cs.export(budget, image, path, to="tflite")  # type: ignore[arg-type]
    with pytest.raises(cs.UnknownName, match="tvm"):
        cs.export(budget, image, path, check_in="tvm")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(cs.CadError, match=r"cadsurgery\[export\]"):
            cs.export(budget, image, path)
    with monkeypatch.context() as patched:
        patched.setattr(torch.onnx, "export", lambda *given, **options: 1 / 0)
        with pytest.raises(cs.CannotConvert, match="ZeroDivisionError"):
            cs.export(budget, image, path)
    assert not list(tmp_path.iterdir())


def test_an_engine_without_kernels_is_refused_files_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of the user needs no twin with kernels."""
    monkeypatch.setitem(ENGINES, "mine", OnnxRuntime)
    assert engine_for("mine", with_kernels=False) is OnnxRuntime
    with pytest.raises(cs.UnknownName, match="with kernels named 'mine'"):
        engine_for("mine", with_kernels=True)


@pytest.mark.parametrize("size", [(1, 1), (4, 96), (96, 3)])
def test_an_example_of_any_size_has_more_than_one_sample_along_a_side(
    size: tuple[int, int], tmp_path: Path
) -> None:
    with pytest.raises(
        cs.InvalidInput, match=f"{size[0]} x {size[1]} pixels is too small(.|\n)*dynamic=False"
    ):
        cs.export(net("edges", output_stride=(4, 8)), images(1, *size), tmp_path / "net.onnx", dynamic=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["out", "aux"])
def test_a_difference_that_is_no_number_is_seen_in_any_output(broken: str) -> None:
    expected = {"out": torch.ones(3), "aux": torch.full((2,), 4.0)}
    assert difference(expected, expected) == 0.0
    assert difference({**expected, "aux": torch.tensor([4.0, 3.0])}, expected) == 0.25
    assert math.isnan(difference({**expected, broken: expected[broken] * math.nan}, expected))
    with pytest.raises(cs.CannotConvert, match="nan"):
        check_difference([difference({**expected, broken: expected[broken] * torch.nan}, expected), 0.0])


def test_outputs_are_named_by_their_structure() -> None:
    one = torch.ones(1)
    assert output_names(one) == ("output",)
    assert output_names({"out": one, "aux": one}) == ("out", "aux")
    assert output_names([one, (one, one)]) == ("0", "1_0", "1_1")


def test_it_is_compared_on_images_that_it_was_not_made_of() -> None:
    image = picture(1, 16, 16)
    assert not any(torch.equal(image, other) for other in more_images(image, None))


@pytest.mark.slow
def test_the_command_writes_a_file(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from cadsurgery.cli.main import make_app

    saved, path = tmp_path / "net.safetensors", tmp_path / "net.onnx"
    words = (
        "export",
        saved_segmenter(saved),
        "-o",
        path,
        "--size",
        "64x96",
        "--dynamic",
        "--trust",
        "--json",
    )
    told = CliRunner().invoke(make_app(), [*map(str, words)])
    assert told.exit_code == 0, told.output
    said = json.loads(told.stdout)
    assert said["format"] == "onnx" and said["image"] == [None, 3, None, None] and path.is_file()


class OfDictionary(nn.Module):
    """Takes its image in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.body = strided(3, 8, outputs=3)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"scores": self.body(data["photo"])}


class Scaled(OfDictionary):
    """Takes more than its image from the dictionary."""

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"scores": super().forward(data)["scores"] * data["scale"].view(-1, 1, 1, 1)}


def scaled(image: Tensor, scale: float) -> dict[str, Tensor]:
    return {"scale": torch.full((len(image),), scale), "photo": image}


def of_scaled(mask: str = "edges") -> cs.AdaptiveModel:
    torch.manual_seed(0)
    example = (scaled(picture(1, 64, 96), 2.0),)
    return unverified(Scaled().eval(), mask, example_input=example)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "file"),
    [
        *((OfDictionary, "net.onnx"), thorough(OfDictionary, "net.pt2")),
        *((Scaled, "net.onnx"), (Scaled, "openvino.onnx"), (Scaled, "net.pt2")),
    ],
)
@pytest.mark.filterwarnings("ignore:the network is compiled before it has seen a picture")
def test_every_tensor_of_a_dictionary_is_an_input_by_its_name(
    make: type[nn.Module], file: str, tmp_path: Path
) -> None:
    """An image alone is the only tensor of a dictionary."""
    given = {"scale": torch.full((1,), 2.0)} if make is Scaled else {}
    engine, path, mask = "onnx", tmp_path / file, "edges | budget:fraction=0.3"
    if file == "openvino.onnx":
        pytest.importorskip("openvino")
        engine = "openvino"
    image = picture(1, 64, 96)
    call = {**given, "photo": image}
    model = unverified(make().eval(), mask, example_input=(call,))
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


class OfPlaces(OfDictionary):
    """Gives a dictionary whose keys are tuples."""

    def forward(self, x: Tensor) -> Any:
        return {("scores", 0): self.body(x)}


def test_a_program_refuses_keys_that_torchs_files_do_not_keep(tmp_path: Path) -> None:
    mask = "edges | budget:fraction=0.3"
    net = cs.adaptify(OfPlaces().eval(), mask, output_stride=(2, 8), verify_laws=False)
    with pytest.raises(cs.CannotConvert, match=r"cannot return .* the key \('scores', 0\)"):
        cs.export(net, picture(1, 64, 96), tmp_path / "net.pt2")
    assert not any(tmp_path.iterdir())


def test_an_image_alone_is_too_little_for_a_dictionary_of_several(tmp_path: Path) -> None:
    with pytest.raises(cs.InvalidInput, match="reads 'scale', 'photo' from data"):
        cs.export(of_scaled(), picture(1, 64, 96), tmp_path / "net.onnx")


def test_files_with_several_inputs_are_for_one_size(tmp_path: Path) -> None:
    given = scaled(picture(1, 64, 96), 2.0)
    with pytest.raises(cs.InvalidInput, match="inputs photo, scale cannot be dynamic"):
        cs.export(of_scaled(), given, tmp_path / "net.onnx", dynamic=True)


class OfMultiples(nn.Module):
    """Refuses sizes that are no multiples of 16 with an error of its own, where its maps are as deep."""

    def __init__(self) -> None:
        super().__init__()
        self.body = strided(4, 8, outputs=3)

    def forward(self, image: Tensor) -> Tensor:
        y = self.body(image)
        height, width = image.shape[2:]
        cells = image.view(len(image), 3, height // 16, 16, width // 16, 16)
        return y + cells.mean((3, 5))


def test_examples_of_any_size_are_those_that_the_network_accepts() -> None:
    image = picture(1, 64, 96)
    model = unverified(OfMultiples(), "edges", output_stride=(2, 16), example_input=image)
    with torch.no_grad():
        assert _cut_awkwardly(model, image).image.shape == image.shape
        sizes = [tuple(answer.image.shape) for answer in _of_other_sizes(model, image)]
    assert sizes == [(2, 3, 80, 32)]


class Joined(nn.Module):
    """A pyramid whose maps are added where they have the same size: sides of images are multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.Conv2d(before, 4, 3, stride=2, padding=1, bias=False) for before in (3, 4, 4)
        )
        self.up = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, image: Tensor) -> Tensor:
        maps = [image]
        for layer in self.down:
            maps.append(layer(maps[-1]).relu())
        y = self.up[0](maps[3])
        for layer, beside in zip(self.up[1:], maps[2:0:-1], strict=True):
            y = layer(beside + F.interpolate(y, scale_factor=2.0))
        return y


@pytest.mark.slow
@pytest.mark.parametrize("level_map", [False, True])
def test_files_for_multiples_derive_each_lattice_once_and_refuse_other_sizes(
    level_map: bool, tmp_path: Path
) -> None:
    """Maps that are joined have one size for all images, so files have the lattices of one way through the strides."""
    net = unverified(Joined().eval(), "edges", coarsest=8, example_input=picture(1, 64, 96))
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
    net = unverified(Joined().eval(), "edges", coarsest=8, example_input=image)
    report = cs.export(net, image, tmp_path / "net.onnx", dynamic=True)
    assert report.multiple == 1 and report.compared[0] == (1, 3, 95, 64)


class Dropped(nn.Module):
    """Dropout of channels behind the region."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout2d(F.interpolate(x, size=(64, 96)), 0.5, self.training)


class OtherPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, (3, 2), 1, (1, 0), divisor_override=4)


class Rolled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.unflatten(1, (2, -1)).roll((1, -1), (1, 2)).flatten(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [thorough(False), True])
def test_what_torch_cannot_follow_or_translates_otherwise_is_written(dynamic: bool, tmp_path: Path) -> None:
    """torch.export asks of rolls and norms of neighbours whether there are values; torch's translation to ONNX does not
    know dropout of channels, and leaves out the divisor of a pooling."""
    kinds = (Rolled(), OtherPool(), nn.LocalResponseNorm(3, alpha=0.5), Dropped(), OtherPool())
    model = nn.Sequential(strided(3, 4), *kinds, nn.Conv2d(4, 2, 1)).eval()
    image = picture(1, 64, 96)
    net = unverified(model, "edges", output_stride=(2, 8), example_input=image)
    report = cs.export(net, image, tmp_path / "net.onnx", dynamic=dynamic)
    assert report.difference < 1e-4
    assert_same_file(tmp_path / "net.onnx", net, image.flip(3))


class Stretched(nn.Module):
    """A map is halved without padding, and resized to the size before: 24 samples to 50, of which the 25th reads the
    12th, or by a little less the 11th."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2)
        self.rest, self.last = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(self.rest(x + F.interpolate(self.down(x), size=x.shape[-2:])))


@pytest.mark.slow
def test_a_resize_between_samples_reads_the_networks_own_in_files_of_any_size(tmp_path: Path) -> None:
    net = unverified(randomise(Stretched()).eval(), "none", output_stride=(2, 4))
    cs.export(net, picture(1, 64, 96), tmp_path / "net.onnx", dynamic=True)
    assert_same_file(
        tmp_path / "net.onnx", net, *(picture(1, 68, width) for width in range(60, 130, 3))
    )  # of each remainder by 4


class GatedInFront(nn.Module):
    """In front of the region channels are weighted by windows of the map's size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rest = nn.Conv2d(3, 4, 3, 2, 1), strided(3, 4, inputs=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = F.avg_pool2d(x, (x.size(2), x.size(3))) + F.max_pool2d(x, x.shape[2:], x.shape[2:])
        return self.rest(x * gate.sigmoid())


@pytest.mark.slow
def test_windows_of_the_maps_size_are_so_in_files_of_any_size(tmp_path: Path) -> None:
    net = unverified(randomise(GatedInFront()).eval(), "edges", output_stride=(4, 16))
    cs.export(net, picture(1, 64, 96), tmp_path / "net.onnx", dynamic=True)
    sizes = ((64, 96), (75, 101), (128, 160))
    assert_same_file(tmp_path / "net.onnx", net, *(picture(2, *size) for size in sizes), tolerance=1e-5)


class RoundedUp(nn.Module):
    """Sizes and positions rounded up by way of negative numbers, as in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.pool = strided(3, 4, outputs=2), nn.AdaptiveAvgPool2d(3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.maps(x)
        maps = maps + F.interpolate(self.pool(maps), size=maps.shape[2:], mode="bilinear")
        maps = F.interpolate(maps, size=[-(-side // 3) for side in x.shape[2:]])
        return maps - (-torch.arange(maps.shape[3]) // 4)


@pytest.mark.slow
def test_quotients_of_negative_numbers_are_rounded_down(tmp_path: Path) -> None:
    net = cs.adaptify(randomise(RoundedUp()).eval(), "edges", output_stride=(2, 8), verify_laws=False)
    cs.export(net, picture(1, 64, 96), tmp_path / "net.onnx", dynamic=True)
    for engine in ENGINES_HERE:
        run = ENGINES[engine](tmp_path / "net.onnx")
        for size in ((64, 96), (75, 101), (128, 160)):
            image = picture(2, *size)
            torch.testing.assert_close(run(image)[0], net(image), rtol=1e-5, atol=1e-5)


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
    model = unverified(strided(6, 4), "edges", output_stride=(1, 64), example_input=image)
    low = unverified(strided(6, 4), "edges", output_stride=(4, 64), example_input=image)
    with torch.no_grad():
        for one in (model, low):
            height, width = _cut_awkwardly(one, image).image.shape[2:]
            assert height == 64 and width > 64
