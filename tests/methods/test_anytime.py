"""Networks with exits: the published formulas by brute force, and what comes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images, slow, some
from decisions import decide
from networks import (
    Chain,
    Classifier,
    InvertedBottleneck,
    conv_norm,
    made_once,
    randomise,
    seeded,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cadsurgery as cs
from cadsurgery.functional import gaussian_fill
from cadsurgery.methods.anytime.exit_calls import AnytimeRun

conv = partial(conv_norm, bias=False, inplace=True)


class Parallel(nn.Module):
    """Branches of two resolutions that read each other, and a head on both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 2), conv(8, 8, 2))
        self.stage1 = nn.Sequential(InvertedBottleneck(8, 8), InvertedBottleneck(8, 8))
        self.split = conv(8, 12, 2)
        self.stage2 = nn.ModuleList([Exchange(), Exchange()])
        self.stage3 = nn.ModuleList([Exchange(), Exchange()])
        self.head = nn.Sequential(conv(20, 8, kernel=1), nn.Conv2d(8, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stage1(self.stem(x))
        coarse = self.split(fine)
        for exchange in (*self.stage2, *self.stage3):
            fine, coarse = exchange(fine, coarse)
        up = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
        return self.head(torch.cat((fine, up), 1))


class Exchange(nn.Module):
    """Both branches, each plus the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = InvertedBottleneck(8, 8), InvertedBottleneck(12, 12)
        self.up = nn.Sequential(nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.down = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12))

    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        fine, coarse = self.fine(fine), self.coarse(coarse)
        up = F.interpolate(self.up(coarse), size=fine.shape[2:], mode="bilinear", align_corners=False)
        return F.relu(fine + up), F.relu(coarse + self.down(fine))


# The stages of each segment by their names, after the first exit.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[list[str]]]] = {
    "chain": (Chain, [["stage2"], ["stage3"], ["stage4", "head"]]),
    "parallel": (Parallel, [["split", "stage2"], ["stage3", "head"]]),
}


def network(name: str = "chain", dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    return seeded(NETWORKS[name][0], dtype, seed)


@made_once
def anytime(name: str = "chain", dtype: torch.dtype = torch.float64, **options: Any) -> cs.AnytimeModel:
    torch.manual_seed(1)
    net = cs.anytime(network(name, dtype), **{"threshold": 0.9, **options})
    for head in net.heads:
        randomise(head)
        for layer in head.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
    decide(net, [*(head[-1] for head in net.heads), net.head[-1]])  # type: ignore[index,union-attr]
    for parameter in net.own_parameters().values():
        if parameter.dim() == 0:
            nn.init.uniform_(parameter, 0.5, 2.0)
    return net


@contextmanager
def masked(net: cs.AnytimeModel, stages: list[str], mask: Tensor | None) -> Iterator[None]:
    """Convolutions of some stages whose outputs are filled where a mask (B, H, W) leaves nothing to compute."""

    def fill(module: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        if mask is None or not hasattr(module, "width"):
            return None
        own = F.interpolate(mask[:, None].double(), size=y.shape[2:])[:, 0] > 0
        return gaussian_fill(y, own, module.width)

    hooks = [
        module.register_forward_hook(fill)
        for stage in stages
        for module in net.get_submodule(stage).modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def by_hand(net: cs.AnytimeModel, name: str, x: Tensor) -> list[Tensor]:
    """Aggregated class scores as published: the whole network as modules, once for each exit, on whole maps."""
    segments, model = NETWORKS[name][1], network(name)
    model._modules = dict(net._modules)
    found: list[Tensor] = []
    masks: list[Tensor] = []
    for number in range(len(segments) + 1):
        maps: dict[str, Any] = {}
        stage = f"stage{number + 1}"
        part: Any = getattr(model, stage)
        last = part[-1] if isinstance(part, nn.ModuleList) else part

        def note(module: nn.Module, inputs: object, output: Any, maps: dict[str, Any] = maps) -> None:
            maps["exit"] = output if isinstance(output, tuple) else (output,)

        handle = last.register_forward_hook(note)
        with contextstack([masked(net, segments[k], masks[k]) for k in range(number)]):
            if number < len(net.heads):
                model(x)
                of_head = masks[number - 1] if number else None
                with masked(net, [f"exit_heads.{number}"], of_head):
                    logits = apply_head(net.heads[number], maps["exit"])  # type: ignore[arg-type]
            else:
                kept: dict[str, Tensor] = {}
                hook = model.head.register_forward_hook(lambda m, i, o, kept=kept: kept.update(y=o))  # type: ignore[union-attr]
                model(x)
                hook.remove()
                logits = kept["y"]
        handle.remove()
        if found:  # all exits of a finer grid than those after them
            logits = F.interpolate(logits, size=found[-1].shape[2:], mode="bilinear", align_corners=False)
            logits = torch.where(masks[-1][:, None], logits, found[-1])
        found.append(logits)
        left = logits.softmax(1).amax(1) <= (*net.thresholds(), 1.0)[number]
        masks.append(left & masks[-1] if masks else left)
    return found


@contextmanager
def contextstack(contexts: list[Any]) -> Iterator[None]:
    if not contexts:
        yield
        return
    with contexts[0], contextstack(contexts[1:]):
        yield


def apply_head(head: nn.Sequential, maps: tuple[Tensor, ...]) -> Tensor:
    size = maps[0].shape[2:]
    x = torch.cat([F.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in maps], 1)
    sizes = []
    for layer in head:
        if type(layer).__name__ == "Resize":
            x = F.interpolate(x, size=sizes.pop(), mode="bilinear", align_corners=False)
            continue
        if isinstance(layer, nn.AvgPool2d):
            sizes.append(x.shape[2:])
        x = layer(x)
    return x


def whole(net: cs.AnytimeModel, x: Tensor) -> list[Tensor]:
    """Class scores with every map computed and filled as a whole, as in training."""
    return list(net._logits(net._start((x,), {}, is_training=True), net.thresholds()))


@pytest.mark.parametrize(
    ("name", "size", "falls"), [("parallel", (45, 70), 0.2), slow("chain", (64, 64), 0.0)]
)
def test_every_exit_is_the_published_formula(name: str, size: tuple[int, int], falls: float) -> None:
    net, x = anytime(name), images(2, *size, torch.float64)
    if falls:  # a threshold of each exit
        net.threshold = tuple(0.9 - falls * number for number in range(len(net.heads)))
    with torch.no_grad():
        found, expected = net.logits(x), by_hand(net, name, x)
        shares = [float(net.undecided_mask(one).double().mean()) for one in expected]
        assert 0.05 < shares[0] < 0.95 and shares[-2] > 0
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize(
    ("name", "dtype", "head", "fill"),
    [
        ("chain", torch.float64, "redesigned", "gaussian"),
        ("parallel", torch.float32, "plain", "interpolated"),
        slow("parallel", torch.float64, "redesigned", "zeros"),
    ],
)
def test_rows_where_they_are_needed_are_those_of_whole_maps(
    name: str, dtype: torch.dtype, head: str, fill: str
) -> None:
    net, x = anytime(name, head=head, fill=fill), images(3, 45, 70, torch.float64)
    with torch.no_grad():
        expected = whole(net, x)
        masks = [net.undecided_mask(one) for one in expected[:-1]]
        assert not torch.equal(masks[0][0], masks[0][1]) and masks[-1].any()
        net.to(dtype)
        for one, other in zip(net.logits(x.to(dtype)), expected, strict=True):
            if dtype == torch.float64:
                assert_same(one, other)
            else:  # a confidence at the threshold may round to its other side
                near = (one.double() - other).abs().amax(1) < 1e-3 * other.abs().max()
                assert near.double().mean() > 0.98


@pytest.mark.parametrize(("name", "dtype"), [("parallel", torch.float64), slow("chain", torch.float32)])
def test_with_threshold_one_it_is_the_plain_network_with_exits(name: str, dtype: torch.dtype) -> None:
    net, x = anytime(name, dtype, threshold=1.0), images(2, 61, 83, dtype)
    model = network(name, dtype)
    model._modules = dict(net._modules)
    with torch.no_grad():
        found = net(x)
        assert torch.equal(found[-1], model(x))
        kept: list[Any] = []
        last: Any = model.stage1
        last.register_forward_hook(lambda module, inputs, output: kept.append(output))
        model(x)
        first = apply_head(net.heads[0], (kept[0],))  # type: ignore[arg-type]
        assert torch.equal(net.logits(x)[0], first)
    assert [exit.macs for exit in net.macs(x)] == [exit.dense for exit in net.macs(x)]


@pytest.mark.parametrize("name", some(NETWORKS))
def test_a_batch_equals_its_images_and_sizes_may_change(name: str) -> None:
    net = anytime(name)
    with torch.no_grad():
        for size in ((45, 70), (33, 64)):
            x = images(3, *size, torch.float64)
            together = net(x)
            for number, image in enumerate(x.split(1)):
                for one, other in zip(net(image), together, strict=True):
                    assert_same(one, other[number : number + 1])


def test_entropy_leaves_what_is_undecided() -> None:
    net, x = anytime(confidence="entropy", threshold=0.5), images(2, 64, 64, torch.float64)
    with torch.no_grad():
        first = net.logits(x)[0]
        entropy = torch.distributions.Categorical(logits=first.permute(0, 2, 3, 1)).entropy()
        assert torch.equal(net.undecided_mask(first), entropy >= 0.5)
        assert 0 < net.undecided_mask(first).double().mean() < 1
        for one, other in zip(net.logits(x), whole(net, x), strict=True):
            assert_same(one, other)
        assert torch.equal(net(x, threshold=0.0)[-1], anytime(threshold=1.0)(x)[-1])


def test_thresholds_that_are_no_numbers_or_not_as_many_are_refused() -> None:
    net, threshold = anytime(), (0.9, None, 0.8)
    for wrong in ((0.9, 0.8), [], float("nan"), "much", threshold):
        with pytest.raises(cs.InvalidInput, match="give one number, or 3"):
            net.threshold = wrong
    with pytest.raises(cs.InvalidInput, match="give one number, or 3"):
        net.steps(images(1, 64, 64, torch.float64), threshold=threshold)
    with pytest.raises(cs.InvalidInput, match="give one number, or 3"):
        cs.anytime(network(), threshold=threshold)
    assert net.threshold == 0.9


def test_steps_compute_no_more_than_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = anytime(), images(1, 64, 64, torch.float64)
    every, ran, run = net(x), list[int](), AnytimeRun.segment

    def segment(self: AnytimeRun, number: int, sites: Any) -> None:
        ran.append(number)
        run(self, number, sites)

    monkeypatch.setattr(AnytimeRun, "segment", segment)
    steps = net.steps(x)
    assert ran == []
    assert torch.equal(next(steps), every[0]) and ran == [0]
    assert torch.equal(next(steps), every[1]) and ran == [0, 1]


@pytest.mark.parametrize(("name", "fill"), [("parallel", "interpolated"), slow("chain", "gaussian")])
def test_macs_are_those_that_torch_sees_being_executed(name: str, fill: str) -> None:
    net, x = anytime(name, fill=fill), images(2, 61, 83, torch.float64)
    report = net.macs(x)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        net(x)
    assert report[-1].macs == flops.get_total_flops() // 2 < report[-1].dense
    assert all(one.macs <= other.macs for one, other in pairwise(report))
    assert "up to each exit" in str(report)


@pytest.mark.parametrize("fill", ["gaussian", slow("interpolated")])
def test_gradients_are_those_of_whole_maps_and_reach_the_widths(fill: str) -> None:
    net, x = anytime("parallel", fill=fill), images(2, 45, 70, torch.float64)
    gradients = []
    for run in (net.logits, lambda x: whole(net, x)):
        net.zero_grad()
        sum(one.square().mean() for one in run(x)).backward()  # type: ignore[union-attr]
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
        gradients.append(found)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-7, atol=1e-10)
    assert any(name.endswith(".width") and gradient != 0 for name, gradient in gradients[0].items())
    net.zero_grad()
    net.train()
    net(x)[-1].mean().backward()
    assert net.training and any(p.grad is not None for p in net.own_parameters().values())


@pytest.mark.parametrize(("name", "fill"), [("parallel", "interpolated"), slow("chain", "gaussian")])
def test_an_optimised_copy_gives_the_same(name: str, fill: str) -> None:
    net, x = anytime(name, fill=fill), images(2, 61, 83, torch.float64)
    fast = net.optimize()
    with torch.no_grad():
        for one, other in zip(fast(x), net(x), strict=True):
            assert_same(one, other)
        for one, other in zip(fast(x, threshold=1.0), net(x, threshold=1.0), strict=True):
            assert_same(one, other)
    assert fast.macs(x).exits == net.macs(x).exits
    with pytest.raises(cs.InvalidInput, match="cannot be trained"):
        fast.train()


class Backbone(Chain):
    """Returns its maps."""

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        y = self.stage1(self.stem(x))
        return [y, self.stage2(y)]


class Mirrored(nn.Module):
    """The mean of what an image and its mirror give, which are joined along the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.head(self.body(torch.cat((x, x.flip(3)))).relu()).chunk(2)
        return one + other.flip(3)


@pytest.mark.parametrize(
    ("model", "options", "kind", "words"),
    [
        (Chain, {"exits": ["stage9"]}, cs.UnknownName, "did you mean"),
        (Chain, {"exits": ["head"]}, cs.InvalidInput, "no exit after head"),
        (Chain, {"exits": ["stage1", "stage1"]}, cs.InvalidInput, "twice"),
        (Chain, {"classes": 7}, cs.InvalidInput, "predicts 5"),
        (Chain, {"confidence": "margin"}, cs.UnknownName, "entropy"),
        (Backbone, {}, cs.InvalidInput, "say classes=N"),
        (Classifier, {}, cs.CannotConvert, "returns no map"),
        (Mirrored, {"exits": ["body"]}, cs.CannotConvert, "of 4 images and the output of 2"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    model: Callable[[], nn.Module], options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        cs.anytime(model().eval(), **options)
