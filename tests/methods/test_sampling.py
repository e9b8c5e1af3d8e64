"""Networks with gates: the published formulas by brute force, and what comes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, images, slow
from decisions import half_open
from networks import build, randomise, thin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import cadsurgery as cs
from cadsurgery.methods.sampling import gates as gating
from cadsurgery.methods.sampling.sampled_calls import SampledRun

TYPES = (torch.float32, torch.float64)
TIGHT = {torch.float32: 2e-4, torch.float64: 1e-9}


def convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 2)], layer_scale=0.5)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda name=name: build(name, by=4)) for name in ("resnet18", "resnet50", "regnet_y_400mf")},
    "mobilenet_v3_small": lambda: build("mobilenet_v3_small"),
    "convnext": convnext,
    "timm resnetv2": lambda: timm.create_model("resnetv2_50", channels=(32, 64, 96, 128), stem_chs=16),
    "timm efficientnet (padded as TensorFlow)": lambda: timm.create_model("tf_efficientnet_b0"),
}

QUICK = ("resnet18", "convnext")


def small(kind: type = Bottleneck, dtype: torch.dtype = torch.float32) -> ResNet:
    return thin(lambda: ResNet(kind, [1, 2, 1, 1]), 8).to(dtype)  # type: ignore[return-value]


class Published:
    """The published block, whole maps in plain torch; of the gates of a network."""

    def __init__(self, model: ResNet, net: cs.SampledModel) -> None:
        self.model, self.net = model, net
        self.of = dict(zip((gated.path for gated in net.program.gates), enumerate(net.gates), strict=True))
        self.probabilities: dict[str, Tensor] = {}

    def share(self, path: str, x: Tensor, stride: int) -> Tensor:
        number, gate = self.of[path]
        p = torch.sigmoid(F.conv2d(x, gate.weight, gate.bias, stride, 1))
        self.probabilities[path] = p.mean()
        noisy = self.net.training or self.net.noise
        u = gating.uniform((self.net.seed, self.net.step, number), p[:, 0])[:, :, None]
        n = -torch.log(-torch.log(u + 1e-8) + 1e-8) if noisy else torch.zeros_like(u)
        t = (gate.temperature if self.net.training else self.net.temperature) + 1e-8
        both = torch.stack(((torch.log(p + 1e-8) + n[0]) / t, (torch.log(1 - p + 1e-8) + n[1]) / t))
        s = both.softmax(0)[0]
        if self.net.grid:
            s = s.clone()
            s[:, :, :: self.net.grid, :: self.net.grid] = 1
        return s if self.net.training else s * (s >= 0.5)

    def fill(self, path: str, f: Tensor, x: Tensor, stride: int) -> Tensor:
        m, width = self.share(path, x, stride), self.of[path][1].width
        offsets = torch.arange(-3, 4).to(f)
        apart = offsets[:, None] ** 2 + offsets**2
        w = width**2 / (2 * torch.pi) * torch.exp(-(width**2) * apart / 2)
        taps = w.expand(f.shape[1], 1, 7, 7)
        near = F.conv2d(m * f, taps, padding=3, groups=f.shape[1]) / (
            F.conv2d(m, w[None, None], padding=3) + 1e-5
        )
        return m * f + (1 - m) * near

    def block(self, path: str, block: Any, x: Tensor) -> Tensor:
        short = x if block.downsample is None else block.downsample(x)
        strides = [block.conv1.stride[0], block.stride]
        y = self.fill(f"{path}.conv1", F.relu(block.bn1(block.conv1(x))), x, strides[0])
        y = block.bn2(block.conv2(y))
        if isinstance(block, BasicBlock):
            return F.relu(self.fill(f"{path}.conv2", y, x, strides[1]) + short)
        y = self.fill(f"{path}.conv2", F.relu(y), x, strides[1])
        return F.relu(block.bn3(block.conv3(y)) + short)

    def __call__(self, x: Tensor) -> Tensor:
        m = self.model
        x = m.maxpool(F.relu(m.bn1(m.conv1(x))))
        for number in range(1, 5):
            for place, block in enumerate(getattr(m, f"layer{number}")):
                x = self.block(f"layer{number}.{place}", block, x)
        return m.fc(m.avgpool(x).flatten(1))


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in NETWORKS])
def test_open_gates_leave_the_original_bit_for_bit(name: str) -> None:
    model = randomise(NETWORKS[name]())
    net, x = cs.sample(model), images(2, 75, 101)
    with torch.no_grad():
        assert torch.equal(net(x), model(x))
        assert all((share == 1).all() for share in net.shares.values())
        assert_same(net.optimize()(x), model(x))


@pytest.mark.parametrize(("dtype", "noise", "kind"), covering(TYPES, (False, True), (BasicBlock, Bottleneck)))
def test_evaluation_is_what_is_published(kind: type, noise: bool, dtype: torch.dtype) -> None:
    model = small(kind, dtype)
    net, x = half_open(cs.sample(model, grid=3, noise=noise)), images(2, 67, 99, dtype)
    net.seed = 5
    with torch.no_grad():
        expected = Published(model, net)(x)
        assert_same(net(x), expected, TIGHT[dtype])
        assert 0.2 < sum(net.densities.values()) / len(net.gates) < 0.95
        assert_same(net.optimize()(x), expected, TIGHT[dtype])
    assert_same(net(x), expected, TIGHT[dtype])  # with gradients, which other code computes


@pytest.mark.parametrize(("kind", "dtype"), [(BasicBlock, torch.float64), slow(Bottleneck, torch.float32)])
def test_training_is_what_is_published(kind: type, dtype: torch.dtype) -> None:
    model = small(kind, dtype)
    net, x = half_open(cs.sample(model, grid=5)), images(2, 67, 99, dtype)
    net.training, net.step = True, 2  # norms stay as they are, as published
    reference = Published(model, net)
    expected = reference(x)
    assert_same(net(x), expected, TIGHT[dtype])
    means = [
        0.25 * reference.probabilities[f"{name}.conv1"] + 0.75 * reference.probabilities[f"{name}.conv2"]
        for name in (branch.name for branch in net.plan.branches)
    ]
    assert_same(net.sparse_loss(), torch.stack(means).mean())


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in NETWORKS])
def test_chosen_positions_give_what_whole_maps_give(name: str) -> None:
    model = randomise(NETWORKS[name]()).double()
    net, x = half_open(cs.sample(model, grid=7), 0.5), images(2, 75, 101, torch.float64)
    with torch.no_grad():
        found, fast = net(x), net.optimize()(x)
        with mock.patch.object(SampledRun, "_is_settled", lambda run, number: False):
            expected = net(x)
    assert 0 < sum(net.densities.values()) / len(net.gates) < 1
    assert_same(found, expected, 1e-9)
    assert_same(fast, expected, 1e-9)


def test_with_everything_closed_only_the_grid_is_computed_and_without_it_nothing() -> None:
    model, x = small(Bottleneck, torch.float64), images(2, 67, 99, torch.float64)
    for grid in (0, 2):
        net = cs.sample(model, grid=grid)
        with torch.no_grad():
            for gate in net.gates:
                gate.bias.fill_(-30.0)
            assert_same(net(x), Published(model, net)(x), 1e-9)
            assert_same(net.optimize()(x), Published(model, net)(x), 1e-9)
        for share in net.shares.values():
            computed = torch.zeros_like(share)
            if grid:
                computed[:, ::grid, ::grid] = 1
            assert torch.equal(share, computed)


def test_a_batch_is_its_images_one_by_one() -> None:
    net, x = half_open(cs.sample(small())), images(3, 65, 97)
    with torch.no_grad():
        for fast in (net, net.optimize()):
            assert_same(fast(x), torch.cat([fast(one[None]) for one in x]), TIGHT[torch.float32])


def test_a_gate_opens_as_often_as_its_probability_says() -> None:
    score = torch.full((1, 200, 200), 0.7, dtype=torch.float64)
    noise = gating.uniform((0, 1, 2), score)
    share = gating.shares(score, 0.03, noise, 0)
    rate = float((share >= 0.5).double().mean())
    assert rate == pytest.approx(float(torch.sigmoid(score[0, 0, 0])), abs=4 * 0.5 / 200)
    assert gating.hard_shares(torch.tensor([0.4999, 0.5, 0.7])).tolist() == [0.0, 0.5, pytest.approx(0.7)]
    cold = gating.shares(torch.full_like(score, 5.0), 1e-4, None, 0)
    assert torch.equal(cold, torch.ones_like(cold))


def test_noise_is_that_of_seed_and_step_and_evaluation_has_none_unless_asked() -> None:
    net, x = half_open(cs.sample(small())), images(1, 65, 97)
    with torch.no_grad():
        quiet = net(x)
        net.seed = 1
        assert torch.equal(net(x), quiet)
        net.noise = True
        first = net(x)
        assert torch.equal(net(x), first)
        assert not torch.equal(first, quiet)
        net.seed = 2
        assert not torch.equal(net(x), first)
        net.training = True
        second = net(x)
        assert not torch.equal(net(x), second)  # of the next step
        net.step -= 2
        for gate in net.gates:
            gate.temperature.fill_(1.0)
        assert torch.equal(net(x), second)


def test_gradients_reach_gates_widths_and_weights_and_equal_differences() -> None:
    net = half_open(cs.sample(small(Bottleneck, torch.float64), grid=4))
    net.training = True
    x, step = images(1, 49, 65, torch.float64), 1e-5

    def loss() -> Tensor:
        net.step = 0
        for gate in net.gates:
            gate.temperature.fill_(1.0)
        return net(x).square().sum() + net.sparse_loss()

    loss().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    for parameter in (net.gates[1].weight, net.gates[2].bias, net.gates[3].width, net.layer2[0].conv2.weight):
        place = tuple(int(length) // 2 for length in parameter.shape)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[place] += sign * step
                ends.append(float(loss()))
                parameter[place] -= sign * step
        assert float(parameter.grad[place]) == pytest.approx(
            (ends[0] - ends[1]) / (2 * step), rel=2e-4, abs=1e-7
        )


def test_macs_are_what_runs() -> None:
    model = thin(lambda: ResNet(Bottleneck, [1, 2, 1, 1]), 2)
    net, x = half_open(cs.sample(model)), images(2, 65, 97)
    report = net.macs(x)
    with torch.no_grad(), mock.patch("cadsurgery.methods.sampling.sampled_calls.WHOLE_FROM", 2.0):
        counter = FlopCounterMode(display=False)
        with counter:
            net(x)
        dense = FlopCounterMode(display=False)
        with dense:
            model(x)
    assert report.dense == dense.get_total_flops() // 2
    assert counter.get_total_flops() / 2 == pytest.approx(
        report.total, rel=0.02
    )  # floors, and sums that fill
    everything = net.macs(x.to("meta"))
    assert everything.total == everything.dense + sum(gate.gate for gate in everything)
    assert report.total < everything.total
    assert set(report.to_dict()) >= {"gates", "rest", "total", "dense", "density"}
    assert str(len(report.gates)) and "MACs on 2x3x65x97" in str(report)


def test_names_choose_branches_or_single_convolutions() -> None:
    model = small()
    assert len(cs.sample(model).gates) == 10
    by_module = cs.sample(model, ["layer3", "layer2.1"])
    assert [branch.name for branch in by_module.plan.branches] == ["layer2.1", "layer3.0"]
    one = cs.sample(model, "layer2.0.conv2")
    assert [gated.path for gated in one.program.gates] == ["layer2.0.conv2"]
    x = images(2, 65, 97)
    with torch.no_grad():
        for net in (by_module, one):
            half_open(net)
            fast = net.optimize()(x)
            assert_same(fast, net(x))
            assert not torch.equal(net(x), model(x))


class Chain(nn.Module):
    """Two convolutions one after the other, of which either may have a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)))


