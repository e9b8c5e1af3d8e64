"""Laws of max pooling with indices, and of unpooling, which runs dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, images, some
from networks import conv_norm
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.elements import functional
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Geometry
from cadsurgery.surgery.verify import FirstOfEqual

pytestmark = pytest.mark.filterwarnings("ignore:no mask can improve")

EXACT = 1e-9
CHANNELS = 5
double = torch.float64


def entering(
    size: tuple[int, int], levels: Tensor | int, strides: tuple[int, ...], stage: int, **options: Any
) -> Elements:
    geometry = Geometry(strides, **options)
    lattice = geometry.uniform(levels, 2, size) if isinstance(levels, int) else geometry.lattice(levels)
    lattice = lattice.at(stage)
    return Elements(torch.randn(len(lattice), CHANNELS, dtype=double), lattice)


def pooled(x: Elements, window: Window, stage: int) -> tuple[Elements, Elements]:
    """Values and indices."""
    pair = functional.max_pool2d_with_indices(x, window, stage)
    values, indices = pair.rows  # type: ignore[misc]
    return Elements(values, pair.lattice), Elements(indices, pair.lattice)


@pytest.mark.parametrize(
    ("pool", "size"),
    covering([nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True)], [(16, 24), (13, 22)]),
    ids=str,
)
def test_indices_that_leave_the_region_are_torchs_numbers(pool: nn.MaxPool2d, size: tuple[int, int]) -> None:
    """Overlapping windows included, which only unpooling on elements does not take."""
    x, window = entering(size, 1, (2,), 0), Window((pool.kernel_size,) * 2, 2, ceil_mode=pool.ceil_mode)
    _, indices = pooled(x, window._replace(padding=(pool.padding,) * 4), 1)
    _, expected = F.max_pool2d(
        functional.to_dense(x),
        pool.kernel_size,
        pool.stride,
        pool.padding,
        ceil_mode=pool.ceil_mode,
        return_indices=True,
    )
    assert torch.equal(functional.dense_indices(indices, 2), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_laws_are_checked_rounding_does_not_say_which_of_equal_values_is_the_largest(
    dtype: torch.dtype,
) -> None:
    x, flat = torch.randn(2, CHANNELS, 8, 12, dtype=dtype), torch.randn(2, CHANNELS, 4, 6, dtype=dtype)
    flat = flat.repeat_interleave(2, 2).repeat_interleave(2, 3)
    rounded = flat * (1 + torch.finfo(dtype).eps * torch.randint(-1, 2, flat.shape, dtype=dtype))
    first, own = (F.max_pool2d(value, 2, return_indices=True) for value in (flat, x))
    assert not torch.equal(F.max_pool2d(rounded, 2, return_indices=True)[1], first[1])
    with FirstOfEqual():
        assert torch.equal(F.max_pool2d(rounded, 2, return_indices=True)[1], first[1])
        for found, expected in zip(F.max_pool2d(x, 2, return_indices=True), own, strict=True):
            assert torch.equal(found, expected)


class Once(nn.Module):
    """One pooling, and what is made of its indices."""

    def __init__(self, pool: nn.Module, use: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.pool, self.use = nn.Sequential(conv_norm(3, 8, 2), conv_norm(8, 8, 2)), pool, use
        self.body, self.last = nn.Sequential(conv_norm(8, 8), conv_norm(8, 8)), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Any:
        x, indices = self.pool(self.stem(x))
        return self.use(self.last(self.body(x)), indices)


ENDS: dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], Any]]] = {
    "puts values at places of a dense map": (
        nn.MaxPool2d(3, 2, 1, return_indices=True),
        lambda x, i: F.max_unpool2d(x, i, 3, 2, 1, (x.shape[2] * 2, x.shape[3] * 2)),
    ),
    "reads the indices of a pooling": (
        nn.MaxPool2d(2, 2, return_indices=True),
        lambda x, i: F.max_unpool2d(x, i.clone(), 2, 2),
    ),
    "": (nn.MaxPool2d(2, 2, return_indices=True), lambda x, i: (x, i)),
}


@pytest.mark.parametrize("reason", some(ENDS, every=3), ids=lambda reason: reason or "returned")
@pytest.mark.usefixtures("one_thread")  # where windows overlap, threads race for which value stays at a place
def test_what_is_not_unpooled_on_elements_says_why_and_is_the_networks(reason: str) -> None:
    torch.manual_seed(0)
    model = Once(*ENDS[reason]).eval().double()
    x = images(2, 48, 64, double)
    net = cs.adaptify(model, "none", output_stride=(4, 8), example_input=x, outputs="native")
    assert net.plan["pool"].action == "adapt"
    assert any(reason in d.reason for d in net.plan.chosen("barrier", "exit"))
    with torch.no_grad():
        for image in (x, images(1, 53, 58, double)) if not reason else (x,):
            assert_same(net(image), model(image), EXACT)
    # Under floors its pooling runs dense: inside a cell there are no places of maxima.
    net = cs.adaptify(model, "none", coarsest=16, example_input=x)
    assert not net.plan["pool"].on_elements
    levels = (torch.rand(2, 48, 64) < 0.5).int() * net.plan.max_level
    with torch.no_grad(), FirstOfEqual():  # of values that are equal but for rounding
        assert_same(net(x, mask="all"), model(x), EXACT)
        ours, last = net(x, mask=levels), net(x[1:], mask=levels[1:])
    assert_same(ours[0][1:] if not reason else ours[1:], last[0] if not reason else last, EXACT)
