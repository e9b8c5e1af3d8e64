"""Masks on pictures of any number of channels see the grey picture; the network's values stay right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cadsurgery.data.images import normalise, street_scene
from cadsurgery.data.networks import Source
from cadsurgery.masks import resolve_mask
from cadsurgery.masks.provider import FineMapSpec

CHANNELS = (1, 2, 4, 6)
# Every registered mask by name that sees the picture, but keypoints, which need OpenCV.
ON_PICTURES = (
    "edges",
    "edges:threshold=0.9/0.2,dilation=3/9",
    "gradient:threshold=0.3,dilation=5,sigma=1",
    "content",
)


def network(channels: int) -> nn.Module:
    torch.manual_seed(0)
    pairs = ((channels, 8), (8, 8), (8, 8))
    layers = [layer for pair in pairs for layer in (nn.Conv2d(*pair, 3, 2, 1), nn.ReLU())]
    return nn.Sequential(*layers, nn.Conv2d(8, 3, 1), nn.UpsamplingBilinear2d(scale_factor=8)).eval()


def batch(channels: int) -> Tensor:
    pictures = torch.stack([street_scene(64, 96, seed, channels) for seed in range(2)])
    return normalise(pictures, Source("mine", channels=channels))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("mask", ON_PICTURES)
def test_a_mask_on_pictures_sees_the_mean_of_their_channels(mask: str, channels: int) -> None:
    grid = FineMapSpec(2, (32, 48), 2, 2, 4, 4)
    image = batch(channels)
    features = torch.zeros(2, 8, 32, 48)
    provider = resolve_mask(mask)
    found = provider(image, features, grid)
    assert torch.equal(found, provider(image.mean(1, keepdim=True), features, grid))
    assert torch.equal(found, provider(image.flip(1), features, grid))  # the order of bands does not count