def test_a_gate_reads_what_the_gate_before_has_filled() -> None:
    model = Chain().double().eval()
    net, x = half_open(cs.sample(model, ["one", "two"], grid=0)), images(2, 33, 41, torch.float64)
    with torch.no_grad():
        assert_same(net.optimize()(x), net(x), 1e-9)
        share = net.shares["two"]
        filled = net(x)  # repeated
        assert torch.equal(net.shares["two"], share)
        with mock.patch.object(SampledRun, "_is_settled", lambda run, number: False):
            assert_same(net(x), filled, 1e-9)
        assert_same(net.shares["two"], share, 1e-9)


REFUSALS: list[tuple[Callable[[], object], type[cs.CadError], str]] = [
    (
        lambda: cs.sample(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())),
        cs.CannotConvert,
        "no residual branches",
    ),
    (lambda: cs.sample(small(), "layer9"), cs.UnknownName, "layer"),
    (lambda: cs.sample(small(), "fc"), cs.InvalidInput, "neither a convolution"),
    (lambda: cs.sample(small(), ["layer1", "layer1"]), cs.InvalidInput, "twice"),
    (lambda: cs.sample(cs.sample(small())), cs.InvalidInput, "gates already"),
    (lambda: cs.sample(small(), grid=1.5), cs.InvalidInput, "grid"),  # type: ignore[arg-type]
    (lambda: cs.sample(small(), temperature=0.0), cs.InvalidInput, "temperature"),
    (lambda: cs.sample(small()).sparse_loss(), cs.InvalidInput, "has not been called"),
    (lambda: cs.sample(small())(torch.zeros(3, 64, 64)), cs.CadError, "batch"),
    (lambda: cs.sample(small()).optimize().train(), cs.InvalidInput, "optimised"),
]


@pytest.mark.parametrize(("call", "kind", "says"), REFUSALS)
def test_what_cannot_be_is_refused(call: Callable[[], object], kind: type[cs.CadError], says: str) -> None:
    with pytest.raises(kind, match=says) as refusal:
        call()
    assert "Next:" in str(refusal.value)


class Shared(nn.Module):
    """A residual branch that calls a convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = (
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.Conv2d(8, 8, 3, 1, 1),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        return self.head(y + self.conv(self.conv(y).relu()))


@torch.no_grad()
def test_each_call_of_a_convolution_has_a_gate_and_its_count() -> None:
    net = half_open(cs.sample(Shared().eval()))
    net(images(2, 61, 83))
    assert list(net.shares) == ["conv", "conv (call 2)"] and len(net.gates) == 2
    counted = net.macs(images(2, 61, 83))
    assert [gate.density for gate in counted.gates] == list(net.densities.values())
