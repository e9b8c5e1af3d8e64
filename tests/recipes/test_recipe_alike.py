"""The ALIKE recipe: names of the weights, the published network at full resolution, figures of the authors' code."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_same, images, random_levels, slow
from networks import made_once, randomise
from torch import Tensor

import cadsurgery as cs
from recipes.alike import recipe
from recipes.alike.network import CHANNELS, REGION, STRIDES, Alike, padded


def network(strides: tuple[int, ...] = (), seed: int = 0) -> Alike:
    """ALIKE-t with random weights; the same ones for every `strides`."""
    torch.manual_seed(seed)
    net = Alike(CHANNELS["alike-t"], strides)
    randomise(net)
    return net.double().eval()


def image(batch: int, height: int, width: int) -> Tensor:
    return padded(images(batch, height, width, torch.float64))


@made_once
def converted(mask: object = "all", **options: object) -> cs.AdaptiveModel:
    return cs.adaptify(network(STRIDES), mask, output_stride=(1, 4), region=REGION, **options)  # type: ignore[arg-type]


# -- the network ---------------------------------------------------------------------------------------


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
    found = network()(image(2, 33, 70))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "scores": (2, 1, 64, 96),
        "descriptors": (2, 64, 64, 96),
    }
    assert found["scores"].min() > 0 and found["scores"].max() < 1
    assert_same(found["descriptors"].norm(dim=1), torch.ones(2, 64, 96, dtype=torch.float64))


# -- converted: the last convolution -------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["linear", slow("nearest"), slow("guided")])
def test_everything_high_is_the_published_network(fill: str) -> None:
    x = image(2, 50, 90)
    assert_same(converted(fill=fill)(x), network()(x))


def test_everything_low_is_the_network_with_the_strides_at_its_samples() -> None:
    x = image(2, 50, 90)
    found = converted("none")(x)
    assert_same({name: value[..., ::4, ::4] for name, value in found.items()}, network(STRIDES)(x))


def test_pixels_kept_high_and_first_pixels_of_cells_are_those_of_the_published_network() -> None:
    x = image(2, 50, 90)
    net, expected = converted(), network()(x)
    found = net(x, mask=random_levels(2, (64, 96), STRIDES))
    y, across = torch.arange(64).view(-1, 1), torch.arange(96)
    exact = torch.stack([(y % 2**level == 0) & (across % 2**level == 0) for level in range(3)])
    exact = exact[net.levels.long(), y, across]
    assert 0.1 < net.active_fraction < exact.double().mean() < 0.9
    for name, value in found.items():
        assert_same(value.movedim(1, -1)[exact], expected[name].movedim(1, -1)[exact])


@pytest.mark.slow
def test_only_the_last_convolution_is_counted_as_adaptive() -> None:
    net, x = converted(), image(1, 64, 96)
    costs = [recipe.cost(net, {"": x[0]}, mask) for mask in ("all", "none")]
    assert costs[0] == {"part_of_high": 1, "whole_of_high": 1, "active_fraction": 1}
    assert costs[1]["part_of_high"] == 1 / 16 and costs[1]["active_fraction"] == 0
    looked = recipe.cost(net, {"": x[0]}, "keypoints:detector=own,count=4,dilations=1")
    assert looked["part_of_high"] > 2 / 16  # the pass that it looks at, and its own
