"""Laws of networks that unpool: max pooling with indices and unpooling run dense, and all around them is as always."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images
from networks import conv_norm
from random_laws import compare
from random_networks import Case, Draw, settled
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.surgery.verify import FirstOfEqual

EXACT = 1e-9
CHANNELS = 5
double = torch.float64


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
    """A stem with strides, a pooling, and what is made of its indices; strides between them with `body`."""

    def __init__(self, pool: nn.Module, use: Callable[[Tensor, Tensor], Any], stride: int = 1) -> None:
        super().__init__()
        self.stem, self.pool, self.use = nn.Sequential(conv_norm(3, 8, 2), conv_norm(8, 8, 2)), pool, use
        self.body = nn.Sequential(conv_norm(8, 8), conv_norm(8, 8, stride))
        self.last = nn.Sequential(nn.Upsample(scale_factor=stride), nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Any:
        x, indices = self.pool(self.stem(x))
        return self.use(self.last(self.body(x)), indices)


USES: dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], Any]]] = {
    "put back": (nn.MaxPool2d(2, 2, return_indices=True), nn.MaxUnpool2d(2, 2)),
    "by a function": (nn.MaxPool2d(2, return_indices=True), lambda x, i: F.max_unpool2d(x, i, 2, 2)),
    "windows that overlap": (
        nn.MaxPool2d(3, 2, 1, return_indices=True),
        lambda x, i: F.max_unpool2d(x, i, 3, 2, 1, (x.shape[2] * 2, x.shape[3] * 2)),
    ),
    "returned": (nn.MaxPool2d(2, 2, return_indices=True), lambda x, i: (x, i)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("options", [{"coarsest": 16}, {}], ids=str)
@torch.no_grad()
def test_pooling_with_indices_and_unpooling_run_dense(use: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = images(2, 48, 64, double)
    model = settled(Once(*USES[use]).double(), x, Draw(0))
    net = cs.adaptify(model, "none", example_input=x, outputs="native", **options)
    assert net.plan["pool"].action not in ("adapt", "keep")
    assert "indices are places of a dense map" in net.plan["pool"].reason
    with FirstOfEqual():
        own = "all" if "coarsest" in options else "none"
        assert_same(net(x, mask=own), model(x), EXACT)
        net(x, mask="all")
        levels = torch.full_like(net.levels.long(), net.plan.max_level)
        levels[:, : net.geometry.sides[-1]] = 0
        ours, alone = net(x, mask=levels), net(x[1:], mask=levels[1:])
        for found, expected in zip(_parts(ours), _parts(alone), strict=True):
            assert_same(found[1:], expected, EXACT)


def _parts(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_strides_behind_the_pooling_are_adaptive() -> None:
    """A region may begin behind it."""
    torch.manual_seed(0)
    x = images(1, 64, 96, double)
    pool, use = USES["put back"]
    model = settled(Once(pool, use, 2).double(), x, Draw(0))
    compare(Case(model, images(2, 64, 128, double), x, True), Draw(1))
