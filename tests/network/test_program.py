"""A program is a value: what tools need of a network, the same for a network, its copies and a part that is hosted."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import made_once
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.network.model import whole_program


class Backbone(nn.Module):
    """Two maps in a dictionary, at half and an eighth of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        half = self.stem(x).relu()
        return {"half": half, "eighth": self.body(half)}


class Host(nn.Module):
    """Decides by values, which torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()

    def forward(self, x: Tensor) -> Tensor:
        found = self.backbone(2 * x)
        return found["eighth"] if bool(x.sum() > 0) else found["eighth"].clone()


@made_once
def adapted(model: nn.Module | None = None) -> cs.AdaptiveModel:
    torch.manual_seed(0)
    return cs.adaptify(
        (model or Backbone()).eval(), "edges", example_input=torch.randn(1, 3, 64, 64), verify_laws=False
    )


def test_a_host_answers_for_its_part() -> None:
    net, x = adapted(Host()), torch.rand(2, 3, 64, 96)
    part = net.adaptive_part
    assert net.hosts_part and not part.hosts_part and part.adaptive_part is part
    assert net.program is part.program and (net.plan, net.geometry) == (part.plan, part.geometry)
    net.mask = "all"
    assert part.mask is net.mask and part.mask.spec() == "all"
    with net.masked("none"):
        net(x)
    assert net.active_fraction == part.active_fraction == 0
    net(x)
    assert net.active_fraction == 1
    clone = copy.deepcopy(net)
    assert clone.adaptive_part is clone.get_submodule("backbone") is clone.program.net is not part


def test_only_a_network_that_is_adaptive_as_a_whole_has_a_program_of_its_own() -> None:
    net, host = adapted(), adapted(Host())
    fast = net.optimize()
    assert whole_program(net, "is none") is net.program and whole_program(fast, "is none") is fast.program
    assert not net.program.is_fused and fast.program.is_fused and host.optimize().program.is_fused
    for other in (host, Backbone(), "net"):
        with pytest.raises(cs.InvalidInput, match=f"{type(other).__name__} is none"):
            whole_program(other, "is none")
