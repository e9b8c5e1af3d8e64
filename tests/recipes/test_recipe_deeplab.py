"""The DeepLabv3 recipe: published checkpoints, published totals, the variants of the oracle table.

The reference for checkpoints works on the tensors of a file as they are, by the published rule written on dense maps:
a cell's value is the one at its top-left pixel, later 3x3 kernels start at its middle.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images, random_levels, relative_error
from emulation import fill_cells, pick, pixels
from networks import randomise
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.finetune import Settings
from cadsurgery.masks import LearnedMask
from recipes.deeplabv3_resnet101 import checkpoints, published_macs, recipe, variants
from recipes.deeplabv3_resnet101.checkpoints import load_published, published_state
from recipes.deeplabv3_resnet101.recipe import RUNS

LAYERS, WIDTH, CLASSES = (1, 1, 2, 2), 8, 5
SMALL: dict[str, Any] = {"layers": LAYERS, "width": WIDTH, "num_classes": CLASSES}
SIZE = (64, 96)
FORMATS = {"os16": "dense", "os8": "dense", "edges-8-32-0.35": "adaptive", "learned-0.5": "two paths"}
EDGES = "edges-8-32-0.35"
State = dict[str, Tensor]


def tensors_of(name: str) -> State:
    """A state dict in the format of a run; random, batch norm statistics too; the same each time, and one's own."""
    return {key: value.clone() for key, value in _tensors_of(name).items()}


@cache
def _tensors_of(name: str) -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return _draw_tensors(name)


def _draw_tensors(name: str) -> State:
    state: State = {}
    kind = FORMATS[name]
    channels = 64

    def conv(key: str, outputs: int, inputs: int, kernel: int, graph: bool = False) -> None:
        weight = torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
        flat = (
            weight.reshape(outputs, inputs, kernel**2, 1)
            if kernel > 1
            else weight.reshape(outputs, inputs, 1)
        )
        state[f"{key}.weight"] = flat if graph else weight

    def norm(key: str, count: int) -> None:
        state[f"{key}.weight"], state[f"{key}.running_var"] = torch.rand(2, count) + 0.5
        state[f"{key}.bias"], state[f"{key}.running_mean"] = torch.randn(2, count) / 10
        state[f"{key}.num_batches_tracked"] = torch.tensor(7)

    conv("backbone.conv1", 64, 3, 7)
    norm("backbone.bn1", 64)
    for number, blocks in enumerate(LAYERS, 1):
        copies = ("_low_res", "_high_res") if kind == "two paths" and number > 2 else ("",)
        planes, inputs = 64 * 2 ** (number - 1), channels
        width, graph = planes * WIDTH // 64, kind == "adaptive" and number > 2
        for copy in copies:
            for block in range(blocks):
                key, channels = f"backbone.layer{number}{copy}.{block}", 4 * planes if block else inputs
                conv(f"{key}.conv1", width, channels, 1, graph)
                conv(f"{key}.conv2.conv" if graph else f"{key}.conv2", width, width, 3, graph)
                conv(f"{key}.conv3", 4 * planes, width, 1, graph)
                for at, count in ((1, width), (2, width), (3, 4 * planes)):
                    norm(f"{key}.bn{at}", count)
                if not block:
                    conv(f"{key}.downsample.{'conv1' if graph else 0}", 4 * planes, channels, 1, graph)
                    norm(f"{key}.downsample.{'norm1' if graph else 1}", 4 * planes)
        channels = 4 * planes
    head = "classifier.classifier"
    for at, kernel in enumerate((1, 3, 3, 3)):
        conv(f"{head}.0.convs.{at}.0", 256, 2048, kernel)
        norm(f"{head}.0.convs.{at}.1", 256)
    conv(f"{head}.0.convs.4.1", 256, 2048, 1)
    norm(f"{head}.0.convs.4.2", 256)
    conv(f"{head}.0.project.0", 256, 1280, 1)
    norm(f"{head}.0.project.1", 256)
    conv(f"{head}.1", 256, 256, 3)
    norm(f"{head}.2", 256)
    conv(f"{head}.4", CLASSES, 256, 1)
    state[f"{head}.4.bias"] = torch.randn(CLASSES)
    if kind == "two paths":
        state["backbone.fc.weight"], state["backbone.fc.bias"] = torch.randn(10, 2048), torch.randn(10)
        for at, (outputs, inputs) in {0: (128, 512), 2: (64, 128), 5: (64, 64), 7: (2, 64)}.items():
            conv(f"backbone.mask_estimator.{at}", outputs, inputs, 3)
            state[f"backbone.mask_estimator.{at}.bias"] = torch.randn(outputs)
    return state


