"""Every refusal: its class, what it says, and that it names a next step."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
from conftest import assert_same, rewritten
from networks import made_once, strided
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import read_image, write_picture
from cadsurgery.elements import kernel_map
from cadsurgery.elements.functional import to_elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Geometry
from cadsurgery.masks import resolve_mask
from cadsurgery.masks.keypoint_masks import KeypointMask
from cadsurgery.methods.resampling.locations import check_locations, smooth
from cadsurgery.support.provenance import find_device


@contextmanager
def refused(kind: type[cs.CadError], *words: str) -> Iterator[SimpleNamespace]:
    """The body raises exactly `kind`, saying what is wrong with `words` and naming a next step."""
    found = SimpleNamespace(error=None)
    with pytest.raises(cs.CadError) as caught:
        yield found
    error = found.error = caught.value
    assert type(error) is kind
    assert error.what and error.what in str(error)
    assert error.next, f"no next step: {error}"
    for word in words:
        assert word in str(error), f"{word!r} is not in: {error}"


def trunk(channels: int = 4, classes: int = 2) -> nn.Module:
    return strided(channels=channels, outputs=classes)


@made_once
def adapted(mask: object = "none", **options: Any) -> cs.AdaptiveModel:
    return cs.adaptify(trunk(), mask, verify_laws=False, **options)


IMAGE = torch.zeros(2, 3, 97, 129)  # its fine map is 13 x 17


# -- the shape of an error -----------------------------------------------------------------------------


def test_an_error_tells_what_where_why_and_next_in_text_and_json() -> None:
    error = cs.CannotConvert("it cannot.", where="here", why="because", next="do this.")
    assert str(error).splitlines() == ["it cannot.", "  Where: here", "  Why: because", "  Next: do this."]
    assert error.to_dict() == {
        "error": "CannotConvert",
        "what": "it cannot.",
        "where": "here",
        "why": "because",
        "next": "do this.",
    }


def test_an_unknown_name_lists_the_closest_and_the_known() -> None:
    error = cs.UnknownName("fruit", "aple", ["apple", "pear"])
    assert str(error).splitlines() == [
        "there is no fruit named 'aple'.",
        "  Next: did you mean apple? known: apple, pear.",
    ]


# -- calls ---------------------------------------------------------------------------------------------

# What every refusal of a mask's size, of levels and of strides says.
RIGHT = "13 x 17 | (2, 13, 17)"
LEVELS = "0 (keep the high resolution) to 2 | clamp"
PAIRS = " | ".join(["output_stride", *(f"({a}, {b})" for a, b in combinations((1, 2, 4, 8, 16, 32), 2))])
NOTHING = torch.full((1, 3, 64, 64), float("nan"))


def masked(mask: object) -> object:
    return adapted()(IMAGE, mask=mask)


def with_level(level: int) -> Tensor:
    levels = torch.zeros(2, 13, 17, dtype=torch.int64)
    levels[1, 5, 5] = level
    return levels


def with_value(value: str) -> Tensor:
    image = IMAGE.clone()
    image[1, 2, 50, 60] = float(value)
    return image


# By class: the words of a refusal, and the call.
REFUSALS: dict[type[cs.CadError], list[tuple[str, Callable[[], object]]]] = {
    cs.InvalidInput: [
        ("builtins:dict | Module", lambda: cs.build_model("builtins:dict", "none")),
        ("names no place | folder:PATH", lambda: cs.open_data("folder:")),
        ("shapes and no values", lambda: find_device("meta")),
        ("no device 'xpu'", lambda: find_device("xpu")),
        ("not a detector", lambda: KeypointMask(3)),
        ("smoothness=-1.0 | 0 or more", lambda: smooth(torch.zeros(1, 8, 8, 2), -1.0)),
        ("grid, grid, 2", lambda: check_locations(torch.zeros(1, 8), 1)),
        ("real", lambda: adapted()(IMAGE.to(torch.complex64))),
        ("not run yet | net(x)", lambda: adapted().levels),
        ("not run yet", lambda: adapted().active_fraction),
        ("not run yet", lambda: adapted().lattice),
        ("2..2 | to 1", lambda: adapted(output_stride=(8, 16))(IMAGE, mask=torch.full((13, 17), 2))),
        ("(5, 5) | 13 x 17", lambda: adapted(torch.zeros(5, 5, dtype=torch.long))(IMAGE)),
        ("8x8 | 9x8", lambda: Geometry((2, 2)).uniform(0, 1, (8, 8)).at(0, (9, 8))),
        ("max_level=3 | (2, 2)", lambda: Geometry((2, 2), max_level=3)),
        ("strides", lambda: Geometry((2, 0))),
        ("batch of 2", lambda: to_elements(torch.zeros(3, 4, 8, 8), Geometry((2,)).uniform(0, 2, (8, 8)))),
        ("3x3 | too small", lambda: Window((3, 3), 1, (1, 1), (0, 0, 0, 0)).output_size((2, 8))),
        (
            "a border of 3 samples is reflected in a map of 3",
            lambda: cs.functional.conv2d(
                to_elements(torch.zeros(2, 4, 6, 6), Geometry((2,)).uniform(1, 2, (6, 6))),
                torch.zeros(4, 4, 3, 3),
                None,
                Window((3, 3), 1, (3, 3), (3, 3, 3, 3), "reflect", spacing=2),
                1,
            ),
        ),
        ("example_input", lambda: cs.plan(trunk(), example_input="cat.png")),
        ("(batch, channels, height, width)", lambda: cs.plan(trunk(), example_input=IMAGE[0])),
        ("(2, 3, 0, 129)", lambda: cs.plan(trunk(), example_input=IMAGE[:, :, :0])),
        ("NaN", lambda: cs.adaptify(trunk(), example_input=NOTHING)),
        ("meta", lambda: cs.plan(trunk(), example_input=IMAGE.to("meta"))),
        ("level map | integer", lambda: Geometry((2, 2)).lattice(torch.zeros(1, 4, 4))),
        ('anchor="center" | fill="nearest"', lambda: adapted(anchor="center")),
        ("3", lambda: cs.plan(Interrupted(), region=3)),
        ("resnet18", lambda: cs.plan("resnet18")),
        ("Sequential is not a converted network | state_dict", lambda: cs.save(trunk(), "net.safetensors")),
        (
            "not a network | the network that was exported",
            lambda: cs.adaptify(torch.export.export(trunk(), (IMAGE,))),
        ),
        ("not a mask | edges | tensor | function", lambda: resolve_mask(None)),
        ("not a mask | edges | tensor | function", lambda: resolve_mask(["edges"])),
        ("(12, 17) | " + RIGHT, lambda: masked(torch.zeros(12, 17, dtype=torch.bool))),
        ("(3, 13, 17) | " + RIGHT, lambda: masked(torch.zeros(3, 13, 17, dtype=torch.int64))),
        ("(1, 1, 13, 17) | " + RIGHT, lambda: masked(torch.zeros(1, 1, 13, 17, dtype=torch.bool))),
        ("() | " + RIGHT, lambda: masked(torch.tensor(0))),
        ("float32 | threshold", lambda: masked(torch.zeros(13, 17))),
        ("complex64 | threshold", lambda: masked(torch.zeros(13, 17, dtype=torch.complex64))),
        ("-1 | " + LEVELS, lambda: masked(with_level(-1))),
        ("3 | " + LEVELS, lambda: masked(with_level(3))),
        ("300 | " + LEVELS, lambda: masked(with_level(300))),
        ("mask | (2, 13, 17)", lambda: adapted(lambda image: None)(IMAGE)),
        ("mask | (2, 13, 17)", lambda: adapted(lambda image: [[0]])(IMAGE)),
        ("1 NaN or infinite | normalisation", lambda: adapted()(with_value("nan"))),
        ("1 NaN or infinite | normalisation", lambda: adapted()(with_value("inf"))),
        ("1 NaN or infinite | normalisation", lambda: adapted()(with_value("-inf"))),
        ("fill | cubic | linear | nearest | guided", lambda: adapted(fill="cubic")),
        ("anchor | cubic | corner | center", lambda: adapted(anchor="cubic")),
        ("pool | cubic | atrous | drop", lambda: adapted(pool="cubic")),
        ("patch | cubic | quadtree | block", lambda: adapted(patch="cubic")),
        (PAIRS, lambda: cs.adaptify(trunk(), output_stride=(3, 5))),
        (PAIRS, lambda: cs.plan(trunk(), output_stride=(32, 8))),
        (PAIRS, lambda: cs.plan(trunk(), output_stride=(8, 16, 32))),
        (PAIRS, lambda: cs.plan(trunk(), output_stride=8)),
        (PAIRS, lambda: cs.plan(trunk(), output_stride="8,32")),
    ],
    cs.UnknownName: [
        ("torchvison | timm", lambda: cs.list_models("*", "torchvison")),
        ("outpt | output", lambda: adapted().plan["outpt"]),
        ("zzzzqqqq", lambda: cs.plan(Interrupted(), region=["body", "zzzzqqqq"])),
        ("backbon", lambda: cs.plan(trunk(), region="backbon")),
        ("resnt18 | resnet18", lambda: cs.build_model("resnt18", "none")),
        ("torchvision | resnet18", lambda: cs.build_model("torchvision:resnet19", "none")),
        ("zzzzqqqq | cadsurgery list", lambda: cs.build_model("zzzzqqqq", "none")),
        ("no_such_module | imported", lambda: cs.build_model("no_such_module:build", "none")),
        ("squirt | sqrt", lambda: cs.build_model("math:squirt", "none")),
        ("IMAGENET1K_V3 | IMAGENET1K_V1", lambda: cs.build_model("resnet18", "IMAGENET1K_V3")),
        ("a9_in1k | a1_in1k", lambda: cs.build_model("timm:resnet18", "a9_in1k")),
    ],
    cs.FileError: [
        ("no file | nothing.pth", lambda: cs.build_model("resnet18", "nothing.pth")),
        ("no file", lambda: cs.load("nothing.safetensors")),
        ("no such data | nowhere", lambda: cs.open_data("folder:nowhere,classes=2")),
    ],
    cs.CannotConvert: [
        ("backbone | auto | region=[", lambda: adapted(region="backbone")),
        ("outside the region head", lambda: cs.plan(Interrupted(), region=["head"])),
        (
            "does not run | 4 channels | example_input",
            lambda: cs.plan(trunk(), example_input=torch.zeros(1, 4, 64, 64)),
        ),
        ("Conv2d", lambda: cs.adaptify(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))),
        (
            "no strided convolution | downsamples",
            lambda: cs.adaptify(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())),
        ),
        ("nothing that can be made adaptive | fft", lambda: cs.adaptify(Behind())),
        (
            "nothing | LPPool2d",
            lambda: cs.adaptify(nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.LPPool2d(2, 2))),
        ),
    ],
}


@pytest.mark.parametrize(
    ("kind", "words", "call"), [(kind, *row) for kind in REFUSALS for row in REFUSALS[kind]]
)
def test_a_call_that_cannot_be_is_refused(
    kind: type[cs.CadError], words: str, call: Callable[[], object]
) -> None:
    with refused(kind, *words.split(" | ")):
        call()


# -- images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "words"),
    [
        *((None, []), (IMAGE[None], [])),
        ([IMAGE[0], IMAGE[0]], ["torch.stack"]),
        (IMAGE[0], ["unsqueeze(0)"]),
        (IMAGE.numpy(), ["float32 ndarray of shape (2, 3, 97, 129)", "read_image"]),
    ],
)
def test_what_is_no_image_batch_is_refused_with_how_one_is_made(image: object, words: list[str]) -> None:
    with refused(cs.InvalidInput, "(batch, channels, height, width)", *words) as found:
        adapted()(image)
    assert "\n" not in found.error.what


MISFITS: list[tuple[Callable[[Tensor], Tensor], list[str]]] = [
    (lambda x: (x * 255).to(torch.uint8), ["uint8", "float32", "normalise"]),
    (lambda x: x.double(), ["float64", "float32", "image.to(torch.float32)"]),
    (lambda x: x.half(), ["float16", "net.to(torch.float16)"]),
    (lambda x: x.to("meta"), ["on meta", "on cpu", 'image.to("cpu")']),
    (lambda x: x[:, :1], ["1 channel,", "takes 3", "expand"]),
    (lambda x: torch.cat((x, x[:, :1]), 1), ["4 channels", "takes 3", "image[:, :3]"]),
    (lambda x: x.permute(0, 2, 3, 1), ["takes 3", "permute(0, 3, 1, 2)"]),
    (lambda x: x.to_sparse(), ["sparse", "to_dense()"]),
    (lambda x: x[:, :, :0], ["size zero", "(2, 3, 0, 129)"]),
]


@pytest.mark.parametrize(("change", "words"), MISFITS)
def test_an_image_of_another_type_device_or_depth_than_the_networks_is_refused(
    change: Callable[[Tensor], Tensor], words: list[str]
) -> None:
    """Behind a stem and from the image on. Optimised kernels would convert their weights to any type, and answer in
    it."""
    for net in (adapted("edges", output_stride=(8, 32)), adapted("edges", output_stride=(1, 4)).optimize()):
        with refused(cs.InvalidInput, *words):
            net(change(IMAGE))


@pytest.mark.parametrize(
    "change",
    [lambda x: x.double(), lambda x: x[0], lambda x: x * float("nan")],
    ids=["float64", "no batch", "NaN"],
)
def test_what_a_call_refuses_is_refused_by_everything_that_runs_the_network(
    change: Callable[[Tensor], Tensor],
) -> None:
    net, points = adapted("edges"), [torch.zeros(1, 2)] * 2
    for use in (
        lambda image: net.macs(image),
        lambda image: net(image, mask="all"),
        lambda image: net(image, mask="confidence"),
        lambda image: cs.read_at(net, image, points),
    ):
        with refused(cs.InvalidInput):
            use(change(IMAGE))


class TakesPictures(nn.Module):
    """Scales pictures of whole numbers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x.float() / 255)


