"""Laws of single operations: two spellings of one function stay one function after conversion, on any level map.

The right-hand sides are made of convolutions, batch norms and pointwise functions, which `test_network_laws.py`
compares with a brute-force emulation. So every operation here is exact on mixed maps, not only on uniform ones. Here
are spellings that the networks of `random_networks` lack; what they have is compared with its emulation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images, random_levels
from networks import unverified
from torch import Tensor, nn

Function = Callable[[Any, Tensor], Tensor]
SIZE = (51, 67)
EXACT = 1e-9
C = 8


class Net(nn.Module):
    """A stem, two strided stages, and between and after them the operation under test."""

    def __init__(self, function: Function, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, 2, 1)
        self.first, self.second = nn.Conv2d(C, C, 3, 2, 1), nn.Conv2d(C, C, 3, 2, 1)
        self.last = nn.Conv2d(C, C, 3, padding=1)
        self.parts = nn.ModuleDict(parts)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.parts, self.first(self.stem(x)))
        return self.last(self.function(self.parts, self.second(x)))


def network(function: Function, **parts: nn.Module) -> Net:
    """The same weights whatever the function is."""
    torch.manual_seed(0)
    net = Net(function, parts).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return net


def outputs(net: nn.Module, levels: Tensor, x: Tensor, **options: Any) -> Tensor:
    example = images(2, *SIZE, torch.float64)
    adapted = unverified(net, "none", output_stride=(2, 8), example_input=example, **options)
    inside = {decision.action for decision in adapted.plan.decisions if decision.path not in ("", "stem")}
    assert "barrier" not in inside, adapted.plan.summary()
    with torch.no_grad():
        return adapted(x, mask=levels)


def assert_one_function(ours: Net, theirs: Net, fill: str = "linear") -> None:
    """Both networks are the same before conversion and after it, for a random level map per image."""
    x = images(2, *SIZE, torch.float64)
    with torch.no_grad():
        assert_same(ours(x), theirs(x), EXACT)
    levels = random_levels(2, (26, 34), (2, 2))
    assert 0 < (levels == 0).double().mean() < 1
    assert_same(outputs(ours, levels, x, fill=fill), outputs(theirs, levels, x, fill=fill), EXACT)


def _pooled_by_attention(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    attention = torch.softmax(m["one"](x)[:, :1].reshape(b, 1, h * w), dim=-1).unsqueeze(3)
    return x + (x.reshape(b, c, h * w).unsqueeze(1) @ attention).view(b, c, 1, 1)


def _pooled_by_weights(m: Any, x: Tensor) -> Tensor:
    weights = m["one"](x)[:, :1].exp()
    return x + (x * weights).mean((2, 3), keepdim=True) / weights.mean((2, 3), keepdim=True)


def _channel_attention(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    tokens = F.normalize(x.flatten(2), dim=-1)
    return x + (torch.softmax(tokens @ tokens.transpose(-2, -1), dim=-1) @ x.flatten(2)).view(b, c, h, w)


def _channel_attention_by_pairs(m: Any, x: Tensor) -> Tensor:
    unit = x / x.square().sum((2, 3), keepdim=True).sqrt()
    rows = [(unit * unit[:, i : i + 1]).sum((2, 3)) for i in range(C)]
    attention = torch.softmax(torch.stack(rows, dim=1), dim=-1)
    mixed = [(x * attention[:, i].view(-1, C, 1, 1)).sum(1, keepdim=True) for i in range(C)]
    return x + torch.cat(mixed, dim=1)


def _gated(m: Any, x: Tensor) -> Tensor:
    return m["one"](x)[:, :1].sigmoid() * x


EXPANSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expand": lambda gate, x: gate.expand(-1, C, -1, -1),
    "expand to sizes": lambda gate, x: gate.expand(x.size(0), C, x.size(2), x.size(3)),
    "expand_as": lambda gate, x: gate.expand_as(x),
    "repeat": lambda gate, x: gate.repeat(1, C, 1, 1),
}
POINT = {"one": nn.Conv2d(C, C, 1), "two": nn.Conv2d(C, C, 1)}
SPELLINGS: dict[str, tuple[Function, Function, dict[str, nn.Module]]] = {
    "pooling by attention": (_pooled_by_attention, _pooled_by_weights, POINT),
    "attention between channels": (_channel_attention, _channel_attention_by_pairs, {}),
    **{
        f"a gate, {name}": (lambda m, x, use=use: use(m["one"](x)[:, :1].sigmoid(), x) * x, _gated, POINT)
        for name, use in EXPANSIONS.items()
    },
    "padded channels": (
        lambda m, x: F.pad(x[:, 1:], (0, 0, 0, 0, 1, 0)),
        lambda m, x: torch.cat([0 * x[:, :1], x[:, 1:]], dim=1),
        {},
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_two_spellings_stay_one_function(name: str) -> None:
    ours, theirs, parts = SPELLINGS[name]
    assert_one_function(network(ours, **parts), network(theirs, **parts))
