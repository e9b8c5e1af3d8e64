"""The VOC recipe: names of the weights, output strides, how pictures are scaled and padded, the published figures."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_same, images

import cadsurgery as cs
from recipes.voc_deeplab import network
from recipes.voc_deeplab.network import SIDE, DeepLab


def net(output_stride: int) -> DeepLab:
    """With random weights; the same ones for every output stride."""
    torch.manual_seed(0)
    return DeepLab(output_stride).double().eval()


@pytest.mark.parametrize("output_stride", [16, 32])
def test_every_so_many_th_sample_at_output_stride_8_is_that_of_a_larger_one(output_stride: int) -> None:
    x, step = images(1, 65, 97, torch.float64), output_stride // 8
    assert_same(net(8).features(x)[..., ::step, ::step], net(output_stride).features(x))


@pytest.mark.slow
def test_everything_low_is_the_network_at_output_stride_16() -> None:
    x = images(2, 97, 65, torch.float64)
    converted = cs.adaptify(net(8), "none", output_stride=(8, 16))
    assert_same(converted(x), net(16)(x))


@pytest.mark.parametrize("size", [(300, 400), (640, 480), (513, 513), (100, 1000)])
def test_pictures_are_padded_with_what_is_normalised_to_zero(size: tuple[int, int]) -> None:
    picture, (height, width) = network.padded(torch.zeros(3, *size))
    assert picture.shape == (3, SIDE, SIDE) and max(height, width) == SIDE
    assert abs(height * size[1] - width * size[0]) <= max(size)
    assert picture[:, :height, :width].count_nonzero() == 0
    assert (picture == 0.5).sum() == 3 * (SIDE**2 - height * width)
    assert network.restored(picture[None], (height, width), size).shape == (1, 3, *size)
