"""The counter of the package: its rules, what it names for want of a rule, and the shapes it answers at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import covering, images, slow
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula
from torchvision.ops import DeformConv2d, roi_align

import cadsurgery as cs
from cadsurgery.network.macs import count_network, dense_macs
from cadsurgery.support.counting import MacCounter
from cadsurgery.tasks.convert_report import render_macs


def counted(call: Callable[..., Any], *args: Any) -> MacCounter:
    with torch.no_grad(), MacCounter() as counter:
        call(*args)
    return counter


# An operation on random arguments, and its multiply-accumulates by hand.
BY_HAND: dict[str, tuple[Callable[[], Any], int]] = {
    "mv": (lambda: torch.mv(torch.rand(5, 7), torch.rand(7)), 35),
    "addmv": (lambda: torch.addmv(torch.rand(5), torch.rand(5, 7), torch.rand(7)), 35),
    "einsum": (lambda: torch.einsum("bchw,bdhw->bcd", torch.rand(2, 3, 5, 7), torch.rand(2, 4, 5, 7)), 840),
    "bilinear": (lambda: F.bilinear(torch.rand(2, 3), torch.rand(2, 5), torch.rand(7, 3, 5)), 2 * 2 * 7 * 15),
    "conv_tbc": (lambda: torch.conv_tbc(torch.rand(9, 2, 3), torch.rand(3, 3, 4), torch.rand(4)), 7 * 2 * 36),
    "attention": (
        lambda: F.scaled_dot_product_attention(*torch.rand(3, 2, 4, 9, 8).unbind()),
        2 * 2 * 4 * 9 * 9 * 8,
    ),
    "affine grid": (lambda: F.affine_grid(torch.rand(2, 2, 3), [2, 3, 5, 7], False), 2 * 5 * 7 * 2 * 3),
    "grid sampling": (
        lambda: F.grid_sample(torch.rand(2, 3, 5, 7), torch.rand(2, 4, 6, 2), align_corners=False),
        4 * 2 * 3 * 4 * 6,
    ),
    "grid sampling of a volume": (
        lambda: F.grid_sample(torch.rand(2, 3, 5, 7, 3), torch.rand(2, 4, 6, 2, 3), align_corners=False),
        8 * 2 * 3 * 4 * 6 * 2,
    ),
    "aligned regions": (
        lambda: roi_align(torch.rand(2, 3, 9, 9), torch.tensor([[0.0, 1, 1, 8, 7]]), 2, 1.0, 2),
        3 * 2 * 2 * 4 * 4,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_an_operation_costs_what_it_multiplies(name: str) -> None:
    call, expected = BY_HAND[name]
    found = counted(call)
    assert found.macs == expected
    assert not found.not_counted


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_deformable_convolution_costs_its_weights_and_four_for_each_sampled_value(
    groups: int, device: str
) -> None:
    layer = DeformConv2d(6, 9, (3, 5), stride=2, padding=1, groups=groups).to(device)
    x = torch.rand(2, 6, 17, 23, device=device)
    height, width = 9, 11
    found = counted(layer, x, torch.rand(2, 2 * 15, height, width, device=device))
    assert found.macs == 2 * height * width * (layer.weight.numel() + 4 * 6 * 15)
    assert not found.not_counted


@pytest.mark.parametrize("inference", [False, True])
def test_the_fused_layer_of_a_transformer_costs_what_its_parts_cost(inference: bool) -> None:
    layer, x = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval(), torch.rand(3, 7, 16)
    projections, attention, behind = 4 * 16 * 16, 2 * 7 * 16, 2 * 16 * 24
    with torch.inference_mode(inference):
        found = counted(layer, x)
        fused = counted(lambda: torch._transformer_encoder_layer_fwd(*fused_arguments(layer, x)))
    assert found.macs == fused.macs == 3 * 7 * (projections + attention + behind)
    assert not found.not_counted and not fused.not_counted


def fused_arguments(layer: nn.TransformerEncoderLayer, x: Tensor) -> tuple[Any, ...]:
    own, first, second = layer.self_attn, layer.norm1, layer.norm2
    return (
        *(x, own.embed_dim, own.num_heads, own.in_proj_weight, own.in_proj_bias),
        *(own.out_proj.weight, own.out_proj.bias, False, False, first.eps),
        *(first.weight, first.bias, second.weight, second.bias),
        *(layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias, None, None),
    )


def test_a_recurrent_layer_costs_the_same_with_values_and_without() -> None:
    layer, x = nn.LSTM(5, 7), torch.rand(9, 2, 5)
    expected = 9 * 2 * 4 * 7 * (5 + 7)
    assert counted(layer, x).macs == counted(layer.to("meta"), x.to("meta")).macs == expected


def test_a_branch_costs_the_larger_one_and_gives_the_one_that_is_asked_for() -> None:
    x = torch.rand(3, 3)
    values = []

    def call() -> None:
        for wanted in (True, False):
            values.append(torch.cond(torch.tensor(wanted), lambda x: x @ x, lambda x: x + 1, (x,)))

    with torch.no_grad(), MacCounter() as counter:
        call()
    assert counter.macs == 2 * 27
    torch.testing.assert_close(values[0], x @ x)
    torch.testing.assert_close(values[1], x + 1)


@torch.library.custom_op("counting_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """An operation that torch knows nothing of."""
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


WITHOUT_A_RULE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "fft": (torch.fft.rfft2, "aten._fft_r2c"),
    "linalg": (torch.linalg.svdvals, "aten._linalg_svd"),
    "inverse": (lambda x: torch.linalg.inv(x @ x.mT), "aten.linalg_inv_ex"),
    "distances": (lambda x: torch.cdist(x, x, p=1.0), "aten._cdist_forward"),
    "custom": (twice, "counting_tests.twice"),
}


@pytest.mark.parametrize("name", WITHOUT_A_RULE)
def test_an_operation_without_a_rule_is_named_and_one_with_a_users_counts(name: str) -> None:
    (call, operation), x = WITHOUT_A_RULE[name], torch.rand(2, 3, 5, 7)
    assert operation in counted(call, x).not_counted
    if call is not twice:
        return
    register_flop_formula(torch.ops.counting_tests.twice)(lambda shape, **_: 2 * math.prod(shape))
    try:
        found = counted(twice, x)
    finally:
        del flop_registry[torch.ops.counting_tests.twice]
    assert found.macs == x.numel() and not found.not_counted


def test_what_multiplies_nothing_is_free_and_not_named() -> None:
    x, index = torch.rand(2, 4, 9, 7), torch.tensor([0, 2])

    def call() -> None:
        F.max_pool2d(F.interpolate(F.pad(x, (1, 1)), scale_factor=2, mode="bicubic"), 3)
        F.adaptive_avg_pool2d(x, 3)
        F.group_norm(F.instance_norm(F.layer_norm(x, [7])), 2).softmax(1).sum()
        torch.cat([x, x.flip(2)]).roll(1, 2).permute(0, 2, 3, 1).contiguous().view(-1)
        x.clone().index_copy_(1, index, x[:, index]).scatter(1, index.view(1, 2, 1, 1), 0.0).cumsum(1)
        F.pixel_shuffle(x, 2).sort(1).values.topk(1).values.to(torch.float64).round()
        F.unfold(x, 3).unique()
        F.gelu(F.embedding(index, torch.rand(5, 3)))
        torch.zeros(3).normal_().t_()

    found = counted(call)
    assert found.macs == 0 and not found.not_counted


class Spectral(nn.Module):
    """Convolutions with strides, and a transform that no rule counts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[2:]))


