"""Decoders without skips, at sizes that are no multiple of the strides: what the network returns is larger then."""

from __future__ import annotations

import pytest
import torch
from conftest import covering
from torch import nn

import cadsurgery as cs


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


def down(how: str) -> nn.Module:
    if how == "pool":
        return nn.Sequential(conv(8, 8), nn.MaxPool2d(2))
    return conv(8, 8, 2) if how == "stride" else nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), conv(8, 8))


def up(how: str) -> list[nn.Module]:
    if how == "shuffle":
        return [nn.Conv2d(8, 32, 1), nn.PixelShuffle(2)]
    return [nn.Upsample(scale_factor=2, mode=how), conv(8, 8)]


@pytest.mark.parametrize(
    ("kind", "example"),
    covering(
        [("stride", "nearest"), ("pool", "bilinear"), ("ceil", "nearest"), ("stride", "shuffle")],
        [None, (96, 128)],
    ),
)
def test_a_plain_encoder_decoder_is_itself_at_any_size(kind, example):
    """On its own example, and on an even one."""
    before, after = kind
    torch.manual_seed(0)
    encoder = [conv(3, 8), *(down(before) for _ in range(4))]
    model = nn.Sequential(
        *encoder, *(part for _ in range(4) for part in up(after)), nn.Conv2d(8, 2, 1)
    ).eval()
    image = torch.randn(1, 3, *example) if example else None
    net = cs.adaptify(model, mask="none", example_input=image)
    assert net.plan.output_stride[1] == 16
    for size in ((97, 129), (101, 94), (128, 160)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(net(x), model(x), rtol=1e-4, atol=1e-5)
            assert net(x, mask="random").shape == model(x).shape