@pytest.mark.parametrize("mask", ["all", "edges"])
def test_a_network_that_scales_pictures_itself_takes_them(mask: str) -> None:
    """Masks then see the same numbers as floats: differences of unsigned ones would wrap around."""
    net = cs.adaptify(TakesPictures(), mask, verify_laws=False)
    picture = torch.randint(0, 256, (2, 3, 97, 129), dtype=torch.uint8)
    for one in (net, net.optimize()):
        found = one(picture), one.levels
        assert_same(found[0], one(picture.float()))
        assert torch.equal(found[1], one.levels)
    with refused(cs.InvalidInput, "1 channel, the network takes 3", "image.expand(-1, 3, -1, -1)"):
        net(picture[:, :1])


class OfOneHeight(TakesPictures):
    """Scales pictures, and brightens each row by a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(97, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x.float() / 255 + self.rows)


def test_what_a_network_says_of_pictures_that_it_changes_first_is_told() -> None:
    net = cs.adaptify(OfOneHeight(), "all", verify_laws=False)
    with refused(cs.InvalidInput, "does not run", "uint8", "must match the size", "float32 on cpu"):
        net(torch.zeros(2, 3, 65, 129, dtype=torch.uint8))


# -- conversion ----------------------------------------------------------------------------------------


class Behind(nn.Module):
    """Every strided operation leads straight into an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(self.conv(x)).real


