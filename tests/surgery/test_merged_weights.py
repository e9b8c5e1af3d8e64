"""Blocks that merge their branches into one weight in every forward, however they write it.

The converted network merges the weights that it has in each call, or the conversion is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, images
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import cadsurgery as cs

EXACT = 1e-9
OPTIONS: dict[str, dict[str, Any]] = {"finer": {"outputs": "native"}, "floors": {"coarsest": 32}}
pytestmark = pytest.mark.filterwarnings("ignore:no mask can improve", "ignore:masks hardly change")


class Merging(nn.Module):
    """A wide and a thin convolution, merged into a third; `write` says how."""

    def __init__(self, write: Callable[[nn.Conv2d, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.wide, self.thin = nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 6, 1)
        self.merged = nn.Conv2d(6, 6, 3, 1, 1).requires_grad_(False)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.wide(x) + self.thin(x)
        weight = self.wide.weight.data + F.pad(self.thin.weight.data, (1, 1, 1, 1))
        self.write(self.merged, weight, self.wide.bias.data + self.thin.bias.data)
        return self.merged(x)


def by_data(module: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    module.weight.data = weight
    module.bias.data = bias


def by_setattr(module: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        setattr(getattr(module, name), "data", value)  # noqa: B010 - the spelling is the point


def by_copying(module: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)


def by_copying_data(module: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    module.weight.data.copy_(weight)
    module.bias.data.zero_().add_(bias)


def by_set(module: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        module.weight.set_(weight)
        module.bias.detach().copy_(bias)


def by_new_parameters(module: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.bias = nn.Parameter(bias, requires_grad=False)


def by_parts(module: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    module.weight.data.zero_()
    module.weight.data[:, :, 1:2, 1:2] += weight[:, :, 1:2, 1:2]
    module.weight.data[:, :, 0], module.weight.data[:, :, 2] = weight[:, :, 0], weight[:, :, 2]
    module.weight.data[:, :, 1, ::2] = weight[:, :, 1, ::2]
    module.bias.data[:] = bias


def by_two_writes(module: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """The second write leaves alone what the first one took its value from."""
    module.weight.data = weight
    module.weight.data = module.weight.data.clone()
    module.bias.data = bias
    module.bias.data = 1 * bias


WAYS = (by_data, by_setattr, by_copying, by_copying_data, by_set, by_new_parameters, by_parts, by_two_writes)


class Rounded(nn.Conv2d):
    """A convolution that keeps its own weight on a grid."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = (self.weight.data * 64).round() / 64
        return super().forward(x)


class Scaled(nn.Module):
    """A buffer of the network's own, which multiplies what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(6, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.sqrt()


def frozen() -> nn.Module:
    """A norm whose statistics are buffers, and no module that a rule knows."""
    norm = FrozenBatchNorm2d(6)
    for buffer in norm.buffers():
        nn.init.uniform_(buffer, 0.5, 1.5)
    return norm


class Fused(nn.Module):
    """Branches with norms, and a chain of convolutions that becomes one, which are merged in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.first, self.second = nn.Conv2d(6, 12, 1, bias=False), nn.Conv2d(12, 6, 3, bias=False)
        self.fused = nn.Conv2d(6, 6, 3, 1, 1)

    def update(self) -> None:
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        kernel = self.conv.weight * scale.view(-1, 1, 1, 1)
        turned = self.first.weight.flip(2, 3).permute(1, 0, 2, 3)
        chain = F.conv2d(turned, self.second.weight, padding=2).flip(2, 3).permute(1, 0, 2, 3)
        self.kernel = kernel + chain[:, :, 1:-1, 1:-1].flip(2, 3) if chain.shape[2] > 3 else kernel + chain
        self.fused.weight.data = self.kernel
        self.fused.bias.data = self.norm.bias - self.norm.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        self.update()
        return self.fused(x)


class FrozenNorm(nn.Module):
    """A norm whose statistics forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.spread = nn.BatchNorm2d(6), nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.norm.running_var.copy_(self.spread.detach().square())
        return self.norm(x)


def made(block: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), block(), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)),
    )
    return model.double().eval()


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    **{way.__name__: lambda way=way: Merging(way) for way in WAYS},  # type: ignore[misc]
    "rounded": lambda: Rounded(6, 6, 3, 1, 1),
    "fused": Fused,
    "statistics": FrozenNorm,
    "a buffer": Scaled,
    "a frozen norm": frozen,
}


def loaded(net: nn.Module, model: nn.Module) -> None:
    net.load_state_dict(model.state_dict())


def changed_in_place(net: nn.Module, model: nn.Module) -> None:
    values = model.state_dict()
    with torch.no_grad():
        for name, value in net.state_dict().items():
            value.copy_(values[name])


@pytest.mark.parametrize(
    ("block", "options", "change"), covering(BLOCKS, OPTIONS, [loaded, changed_in_place])
)
def test_a_block_merges_the_weights_of_the_call(
    block: str, options: str, change: Callable[[nn.Module, nn.Module], None]
) -> None:
    """Those of the conversion, those that came later, and those of the moment in an optimised copy."""
    model, other, x = made(BLOCKS[block]), made(BLOCKS[block], 1), images(2, 72, 104, torch.float64)
    net = cs.adaptify(model, example_input=x[:1], **OPTIONS[options])
    level = "all" if net.plan.floors else "none"
    assert_same(net(x, mask=level), model(x), EXACT)
    change(net, other)
    assert_same(net(x, mask=level), other(x), EXACT)
    assert_same(net.optimize()(x, mask=level), other(x), EXACT)


@torch.no_grad()
def test_merged_weights_follow_the_type() -> None:
    model, x = made(BLOCKS["by_data"]).float(), images(1, 72, 104)
    net = cs.adaptify(model, example_input=x, outputs="native").double()
    assert_same(net(x.double(), mask="none"), model.double()(x.double()), EXACT)


class Untold(nn.Module):
    """It writes a weight where no tracer sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.conv._parameters["weight"].data = (self.conv.weight * 2).data
        return self.conv(x)


def test_what_cannot_be_followed_is_refused_with_its_line() -> None:
    with pytest.raises(cs.CannotConvert, match=r"_parameters\[.weight.\]"):
        cs.adaptify(made(Untold))
