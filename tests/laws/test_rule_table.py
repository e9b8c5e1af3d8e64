"""A network for each rule, so that what tests a rule is found at once: the rule is asked, and its answer is exact.

Each is a small network with the operation between strided convolutions. On random level maps its rows are compared
with a dense emulation, as far as that follows the operation; with the network itself at its own level; and with the
optimised copy. Spellings, options and sizes are the business of the other laws.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import random_laws
import timm.layers
import torch
import torch.nn.functional as F
import torchvision.ops
from planned_emulation import NotFollowed
from random_laws import compare
from random_networks import Case, Draw
from torch import Tensor, fx, nn

from cadsurgery.surgery import treatment

TESTS = Path(__file__).parents[1]
C, SIZE = 8, (48, 64)
Function = Callable[[Any, Tensor], Tensor]
RULES = {rule for rule in treatment._RULES.values() if rule.__module__.startswith("cadsurgery.")}


class Net(nn.Module):
    """Two strided convolutions, the operation, and a convolution where it leaves a map of channels."""

    def __init__(self, function: Function, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, C, 3, 2, 1), nn.Conv2d(C, C, 3, 2, 1)
        self.last = nn.LazyConv2d(5, 1)
        self.parts, self.function = nn.ModuleDict(parts), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.parts, self.body(self.stem(x))))


def called(module: nn.Module) -> tuple[Function, dict[str, nn.Module]]:
    return lambda parts, x: parts["one"](x), {"one": module}


def plain(function: Callable[[Tensor], Tensor]) -> tuple[Function, dict[str, nn.Module]]:
    return lambda parts, x: function(x), {}


def in_rows(function: Callable[[Tensor], Tensor]) -> tuple[Function, dict[str, nn.Module]]:
    """On a map with the channels last."""
    return plain(lambda x: function(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def assigned(x: Tensor) -> Tensor:
    y = x.relu()
    y[:, :2] = x[:, 2:4]
    return y


def of_weight(
    function: Callable[[Tensor, Tensor], Tensor], *shape: int
) -> tuple[Function, dict[str, nn.Module]]:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 4)
    return lambda parts, x: function(x, parts["one"].weight), {"one": holder}


def unpooled(x: Tensor) -> Tensor:
    pooled, indices = F.max_pool2d(x, 2, 2, return_indices=True)
    return F.max_unpool2d(pooled, indices, 2, 2, output_size=x.shape[-2:])


def attended(x: Tensor) -> Tensor:
    q = x.flatten(2).permute(0, 2, 1)
    return F.scaled_dot_product_attention(q, q, q).permute(0, 2, 1).unflatten(2, x.shape[2:])


def multiplied(x: Tensor) -> Tensor:
    return (x.permute(0, 2, 3, 1) @ torch.eye(C, dtype=torch.float64).to(x)).permute(0, 3, 1, 2)


EXAMPLES: dict[str, tuple[Function, dict[str, nn.Module]]] = {
    "along_channels": plain(lambda x: x.softmax(1)),
    "softmax_of_channels": called(nn.Softmax2d()),
    "cosine_similarity": (
        lambda parts, x: x * parts["one"](x, x.relu()).unsqueeze(1),
        {"one": nn.CosineSimilarity(1)},
    ),
    "local_response_norm": called(nn.LocalResponseNorm(3)),
    "channel_shuffle": called(nn.ChannelShuffle(2)),
    "sum_of_letters": plain(
        lambda x: torch.einsum("bchw,oc->bohw", x, torch.eye(C, dtype=torch.float64).to(x))
    ),
    "tensor_product": plain(
        lambda x: torch.tensordot(x, torch.eye(C, dtype=torch.float64).to(x), ([1], [1])).movedim(-1, 1)
    ),
    "repetition": plain(lambda x: x.repeat(1, 2, 1, 1)),
    "reshaping": plain(lambda x: x.unflatten(1, (2, C // 2)).flatten(1, 2)),
    "permutation": plain(lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)),
    "split": plain(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "selection": plain(lambda x: torch.stack(x.unbind(1)[::-1], 1)),
    "indexing": plain(lambda x: x[:, 1:6]),
    "assignment": plain(assigned),
    "concatenation": plain(lambda x: torch.cat((x, x.relu()), 1)),
    "stacking": plain(lambda x: torch.stack((x, x.relu()), 1).sum(1)),
    "convolution": called(nn.Conv2d(C, C, 3, padding=1)),
    "convolution_same": called(timm.layers.Conv2dSame(C, C, 3, 2)),
    "convolution_per_image": (
        lambda parts, x: parts["one"](x, parts["router"](x.mean((2, 3))).sigmoid()),
        {"one": timm.layers.CondConv2d(C, C, 3, padding=1, num_experts=3), "router": nn.Linear(C, 3)},
    ),
    "convolution_function": of_weight(lambda x, weight: F.conv2d(x, weight, padding=1), C, C, 3, 3),
    "max_pooling": called(nn.MaxPool2d(3, 2, 1)),
    "average_pooling": called(nn.AvgPool2d(2)),
    "max_pooling_same": called(timm.layers.pool2d_same.MaxPool2dSame(3, 2)),
    "average_pooling_same": called(timm.layers.pool2d_same.AvgPool2dSame(3, 2)),
    "space_to_depth": called(nn.PixelUnshuffle(2)),
    "padding": (
        lambda parts, x: parts["one"](F.pad(x, (1, 1, 1, 1))),
        {"one": nn.Conv2d(C, C, 3)},
    ),
    "padding_same": called(timm.layers.StdConv2dSame(C, C, 3, 2)),
    "adaptive_pooling": plain(lambda x: x * F.adaptive_avg_pool2d(x, 1)),
    "reduction": plain(lambda x: x / (1 + x.std((2, 3), keepdim=True))),
    "group_norm": called(nn.GroupNorm(2, C)),
    "instance_norm": called(nn.InstanceNorm2d(C)),
    "batch_norm": called(nn.BatchNorm2d(C)),
    "batch_norm_act": called(timm.layers.BatchNormAct2d(C)),
    "batch_norm_function": plain(
        lambda x: F.batch_norm(x, torch.full((C,), 0.2).to(x), torch.full((C,), 1.5).to(x))
    ),
    "layer_norm": in_rows(lambda x: F.layer_norm(x, (C,))),
    "dropout_per_image": called(torchvision.ops.StochasticDepth(0.5, "row")),
    "dropout_function": plain(lambda x: F.dropout2d(x, 0.5, training=False)),
    "pointwise": called(nn.Hardswish()),
    "conversion": plain(lambda x: x.to(x.dtype)),
    "like_a_map": plain(lambda x: x + x.new_zeros(x.shape)),
    "arithmetic": plain(lambda x: x * 2 + x.relu()),
    "linear": (
        lambda parts, x: parts["one"](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        {"one": nn.Linear(C, 6)},
    ),
    "resizing": plain(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "depth_to_space": called(nn.PixelShuffle(2)),
    "max_unpooling": plain(unpooled),
    "transposed_convolution": called(nn.ConvTranspose2d(C, C, 2, 2)),
    "broadcast": plain(lambda x: x + x.mean(1, keepdim=True).expand(-1, C, -1, -1)),
    "shape": plain(lambda x: x * (x.size(1) / x.dim())),
    "matrix_product": plain(multiplied),
    "attention": plain(attended),
}

ELSEWHERE = {
    "group_deviation": "laws/test_operation_laws.py",  # timm's computes in float32, whatever it is given
}
NOT_EMULATED = ("cosine_similarity", "attention")


def not_followed(*arguments: object) -> None:
    raise NotFollowed


def test_every_rule_has_its_network() -> None:
    assert EXAMPLES.keys() | ELSEWHERE.keys() == {rule.__name__ for rule in RULES}
    assert all(name in (TESTS / path).read_text() for name, path in ELSEWHERE.items())


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_rule_is_asked_and_its_answer_is_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Net(*EXAMPLES[name])
    model(torch.rand(1, 3, *SIZE))
    model = model.double().eval()
    (rule,) = (one for one in RULES if one.__name__ == name)
    asked: list[fx.Node] = []

    def watched(node: fx.Node, facts: Any) -> Any:
        asked.append(node)
        return rule(node, facts)

    for key in [key for key, value in treatment._RULES.items() if value is rule]:
        monkeypatch.setitem(treatment._RULES, key, watched)
    if name in NOT_EMULATED:
        monkeypatch.setattr(random_laws, "emulate", not_followed)
    image = torch.rand(2, 3, *SIZE, dtype=torch.float64)
    compare(Case(model, image, image.flip(3), per_image=True), Draw(3), {})
    assert asked
