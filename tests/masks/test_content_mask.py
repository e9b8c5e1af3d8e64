"""Mask `content`: keeps what differs from a smooth background by more than the picture's own noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cadsurgery as cs
from cadsurgery.masks import FineMapSpec, resolve_mask

CELL = 32


def grid(size: tuple[int, int], batch: int = 1) -> FineMapSpec:
    return FineMapSpec(batch, size, 1, 5, CELL, CELL)


def page(noise: float, slope: float = 0.0) -> Tensor:
    """A page, lit unevenly and noisy, with writing in one cell."""
    torch.manual_seed(0)
    light = torch.linspace(0, slope, 160).view(1, 1, 1, -1)
    image = 2 + light + noise * torch.randn(1, 3, 128, 160)
    image[..., 40:56:4, 40:60] -= 3
    return image


def kept(image: Tensor, spec: str = "content:margin=0") -> Tensor:
    return resolve_mask(spec)(image, image, grid((128, 160)))[0, ::CELL, ::CELL]


@pytest.mark.parametrize(("noise", "slope"), [(0.0, 0.0), (0.05, 0.0), (0.2, 0.0), (0.05, 4.0)])
def test_writing_is_kept_whatever_the_paper_and_the_light(noise: float, slope: float) -> None:
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[1, 1] = True
    assert torch.equal(kept(page(noise, slope)), expected)


def test_a_margin_keeps_the_cells_around() -> None:
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[:3, :3] = True
    assert torch.equal(kept(page(0.05), "content"), expected)


def test_a_blank_page_keeps_nothing_and_sizes_may_be_odd() -> None:
    blank = torch.full((2, 3, 101, 75), 0.5)
    map_ = resolve_mask("content")(blank, blank, grid((101, 75), 2))
    assert map_.shape == (2, 101, 75) and not map_.any()


@pytest.mark.parametrize(
    "spec", ["content:share=2", "content:noise=-1", "content:margin=-1", "content:least=-1"]
)
def test_impossible_options_are_refused(spec: str) -> None:
    with pytest.raises(cs.InvalidInput):
        resolve_mask(spec)
