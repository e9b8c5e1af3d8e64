"""Floors: where the mask does not keep the network's own grid, no map is computed finer than `coarsest` pixels.

The emulation here is independent of the package: torch's interpolation of every map between its samples `floor` pixels
apart, in an interpreter of the network's own graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, slow, some
from networks import Encoded, SmallUNet, unverified
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import cadsurgery as cs
from cadsurgery.elements.backends.choose import BACKENDS
from cadsurgery.elements.backends.floors import WithoutOverlap


class Strided(nn.Module):
    """Strided convolutions, one depthwise, and transposed convolutions with and without overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 5, 1, 2, groups=8)
        self.c, self.d = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, 1, 1)
        self.up, self.out = nn.ConvTranspose2d(12, 6, 4, 2, 1), nn.ConvTranspose2d(6, 2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(self.a(x).relu()))
        y = y + self.d(y).relu()
        return self.out(self.up(F.interpolate(F.max_pool2d(y, 2), scale_factor=2) + y))


class AnySize(nn.Module):
    """Takes pictures of odd sizes: its resizes are to the size of another map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.c, self.d = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(16, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.b(self.a(x).relu()).relu()
        up = F.interpolate(self.c(fine).relu(), fine.shape[2:], mode="bilinear", align_corners=False)
        return F.interpolate(self.d(torch.cat([up, fine], 1)), x.shape[2:], mode="bilinear")


class Attentive(nn.Module):
    """One attention block on the coarsest map, as in YOLO11, and a decoder with a skip behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.c, self.d = nn.Conv2d(14, 6, 3, 1, 1), nn.Conv2d(6, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.a(x).relu()
        y = self.b(fine).relu()
        tokens = y.flatten(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(tokens, tokens, tokens)
        y = y + mixed.transpose(1, 2).reshape(y.shape)
        return self.d(self.c(torch.cat([F.interpolate(y, scale_factor=2), fine], 1)).relu())


NETWORKS = {"unet": SmallUNet, "strided": Strided}
FILLS = ["linear", "nearest", "guided"]


def network(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return {**NETWORKS, "any size": AnySize, "attentive": Attentive}[name]().eval().to(dtype)


class Uniform(fx.Interpreter):
    """Replaces every map by the interpolation of its samples `floor` pixels apart, or by the sample before."""

    def __init__(self, model: nn.Module, floor: int, size: tuple[int, int], fill: str = "linear") -> None:
        super().__init__(fx.symbolic_trace(model))
        self.floor, self.size, self.fill = floor, size, fill

    def run_node(self, n: fx.Node) -> Any:
        y = super().run_node(n)
        if n.op in ("placeholder", "output") or not isinstance(y, Tensor) or y.dim() != 4:
            return y
        step = self.floor // round(self.size[1] / y.shape[-1])  # samples between those that are kept
        if step < 2:
            return y
        if self.fill == "nearest":
            repeated = y[..., ::step, ::step].repeat_interleave(step, 2).repeat_interleave(step, 3)
            return repeated[..., : y.shape[2], : y.shape[3]]
        kept = F.pad(y[..., ::step, ::step], (0, 1, 0, 1), mode="replicate")
        between = [(length - 1) * step + 1 for length in kept.shape[2:]]
        filled = F.interpolate(kept, between, mode="bilinear", align_corners=True)
        return filled[..., : y.shape[2], : y.shape[3]]


def mixed(batch: int, size: tuple[int, int], cell: int, level: int, seed: int = 0) -> Tensor:
    """A level map whose cells are kept or at the floor."""
    torch.manual_seed(seed)
    cells = torch.rand(batch, -(-size[0] // cell), -(-size[1] // cell)) < 0.5
    levels = torch.where(cells, 0, level).repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    return levels[:, : size[0], : size[1]]


@pytest.mark.parametrize(
    ("network_and_size", "floor", "fill"),
    covering(
        [("unet", (64, 96)), ("strided", (48, 80)), ("any size", (61, 83)), ("attentive", (64, 80))],
        [2, 4, 8, 16],
        ["linear", "nearest"],
    ),
    ids=str,
)
def test_a_uniform_floor_is_its_emulation(
    network_and_size: tuple[str, tuple[int, int]], floor: int, fill: Any
) -> None:
    name, size = network_and_size
    model, x = network(name), torch.rand(2, 3, *size, dtype=torch.float64)
    net = unverified(model, "none", coarsest=16, fill=fill, example_input=x[:1])
    levels = torch.full((2, *size), net.plan.strides.index(floor))
    with torch.no_grad():
        found, expected = net(x, mask=levels), Uniform(model, floor, size, fill).run(x)
    assert (found - expected).abs().max() < 1e-10


def test_the_region_of_floors_begins_again_behind_attention() -> None:
    model = network("attentive")
    plan = cs.plan(model, coarsest=16, example_input=torch.rand(1, 3, 64, 96, dtype=torch.float64))
    assert [plan[name].action for name in ("add", "cat", "c", "d")] == ["keep"] * 4


@pytest.mark.parametrize(
    ("name", "shape", "fill"),
    covering(
        [*NETWORKS],
        [((64, 96), 16), ((80, 112), 16), ((128, 192), 64), ((128, 192), 32)],
        ["linear", "nearest"],
    ),
)
def test_transposed_convolutions_without_overlap_are_those_with_kernel_maps(
    name: str, shape: tuple[tuple[int, int], int], fill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, cell = shape
    model, x = network(name), torch.rand(1, 3, *size, dtype=torch.float64)
    net = unverified(model, "none", coarsest=cell, fill=fill, example_input=x)
    fast, levels = net.optimize(), mixed(1, size, cell, net.plan.max_level)
    with torch.no_grad():
        as_product = net(x, mask=levels)
        assert (fast(x, mask=levels) - as_product).abs().max() < 1e-10
        monkeypatch.setattr(
            "cadsurgery.elements.backends.choose.BACKENDS",
            [backend for backend in BACKENDS if not isinstance(backend, WithoutOverlap)],
        )
        assert (net(x, mask=levels) - as_product).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("network_and_size", "batch", "fill"),
    covering(
        [("unet", (52, 76)), ("strided", (64, 80)), ("any size", (61, 83)), ("attentive", (52, 76))],
        [2, 3],
        FILLS,
    ),
    ids=str,
)
def test_a_batch_equals_its_images(
    network_and_size: tuple[str, tuple[int, int]], batch: int, fill: Any
) -> None:
    """Outputs and gradients, where each image has a mask of its own."""
    name, size = network_and_size
    model, x = network(name), torch.rand(batch, 3, *size, dtype=torch.float64)
    net = unverified(model, "none", coarsest=16, fill=fill, example_input=x[:1])
    levels = mixed(batch, size, 16, net.plan.max_level)
    output = net(x, mask=levels)
    alone = torch.cat([net(x[i : i + 1], mask=levels[i : i + 1]) for i in range(batch)])
    assert (output - alone).abs().max() < 1e-10
    gradients, expected = (
        torch.autograd.grad(y.square().sum(), [*net.parameters()]) for y in (output, alone)
    )
    for gradient, other in zip(gradients, expected, strict=True):
        assert (gradient - other).abs().max() < 1e-9 * other.abs().max().clamp(min=1)


def test_gradients_are_those_of_the_emulation() -> None:
    model, x = network("unet"), torch.rand(1, 3, 32, 48, dtype=torch.float64)
    net = cs.adaptify(model, "none", coarsest=8, example_input=x)
    net(x, mask="none").square().sum().backward()
    Uniform(model, 8, (32, 48)).run(x).square().sum().backward()
    for (name, parameter), expected in zip(net.named_parameters(), model.parameters(), strict=True):
        assert parameter.grad is not None and expected.grad is not None, name
        assert (parameter.grad - expected.grad).abs().max() < 1e-8 * expected.grad.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_are_those_executed_and_never_more_than_given(name: str) -> None:
    model, x = network(name, torch.float32), torch.rand(1, 3, 64, 96)
    net = unverified(model, "none", coarsest=16, example_input=x)
    with FlopCounterMode(display=False) as given, torch.no_grad():
        model(x)
    counted = [net.macs(x, mask=mask).mask for mask in ("none", mixed(1, (64, 96), 16, 4), "all")]
    assert counted[0] < counted[1] < counted[2] == given.get_total_flops() // 2
    plain = replace(net.geometry, dense_shortcut=False).lattice(mixed(1, (64, 96), 16, 4))
    with FlopCounterMode(display=False) as executed, torch.no_grad():
        net.run(lambda *_: plain, x)
    assert abs(executed.get_total_flops() / 2 / counted[1] - 1) < 0.02


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coarsest": 16, "output_stride": (1, 4)}, "two conversions"),
        ({"coarsest": 12}, "give a multiple of 4"),
        ({"coarsest": 1}, "no number of pixels above 1"),
        ({"coarsest": True}, "no number of pixels above 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(cs.InvalidInput, match=words):
        cs.adaptify(network("unet", torch.float32), "none", **options)


def by_constants(x: Tensor, step: int) -> Tensor:
    return F.pad(F.pad(x, (0, 1)), (0, 0, 0, 1))


def by_rests(x: Tensor, step: int) -> Tensor:
    x = F.pad(x, (0, -x.shape[3] % step))
    return F.pad(x, (0, 0, 0, -x.shape[2] % step))


def where_needed(x: Tensor, step: int) -> Tensor:
    height, width = x.shape[2:]
    if width % step:
        x = F.pad(x, (0, step - width % step))
    if height % step:
        x = F.pad(x, (0, 0, 0, step - height % step))
    return x


class PadsAlongEachAxis(nn.Module):
    """Pads a map on the right, then below, for a convolution that reads patches, as transformers with stages do."""

    def __init__(self, pad: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2)
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.pad(self.stem(x), 2))


@pytest.mark.parametrize("pad", some([by_constants, by_rests, where_needed], every=3))
def test_a_map_that_is_padded_along_each_axis_in_turn_is_exact(pad: Callable[[Tensor, int], Tensor]) -> None:
    torch.manual_seed(0)
    model = PadsAlongEachAxis(pad).double().eval()
    net = cs.adaptify(model, coarsest=32, outputs="native", example_input=torch.rand(2, 3, 100, 132).double())
    assert any(check.law.startswith("floors side by side") for check in net.checks)
    assert net.plan.share("adapt", "keep") == 1
    with torch.no_grad():
        for size in ((100, 132), (104, 100), (96, 128), (99, 131)):
            assert_same(net(x := torch.rand(1, 3, *size).double(), mask="all"), model(x), 1e-9)


@pytest.mark.parametrize("size", [(97, 129), (64, 96)], ids=str)
def test_differences_of_neighbours_are_exact(size: tuple[int, int]) -> None:
    """A crop is a view of the map that it is taken from, which has other values where it goes on."""

    def differences(net: Any, image: Tensor, z: Tensor) -> Tensor:
        down, across = z[:, :, 1:] - z[:, :, :-1], z[..., 1:] - z[..., :-1]
        return net.head(F.pad(down, (0, 0, 0, 1)) + F.pad(across, (0, 1)) + z)

    model = Encoded(differences).eval()
    net = cs.adaptify(model, "edges", coarsest=32, example_input=torch.rand(1, 3, *size))
    x = torch.rand(2, 3, 70, 90)
    assert_same(net(x, mask="all"), model(x), 1e-5)


def test_an_identity_whose_hooks_are_asked_for_keeps_its_place_behind_padding() -> None:
    seen: list[Tensor] = []
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.ConstantPad2d(1, 0.0), nn.Identity(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 2, 1)),
    ).eval()
    model[2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    net = unverified(model, "edges", output_stride=(4, 8), example_input=torch.rand(1, 3, 64, 96))
    seen.clear()
    net(torch.rand(1, 3, 64, 96))
    assert seen


class SuperResolving(nn.Module):
    """A body at the picture's size and pixel shuffles, with the picture enlarged beside it (compact Real-ESRGAN)."""

    def __init__(self, scales: tuple[int, ...], mode: str, first: bool) -> None:
        super().__init__()
        self.first, self.options = first, {"scale_factor": math.prod(scales), "mode": mode}
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, 1, 1), nn.PReLU(6), nn.Conv2d(6, 6, 3, 1, 1), nn.PReLU(6)
        )
        last = len(scales) - 1
        self.ups = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(6, (3 if i == last else 6) * s**2, 3, 1, 1), nn.PixelShuffle(s))
                for i, s in enumerate(scales)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        base = F.interpolate(x, **self.options) if self.first else None
        y = self.ups(self.body(x - 0.5))
        return y + (F.interpolate(x, **self.options) if base is None else base)


@pytest.mark.parametrize(
    ("scales", "mode", "first"),
    covering([(2,), slow((3,)), slow((4,)), (2, 2)], ["nearest", "bilinear", slow("bicubic")], [False, True]),
    ids=str,
)
@torch.no_grad()
def test_a_picture_enlarged_beside_the_network_is_no_map_of_it(
    scales: tuple[int, ...], mode: str, first: bool
) -> None:
    """The lattice is that of the picture as it is: masks lie on it, and what is larger stays dense."""
    torch.manual_seed(1)
    model = SuperResolving(scales, mode, first).eval().double()
    net = cs.adaptify(model, "none", coarsest=8, example_input=torch.rand(1, 3, 40, 48).double())
    for size in ((40, 48), (33, 51)):
        x, levels = torch.rand(2, 3, *size).double(), mixed(2, size, 8, 3)
        assert_same(net(x, mask="all"), model(x))
        assert net.levels.shape[1:] == size
        ours = net(x, mask=levels)
        assert_same(net.optimize()(x, mask=levels), ours)
        assert_same(ours[1:], net(x[1:], mask=levels[1:]))
        if len(scales) == 1:
            small = Uniform(nn.Sequential(model.body, model.ups[0][0]), 8, size).run(x - 0.5)
            expected = model.ups[0][1](small) + F.interpolate(x, **model.options)
            assert_same(net(x, mask="none"), expected)
    assert net.macs(x, mask="none").mask < net.macs(x, mask="all").mask


PEAKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "equal": lambda heat, largest: heat * (largest == heat),
    "as large": lambda heat, largest: torch.where(heat >= largest, heat, 0.0),
}


