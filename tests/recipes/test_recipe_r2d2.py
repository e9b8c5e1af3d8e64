"""The recipes of R2D2 and ALIKE: the networks as released, padding that puts strides back, keypoints as published."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images, random_levels, slow
from networks import made_once, randomise
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.network.macs import dense_macs
from recipes.alike import recipe as alike_recipe
from recipes.alike.network import CHANNELS, REGION, STRIDES, Alike, padded
from recipes.r2d2 import recipe
from recipes.r2d2.network import FRAME, LAYERS, R2D2, r2d2

SIZE = (56, 75)


def network(*, is_published: bool = False, by: int = 8) -> R2D2:
    """With random weights, the same ones for both paddings, and a `by`-th of the channels, which costs little."""
    torch.manual_seed(0)
    layers = [layer._replace(channels=layer.channels // by) for layer in LAYERS]
    net = R2D2(tuple(layer.published if is_published else layer for layer in layers))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.1, 0.5)
    return net.double().eval()


def image(batch: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return images(batch, *size, torch.float64)


@made_once
def converted(mask: str, **options: object) -> cs.AdaptiveModel:
    return cs.adaptify(network(), mask, example_input=image(1), **options)  # type: ignore[arg-type]


def test_it_is_the_network_that_was_written_down() -> None:
    """Kernels, dilations and padding of the weights' description; reliability and repeatability of the squares."""
    net, x = network(is_published=True), image()
    found = net(x)
    convolutions = {name: op for name, op in net.ops.named_children() if isinstance(op, nn.Conv2d)}
    assert [*convolutions] == ["0", "3", "6", "9", "12", "15", "18", "20", "22"]
    dilations = (1, 1, 1, 2, 2, 4, 4, 8, 16)
    for (name, conv), dilation in zip(convolutions.items(), dilations, strict=True):
        x = F.conv2d(
            x, conv.weight, conv.bias, padding=(conv.kernel_size[0] - 1) * dilation // 2, dilation=dilation
        )
        if name != "22":
            norm = net.ops[int(name) + 1]
            x = F.batch_norm(x, norm.running_mean, norm.running_var, eps=1e-5)
        if int(name) < 18:
            x = x.clamp(min=0)
    u = F.softplus(F.conv2d(x**2, net.sal.weight, net.sal.bias))
    reliability = F.conv2d(x**2, net.clf.weight, net.clf.bias).softmax(1)[:, 1:]
    maps = torch.cat((reliability, u / (1 + u)), 1)
    assert_same(found, {"descriptors": F.normalize(x), "maps": maps, "scores": maps.prod(1, keepdim=True)})
    assert found["descriptors"].shape == (2, 16, *SIZE)


def test_parameters_and_work_are_those_of_the_file() -> None:
    net = r2d2()
    names = {
        f"ops.{place}.{kind}" for place in (0, 3, 6, 9, 12, 15, 18, 20, 22) for kind in ("weight", "bias")
    }
    names |= {f"{head}.{kind}" for head in ("clf", "sal") for kind in ("weight", "bias")}
    assert {name for name, _ in net.named_parameters()} == names
    assert sum(value.numel() for value in net.parameters()) == pytest.approx(480_000, rel=0.02)
    assert dense_macs(net, torch.zeros(1, 3, 8, 8)) == 64 * 483_552


def test_aligned_padding_changes_nothing_but_a_frame() -> None:
    x = image(2, (61, 70))
    found, expected = network()(x), network(is_published=True)(x)
    for name, value in expected.items():
        inner = (..., slice(FRAME, -FRAME), slice(FRAME, -FRAME))
        assert_same(found[name][inner], value[inner])
        wider = (..., slice(FRAME - 1, None), slice(FRAME - 1, None))
        assert not torch.allclose(found[name][wider], value[wider])


def test_only_aligned_padding_lets_all_strides_be_put_back() -> None:
    strides = {False: ((1, 2), (1, 4), (1, 8)), True: ((1, 2),)}
    for is_published, possible in strides.items():
        plan = cs.plan(network(is_published=is_published), example_input=image(1))
        assert plan.possible == possible and plan.output_stride == possible[-1]
    assert sum(layer != layer.published for layer in LAYERS) == 3


