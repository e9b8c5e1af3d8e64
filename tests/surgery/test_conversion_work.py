"""A conversion costs a few calls of the network, however many times its work all cells high would cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import slow
from networks import Encoded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cadsurgery as cs
from benchmarks.zoo.corpus import CHECKOUT, subject
from cadsurgery.surgery.verify import _largest_part


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


# Outputs of several strides, resized where a size differs; a U of small Us; one that decides by sizes.
SIDES, NESTED, DECIDES = (
    subject(name, CHECKOUT).build
    for name in ("libraries:SideOutputs", "unets:NestedSalience", "pythonic:LargestSide")
)
BUILT = pytest.mark.parametrize("build", [SIDES, slow(NESTED), slow(DECIDES)])
# What decides by sizes is also run at a few other sizes, to find out which decisions matter.
MOST_CALLS = {DECIDES: 12}


@pytest.mark.filterwarnings("ignore::cadsurgery.CadWarning")
@BUILT
def test_a_conversion_costs_about_ten_calls_of_the_network(build: Callable[[], nn.Module]) -> None:
    """Everything high costs many times the work of these networks; the laws are compared all the same."""
    torch.manual_seed(0)
    model = build().eval()
    of_conversion, net = work(lambda: cs.adaptify(model, "none"))
    of_call, _ = work(lambda: model(torch.rand(net.plan.example_shape)))
    assert {check.number for check in net.checks} == {1, 2}
    assert all(check.passed for check in net.checks)
    assert of_conversion <= MOST_CALLS.get(build, 10) * of_call


@BUILT
def test_a_plan_costs_at_most_six_calls_of_the_network(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    of_plan, plan = work(lambda: cs.plan(model))
    of_call, _ = work(lambda: model(torch.rand(plan.example_shape)))
    assert of_plan <= 6 * of_call


@pytest.mark.slow
def test_every_level_is_compared_on_a_part_with_the_same_rest() -> None:
    """The network's own level is compared on the whole example, the others on a part that leaves the same rests."""
    net = cs.adaptify(NESTED().eval(), "none")
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
    net = cs.adaptify(SIDES().train(), "none")
    assert all((value == 0).all() for name, value in net.named_buffers() if name.endswith("running_mean"))
    assert net.training


def test_sizes_in_torch_size_are_followed() -> None:
    """Sizes that a forward puts into torch.Size are computed in each call, so that one graph serves every size."""

    def shrunk(own: Any, image: Tensor, y: Tensor) -> Tensor:
        y = own.head(F.max_pool2d(y, 2))
        return F.interpolate(y, size=torch.Size([2 * side for side in y.shape[-2:]]), mode="bilinear")

    model, x = Encoded(shrunk).eval(), torch.rand(1, 3, 64, 112)
    net = cs.adaptify(model, "none", outputs="native")
    torch.testing.assert_close(net(x), model(x), rtol=1e-4, atol=1e-5)
    assert not net._paths
