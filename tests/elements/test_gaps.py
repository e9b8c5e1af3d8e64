"""Gaussian filling of what was not computed: both published forms against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, images
from torch import Tensor
from torch.testing import assert_close

import cadsurgery as cs
from cadsurgery.functional import gaussian_fill

TYPES = (torch.float32, torch.float64)


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def chosen(*shape: int, share: float = 0.5) -> Tensor:
    """A mask that differs from image to image."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share


def formula(x: Tensor, mask: Tensor, width: float, normalised: bool) -> Tensor:
    """The published formulas as dense convolutions over 7 x 7 in float64."""
    mask, steps = mask.double().unsqueeze(1), torch.arange(-3, 4)
    squared = (steps.square().unsqueeze(1) + steps.square()).double()
    if normalised:
        kernel = width**2 / (2 * math.pi) * torch.exp(-(width**2) * squared / 2)
    else:
        kernel = torch.exp(-(width**2) * squared) * (squared > 0)

    def spread(values: Tensor) -> Tensor:
        weights = kernel.expand(values.shape[1], 1, 7, 7)
        return F.conv2d(values, weights, padding=3, groups=values.shape[1])

    x = x.double()
    mass = spread(mask) if normalised else kernel.sum()
    return mask * x + (1 - mask) * spread(mask * x) / (mass + 1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("width", [3.0, 1.0, 0.3])
@pytest.mark.parametrize("soft", [False, True])
def test_it_is_the_published_formula(dtype: torch.dtype, normalised: bool, width: float, soft: bool) -> None:
    x, mask = numbers(2, 5, 13, 11, dtype=dtype), chosen(2, 13, 11, share=0.3)
    shares = (mask * images(2, 13, 11, dtype)[:, 0].sigmoid()) if soft else mask
    found = gaussian_fill(x, shares, width, normalised)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(found.double(), formula(x, shares, width, normalised), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("full", [torch.ones(2, 7, 5, dtype=torch.bool), torch.ones(2, 7, 5)])
def test_a_full_mask_gives_the_map_bit_for_bit(normalised: bool, full: Tensor) -> None:
    x = numbers(2, 3, 7, 5)
    for width in (3.0, torch.tensor(3.0, dtype=torch.float64, requires_grad=True)):
        found = gaussian_fill(x, full, width, normalised)
        assert torch.equal(found, x)
    found.sum().backward()
    assert width.grad == 0


def test_values_are_measured_from_a_baseline() -> None:
    x, mask, baseline = numbers(2, 3, 9, 7), chosen(2, 9, 7, share=0.2), numbers(3)
    wide = baseline.view(-1, 1, 1)
    assert_same(gaussian_fill(x, mask, 1.0, baseline=baseline), gaussian_fill(x - wide, mask, 1.0) + wide)


@pytest.mark.parametrize(("normalised", "soft"), covering([False, True], [False, True]))
def test_gradients_are_those_of_finite_differences(normalised: bool, soft: bool) -> None:
    mask = chosen(2, 5, 6)
    shares = mask * images(2, 5, 6, torch.float64)[:, 0].sigmoid() if soft else mask

    def fill(x: Tensor, width: Tensor) -> Tensor:
        return gaussian_fill(x, shares, width, normalised)

    width = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fill, (numbers(2, 2, 5, 6).requires_grad_(), width))


def test_what_does_not_fit_is_refused() -> None:
    x = numbers(2, 3, 7, 5)
    with pytest.raises(cs.InvalidInput, match="one value for each position"):
        gaussian_fill(x, torch.ones(2, 5, 7, dtype=torch.bool), 3.0)
    with pytest.raises(cs.InvalidInput, match="without dimensions"):
        gaussian_fill(x, torch.ones(2, 7, 5, dtype=torch.bool), torch.ones(3))
