"""The estimate of memory in bands: a map keeps exactly the rows that later bands still read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory_gate import PICTURE, Plan, in_passes, plan_of, walk

HEIGHT, WIDTH = 64, 32


class Skips(nn.Module):
    """Windows, strides, dilations, a skip connection, a transposed convolution and a resize."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 5, padding=2)
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(6, 6, 3, padding=4, dilation=4)
        self.deep = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Return all maps."""
        first = self.first(x)
        down = self.down(first)
        wide = self.wide(down) + down
        deep = self.deep(wide)
        up = self.up(deep)
        return {"first": first, "down": down, "wide": wide, "deep": deep, "up": up}

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to the same shape."""
        maps = self.stages(x)
        low = torch.cat((maps["wide"], maps["up"]), 1)
        fine = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        return self.last(torch.cat((fine, maps["first"]), 1))


class Gated(nn.Module):
    """A map times a gate by the mean of it over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 2, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, 2, H - 2, W - 2)."""
        x = self.first(x)
        return self.last(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())


def rows_read(source: Tensor, result: Tensor, begin: int) -> set[int]:
    """Return the rows of a map on which rows of a result, from one on, depend through torch's own gradients."""
    if begin >= result.shape[2]:
        return set()
    (gradient,) = torch.autograd.grad(result[:, :, begin:].sum(), source, retain_graph=True)
    return set(gradient.abs().sum((0, 1, 3)).nonzero().flatten().tolist())


def made(plan: Plan) -> dict[str, int]:
    return {one.name.split(" ")[0]: number for number, one in enumerate(plan.maps)}


@pytest.mark.parametrize("band", [4, 8, 24, HEIGHT])
def test_a_map_keeps_the_rows_that_later_bands_read(band: int) -> None:
    torch.manual_seed(0)
    net = Skips().double()
    for parameter in net.parameters():
        parameter.data.abs_()  # gradients of sums do not cancel
    image = torch.rand(1, 3, HEIGHT, WIDTH, dtype=torch.float64, requires_grad=True)
    maps = net.stages(image)
    # What reads each map directly, on a copy of its own that no other path reaches.
    apart = {name: value.detach().requires_grad_() for name, value in maps.items()}
    low = torch.cat((apart["wide"], apart["up"]), 1)
    fine = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
    readers = {
        "down": ("first", net.down(apart["first"])),
        "wide": ("down", net.wide(apart["down"]) + apart["down"]),
        "deep": ("wide", net.deep(apart["wide"])),
        "up": ("deep", net.up(apart["deep"])),
        "interpolate": ("wide up", fine),
        "last": ("first", net.last(torch.cat((fine.detach(), apart["first"]), 1))),
    }
    plan = plan_of(net.float(), WIDTH, HEIGHT, torch.randn(1, 3, HEIGHT, WIDTH))
    net.double()
    numbers = made(plan)
    for rows in walk(plan, band, notes=True).bands:
        for name in ("first", "down", "wide", "deep", "up"):
            read: set[int] = set()
            for reader, (sources, result) in readers.items():
                if name in sources.split():
                    read |= rows_read(apart[name], result, rows[numbers[reader]][1])
            _, end, kept = rows[numbers[name]]
            kept_rows = {row for row in read if row < end}
            assert kept == min(kept_rows, default=end)


@pytest.mark.parametrize("band", [4, 8, 24])
def test_nothing_is_computed_twice_and_everything_once(band: int) -> None:
    plan = plan_of(Skips(), WIDTH, HEIGHT, torch.randn(1, 3, HEIGHT, WIDTH))
    bands = walk(plan, band, notes=True).bands
    for number, one in enumerate(plan.maps[1:], 1):
        computed = [row for rows in bands for row in range(rows[number][0], rows[number][1])]
        assert computed == list(range(one.height))


def test_one_band_is_the_whole_picture_and_more_bands_take_less() -> None:
    plan = plan_of(Skips(), WIDTH, 64 * HEIGHT, torch.randn(1, 3, HEIGHT, WIDTH))
    whole, half, small = (walk(plan, rows, copies=False).peak for rows in (64 * HEIGHT, 32 * HEIGHT, 8))
    assert whole > half > 10 * small
    assert walk(plan, 8).peak == walk(plan_of(Skips(), WIDTH, 128 * HEIGHT), 8).peak


def test_a_mean_takes_a_pass_that_computes_again_or_keeps_what_feeds_it() -> None:
    plan = plan_of(Gated(), WIDTH, HEIGHT, torch.randn(1, 3, HEIGHT, WIDTH))
    (again, work), (kept, once) = (in_passes(plan, 8, keeps) for keeps in (False, True))
    first = plan.maps[made(plan)["first"]]
    assert again.peak < first.height * first.row <= kept.peak
    assert once == pytest.approx(1, rel=0.01) and work > 1.5
    assert PICTURE not in plan.outputs
