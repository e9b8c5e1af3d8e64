"""A conversion costs a few calls of the network, however many times its work all cells high would cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import slow
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cadsurgery as cs
from benchmarks.zoo.corpus import CHECKOUT, subject
from cadsurgery.surgery.verify import _largest_part


def conv(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    window = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(window, nn.BatchNorm2d(outputs), nn.ReLU())


class ResidualStream(nn.Module):
    """A stream of full resolution, to which coarser maps are added (as FRRN)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = conv(3, 8), nn.Conv2d(8, 3, 1)
        self.scales = (2, 4, 8, 16, 8, 4, 2)
        self.units = nn.ModuleList(conv(24 if i else 16, 16) for i in range(len(self.scales)))
        self.back = nn.ModuleList(nn.Conv2d(16, 8, 1) for _ in self.scales)

    def forward(self, x: Tensor) -> Tensor:
        stream = y = self.first(x)
        scale = 1
        for new, unit, back in zip(self.scales, self.units, self.back, strict=True):
            if new > scale:
                y = F.max_pool2d(y, 2, 2)
            else:
                y = F.interpolate(y, size=torch.Size([2 * s for s in y.shape[-2:]]), mode="bilinear")
            y, scale = unit(torch.cat([y, F.max_pool2d(stream, new, new)], 1)), new
            size = torch.Size([s * new for s in y.shape[-2:]])
            stream = stream + F.interpolate(back(y), size=size, mode="nearest")
        return self.head(stream)


class Edges(nn.Module):
    """Outputs of several strides, resized where a size differs (as DexiNed)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [conv(3, 8, 2), *(nn.Sequential(conv(8, 8), conv(8, 8)) for _ in range(4))]
        )
        self.sides = nn.ModuleList(nn.Conv2d(8, 1, 1) for _ in range(5))

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs, y = [], x
        for i, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            y = block(F.max_pool2d(y, 3, 2, 1) if i else y)
            output = side(y)
            if output.shape[2:] != x.shape[2:]:
                output = F.interpolate(output, (x.shape[2], x.shape[3]), mode="bilinear")
            outputs.append(output)
        return [*outputs, torch.stack(outputs).mean(0)]


class Macs(TorchDispatchMode):
    """Counts the multiply-accumulates that are computed, not those of tensors without values."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(output, Tensor) and not output.is_meta:
            if name == "convolution":
                self.total += output.numel() * args[1][0].numel()
            elif name in ("mm", "bmm"):
                self.total += output.numel() * args[0].shape[-1]
            elif name in ("addmm", "baddbmm"):
                self.total += output.numel() * args[1].shape[-1]
        return output


def work(run: Callable[[], Any]) -> tuple[int, Any]:
    with Macs() as macs, torch.no_grad():
        result = run()
    return macs.total, result


Nested = subject("unets:NestedSalience", CHECKOUT).build  # a U of small Us
NETWORKS = (ResidualStream, Nested, Edges)
# What decides by sizes is also run at a few other sizes, to find out which decisions matter.
MOST_CALLS = {Edges: 12}


@pytest.mark.filterwarnings("ignore::cadsurgery.CadWarning")
@pytest.mark.parametrize("build", [ResidualStream, slow(Nested), slow(Edges)])
def test_a_conversion_costs_about_ten_calls_of_the_network(build: type[nn.Module]) -> None:
    """Everything high costs up to fifty times the work of these networks; the laws are compared all the same."""
    torch.manual_seed(0)
    model = build().eval()
    of_conversion, net = work(lambda: cs.adaptify(model, "none"))
    of_call, _ = work(lambda: model(torch.rand(net.plan.example_shape)))
    assert {check.number for check in net.checks} == {1, 2}
    assert all(check.passed for check in net.checks)
    assert of_conversion <= MOST_CALLS.get(build, 10) * of_call


@pytest.mark.parametrize("build", [ResidualStream, slow(Nested), slow(Edges)])
def test_a_plan_costs_at_most_six_calls_of_the_network(build: type[nn.Module]) -> None:
    model = build().eval()
    of_plan, plan = work(lambda: cs.plan(model))
    of_call, _ = work(lambda: model(torch.rand(plan.example_shape)))
    assert of_plan <= 6 * of_call


@pytest.mark.slow
def test_every_level_is_compared_on_a_part_with_the_same_rest() -> None:
    """The network's own level is compared on the whole example, the others on a part that leaves the same rests."""
    net = cs.adaptify(Nested().eval(), "none")
    own = [check.size for check in net.checks if check.number == 1]
    others = {check.size for check in net.checks if check.law.startswith("everything") and check.number == 2}
    assert own[0] == tuple(net.plan.example_shape[2:])
    assert {tuple(length % 32 for length in size) for size in others if size != (0, 0)} == {(1, 1)}
    assert max(height * width for height, width in others) < own[0][0] * own[0][1]


@pytest.mark.parametrize(
    ("pixels", "least", "part"),
    [
        (12_513, 64, (97, 129)),
        (7_000, 64, (97, 65)),
        (4_300, 32, (65, 65)),
        (2_000, 32, (33, 33)),
        (9, 64, (65, 65)),
    ],
)
def test_a_part_is_the_largest_that_fits(pixels: int, least: int, part: tuple[int, int]) -> None:
    """It leaves the same rest of 32 as the example, and has two cells of the lowest stride along each side."""
    assert _largest_part((97, 129), pixels, least) == part


def test_a_network_in_training_mode_is_verified_without_a_trace() -> None:
    """Parts of the example run in evaluation mode, too: no statistic of a norm changes."""
    net = cs.adaptify(ResidualStream().train(), "none")
    assert all((value == 0).all() for name, value in net.named_buffers() if name.endswith("running_mean"))
    assert net.training


def test_sizes_in_torch_size_are_followed() -> None:
    """Sizes that a forward puts into torch.Size are computed in each call, so that one graph serves every size."""
    model = ResidualStream().eval()
    net = cs.adaptify(model, "none")
    x = torch.rand(1, 3, 64, 112)
    torch.testing.assert_close(net(x), model(x), rtol=1e-4, atol=1e-5)
    assert not net._paths