class Peaks(nn.Module):
    """Peaks of a heatmap, the highest of them, and another map read there (CenterNet)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU())
        self.up = nn.ConvTranspose2d(6, 6, 4, 2, 1)
        self.heat, self.size, self.pool = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1), nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.body(x)).relu()
        heat = self.heat(y).sigmoid()
        heat = PEAKS[self.how](heat, self.pool(heat))
        batch, _, height, width = heat.shape
        scores, places = heat.view(batch, -1).topk(5)
        size = self.size(y).permute(0, 2, 3, 1).reshape(batch, -1, 2)
        found = torch.gather(size[:, :, 0], 1, places.fmod(height * width))
        return torch.stack((scores, found, places.to(scores)), 2)


@pytest.mark.parametrize("how", some(PEAKS))
@torch.no_grad()
def test_peaks_of_a_map_are_found_dense(how: str) -> None:
    """Between anchors many values are equal but for rounding: the heatmap leaves the region before."""
    torch.manual_seed(1)
    model = Peaks(how).eval().double()
    net = cs.adaptify(model, "none", coarsest=16)
    assert any("which values are equal" in decision.reason for decision in net.plan.chosen("barrier"))
    x, levels = torch.rand(2, 3, 64, 96).double(), mixed(2, (64, 96), 16, net.plan.max_level)
    assert_same(net(x, mask="all"), model(x))
    assert_same(net(x, mask=levels)[1:], net(x[1:], mask=levels[1:]))
