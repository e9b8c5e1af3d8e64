"""What users give: maps as tensors and arrays, in samples and pixels, options set on a mask, and what a call gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import covering, some
from networks import strided
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import street_scene
from cadsurgery.masks import keypoints_at, labelled
from cadsurgery.masks.context import call_context, first_passes, masked


def network() -> nn.Module:
    torch.manual_seed(0)
    return strided(4, outputs=2)


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
    own = cs.adaptify(network(), torch.from_numpy(levels), output_stride=(4, 16), verify_laws=False).eval()
    for _ in range(2):  # a tensor is the mask of every call
        assert torch.equal(own(image), expected) and torch.equal(own.levels, net.levels)


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


NET = nn.Identity()
GIVERS: dict[str, Callable[[Any], AbstractContextManager[None]]] = {
    "labels": lambda value: labelled(torch.full((1, 2, 2), value)),
    "points": lambda value: keypoints_at([torch.full((1, 2), float(value))]),
    "first_passes": lambda value: first_passes({1: torch.tensor(value)}),
    "masks": lambda value: masked(NET, torch.tensor(value)),
}
WITHOUT = dict.fromkeys(GIVERS, None)


def seen() -> dict[str, int | None]:
    """The number that was given for each kind."""
    context = call_context()
    points = context.points[0] if context.points is not None else None
    values = context.labels, points, context.first_passes.get(1), context.masks.get(NET)
    return {
        name: int(value.flatten()[0]) if isinstance(value, Tensor) else None
        for name, value in zip(GIVERS, values, strict=True)
    }


@pytest.mark.parametrize("name", GIVERS)
def test_what_is_given_is_nested_and_given_back_even_after_an_error(name: str) -> None:
    with GIVERS[name](1):
        assert seen() == {**WITHOUT, name: 1}
        with pytest.raises(RuntimeError, match="stop"), GIVERS[name](2):
            assert seen() == {**WITHOUT, name: 2}
            raise RuntimeError("stop")
        assert seen() == {**WITHOUT, name: 1}
        with ThreadPoolExecutor(1) as thread:  # has what was given in it
            assert thread.submit(seen).result() == WITHOUT
    assert seen() == WITHOUT


@pytest.mark.parametrize("name", GIVERS)
def test_tasks_take_turns_and_keep_what_is_theirs(name: str) -> None:
    async def work(value: int) -> int | None:
        with GIVERS[name](value):
            for _ in range(3):
                await asyncio.sleep(0)
            return seen()[name]

    async def both() -> list[int | None]:
        return await asyncio.gather(work(1), work(2))

    assert asyncio.run(both()) == [1, 2] and seen() == WITHOUT
