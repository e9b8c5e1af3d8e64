"""What dilations stand for: strides that were removed, or a network's design. Networks in the idioms people write."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import some
from networks import conv_norm
from torch import nn

import cadsurgery as cs


class Residual(nn.Module):
    """A bottleneck with a dilated convolution, or two dilated ones."""

    def __init__(self, width: int, dilation: int, plain: bool = False) -> None:
        super().__init__()
        first = conv_norm(width, width, 1, dilation) if plain else nn.Conv2d(width, width, 1)
        self.body = nn.Sequential(first, conv_norm(width, width, 1, dilation), nn.Conv2d(width, width, 1))

    def forward(self, x):
        return F.relu(x + self.body(x))


class Factors(nn.Module):
    """Undilated 3x1 and 1x3, dilated 3x1 and 1x3, concatenated with what came in (as in EDANet)."""

    def __init__(self, inputs: int, dilation: int) -> None:
        super().__init__()
        tall, wide = {"padding": (1, 0)}, {"padding": (0, 1)}
        far_tall = {"padding": (dilation, 0), "dilation": dilation}
        far_wide = {"padding": (0, dilation), "dilation": dilation}
        self.body = nn.Sequential(
            nn.Conv2d(inputs, 8, 1),
            nn.ReLU(),
            *(nn.Conv2d(8, 8, (3, 1), **tall), nn.Conv2d(8, 8, (1, 3), **wide), nn.ReLU()),
            *(nn.Conv2d(8, 8, (3, 1), **far_tall), nn.Conv2d(8, 8, (1, 3), **far_wide), nn.ReLU()),
        )

    def forward(self, x):
        return torch.cat([self.body(x), x], 1)


class Head(nn.Module):
    """Parallel rates, then a 3x3 at the fine stride (as DeepLab ends)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rates = nn.ModuleList(conv_norm(width, 8, 1, rate) for rate in (12, 24))
        self.last = conv_norm(16, 8)

    def forward(self, x):
        return self.last(torch.cat([rate(x) for rate in self.rates], 1))


class Network(nn.Module):
    """Three strides, the body, one class map at the size of the image."""

    def __init__(self, *body: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 8, 2), conv_norm(8, 16, 2), conv_norm(16, 32, 2))
        self.body = nn.Sequential(*body, nn.Conv2d(width, 3, 1))

    def forward(self, x):
        y = self.body(self.stem(x))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)


BY_DESIGN = {
    "factored, concatenated": lambda: Network(
        *(Factors(32 + 8 * i, d) for i, d in enumerate((1, 2, 2, 4, 4, 8, 8))), width=88
    ),
    "hybrid 1-2-5": lambda: Network(*(Residual(32, d, plain=True) for d in (1, 2, 5, 1, 2, 5))),
    "alternating 1-2": lambda: Network(*(conv_norm(32, 32, 1, d) for d in (1, 2, 1, 2, 1, 2))),
    "context 1-2-4-8-16-1": lambda: Network(*(conv_norm(32, 32, 1, d) for d in (1, 1, 2, 4, 8, 16, 1))),
    "context 1-2-4-8-16": lambda: Network(*(conv_norm(32, 32, 1, d) for d in (1, 2, 4, 8, 16))),
    "regular between": lambda: Network(*(Residual(32, d) for d in (1, 2, 1, 4, 1, 8, 1, 16))),
}
REMOVED = {
    "2 and 4": lambda: Network(*(Residual(32, d) for d in (1, 2, 2, 2, 4, 4))),
    "and a head": lambda: Network(*(Residual(32, d) for d in (1, 2, 2, 2, 4, 4, 4)), Head(32), width=8),
    "several grids": lambda: Network(*(Residual(32, d) for d in (1, 2, 2, 2, 2, 4, 4, 4, 8, 16))),
    "coming back at the end": lambda: Network(
        *(Residual(32, d, plain=True) for d in (1, 2, 2, 4, 4)), conv_norm(32, 32, 1, 2), conv_norm(32, 32)
    ),
}


@pytest.fixture(autouse=True)
def _same_weights():
    torch.manual_seed(0)


@pytest.mark.parametrize("idiom", some(BY_DESIGN))
def test_dilation_by_design_leaves_the_network_its_strides(idiom):
    plan = cs.plan(BY_DESIGN[idiom]().eval())
    assert plan.output_stride == (2, 8) and plan.identity_level == plan.max_level
    assert plan.share("adapt", "keep") > 0.7