LEFT_OUT = "not counted, for want of a rule: aten._fft_c2r, aten._fft_r2c"


def test_reports_of_macs_name_what_they_leave_out() -> None:
    net, image = cs.adaptify(Spectral().eval(), "none", verify_laws=False), images(2, 64, 96)
    report = net.macs(image)
    assert report.not_counted == ("aten._fft_c2r", "aten._fft_r2c")
    assert str(report).endswith(LEFT_OUT)
    assert report.to_dict()["not_counted"] == list(report.not_counted)
    assert "not counted" in render_macs(report).title  # type: ignore[union-attr, operator]
    assert count_network(Spectral().eval(), image).not_counted == report.not_counted
    plan = cs.plan(Spectral().eval())
    assert LEFT_OUT in plan.summary()
    assert type(plan).from_json(plan.to_json()).not_counted == plan.not_counted


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", slow("mobilenet_v3_small"), slow("lraspp_mobilenet_v3_large"), slow("swin_t")),
        *(slow("timm:vit_tiny_patch16_224"), slow("timm:convnext_atto"), slow("timm:hrnet_w18_small")),
    ],
)
def test_networks_cost_what_torch_counts_where_it_has_rules(name: str) -> None:
    with torch.device("meta"):
        if name.startswith("timm:"):
            model = timm.create_model(name.removeprefix("timm:")).eval()
        else:
            backbone = {"weights_backbone": None} if name.startswith("lraspp") else {}
            model = torchvision.models.get_model(name, weights=None, **backbone).eval()
    x = torch.zeros(2, 3, 224, 224, device="meta")
    found = counted(model, x)
    with torch.no_grad(), FlopCounterMode(display=False) as by_torch:
        model(x)
    assert found.macs == by_torch.get_total_flops() // 2 == dense_macs(model, x) > 0
    assert not found.not_counted


SHORT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu in place by its place": lambda x: F.relu(x, True),
    "relu_": torch.relu_,
    "hardswish": F.hardswish,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": lambda x: x.sigmoid(),
    "sum": lambda x: x + x,
    "sum of unlike types": lambda x: x + x.double(),
    "sum with broadcasting": lambda x: x + x[:, :1],
    "scaled sum": lambda x: torch.add(x, x, alpha=2),
    "batch norm": lambda x: F.batch_norm(x, *torch.empty(2, 4, device=x.device)),
    "half batch norm": lambda x: F.batch_norm(x.half(), *torch.empty(4, 4, device=x.device)),
    "training batch norm": lambda x: F.batch_norm(x, *torch.empty(2, 4, device=x.device), training=True),
    "layer norm": lambda x: F.layer_norm(x, (7,)),
    "integers": lambda x: torch.sigmoid(x.long()),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "part": lambda x: x[:, :, 1:, ::2].expand(3, -1, -1, -1)[..., :7],
}


@pytest.mark.parametrize(("name", "layout"), covering([*SHORT], [*LAYOUTS]))
def test_shapes_that_are_answered_at_once_are_those_that_torch_gives(name: str, layout: str) -> None:
    x = torch.empty(3, 4, 5, 14 if layout == "part" else 7, device="meta")[:, :, :, :]
    x = LAYOUTS[layout](x)
    with torch.no_grad():
        expected = SHORT[name](x)
        with MacCounter():
            SHORT[name](x)
            found = SHORT[name](x)
    assert found.is_meta and (found is x) == (expected is x)
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_values_and_gradients_are_torchs_while_it_counts() -> None:
    x, layer = torch.rand(2, 3, 5, 5), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    expected = layer(x)
    with MacCounter() as counter:
        found = layer(x)
    assert counter.macs == 2 * 25 * 12 and torch.equal(found, expected)
    found.sum().backward()
    assert layer[0].weight.grad is not None
    with MacCounter():
        assert layer.to("meta")(x.to("meta")).requires_grad
