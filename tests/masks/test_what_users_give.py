"""Maps that users give, as tensors and arrays, in samples and in pixels, and options that they set on a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import covering, some
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import street_scene


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3 if i == 0 else 4, 4, 3, 2, 1) for i in range(4)]
    return nn.Sequential(*layers, nn.Conv2d(4, 2, 1)).eval()


def region(height: int, width: int) -> Tensor:
    kept = torch.zeros(1, height, width, dtype=torch.bool)
    kept[:, 17:41, 35:36] = True
    kept[:, -1, -1] = True
    return kept


@pytest.mark.parametrize(
    ("strides", "size"), covering([(1, 16), (2, 16), (4, 8), (8, 16)], [(96, 128), (75, 101)])
)
def test_a_region_in_pixels_keeps_what_it_touches(strides: tuple[int, int], size: tuple[int, int]) -> None:
    model, image, kept = network(), torch.rand(2, 3, *size), region(*size)
    net = cs.adaptify(model, "edges", output_stride=strides, verify_laws=False).eval()
    in_samples = F.max_pool2d(kept.float(), strides[0], ceil_mode=True) > 0
    expected = net(image, mask=in_samples)
    for given in (
        kept,
        kept[0],
        kept.expand(2, -1, -1),
        kept.numpy(),
        in_samples.numpy(),
        lambda image: kept,
    ):
        torch.testing.assert_close(net(image, mask=given), expected)
    torch.testing.assert_close(net.optimize()(image, mask=kept.numpy()), expected, rtol=1e-4, atol=1e-5)
    ranked = cs.adaptify(
        model, lambda image: kept.expand(2, -1, -1), output_stride=strides, verify_laws=False
    )
    ranked(image)
    assert torch.equal(ranked.levels, net.levels)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.int64])
def test_levels_are_taken_from_arrays_of_any_whole_numbers(kind: Any) -> None:
    net = cs.adaptify(network(), "edges", output_stride=(4, 16), verify_laws=False).eval()
    image, levels = torch.rand(1, 3, 64, 96), np.arange(16 * 24).reshape(1, 16, 24) // 100 % 3
    expected = net(image, mask=torch.from_numpy(levels))
    torch.testing.assert_close(net(image, mask=levels.astype(kind)), expected)


def test_a_map_of_another_size_is_refused_with_both_that_are_right() -> None:
    net = cs.adaptify(network(), "edges", output_stride=(4, 16), verify_laws=False)
    with pytest.raises(cs.InvalidInput, match=r"(?s)\(1, 30, 40\).*\(1, 16, 24\).*image's size"):
        net(torch.rand(1, 3, 64, 96), mask=torch.ones(1, 30, 40, dtype=torch.bool))
    with pytest.raises(cs.InvalidInput, match="array"):
        net(torch.rand(1, 3, 64, 96), mask=np.array(["a"]))


# Options with another value than the default, which changes the mask.
SET = [
    *(("edges", "threshold", value) for value in (0.2, (0.2,), [0.2])),
    *(("edges", "dilation", value) for value in (5, (5,))),
    ("gradient", "sigma", 2.0),
    ("detail", "threshold", 0.7),
    ("content", "margin", 2),
    ("random:seed=1", "fraction", 0.6),
    ("edges | budget", "fraction", 0.5),
    ("edges | dilate", "size", 5),
    ("detail | threshold", "at", 0.3),
    ("confidence", "threshold", 0.8),
    ("preview", "threshold", 0.3),
]


@pytest.mark.parametrize(("mask", "option", "value"), some(SET, rows=True))
def test_an_option_that_is_set_is_that_of_the_constructor(mask: str, option: str, value: Any) -> None:
    image = street_scene(96, 128)[None]
    net = cs.adaptify(network(), mask, output_stride=(4, 16), verify_laws=False).eval()
    fast = net.optimize()
    fast(image)
    number = value if isinstance(value, (int, float)) else value[0]
    sign = "," if ":" in mask else ":"
    stated = cs.adaptify(
        network(), f"{mask}{sign}{option}={number}", output_stride=(4, 16), verify_laws=False
    )
    stated.eval()(image)
    setattr(net.mask, option, value)
    for one in (net, fast):
        one(image)
        assert torch.equal(one.levels, stated.levels) and one.mask.spec() == stated.mask.spec()