@pytest.mark.parametrize("idiom", some(REMOVED))
def test_dilations_that_stay_stand_for_removed_strides(idiom):
    plan = cs.plan(REMOVED[idiom]().eval())
    assert plan.output_stride == (8, 32) and plan.identity_level == 0
    assert plan.considered[0].evident and plan.considered[0].removed == (16, 32)


def test_what_was_considered_is_reported_and_kept():
    plan = cs.plan(BY_DESIGN["context 1-2-4-8-16-1"]().eval())
    chosen, *others = plan.considered
    assert chosen.removed == () and chosen.output_stride == (2, 8) and not chosen.evident
    assert chosen.share == pytest.approx(plan.share("adapt", "keep"))
    assert [one.removed for one in others] == [(16, 32, 64, 128), (16, 32, 64), (16, 32), (16,)]
    assert all(one.share < chosen.share for one in others)
    said = [line for line in str(plan).splitlines() if line.startswith("considered")]
    assert len(said) == 2 and "by design" in said[0] and "(8, 128)" in said[1]
    assert type(plan).from_json(plan.to_json()).considered == plan.considered


def test_a_plan_written_before_readings_were_kept_is_the_same_plan():
    plan = cs.plan(REMOVED["2 and 4"]().eval())
    assert plan.considered and replace(plan, considered=()) == plan
    assert cs.plan(nn.Sequential(conv_norm(3, 8, 2), conv_norm(8, 8, 2), conv_norm(8, 8))).considered == ()


def test_another_reading_is_planned_where_its_strides_are_asked_for():
    model = BY_DESIGN["context 1-2-4-8-16-1"]().eval()
    asked = cs.plan(model, output_stride=(8, 128))
    assert asked.output_stride == (8, 128) and (8, 128) in cs.plan(model).possible
    with pytest.raises(cs.InvalidInput, match=r"\(2, 8\).*\(8, 128\)"):
        cs.plan(model, output_stride=(8, 256))


def test_a_network_without_strides_has_those_that_its_dilations_stand_for():
    layers = (conv_norm(3 if i == 0 else 8, 8, 1, d) for i, d in enumerate((1, 2, 4, 8, 1)))
    plan = cs.plan(nn.Sequential(*layers).eval())
    assert plan.output_stride[0] == 1 and plan.share("adapt", "keep") > 0.5
    assert plan.considered[-1].output_stride is None and "nothing would be adaptive" in plan.summary()


class TwoBranches(nn.Module):
    """A branch that keeps stride 8 and has most of the work; one that goes on to 64 and is pooled to 512."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 8, 2), conv_norm(8, 16, 2), conv_norm(16, 32, 2))
        self.fine = nn.Sequential(*(Residual(32, 1, plain=True) for _ in range(3)))
        self.coarse = nn.Sequential(conv_norm(32, 32, 2), conv_norm(32, 32, 2), conv_norm(32, 32, 2))
        self.pools = nn.ModuleList(nn.AvgPool2d(2 * s + 1, s, s) for s in (2, 4, 8))
        self.mixes = nn.ModuleList(nn.Conv2d(32, 32, 1) for _ in range(3))

    def forward(self, x):
        fine = self.stem(x)
        total = coarse = self.coarse(fine)
        for pool, mix in zip(self.pools, self.mixes, strict=True):
            total = total + F.interpolate(mix(pool(coarse)), coarse.shape[2:], mode="bilinear")
        return self.fine(fine) + F.interpolate(total, fine.shape[2:], mode="bilinear")


@pytest.mark.slow
def test_a_branch_that_keeps_its_resolution_is_in_the_region_with_one_that_is_pooled():
    model = TwoBranches().double().eval()
    net = cs.adaptify(model, mask="none", example_input=torch.randn(1, 3, 97, 129).double())
    assert net.plan.share("adapt", "keep") > 0.7 and net.plan.output_stride[1] == 512
    x = torch.randn(2, 3, 133, 90).double()
    with torch.no_grad():
        ours = net(x, mask="none")[..., :: 8 // net.plan.strides[0], :: 8 // net.plan.strides[0]]
        assert (ours - model(x)).abs().max() < 1e-9 * model(x).abs().max()
