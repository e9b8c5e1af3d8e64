"""Random small networks keep the laws: what a call returns is a dense emulation's, on any level map.

Each seed is a network of `random_networks`, converted with random options, run on a random level map per image: its
outputs are the emulation's, a batch is its images one by one, the optimised copy gives the same, and at the network's
own level the outputs of the call are the original's. Where the emulation does not follow, the mixed map is finite and
the other laws hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from conftest import assert_same, slow
from random_laws import compare
from random_networks import LATER, Draw, random_case
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.support.errors import CannotConvert

# 70: another way through the network, which is itself at another level. 4532: values that are equal but for rounding
# are pooled with their places, also where the conversion is verified.
QUICK, LATE, TOGETHER = (3, 4532), (70,), 25
# 69, 117: means over maps that end within a cell, and deviations, whose result depends on the number of samples.
# 1508: a mean over a map that was cropped to cells of one level.
UNDER_FLOORS, LATE_UNDER_FLOORS = (69, 1508), (117,)
ALL = int(os.environ.get("CADSURGERY_SEEDS", 2000))  # of the slow suite
MOST_REFUSED = 4  # of those together: where what ends the region stands in front of all strides


def groups() -> list[list[int]]:
    """The seeds of the slow suite, so many in a test; as many later ones, see `random_networks`."""
    firsts = range(0, ALL, TOGETHER)
    early = [list(range(first, min(first + TOGETHER, ALL))) for first in firsts]
    return [*early, *([LATER + seed for seed in seeds] for seeds in early)]


def span(seeds: list[int]) -> str:
    return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]}-{seeds[-1]}"


def check(seed: int) -> bool:
    """Everything above for a seed; whether it was converted: what ends the region may stand before all strides."""
    try:
        compare(random_case(seed), Draw(-1 - seed))
    except CannotConvert as refusal:
        assert "nothing that can be made adaptive" in refusal.what and refusal.why
        return False
    return True


def check_all(seeds: Iterable[int]) -> list[str]:
    """What failed, a line for each: `check` of a seed alone runs it again."""
    failed, refused = [], []
    for seed in seeds:
        try:
            if not check(seed):
                refused.append(seed)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            failed.append(f"seed {seed}: {type(error).__name__}: {first}")
    if len(refused) > MOST_REFUSED:
        failed.append(f"seeds {refused} have nothing that can be made adaptive")
    return failed


@pytest.mark.parametrize(
    "seeds", [*([seed] for seed in QUICK), *(slow([seed]) for seed in LATE), *map(slow, groups())], ids=span
)
def test_a_random_network_is_its_emulation(seeds: list[int]) -> None:
    """Few of them are refused, though some hold operations that end the region."""
    failed = check_all(seeds)
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    "seeds",
    [
        *([seed] for seed in UNDER_FLOORS),
        *(slow([seed]) for seed in LATE_UNDER_FLOORS),
        *map(slow, groups()[: -(-ALL // TOGETHER)]),
    ],
    ids=span,
)
def test_a_random_network_under_floors_is_its_emulation(seeds: list[int]) -> None:
    """Conversions compare everything high with the network, and each floor and all side by side with an emulation."""
    for seed in seeds:
        case = random_case(seed)
        example = (case.example, *case.more_of_example) if case.more_of_example else case.example
        try:
            net = cs.adaptify(case.model, "none", coarsest=32, example_input=example)
        except CannotConvert as refusal:
            assert "nothing that can be made adaptive" in refusal.what, f"seed {seed}: {refusal}"
            continue
        assert net.checks and all(check.passed for check in net.checks), seed


def conv(stride: int = 1, dilation: int = 1, channels: int = 8, padding: int | None = None) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, dilation if padding is None else padding, dilation)


def keeps_law_1(model: nn.Module, **options: Any) -> cs.AdaptiveModel:
    """Converts, verified, and at the network's own level gives its output at another size."""
    model = model.double().eval()
    example = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    net, x = cs.adaptify(model, "none", example_input=example, **options), torch.randn(2, 3, 53, 58).double()
    with torch.no_grad():
        size = net(x, mask="all") is not None and net.levels.shape
        own = net(x, mask=torch.full(size, net.plan.identity_level))
        step = net.plan.strides[net.plan.identity_level] // net.plan.strides[0]
        assert_same(own[:, :, ::step, ::step], model(x), 1e-9)
    return net


class Halves(nn.Module):
    """Half of the channels pass, half are convolved, at a place where dilations allow a coarser map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), conv(2), nn.ReLU())
        self.conv, self.rest = conv(channels=4), nn.Sequential(conv(1, 2), conv(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.stem(x).chunk(2, 1)
        return self.rest(torch.cat((self.conv(one), other), 1))


def test_parts_of_a_map_are_on_the_lattice_of_the_whole() -> None:
    net = keeps_law_1(Halves())
    assert net.plan.output_stride == (4, 8)


def test_a_map_that_is_split_behind_a_dense_operation_enters_as_a_whole() -> None:
    model = Halves()
    wraps = nn.Conv2d(8, 8, 3, padding=2, dilation=2, padding_mode="circular")
    model.stem, model.conv = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), wraps, nn.ReLU()), conv(1, 2, 4)
    net = keeps_law_1(model)
    assert net.plan["stem_2"].action == "enter" and net.plan["chunk"].action == "keep"
