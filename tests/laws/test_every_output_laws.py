"""Law 2 for every output: everything at one level is the network dilated by hand to that level's output stride.

The dilated network is written out here, tap by tap, and is told nothing of the plan: so what the plan leaves dense
without need, between two parts of a region or behind one of several outputs, shows as a difference.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images, slow, some
from torch import Tensor, nn

import cadsurgery as cs

HIGH = 4


@dataclass(frozen=True)
class Map:
    """A map with a sample every `at` pixels, where the network has one every `own`: at <= own."""

    data: Tensor
    own: int
    at: int


class ByHand:
    """The operations of a network, with no stride beyond an output stride of `most`: windows dilated instead."""

    def __init__(self, most: int) -> None:
        self.most = most

    def window(self, x: Map, layer: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> Map:
        (kernel, (stride, _), padding) = (
            value if isinstance(value, tuple) else (value, value)
            for value in (layer.kernel_size, layer.stride, layer.padding)
        )
        dilation = layer.dilation if isinstance(layer, nn.Conv2d) else (1, 1)
        apart, own = x.own // x.at, x.own * stride
        at = min(own, max(x.at, self.most))
        # Samples of the network itself are every `apart` here; each of the grids in between is padded as they are.
        data, inside, ends = x.data, torch.ones_like(x.data[:1, :1]), []
        least = -torch.inf if isinstance(layer, nn.MaxPool2d) else 0.0
        for axis, n, k, p, d in zip((2, 3), data.shape[2:], kernel, padding, dilation, strict=True):
            place = torch.arange(-p * apart, n + (p + stride) * apart)
            if getattr(layer, "padding_mode", "zeros") == "replicate":
                phase = place % apart
                last = phase + (n - 1 - phase) // apart * apart
                place = torch.minimum(torch.maximum(place, phase), last)
            there = ((place >= 0) & (place < n)).view(-1, *(1,) * (3 - axis))
            data = torch.where(there, data.index_select(axis, place.clamp(0, n - 1)), least)
            inside = inside.index_select(axis, place.clamp(0, n - 1)) * there
            count = (-(-n // apart) + 2 * p - d * (k - 1) - 1) // stride + 1
            ends.append(min(count * (own // at), -(-n * x.at // at)))
        options = {"stride": at // x.at, "dilation": [d * apart for d in dilation]}
        if isinstance(layer, nn.MaxPool2d):
            out = F.max_pool2d(data, kernel, **options)
        elif isinstance(layer, nn.AvgPool2d):  # a mean of what there is
            ones = torch.ones_like(data[0, :, :1, :1]).unsqueeze(1).expand(-1, -1, *kernel)
            out = F.conv2d(data, ones, groups=len(ones), **options) / F.conv2d(inside, ones[:1], **options)
        else:
            out = F.conv2d(data, layer.weight, layer.bias, **options)
        return Map(out[:, :, : ends[0], : ends[1]], own, at)

    def like(self, x: Map, like: Map) -> Map:
        """Resized to the nearest sample, to the network's grid of another map; what is there at full resolution is
        taken over."""
        if x.own == like.own:
            return x
        factor = x.own // like.own
        data = x.data
        if x.at > like.at:
            data = data.repeat_interleave(x.at // like.at, 2).repeat_interleave(x.at // like.at, 3)
        assert factor > 1
        height, width = like.data.shape[2:]
        return Map(data[:, :, :height, :width], like.own, like.at)


class Straight:
    """The same operations as the network has them."""

    def window(self, x: Any, layer: nn.Module) -> Any:
        return layer(x)

    def like(self, x: Any, like: Any) -> Any:
        return F.interpolate(x, size=like.shape[-2:])


class Drawn(nn.Module):
    """A random graph of windows, sums and nearest resizes with several outputs, all of which are read twice or more.

    Every window keeps or halves its map; sums join maps of one grid of the network.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.stem = nn.Conv2d(3, 6, 3, HIGH, 1)
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, int, int]] = []  # what, of which value, with which layer or other value
        grids = [HIGH]
        while len(self.steps) < 9 or grids[-1] == HIGH:
            source = draw.randrange(max(0, len(grids) - 4), len(grids))
            halves = grids[source] < 16 and draw.random() < 0.5
            alike = [k for k, grid in enumerate(grids) if grid == grids[source] and k != source]
            finer = [k for k, grid in enumerate(grids) if grid < grids[source]]
            kind = draw.choice(["window", "window", "sum", "like"])
            if kind == "window":
                self.layers.append(self.layer(draw, halves))
                self.steps.append(("window", source, len(self.layers) - 1))
                grids.append(grids[source] * (2 if halves else 1))
            elif kind == "sum" and alike:
                self.steps.append(("sum", source, draw.choice(alike)))
                grids.append(grids[source])
            elif kind == "like" and finer:
                other = draw.choice(finer)
                self.steps.append(("like", source, other))
                grids.append(grids[other])
        read = {k for what, a, b in self.steps for k in ((a,) if what == "window" else (a, b))}
        ends = [k for k in range(1, len(grids)) if k not in read]
        self.outputs = sorted({*ends, draw.randrange(1, len(grids))})

    @staticmethod
    def layer(draw: random.Random, halves: bool) -> nn.Module:
        if halves:
            return draw.choice(
                [
                    nn.Conv2d(6, 6, 3, 2, 1),
                    nn.Conv2d(6, 6, 2, 2),
                    nn.MaxPool2d(2, 2),
                    nn.MaxPool2d(3, 2, 1),
                    nn.AvgPool2d(2, 2, count_include_pad=False),
                    nn.AvgPool2d(3, 2, 1, count_include_pad=False),
                    nn.Conv2d(6, 6, 1, 2),
                ]
            )
        mode = draw.choice(["zeros", "replicate"])
        return draw.choice(
            [
                nn.Conv2d(6, 6, 1),
                nn.Conv2d(6, 6, 3, 1, 1, padding_mode=mode),
                nn.Conv2d(6, 6, (5, 1), padding=(2, 0), padding_mode=mode),
            ]
        )

    def run(self, x: Any, by: Any) -> list[Any]:
        values = [x]
        for what, a, b in self.steps:
            if what == "window":
                values.append(by.window(values[a], self.layers[b]))
            elif what == "like":
                values.append(by.like(values[a], values[b]))
            else:
                first, second = values[a], values[b]
                plain = isinstance(first, Tensor)
                values.append(first + second if plain else Map(first.data + second.data, first.own, first.at))
        return [values[k] for k in self.outputs]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.run(self.stem(x), Straight())


