"""The VOC recipe: its network, and masks of what the output loses: the loss (`oracle`), what is expected of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images
from feature_cases import SIZE, converted, grid_of, trunk
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import normalise
from cadsurgery.masks.context import first_passes
from cadsurgery.support.divergence import divergence
from recipes.voc_deeplab import network
from recipes.voc_deeplab.fit_gain import GainFit, fit_gain
from recipes.voc_deeplab.gain import GainMask, OracleMask
from recipes.voc_deeplab.network import SIDE, DeepLab

PATCH = 4  # samples; an image of SIZE has 17 x 25


def blocks(samples: Tensor) -> Tensor:
    """(B, ceil(h / PATCH), ceil(w / PATCH)): mean of each patch of a map (B, h, w), one by one."""
    rows, columns = (range(0, length, PATCH) for length in samples.shape[1:])
    return torch.stack(
        [
            torch.stack([samples[:, y : y + PATCH, x : x + PATCH].mean((1, 2)) for x in columns], -1)
            for y in rows
        ],
        1,
    )


# -- oracle --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_oracle_is_the_divergence_of_uniform_passes() -> None:
    """Ranked by the lowest level; with a tolerance each patch has the lowest level that loses no more."""
    net, x = converted(), images(2, *SIZE)
    high, middle, low = (net(x, mask=torch.full((2, 17, 25), level)) for level in range(3))
    losses = [
        blocks(
            F.interpolate(divergence(high, other)[:, None], (17, 25), mode="bilinear", antialias=True)[:, 0]
        )
        for other in (middle, low)
    ]
    tolerance = float(losses[1].median())
    net(x, mask=OracleMask(tolerance, sigma=0))
    expected = torch.where(losses[1] <= tolerance, 2, torch.where(losses[0] <= tolerance, 1, 0))
    spread = expected.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, :17, :25]
    assert torch.equal(net.levels.long(), spread) and len(expected.unique()) == 3
    net(x, mask="oracle:sigma=0 | budget:fraction=0.2")
    best = (net.levels == 0)[:, ::PATCH, ::PATCH]
    for image in range(2):
        assert losses[1][image][best[image]].min() >= losses[1][image][~best[image]].max()


# -- gain ----------------------------------------------------------------------------------------------


class Photos:
    """Images alone, of several sizes; how rough each colour is changes from place to place."""

    def __init__(self, count: int = 24, side: int = 97) -> None:
        self.images = []
        for number in range(count):
            size = (side + 4 * (number % 2), side + 32)
            rough = F.interpolate(torch.randn(1, 3, 4, 5), size, mode="bilinear")[0].mul(1.5).exp()
            self.images.append((0.5 + 0.1 * rough * torch.randn(3, *size)).clamp(0, 1))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.images)


def half_blind() -> nn.Module:
    """Half of its entering channels see red alone, the others blue alone, and nothing uses these."""
    net = trunk()
    with torch.no_grad():
        net.stem[0].weight[:3, 1:] = net.stem[0].weight[3:, :2] = net.body[0].weight[:, 3:] = 0
    return net


@pytest.fixture(scope="module")
def fitted() -> tuple[cs.AdaptiveModel, GainFit]:
    torch.manual_seed(0)
    net = converted("gain:channels=16/16/8 | budget:fraction=0.2", half_blind())
    return net, fit_gain(net, Photos(), balance=0)


@pytest.mark.slow
def test_it_finds_more_of_what_is_lost_than_detail(fitted: tuple[cs.AdaptiveModel, GainFit]) -> None:
    """On images it was not fitted to; nothing finds more than the loss itself."""
    fit = fitted[1]
    assert (fit.images, fit.held_out) == (24, 3) and fit.seconds > 0
    assert fit.captured["detail"] < fit.captured["gain"] <= fit.captured["oracle"] <= 1
    assert fit.to_dict()["captured"] == fit.captured


@pytest.mark.slow
@torch.no_grad()
def test_what_it_expects_is_about_what_is_lost(fitted: tuple[cs.AdaptiveModel, GainFit]) -> None:
    """At each level, by correlation of logarithms, on images it has not seen."""
    net, sides = fitted[0], list[tuple[Tensor, Tensor]]()
    torch.manual_seed(1)
    for image in Photos(4).images[::2]:
        x = normalise(image, None)[None]
        values = net.program.before(net.program.bind(x))
        features = values[net.program.halves.features]
        grid, mask, oracle = (
            grid_of((features.shape[2], features.shape[3]), 1),
            net.mask.parts[0],
            OracleMask(),
        )
        assert isinstance(mask, GainMask)
        with first_passes({level: net.program.at_level(level, values) for level in range(3)}):
            sides.append((mask.losses(x, features, grid), oracle.losses(x, features, grid)))
    expected, measured = (
        torch.cat([one.flatten(2) for one in side], 2)[0] for side in zip(*sides, strict=True)
    )
    for ours, true in zip(expected, measured, strict=True):
        assert torch.corrcoef(torch.stack([ours, true]).clamp(min=1e-5).log())[0, 1] > 0.5


@pytest.mark.parametrize(
    ("make", "photos", "minutes", "message"),
    [
        (lambda: converted("edges"), Photos(2), 1.0, "mask 'edges"),
        (lambda: converted("gain"), Photos(1), 1.0, "1 images"),
        (lambda: converted("gain"), Photos(2), 0.0, "0.0 minutes"),
        (lambda: converted("gain").optimize(), Photos(2), 1.0, "not optimised"),
        (trunk, Photos(2), 1.0, "has no gain mask"),
        (lambda: converted("gain"), [], 1.0, "is empty"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    make: Any, photos: Sequence[Tensor], minutes: float, message: str
) -> None:
    with pytest.raises(cs.InvalidInput, match=message):
        fit_gain(make(), photos, minutes=minutes)
    with pytest.raises(cs.InvalidInput):
        fit_gain(converted("gain"), Photos(2), balance=2.0)


# -- the network: names of the weights, output strides, how pictures are scaled and padded -------------


def published_net(output_stride: int) -> DeepLab:
    """With random weights; the same ones for every output stride."""
    torch.manual_seed(0)
    return DeepLab(output_stride).double().eval()


@pytest.mark.parametrize("output_stride", [16, 32])
def test_every_so_many_th_sample_at_output_stride_8_is_that_of_a_larger_one(output_stride: int) -> None:
    x, step = images(1, 65, 97, torch.float64), output_stride // 8
    assert_same(published_net(8).features(x)[..., ::step, ::step], published_net(output_stride).features(x))


@pytest.mark.slow
def test_everything_low_is_the_network_at_output_stride_16() -> None:
    x = images(2, 97, 65, torch.float64)
    converted = cs.adaptify(published_net(8), "none", output_stride=(8, 16))
    assert_same(converted(x), published_net(16)(x))


@pytest.mark.parametrize("size", [(300, 400), (640, 480), (513, 513), (100, 1000)])
def test_pictures_are_padded_with_what_is_normalised_to_zero(size: tuple[int, int]) -> None:
    picture, (height, width) = network.padded(torch.zeros(3, *size))
    assert picture.shape == (3, SIDE, SIDE) and max(height, width) == SIDE
    assert abs(height * size[1] - width * size[0]) <= max(size)
    assert picture[:, :height, :width].count_nonzero() == 0
    assert (picture == 0.5).sum() == 3 * (SIDE**2 - height * width)
    assert network.restored(picture[None], (height, width), size).shape == (1, 3, *size)
