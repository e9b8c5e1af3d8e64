"""Regions that go on through heads: windows of a dilated network whose taps are closer together than the cells.

The emulation is the network's own graph, in which each map is read inside its cells after every operation; where the
cells are is written out here, by hand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import covering, some
from emulation import fill_cells, read
from networks import DilatedWithHead
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import cadsurgery as cs


class Emulated(fx.Interpreter):
    """Reads every map inside its cells: the last 3x3 before a dilation doubles computes fewer samples."""

    def __init__(self, model: nn.Module, levels: Tensor, fill: str) -> None:
        super().__init__(fx.symbolic_trace(model))
        self.levels, self.fill, self.cap = levels, fill, 0

    def run_node(self, n: fx.Node) -> Any:
        self.cap = {"first": 1, "again": 2}.get(n.name, self.cap)
        if (
            n.target is F.adaptive_avg_pool2d
        ):  # every cell weighs as much as it covers; alike cells weigh the same
            value: Any = self.env[n.all_input_nodes[0]]
            step = int(self.side[0, 0, 0]) if self.levels.unique().numel() == 1 else 1
            return fill_cells(value, self.side)[..., ::step, ::step].mean((2, 3), keepdim=True)
        y = super().run_node(n)
        inside = self.cap and isinstance(y, Tensor) and y.shape[2:] == self.levels.shape[1:]
        return read(fill_cells(y, self.side), self.side, self.fill) if inside else y

    @property
    def side(self) -> Tensor:
        """The side of the cell of each sample."""
        return 2 ** self.levels.clamp(max=self.cap)


SIZE = (61, 83)  # 16 x 21 samples at output stride 4


def network(dtype: torch.dtype = torch.float64) -> DilatedWithHead:
    torch.manual_seed(2)
    return DilatedWithHead().eval().to(dtype)


def level_map(kind: int | str, batch: int = 2) -> Tensor:
    """A level map on 16 x 21 samples: one level, or cells of three levels side by side."""
    if isinstance(kind, int):
        return torch.full((batch, 16, 21), kind)
    torch.manual_seed(3)
    return torch.randint(0, 3, (batch, 4, 6)).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :, :21]


def converted(model: nn.Module, x: Tensor, region: str = "heads", **options: Any) -> cs.AdaptiveModel:
    return cs.adaptify(model, "edges", region=region, output_stride=(4, 16), example_input=x, **options)


@pytest.mark.parametrize(("kind", "fill"), covering([1, 2, "mixed"], ["linear", "nearest"]))
def test_values_and_gradients_are_those_of_the_emulation(kind: int | str, fill: Any) -> None:
    model, x = network(), torch.rand(2, 3, *SIZE, dtype=torch.float64)
    net, levels = converted(model, x, fill=fill), level_map(kind)
    ours, expected = net(x, mask=levels), Emulated(model, levels, fill).run(x)
    assert (ours - expected).abs().max() < 1e-10
    gradients = torch.autograd.grad(ours.square().sum(), [*net.parameters()])
    others = torch.autograd.grad(expected.square().sum(), [*model.parameters()])
    for gradient, other in zip(gradients, others, strict=True):
        assert (gradient - other).abs().max() < 1e-9 * other.abs().max().clamp(min=1)
    with torch.no_grad():
        assert (net.optimize()(x, mask=levels) - expected).abs().max() < 1e-10


@pytest.mark.parametrize(
    "options", some([{}, {"fill": "guided"}, {"anchor": "center", "fill": "nearest"}], every=3)
)
def test_the_conversion_is_verified(options: dict[str, Any]) -> None:
    """By an emulation of every level and of all side by side, where values between anchors follow from these alone."""
    net = converted(network(), torch.rand(2, 3, *SIZE, dtype=torch.float64), **options)
    assert [check.law for check in net.checks if not check.passed] == []
    assert sum("emulation" in check.law for check in net.checks) == (0 if options else 3)


def test_the_head_costs_less_and_macs_are_those_executed() -> None:
    x = torch.rand(1, 3, *SIZE)
    net, auto = converted(network(torch.float32), x), converted(network(torch.float32), x, "auto")
    low, mixed = net.macs(x, mask="none").mask, net.macs(x, mask=level_map("mixed", 1)).mask
    with FlopCounterMode(display=False) as given, torch.no_grad():
        network(torch.float32)(x)
    assert low < mixed < net.macs(x, mask="all").mask == given.get_total_flops() // 2
    assert low < auto.macs(x, mask="none").mask
    plain = replace(net.geometry, dense_shortcut=False).lattice(level_map("mixed", 1))
    with FlopCounterMode(display=False) as executed, torch.no_grad():
        net.run(lambda *_: plain, x)
    assert abs(executed.get_total_flops() / 2 / mixed - 1) < 0.02


def test_the_plan_names_the_heads_and_how_to_reach_them() -> None:
    auto, heads = (cs.plan(network(torch.float32), region=region) for region in ("auto", "heads"))
    inside = {decision.node for decision in heads.decisions if decision.inside_cells}
    assert inside == {"plain", "rate", "pool", "last"}
    assert 'region="heads" continues' in str(auto) and 'region="heads" continues' not in str(heads)
    assert heads.share("adapt", "keep") > auto.share("adapt", "keep")


def test_a_finer_grid_than_the_networks_own_is_refused() -> None:
    with pytest.raises(cs.InvalidInput, match=r"give output_stride=\(4, 8\)"):
        cs.adaptify(network(), region="heads", output_stride=(2, 8))
