"""Constant factors, shifts and activations that are written out: optimised copies fuse them, values stay the same."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import some
from networks import unverified
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.network.optimized import KERNELS

Step = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """A strided, a depthwise and a 1x1 convolution, with the same operation after each."""

    def __init__(self, step: Step, *modules: nn.Module) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.norm, self.point = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.modules_of_step, self.step = nn.ModuleList(modules), step
        self.register_buffer("by_channel", torch.rand(1, 8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.step(self.first(x))
        x = self.step(self.norm(self.depthwise(x)) * self.by_channel)
        return self.point(x).relu()


def hard_swish(x: Tensor) -> Tensor:
    return x * F.relu6(x + 3) / 6


FUSED: dict[str, Step] = {
    "factor and shift": lambda x: (2 * x - 0.5) / 4 + 1,
    "reversed difference": lambda x: 1.5 - x,
    "factors around an activation": lambda x: 0.7 * F.relu(0.3 * x + 0.1) - 0.2,
    "hard swish": hard_swish,
    "hard swish, share first": lambda x: x * (F.relu6(3 + x) * (1 / 6)),
    "hard swish, other order": lambda x: (x + 3).clamp(0, 6) / 6 * x,
    "hard swish, in place clamp": lambda x: x.mul(F.hardtanh(x + 3, 0, 6, inplace=True)).div(6),
    "hard swish of a factor": lambda x: 0.5 * hard_swish(2 * x + 1) - 0.1,
    "hard swish by hard sigmoid": lambda x: x * F.hardsigmoid(x),
    "swish": lambda x: x * torch.sigmoid(x),
}
OTHERS: dict[str, Step] = {
    "another share": lambda x: x * F.relu6(x + 3) / 5,
    "another shift": lambda x: x * F.relu6(x + 2) / 6,
    "other bounds": lambda x: x * (x + 3).clamp(0, 5) / 6,
    "another value": lambda x: x * F.relu6(x.relu() + 3) / 6,
    "sum in place": lambda x: x * F.relu6(x.add_(3)) / 6,
    "read twice": lambda x: (0.5 * x) * F.relu(x + 1),
    "infinite": lambda x: (x * 1e30 * 1e30).clamp(-1, 1),
}


def optimised(step: Step) -> tuple[cs.AdaptiveModel, cs.AdaptiveModel, Tensor, Tensor]:
    torch.manual_seed(0)
    model, image = Between(step).double().eval(), torch.rand(2, 3, 36, 50, dtype=torch.float64)
    model.norm.running_mean.normal_(), model.norm.running_var.uniform_(0.5, 2)
    levels = torch.randint(0, 3, (2, 9, 13)).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :36, :50]
    net = unverified(model, "none", coarsest=4, example_input=image)
    return net, net.optimize(), image, levels


@pytest.mark.parametrize("name", some([*FUSED, *OTHERS]))
def test_values_stay_the_same(name: str) -> None:
    net, fast, image, levels = optimised((FUSED | OTHERS)[name])
    with torch.no_grad():
        for mask in (levels, "all", "none"):
            expected = net(image, mask=mask)
            assert torch.allclose(
                fast(image, mask=mask), expected, rtol=0, atol=1e-12 * float(expected.abs().max())
            )


@pytest.mark.parametrize("name", FUSED)
def test_nothing_but_convolutions_and_one_pass_between_them_is_left(name: str) -> None:
    _, fast, _, _ = optimised(FUSED[name])
    for graph in (fast.graph, fast.program.unchanged):
        assert graph is not None
        left = [
            node for node in graph.nodes if getattr(node.target, "__module__", "") in ("_operator", "torch")
        ]
        assert [node for node in left if node.target is not operator.getitem] == []
        kernels = [node for node in graph.nodes if str(node.target).startswith(KERNELS)]
        assert (
            len(kernels) <= 4
        )  # three convolutions; before the depthwise one, padding is zero: a shift stays


class Counted(nn.Module):
    """Space to depth by numbers that are computed from the image's size, as TResNet's stem."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.then = nn.Conv2d(12, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        parts = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4)
        channels = channels * 5 - 1
        return self.then(self.first(parts.reshape(batch, channels - 2, height // 2, width // 2)).relu())


class Tokens(nn.Module):
    """Attention over positions, behind a gate of one factor and one shift for all channels, as StarReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.then = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, 2, 1)
        self.scale, self.shift = nn.Parameter(torch.tensor([1.5])), nn.Parameter(torch.tensor([-0.25]))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.then(self.first(x).relu()).flatten(2).transpose(1, 2)
        rows = (rows @ rows.transpose(1, 2)).softmax(-1) @ rows
        rows = self.scale * rows.relu() ** 2 + self.shift
        batch, count, channels = rows.shape
        return rows.reshape(batch, count, 2, channels // 2)


@pytest.mark.parametrize("kind", [Counted, Tokens])
def test_numbers_and_tokens_stay_what_they_are(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = unverified(kind().double().eval(), "edges", example_input=torch.rand(1, 3, 64, 96).double())
    fast, image = net.optimize(), torch.rand(2, 3, 48, 80, dtype=torch.float64)
    with torch.no_grad():
        expected = net(image)
        assert torch.allclose(fast(image), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