def write(state: Mapping[str, Any], path: Path) -> Path:
    """A file as published: the state of the training stands beside the network's."""
    training = {"cur_itrs": 30000, "optimizer_state": {"state": {}}, "scheduler_state": {"last_epoch": 3}}
    torch.save({**training, "model_state": dict(state), "best_score": np.float64(0.77)}, path)
    return path


class Reference:
    """Logits of a file's tensors (float64) for images and a level map at output stride 8."""

    def __init__(self, state: State, levels: Tensor) -> None:
        self.state = {
            name.replace("_low_res", ""): value.double() if value.is_floating_point() else value
            for name, value in state.items()
        }
        self.levels = levels

    def norm(self, x: Tensor, key: str) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{key}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    def weight(self, key: str) -> Tensor:
        """A kernel (O, I, k, k), taps in row-major order."""
        found = self.state[f"{key}.weight"]
        side = 3 if found.dim() == 4 and found.shape[2] * found.shape[3] == 9 else 1
        return found.reshape(*found.shape[:2], side, side)

    def sides(self, count: int) -> Tensor:
        return 2 ** self.levels.clamp(max=count)

    def conv3(self, x: Tensor, key: str, count: int) -> Tensor:
        """y(p) = sum W[u, v] x(a(p) + 2^count (u, v)), a(p) the corner of p's box plus half its side."""
        spacing, side = 2**count, self.sides(count)
        dense = F.conv2d(x, self.weight(key), padding=spacing, dilation=spacing)
        y, c = pixels(side)
        return pick(dense, side * (y // side) + side // 2, side * (c // side) + side // 2)

    def block(self, x: Tensor, key: str, count: int, drops: bool) -> Tensor:
        """An adaptive bottleneck whose input has been downsampled `count` times, and `drops` once more inside."""
        name = f"{key}.conv2.conv" if f"{key}.conv2.conv.weight" in self.state else f"{key}.conv2"
        adaptive = name.endswith("conv2.conv")
        side = self.sides(count + 1)
        out = F.relu(self.norm(F.conv2d(x, self.weight(f"{key}.conv1")), f"{key}.bn1"))
        out = self.conv3(out, name, count)
        if drops:
            out, x = fill_cells(out, side), fill_cells(x, side)
            conv, norm = ("conv1", "norm1") if adaptive else ("0", "1")
            x = self.norm(F.conv2d(x, self.weight(f"{key}.downsample.{conv}")), f"{key}.downsample.{norm}")
        out = F.relu(self.norm(out, f"{key}.bn2"))
        return F.relu(x + self.norm(F.conv2d(out, self.weight(f"{key}.conv3")), f"{key}.bn3"))

    def plain(self, x: Tensor, key: str, stride: int) -> Tensor:
        """An ordinary bottleneck; with a convolution in its shortcut if the file has one."""
        out = F.relu(self.norm(F.conv2d(x, self.weight(f"{key}.conv1")), f"{key}.bn1"))
        out = F.conv2d(out, self.weight(f"{key}.conv2"), stride=stride, padding=1)
        out = F.relu(self.norm(out, f"{key}.bn2"))
        if f"{key}.downsample.0.weight" in self.state:
            x = F.conv2d(x, self.weight(f"{key}.downsample.0"), stride=stride)
            x = self.norm(x, f"{key}.downsample.1")
        return F.relu(x + self.norm(F.conv2d(out, self.weight(f"{key}.conv3")), f"{key}.bn3"))

    def head(self, x: Tensor) -> Tensor:
        key = "classifier.classifier"
        kernels = [(0, 1), *((at, rate) for at, rate in zip((1, 2, 3), (12, 24, 36), strict=True))]
        parts = []
        for at, rate in kernels:
            weight = self.state[f"{key}.0.convs.{at}.0.weight"]
            part = F.conv2d(x, weight, padding=rate if at else 0, dilation=rate)
            parts.append(F.relu(self.norm(part, f"{key}.0.convs.{at}.1")))
        mean = F.conv2d(x.mean((2, 3), keepdim=True), self.state[f"{key}.0.convs.4.1.weight"])
        parts.append(F.relu(self.norm(mean, f"{key}.0.convs.4.2")).expand_as(parts[0]))
        x = F.conv2d(torch.cat(parts, 1), self.state[f"{key}.0.project.0.weight"])
        x = F.relu(self.norm(x, f"{key}.0.project.1"))
        x = F.relu(self.norm(F.conv2d(x, self.state[f"{key}.1.weight"], padding=1), f"{key}.2"))
        return F.conv2d(x, self.state[f"{key}.4.weight"], self.state[f"{key}.4.bias"])

    def __call__(self, image: Tensor) -> Tensor:
        x = F.conv2d(image, self.state["backbone.conv1.weight"], stride=2, padding=3)
        x = F.max_pool2d(F.relu(self.norm(x, "backbone.bn1")), 3, 2, 1)
        for stage in (1, 2):
            for block in range(LAYERS[stage - 1]):
                x = self.plain(x, f"backbone.layer{stage}.{block}", 2 if (stage, block) == (2, 0) else 1)
        for count, stage in enumerate((3, 4)):
            for block in range(LAYERS[stage - 1]):
                key = f"backbone.layer{stage}.{block}"
                x = self.block(x, key, count if block == 0 else count + 1, block == 0)
        scores = self.head(x)
        return F.interpolate(scores, size=image.shape[-2:], mode="bilinear", align_corners=False)


def fine_size() -> tuple[int, int]:
    return SIZE[0] // 8, SIZE[1] // 8


def read_and_written_back(state: State, name: str, **options: Any) -> nn.Module:
    """The network of a file, in float64; what is written back is the file, bit for bit."""
    read = load_published(state, name, **options)
    back = published_state(read)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    return read.net.double()


@pytest.mark.slow
def test_an_edge_checkpoint_gives_what_the_published_rule_gives() -> None:
    """Any map in 4 x 4 blocks of levels 0 and 2, batch of two, float64."""
    state, x = tensors_of(EDGES), images(2, *SIZE, torch.float64)
    net = read_and_written_back(state, EDGES)
    levels = random_levels(2, fine_size(), (2, 2), max_level=2, patch="block")
    with torch.no_grad():
        found, expected = net(x, mask=levels)["out"], Reference(state, levels)(x)
    assert_same(found, expected)
    other = Reference(state, torch.full_like(levels, 2))(x)
    assert relative_error(other, expected) > 0.01, "the map matters"


@pytest.mark.slow
def test_a_learned_checkpoint_gives_what_the_coarse_path_gives() -> None:
    """Maps uniform on 2 x 2 fine pixels, as the estimator makes them; the fine path is not used."""
    state, x = tensors_of("learned-0.5"), images(2, *SIZE, torch.float64)
    net = read_and_written_back(state, "learned-0.5", mask="all")
    levels = random_levels(2, fine_size(), (2,))
    with torch.no_grad():
        assert_same(net(x, mask=levels)["out"], Reference(state, levels)(x))
    assert torch.equal(net.levels.long(), levels)


def test_a_dense_checkpoint_gives_the_uniform_map_of_its_output_stride() -> None:
    state, x = tensors_of("os8"), images(2, *SIZE, torch.float64)
    net = read_and_written_back(state, "os8")
    assert not net.training and not isinstance(net, cs.AdaptiveModel)
    with torch.no_grad():
        assert_same(net(x)["out"], Reference(state, torch.zeros(2, *fine_size()).long())(x))


def test_a_score_pickled_by_an_old_numpy_is_read(tmp_path: Path) -> None:
    """`best_score` names numpy.core in the published files, numpy._core in new ones."""
    new, old = write(tensors_of("os8"), tmp_path / "new.pth"), tmp_path / "old.pth"
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            target.writestr(
                name, source.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            )
    assert b"numpy.core.multiarray" in old.read_bytes()
    assert load_published(old, "os8").net is not None


def published_estimator(state: State) -> nn.Module:
    """The layers of a file, as its tensors say."""
    layers = nn.Sequential(
        *(nn.Conv2d(512, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 64, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 2, 3, padding=1)),
    )
    prefix = "backbone.mask_estimator."
    layers.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
    return layers


@pytest.mark.slow
def test_the_mask_estimator_is_handed_to_the_learned_mask() -> None:
    """The mask of the run takes every tensor, and gives the levels that the published layers give."""
    state, x = tensors_of("learned-0.5"), images(2, *SIZE)
    with torch.no_grad():
        features = nn.Sequential(
            *list(load_published(state, "learned-0.5", "all").net.backbone.children())[:6]
        )(x)
        scores = published_estimator(state)(features)
    state["backbone.mask_estimator.7.bias"][0] += (scores[:, 1] - scores[:, 0]).median()  # half of the cells
    net = load_published(state, "learned-0.5").net
    assert isinstance(net.mask, LearnedMask) and net.mask.fraction == 0.5
    estimator = published_estimator(state).state_dict()
    assert {name for name, _ in net.mask.named_parameters()} == {f"estimator.{key}" for key in estimator}
    assert all(torch.equal(net.mask.state_dict()[f"estimator.{key}"], estimator[key]) for key in estimator)
    with torch.no_grad():
        net(x)
        found = published_estimator(state)(features).argmax(1)  # channel 1 asks to downsample
    assert torch.equal(net.levels.long(), found.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert net.active_fraction == pytest.approx(0.5, abs=0.1)


def changed(name: str, **changes: Any) -> State:
    """A published state dict with tensors replaced, added, or (None) taken away; `__` stands for a dot."""
    state: dict[str, Any] = {**tensors_of(name), **{key.replace("__", "."): v for key, v in changes.items()}}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("name", "changes", "run", "error", "told"),
    [
        ("os8", {"backbone__bn1__bias": None}, "os8", cs.FileError, "lacks tensors"),
        ("os8", {"backbone__extra": torch.zeros(1)}, "os8", cs.FileError, "backbone.extra"),
        ("os8", {"backbone__bn1__bias": torch.zeros(3)}, "os8", cs.FileError, r"is \(3,\), not \(64,\)"),
        (
            EDGES,
            {"backbone__layer3__0__conv1__weight": torch.zeros(WIDTH * 4, 512, 1, 1)},
            EDGES,
            cs.FileError,
            "misshapen",
        ),
        ("learned-0.5", {"backbone__mask_estimator__7__bias": None}, "learned-0.5", cs.FileError, "7.bias"),
        ("os8", {}, EDGES, cs.InvalidInput, "network is dense"),
        (EDGES, {}, "os8", cs.InvalidInput, "adaptive in layer3 and layer4"),
        ("learned-0.5", {}, "os8", cs.InvalidInput, "two paths"),
        ("os8", {}, "os-8", cs.UnknownName, "did you mean os8"),
        ("os8", {}, "", cs.UnknownName, "run=NAME"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    name: str, changes: dict[str, Any], run: str, error: type[cs.CadError], told: str
) -> None:
    with pytest.raises(error, match=told) as caught:
        load_published(changed(name, **changes), run, mask="all")
    assert "Next: " in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(cs.FileError, match="there is no file"):
        load_published(tmp_path / "absent.pth", "os8")
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    with pytest.raises(cs.FileError, match="cannot be read"):
        load_published(tmp_path / "broken.pth", "os8")
    torch.save({"model_state": Path("an object")}, tmp_path / "code.pth")
    with pytest.raises(cs.FileError, match="nothing but tensors and numbers"):
        load_published(tmp_path / "code.pth", "os8")
    torch.save({"weights": {}}, tmp_path / "other.pth")
    with pytest.raises(cs.FileError, match="no model_state"):
        load_published(tmp_path / "other.pth", "os8")


def script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe.py", *map(str, arguments)])
    checkpoints.main()


@pytest.mark.slow
def test_the_script_converts_the_published_files_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adaptive, dense = RUNS["edges-8-16-0.15"].stem, RUNS["os8"].stem
    write(tensors_of(EDGES), tmp_path / f"{adaptive}.pth")
    write(tensors_of("os8"), tmp_path / f"{dense}.pth")
    write({}, tmp_path / "another.pth")
    script(monkeypatch, tmp_path, "--output", tmp_path)
    assert capsys.readouterr().out.count("wrote") == 2
    x = images(1, *SIZE)
    for stem, name in ((adaptive, "edges-8-16-0.15"), (dense, "os8")):
        read, path = load_published(tmp_path / f"{stem}.pth"), tmp_path / f"{stem}.safetensors"
        if read.run.low is not None:
            net: nn.Module = cs.load(path, trust=True)
        else:
            net = cs.build_model(checkpoints.BUILDER, str(path), **SMALL)
        with torch.no_grad():
            assert torch.equal(net(x)["out"], read.net(x)["out"]), name


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("os8", 1.42358e12),
        ("os32", 3.27987e11),
        ("resnet50_os8", 8.004e11),
    ],
)
def test_dense_networks_cost_what_is_published(name: str, total: float) -> None:
    """At 1024 x 2048, by the published rule."""
    with torch.device("meta"):
        model = getattr(recipe, name)().eval()
    digits = 1e-5 if name in ("os8", "os16", "os32") else 5e-4
    assert published_macs.dense_macs(model, (1, 3, 1024, 2048)) == pytest.approx(total, rel=digits)


@pytest.mark.slow
def test_adaptive_networks_cost_what_is_published() -> None:
    """All low and all high as published; half of the blocks as measured on the published code."""
    net = recipe.adapted(recipe.deeplabv3().eval(), RUNS["edges-8-32-0.15"], verify_laws=False)
    side, top = net.geometry.sides[-1], net.plan.max_level
    blocks = torch.full((128 // side, 256 // side), top)
    blocks.view(-1)[torch.randperm(blocks.numel())[: blocks.numel() // 2]] = 0
    mixed = blocks.repeat_interleave(side, 0).repeat_interleave(side, 1).unsqueeze(0)
    found = (published_macs.adaptive_macs(net, (1, 3, 1024, 2048), levels) for levels in (top, mixed, 0))
    assert [*found] == pytest.approx([3.56978e11, 8.90281e11, 1.42358e12], rel=1e-5)


VARIANTS = {
    "deformable": variants.deformable,
    "softpool": variants.softpool,
}
DEEPER = {**SMALL, "layers": (1, 1, 1, 3)}  # the deformable block comes after one that is dilated fully


def variant(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small variant with random weights, and the options to convert it with."""
    model = VARIANTS[name](**(DEEPER if name == "deformable" else SMALL))
    for module in model.modules():
        if isinstance(module, variants.DeformableConv):
            nn.init.normal_(module.offset.weight, 0, 0.05)
    region = "auto" if name == "softpool" else "backbone"
    return randomise(model), {**recipe.PUBLISHED, "region": region}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "low"), [("deformable", 16), ("softpool", 32)])
def test_variants_convert_and_keep_the_laws(name: str, low: int) -> None:
    """Uniform maps are the dense networks (verified by `adaptify`), a batch is its images one by one."""
    model, options = variant(name)
    net = cs.adaptify(model, "edges", output_stride=(8, low), **options)
    assert net.checks and all(check.passed for check in net.checks)
    x = images(2, *SIZE)
    levels = random_levels(2, fine_size(), (2, 2), max_level=(low // 8).bit_length() - 1, patch="block")
    with torch.no_grad():
        found = net(x, mask=levels)["out"]
        singly = [net(x[i : i + 1], mask=levels[i : i + 1])["out"] for i in range(2)]
        own = net(x, mask="none" if name == "softpool" and low == 32 else "all")["out"]
        original = model(x)["out"]
    assert found.shape == (2, CLASSES, *SIZE)
    assert_same(found, torch.cat(singly))
    if name != "softpool":
        assert_same(own, original)


def test_a_deformable_convolution_without_offsets_is_the_convolution_it_was_made_from() -> None:
    conv = nn.Conv2d(6, 4, 3, padding=2, dilation=2, bias=False)
    x = torch.randn(2, 6, 13, 9)
    assert_same(variants.DeformableConv(conv)(x), conv(x))


def test_softpool_lies_between_mean_and_maximum_and_is_stable() -> None:
    x = torch.randn(2, 3, 8, 6) * 3
    found = variants.SoftPool()(x)
    assert (found >= F.avg_pool2d(x, 2) - 1e-5).all() and (found <= F.max_pool2d(x, 2) + 1e-5).all()
    assert_same(variants.SoftPool()(torch.full((1, 1, 4, 4), 1e4)), torch.full((1, 1, 2, 2), 1e4))


CONFIGS = sorted((Path(recipe.__file__).parent / "config").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_are_the_published_schedule(path: Path) -> None:
    config = json.loads(path.read_text())
    final = path.stem == "trimap_final"
    assert (config["steps"], config["lr"]) == ((10000, 0.01) if final else (30000, 0.1))
    assert config["objective"] == ("blend" if path.stem.startswith("learned") else "mixed")
    assert Settings.read(path).to_dict().items() >= config.items()