@pytest.mark.parametrize("seed", [seed if seed < 1 else slow(seed) for seed in range(20)])
@torch.no_grad()
def test_every_output_at_every_level_is_the_network_dilated_by_hand(seed: int) -> None:
    torch.manual_seed(seed)
    model = Drawn(seed).double().eval()
    x = images(2, 128, 160).double()
    example = images(1, 64, 96).double()
    try:
        possible = cs.plan(model, example_input=example).possible
        pair = max((pair for pair in possible if pair[0] == HIGH), default=None)
        net = cs.adaptify(model, "none", output_stride=pair, example_input=example, fill="nearest")
    except cs.CannotConvert:
        pytest.skip("everything is read at the network's own size")
    if pair is None:
        pytest.skip("its region begins at the image")
    fine = tuple(n // HIGH for n in x.shape[2:])
    for level, stride in enumerate(net.plan.strides):
        found = net(x, mask=torch.full((2, *fine), level))
        expected = model.run(Map(model.stem(x), HIGH, HIGH), ByHand(stride))
        for ours, theirs in zip(found, expected, strict=True):
            returned = (
                x.shape[2] // ours.shape[2]
            )  # pixels between samples: fewer than they were computed at, or more
            common = max(returned, theirs.at)
            here, there = common // returned, common // theirs.at
            assert_same(ours[:, :, ::here, ::here], theirs.data[:, :, ::there, ::there], 1e-9)


class Faint(nn.Module):
    """A resize brings finer values to the output, scaled to next to nothing beside what there is anyway."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.deep, self.share = nn.Conv2d(8, 8, 3, 1, 1), share

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        deep = F.interpolate(self.deep(self.down(fine)), size=fine.shape[2:], mode="bilinear")
        return fine + self.share * deep


def effect(net: cs.AdaptiveModel, x: Tensor) -> float:
    """Of a mask, on other images than it was measured on."""
    with torch.no_grad():
        high, low = net(x, mask="all"), net(x, mask="none")
    return float((high - low).square().mean().sqrt() / high.std(correction=0))


@pytest.mark.parametrize("dtype", some([torch.float64, torch.float32, torch.bfloat16], every=3))
def test_an_effect_is_measured_as_it_is_and_a_small_one_is_said(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = images(1, 48, 64, dtype)
    plain = cs.adaptify(Faint(1.0).to(dtype).eval(), "none", output_stride=(2, 4), example_input=example)
    assert plain.plan.matters and plain.plan.effect is not None and plain.plan.effect > 1e-2
    if dtype != torch.bfloat16:
        assert effect(plain, images(2, 67, 97, dtype)) == pytest.approx(plain.plan.effect, rel=0.5)
    with pytest.warns(cs.CadWarning, match="masks hardly change what this network returns"):
        net = cs.adaptify(Faint(1e-4).to(dtype).eval(), "none", output_stride=(2, 4), example_input=example)
    assert net.plan.matters and 0 < (net.plan.effect or 0) < 1e-3 and "gains little" in net.plan.summary()
    cs.save(net, tmp_path / "net.safetensors")
    assert cs.load(tmp_path / "net.safetensors", Faint(1e-4).to(dtype)).plan.effect == net.plan.effect
    assert cs.Plan.from_json(net.plan.to_json()).effect == net.plan.effect