class Interrupted(nn.Module):
    """A convertible network with an operation without a rule near its end."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = trunk(), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.fft2(self.body(x)).real)


def test_a_refused_network_is_left_as_it_was() -> None:
    model = Behind().train()
    before = copy.deepcopy(model.state_dict())
    with refused(cs.CannotConvert):
        cs.adaptify(model)
    assert model.training and model.conv.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def quantised(prepare_only: bool = False) -> nn.Module:
    from torch.ao import quantization

    model = quantization.QuantWrapper(trunk())
    model.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(model)
    prepared(IMAGE)
    return prepared if prepare_only else quantization.convert(prepared)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return trunk()


UNSUITABLE: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "data parallel": (lambda: nn.DataParallel(trunk()), ["DataParallel wraps", "pass model.module"]),
    "compiled": (lambda: torch.compile(trunk()), ["OptimizedModule wraps", "pass model._orig_mod"]),
    "scripted": (lambda: torch.jit.script(trunk()), ["TorchScript", "scripted or traced from"]),
    "exported": (
        lambda: torch.export.export(trunk(), (IMAGE,)).module(),
        ["exported program", "the network that was exported"],
    ),
    "quantised": (quantised, ["quantised", "floating point"]),
    "to be quantised": (
        lambda: quantised(prepare_only=True),
        ["Observer prepares a network to be quantised", "as it was before quantisation"],
    ),
    "converted": (adapted, ["AdaptiveModel is converted already", "the original"]),
    "optimised": (lambda: adapted().optimize(), ["OptimizedModel is converted already", "the original"]),
    "converted within": (
        lambda: nn.Sequential(nn.Identity(), adapted()),
        ["converted already", "module 1 of Sequential", "model.1 ="],
    ),
    "on meta": (on_meta, ["meta device", "0.weight", "to_empty", "load_state_dict"]),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3, 2), trunk(4)), ["without a shape", "0.weight"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "words"), UNSUITABLE.values(), ids=list(UNSUITABLE))
def test_a_network_that_is_not_itself_is_refused_with_what_to_pass_instead(
    make: Callable[[], nn.Module], words: list[str], tmp_path: Path
) -> None:
    model = make()
    with refused(cs.CannotConvert, *words):
        cs.adaptify(model)
    cs.save(adapted(), tmp_path / "net.safetensors")
    with refused(cs.CannotConvert, *words):
        cs.load(tmp_path / "net.safetensors", model)


def test_strict_refuses_a_region_that_ends_early_and_says_where() -> None:
    with refused(cs.CannotConvert, "fft_fft2", "no rule", "strict=False") as found:
        cs.adaptify(Interrupted(), "none", strict=True)
    assert found.error.where == found.error.where.strip()
    assert cs.adaptify(Interrupted(), "none").plan.chosen("barrier")[0].node == "fft_fft2"


# -- converted files -----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    cs.save(adapted(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with refused(cs.FileError, saved.name, "truncated"):
        cs.load(saved, trunk())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda metadata: metadata.pop("plan"), []),
        (lambda metadata: metadata.update(plan="not JSON"), []),
        (lambda metadata: metadata["options"].update(surprise=1), []),
        (lambda metadata: metadata.update(format=99), ["format 99", "update"]),
        (lambda metadata: metadata.update(format=2), ["format 2", "convert the network again"]),
        (lambda metadata: metadata.update(mask="telepathy"), ["telepathy", 'mask="edges"']),
    ],
)
def test_a_file_with_metadata_that_cannot_be_used_is_refused(
    saved: Path, change: Callable[..., object], words: list[str]
) -> None:
    with refused(cs.FileError, saved.name, *words):
        cs.load(rewritten(saved, change), trunk())


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_a_file_of_weights_is_told_from_a_converted_network(tmp_path: Path, name: str) -> None:
    path, state = tmp_path / name, trunk().state_dict()
    torch.save(state, path) if name.endswith("pth") else save_file(state, path)
    with refused(cs.FileError, "a file of weights, not a converted network", "--weights"):
        cs.load(path, trunk())


def test_a_file_without_source_needs_the_model(saved: Path) -> None:
    with refused(cs.FileError, "how to build", "model="):
        cs.load(saved)


@pytest.mark.parametrize(
    "model",
    [
        trunk(classes=3),
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 2, 1)),
        nn.Sequential(nn.Linear(3, 3)),
    ],
    ids=["more classes", "other strides", "no convolution"],
)
def test_a_model_the_file_was_not_made_from_is_refused(saved: Path, model: nn.Module) -> None:
    with refused(cs.FileError, saved.name):
        cs.load(saved, model)


def test_a_file_that_lacks_a_parameter_is_refused(saved: Path) -> None:
    tensors = load_file(saved)
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    del tensors["0.weight"]
    save_file(tensors, saved, metadata)
    with refused(cs.FileError, "damaged", "checksum"):
        cs.load(saved, trunk())
    rewritten(saved, lambda metadata: None)
    with refused(cs.FileError, "do not fit", "0.weight"):
        cs.load(saved, trunk())


def upper(image: Tensor) -> Tensor:
    return torch.zeros([-(-side // 8) for side in image.shape[2:]], dtype=torch.long)


def test_a_file_saved_with_a_function_as_mask_needs_one(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    cs.save(adapted(upper), path)
    with refused(cs.FileError, "function", "mask="):
        cs.load(path, trunk())
    assert cs.load(path, trunk(), mask=upper).mask.function is upper


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in ("no/net.safetensors", "file/net.safetensors", "folder"):
        with refused(cs.FileError, path, "cannot be written", "folder"):
            cs.save(adapted(), tmp_path / path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


# -- weights -------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network and empty caches, whatever the machine has."""
    import huggingface_hub.constants

    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no network in this test")

    def no_name(*args: object, **kwargs: object) -> None:
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr("cadsurgery.data.hub.getproxies", dict)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("name", "weights"), [("resnet18", "IMAGENET1K_V1"), ("timm:resnet18", "a1_in1k")])
def test_weights_asked_for_by_name_are_an_error_offline(name: str, weights: str) -> None:
    with refused(cs.FileError, weights, "cannot be had", "--weights auto or none"):
        cs.build_model(name, weights)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18"])
