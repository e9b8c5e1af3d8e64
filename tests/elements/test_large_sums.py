"""Sums over large maps are as exact as sums in float64, for every operation on an image as a whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from conftest import covering
from torch import Tensor, nn

from cadsurgery.elements import functional
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.lattice import Geometry, Lattice
from cadsurgery.elements.whole_image import sum_products

EXACT = 2e-6
SIZE = (1024, 2048)  # 2 megapixels
CHANNELS = 4

OPERATIONS: dict[str, Callable[[Elements], Tensor]] = {
    "mean": functional.global_mean,
    "sum": lambda x: functional.global_reduce(x, "sum", (2, 3)),
    "norm": lambda x: functional.global_reduce(x, "norm", (2, 3)),
    "variance": lambda x: functional.global_reduce(x, "var", (2, 3)),
    "deviation with channels": lambda x: functional.global_reduce(x, "std", (1, 2, 3)),
    "instance norm": lambda x: functional.group_norm(x, CHANNELS, None, None).rows,
    "group norm": lambda x: functional.group_norm(x, 2, None, None).rows,
    "group deviation": lambda x: functional.group_deviation(x, 2, 1e-5).rows,
    "batch norm of the batch": lambda x: functional.batch_norm(x, _norm(x.rows)).rows,
    "bins": lambda x: functional.pool_to_bins(x, (3, 2)),
    "softmax over the image": lambda x: functional.softmax_over_image(x, 1).rows,
    "normalised over the image": lambda x: functional.normalize_over_image(x, 1).rows,
    "products": lambda x: functional.sum_of_products(x, x, 1, "bhwc"),
}


def _norm(rows: Tensor) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(rows.shape[1], track_running_stats=False).to(
        torch.promote_types(rows.dtype, torch.float32)
    )


@cache
def lattice_of(levels: int) -> Lattice:
    """Half of the map is at each of two levels."""
    filled = torch.zeros(1, *SIZE, dtype=torch.uint8)
    filled[:, :, SIZE[1] // 2 :] = levels - 1
    return Geometry((2,)).lattice(filled)


TYPES = (torch.float32, torch.bfloat16)
# Each operation in one type on one lattice, and in the other type on the other lattice.
CASES = [(name, TYPES[place % 2], 1 + place // 2 % 2) for place, name in enumerate(OPERATIONS)]
OTHERS = [(name, TYPES[1 - place % 2], 2 - place // 2 % 2) for place, name in enumerate(OPERATIONS)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "levels"), [*CASES, *OTHERS])
def test_sums_over_two_megapixels_are_those_of_float64(name: str, dtype: torch.dtype, levels: int) -> None:
    lattice = lattice_of(levels)
    draw = torch.Generator().manual_seed(0)
    rows = (torch.rand(len(lattice), CHANNELS, generator=draw) + torch.arange(1.0, CHANNELS + 1) / 2).to(
        dtype
    )
    exact = OPERATIONS[name](Elements(rows.double(), lattice)).detach()
    result = OPERATIONS[name](Elements(rows, lattice)).detach().double()
    rounding = (
        0.0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    )  # of rows of the result, and between
    assert float((result - exact).abs().max() / exact.abs().max()) < EXACT + rounding


@pytest.mark.parametrize(("count", "shape"), covering([0, 1, 511, 512, 513, 8192, 20001], [(), (2,), (2, 3)]))
def test_products_of_rows_are_those_of_einsum_with_gradients(count: int, shape: tuple[int, ...]) -> None:
    left, right = (
        torch.randn(count, *shape, width, dtype=torch.float64, requires_grad=True) for width in (2, 5)
    )
    result, exact = sum_products(left, right), torch.einsum("n...i,n...j->...ij", left, right)
    torch.testing.assert_close(result, exact)
    pull = torch.randn_like(exact)
    for found, wanted in zip(
        torch.autograd.grad(result, (left, right), pull),
        torch.autograd.grad(exact, (left, right), pull),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
