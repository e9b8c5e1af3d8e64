"""The memory that a mask takes counts: what it cannot hold is refused in words, before the mask is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import some
from torch import nn

import cadsurgery as cs

LOCAL = ["edges", "content", "edges | dilate:size=5", "edges | budget:fraction=0.3", "content + edges"]
WHOLE = ["random:seed=1", "detail", "detail | budget:fraction=0.3", "edges | smooth"]
SIZE = (512, 640)


def network(mask: str, **options: Any) -> Any:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.Upsample(scale_factor=4)]
    example = torch.rand(1, 3, 64, 64)
    options = {"normalisation": "imagenet", **options}
    return cs.adaptify(nn.Sequential(*layers).eval(), mask, coarsest=16, example_input=example, **options)


@pytest.mark.parametrize("mask", some(WHOLE))
def test_a_mask_that_sees_all_at_once_needs_memory_for_it(mask: str) -> None:
    net, image = network(mask), torch.rand(1, 3, *SIZE)
    for call in (
        lambda fast: fast(image),
        lambda fast: fast.plan_memory(image),
        lambda fast: fast.rows(image[0]),
    ):
        with pytest.raises(cs.InvalidInput, match=r"are too little for this picture") as refusal:
            call(net.optimize(memory="256KiB"))
        assert "mask" in refusal.value.why and "edges or content" in refusal.value.next
    least = refusal.value.next.split('"')[1]
    walks = net.optimize(memory=least).plan_memory(image)
    assert walks.mask > 0 and "the mask takes" in str(walks)


@pytest.mark.parametrize("mask", some(LOCAL))
def test_a_mask_in_bands_takes_level_maps_only(mask: str) -> None:
    net, image = network(mask), torch.rand(1, 3, *SIZE)
    walks = net.optimize(memory="4MiB").plan_memory(image)
    assert walks.mask <= 3 * SIZE[0] * SIZE[1]


def test_a_uniform_mask_takes_none() -> None:
    walks = network("all").optimize(memory="4MiB").plan_memory(torch.rand(1, 3, *SIZE))
    assert walks.mask == 0 and "mask" not in str(walks)