def test_weights_auto_are_random_offline_and_plainly_called_so(name: str) -> None:
    source = cs.build_model(name, "auto").cad_source
    assert source.weights == "random"
    assert "RANDOM" in source.note and "neither cached nor reachable" in source.note


@pytest.mark.parametrize(
    ("suffix", "content"), [(".pth", b""), (".bin", b"no weights at all" * 10), (".safetensors", b"")]
)
def test_a_corrupt_weights_file_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with refused(cs.FileError, path.name, "cannot be read"):
        cs.build_model("resnet18", str(path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weights_file_of_another_network_is_refused(tmp_path: Path, suffix: str) -> None:
    path, state = tmp_path / f"weights{suffix}", trunk().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with refused(cs.FileError, path.name, "do not fit", "conv1.weight"):
        cs.build_model("resnet18", str(path))


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}])
def test_a_checkpoint_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with refused(cs.FileError, "state dict", "state_dict()"):
        cs.build_model("resnet18", str(tmp_path / "weights.pth"))


# -- image files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_a_corrupt_image_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cat.png").write_bytes(content)
    with refused(cs.FileError, "cat.png", "PNG or JPEG"):
        read_image(tmp_path / "cat.png")


def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "file").write_text("")
    for path in ("no/cat.png", "file/cat.png"):
        with refused(cs.FileError, path, "cannot be written"):
            write_picture(Image.new("P", (4, 4)), tmp_path / path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_network_that_breaks_a_law_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification runs through kernel maps: one wrong entry in them is found and refused."""
    build = kernel_map._shift_taps

    def wrong(*args: object) -> kernel_map.Reading:
        found = build(*args)  # type: ignore[arg-type]
        found.table[: found.table.shape[0] // 2] = 0
        return found

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 4, 3, padding=1)
    )
    assert cs.adaptify(model, "all").checks
    monkeypatch.setattr(kernel_map, "_shift_taps", wrong)
    with refused(cs.CannotConvert, "not exact", "relative error", "report", "level"):
        cs.adaptify(model, "all")
