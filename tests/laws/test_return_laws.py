"""Laws of values that are computed dense, on the network's own grid, and come back where maps are joined with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images, random_levels, some
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery import functional
from cadsurgery.elements.lattice import Geometry

C = 6
EXACT = 1e-9
SIZE = (51, 67)

Function = Callable[[Any, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Three strided convolutions, and between the last two the operation under test."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(c, C, 3, 2, 1) for c in (3, C, C))
        self.one, self.last, self.function = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 3, padding=1), function

    def forward(self, image: Tensor) -> Tensor:
        x = self.function(self, self.first(self.stem(image)), image)
        return self.last(self.second(F.relu(x)))


def _shrunk(m: Any, x: Tensor, image: Tensor) -> Tensor:
    return x * torch.sigmoid(F.interpolate(m.stem(image), size=x.shape[2:], mode="bilinear"))


def _padded(m: Any, x: Tensor, image: Tensor) -> Tensor:
    return x - F.pad(F.max_pool2d(m.one(x), 2, 1), (1, 0, 1, 0))


FUNCTIONS: dict[str, Function] = {
    "an operation without a rule": lambda m, x, image: x + torch.special.expit(m.one(x)),
    "beside others": lambda m, x, image: m.one(
        (torch.cat([torch.special.expit(x), x], 1).unflatten(1, (2, C))).sum(1)
    ),
    "a finer map, shrunk": _shrunk,
    "a window that moves the map": _padded,
}


def network(name: str, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    net = Net(FUNCTIONS[name]).to(dtype).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return net


def adapted(model: nn.Module, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    example = images(2, *SIZE, dtype)
    return cs.adaptify(model, "none", output_stride=(2, 8), example_input=example, **options)


@pytest.mark.parametrize("name", some(FUNCTIONS))
def test_what_comes_back_is_the_networks_at_its_own_level(name: str) -> None:
    model = network(name)
    net = adapted(model)
    assert net.plan["second"].action == "adapt" and net.plan["last"].action == "keep"
    for size in (SIZE, (64, 80), (50, 73)):
        x = images(2, *size, torch.float64)
        with torch.no_grad():
            assert_same(net(x)[..., ::4, ::4], model(x), EXACT)
            levels = random_levels(2, tuple(-(-length // 2) for length in size), (2, 2))
            both = net(x, mask=levels)
            assert_same(both, torch.cat([net(x[i : i + 1], mask=levels[i : i + 1]) for i in range(2)]), EXACT)
            assert_same(net.optimize()(x, mask=levels), both, EXACT)


@pytest.mark.parametrize("fill", ["linear", "nearest"])
def test_elements_read_a_map_of_the_networks_own_between_its_samples(fill: Any) -> None:
    own, spacing = torch.randn(2, 3, 6, 7, dtype=torch.float64), 4
    lattice = Geometry((2, 2), fill=fill).lattice(random_levels(2, (24, 26), (2, 2)))
    rows = functional.rows_on(functional.small_map(own, spacing), lattice)
    for row, image, y, x in zip(rows, *(part.tolist() for part in lattice.coordinates), strict=True):
        expected = torch.zeros(3, dtype=torch.float64)
        for at_y, of_y in (
            (y // spacing, 1 - y % spacing / spacing),
            (y // spacing + 1, y % spacing / spacing),
        ):
            for at_x, of_x in (
                (x // spacing, 1 - x % spacing / spacing),
                (x // spacing + 1, x % spacing / spacing),
            ):
                expected += of_y * of_x * own[image, :, min(at_y, 5), min(at_x, 6)]
        expected = expected if fill == "linear" else own[image, :, y // spacing, x // spacing]
        assert_same(row, expected, EXACT)