def test_a_strided_network_with_the_same_weights_is_everything_low() -> None:
    """Low is an ordinary network: three strides of 2, and kernels without the dilation that stood for them."""
    net, x = network(), image(1, (64, 80))
    strides = {2: 2, 4: 2, 6: 2}  # of the layers, counted from 0: those behind which the dilation doubles
    features, grid, ops = x, 1, iter(net.ops)
    for place, layer in enumerate(LAYERS):
        conv = next(ops)
        before, after = (pad // grid for pad in layer.padding)
        features = F.pad(features, (before, after, before, after))
        step = strides.get(place, 1)
        features = F.conv2d(
            features, conv.weight, conv.bias, stride=step, dilation=max(1, layer.dilation // grid)
        )
        grid *= step
        for _ in range(layer.norm + layer.relu):
            features = next(ops)(features)
    found = converted("none")(x)["descriptors"]
    assert_same(found[..., ::8, ::8], F.normalize(features))


def maps(values: dict[tuple[int, int], tuple[float, float]]) -> Tensor:
    """Reliability and repeatability of a few pixels (x, y)."""
    found = torch.zeros(2, 60, 70)
    for (x, y), pair in values.items():
        found[:, y, x] = torch.tensor(pair)
    return found


def test_keypoints_are_local_maxima_where_both_maps_suffice() -> None:
    found = maps(
        {
            **{(30, 25): (0.8, 0.9), (34, 25): (0.95, 0.9), (38, 30): (0.7, 0.7)},
            **{(31, 26): (0.99, 0.8), (25, 35): (0.69, 0.9), (30, 35): (0.9, 0.69), (19, 30): (0.9, 0.9)},
        }
    )
    points, _ = recipe.keypoints(found, torch.ones(60, 70, dtype=torch.long))
    assert points.tolist() == [[34, 25], [30, 25], [38, 30]]


def data(folder: Path) -> Path:
    """A folder as the command wants it: random weights, two sequences of two small images."""
    (folder / "r2d2").mkdir()
    save_file(r2d2().state_dict(), folder / recipe.WEIGHTS)
    for name in ("boat", "graf"):
        place = folder / "oxford_affine" / name
        place.mkdir(parents=True)
        np.savetxt(place / "H_1_2", np.eye(3))
        for number in (1, 2):
            pixels = torch.randint(256, (64, 72, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(place / f"{number}.png")
    return folder


@pytest.mark.slow
def test_the_command_measures_an_adapted_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file, report = data(tmp_path), tmp_path / "own.safetensors", tmp_path / "results.json"
    cs.save(recipe.adapted(folder / recipe.WEIGHTS), file)
    arguments = ["--masks", "none", "--rounds", "1", "--network", str(file), "--output", str(report)]
    monkeypatch.setattr(sys, "argv", ["recipe.py", str(folder), *arguments])
    recipe.main()
    rows = json.loads(report.read_text())["rows"]
    assert [row["network"] for row in rows] == ["as published", "aligned", "own.safetensors"]
    assert rows[1]["pairs"] == rows[2]["pairs"] and all(row["ms"] > 0 for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + 2 * 2  # sequences that masks were chosen on are told apart
    assert len({line.count(" | ") for line in lines[2:]}) == 1


def alike(strides: tuple[int, ...] = (), seed: int = 0) -> Alike:
    """ALIKE-t with random weights; the same ones for every `strides`."""
    torch.manual_seed(seed)
    net = Alike(CHANNELS["alike-t"], strides)
    randomise(net)
    return net.double().eval()


def alike_image(batch: int, height: int, width: int) -> Tensor:
    return padded(images(batch, height, width, torch.float64))


@made_once
def converted_alike(mask: object = "all", **options: object) -> cs.AdaptiveModel:
    return cs.adaptify(alike(STRIDES), mask, output_stride=(1, 4), region=REGION, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "thousands"), [("alike-t", 83), ("alike-n", 329)])
def test_parameters_are_named_as_in_the_files(name: str, thousands: int) -> None:
    net = Alike(CHANNELS[name], STRIDES)
    expected = {f"block1.{part}.weight" for part in ("conv1", "bn1", "conv2", "bn2")}
    expected |= {
        f"block{block}.{part}.weight" for block in (2, 3, 4) for part in ("conv1", "bn1", "conv2", "bn2")
    }
    expected |= {f"block{block}.downsample.{kind}" for block in (2, 3, 4) for kind in ("weight", "bias")}
    expected |= {f"block{block}.bn{bn}.bias" for block in (1, 2, 3, 4) for bn in (1, 2)}
    expected |= {f"{part}.weight" for part in ("conv1", "conv2", "conv3", "conv4", "convhead2")}
    assert {name for name, _ in net.named_parameters()} == expected
    assert round(sum(value.numel() for value in net.parameters()) / 1000) == thousands


def test_outputs_are_scores_and_unit_descriptors_of_every_pixel() -> None:
    found = alike()(alike_image(2, 33, 70))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "scores": (2, 1, 64, 96),
        "descriptors": (2, 64, 64, 96),
    }
    assert found["scores"].min() > 0 and found["scores"].max() < 1
    assert_same(found["descriptors"].norm(dim=1), torch.ones(2, 64, 96, dtype=torch.float64))


@pytest.mark.parametrize("fill", ["linear", slow("nearest"), slow("guided")])
def test_everything_high_is_the_published_network(fill: str) -> None:
    x = alike_image(2, 50, 90)
    assert_same(converted_alike(fill=fill)(x), alike()(x))


def test_everything_low_is_the_network_with_the_strides_at_its_samples() -> None:
    x = alike_image(2, 50, 90)
    found = converted_alike("none")(x)
    assert_same({name: value[..., ::4, ::4] for name, value in found.items()}, alike(STRIDES)(x))


def test_pixels_kept_high_and_first_pixels_of_cells_are_those_of_the_published_network() -> None:
    x = alike_image(2, 50, 90)
    net, expected = converted_alike(), alike()(x)
    found = net(x, mask=random_levels(2, (64, 96), STRIDES))
    y, across = torch.arange(64).view(-1, 1), torch.arange(96)
    exact = torch.stack([(y % 2**level == 0) & (across % 2**level == 0) for level in range(3)])
    exact = exact[net.levels.long(), y, across]
    assert 0.1 < net.active_fraction < exact.double().mean() < 0.9
    for name, value in found.items():
        assert_same(value.movedim(1, -1)[exact], expected[name].movedim(1, -1)[exact])


@pytest.mark.slow
def test_only_the_last_convolution_is_counted_as_adaptive() -> None:
    net, x = converted_alike(), alike_image(1, 64, 96)
    costs = [alike_recipe.cost(net, {"": x[0]}, mask) for mask in ("all", "none")]
    assert costs[0] == {"part_of_high": 1, "whole_of_high": 1, "active_fraction": 1}
    assert costs[1]["part_of_high"] == 1 / 16 and costs[1]["active_fraction"] == 0
    looked = alike_recipe.cost(net, {"": x[0]}, "keypoints:detector=own,count=4,dilations=1")
    assert looked["part_of_high"] > 2 / 16  # the pass that it looks at, and its own
