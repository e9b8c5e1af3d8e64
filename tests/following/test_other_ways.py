"""Calls that take another way through a network than the one it was converted on: the same answer from every copy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images, random_levels, some
from networks import conv_norm, randomise, unverified
from torch import Tensor, nn

import cadsurgery as cs

EXACT, COARSE = 1e-4, 5e-2
pytestmark = pytest.mark.filterwarnings("ignore:no mask can improve")


block = partial(conv_norm, stride=2)


class CropLike(nn.Module):
    """Crops what a transposed convolution gives to the size of a skip, if it is another, and squashes large images."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(3, 8), block(8, 8), block(8, 8)])
        self.up, self.head = nn.ConvTranspose2d(8, 8, 4, 2, 1), conv_norm(16, 8)

    def crop_like(self, input: Tensor, target: Tensor) -> Tensor:
        if input.size() == target.size():
            return input
        return 2 * input[:, :, : target.size(2), : target.size(3)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.down[0](x)
        skip = self.down[1](x)
        x = self.down[2](skip)
        return self.head(torch.cat([self.crop_like(self.up(x), skip), skip], 1))


def converted() -> tuple[nn.Module, cs.AdaptiveModel]:
    model = randomise(CropLike()).eval()
    return model, unverified(model, "none", outputs="native", example_input=images(1, 64, 96))


EVEN, ODD = (64, 96), (69, 84)


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [True, False])
@torch.no_grad()
def test_an_optimised_copy_follows_what_the_network_follows(fuse: bool) -> None:
    """Copies, pickles and other masks of it too; its weights are those of the moment it was made."""
    model, net = converted()
    fast = net.optimize(fuse)
    calls = [images(2, *size) for size in (EVEN, ODD)]
    expected = [model(x) for x in calls]
    net.down[2][0].weight.mul_(2)
    for one in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        for x, output in 2 * list(zip(calls, expected, strict=True)):
            assert_same(one(x), output, EXACT)
        assert len(one._paths) == 1
    net.down[2][0].weight.div_(2)
    x = images(2, *ODD)
    net(x)
    levels = random_levels(2, tuple(net.levels.shape[1:]), net.plan.stage_strides)
    assert_same(fast(x, mask=levels), net(x, mask=levels), EXACT)
    assert torch.equal(fast.levels, net.levels)


@torch.no_grad()
def test_many_threads_make_a_way_once() -> None:
    model, net = converted()
    fast, x = net.optimize(), images(1, *ODD)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fast(x), range(8)))
    assert len(fast._paths) == 1
    for one in found:
        assert_same(one, model(x), EXACT)


def native(model: nn.Module, dtype: torch.dtype = torch.float32) -> cs.AdaptiveModel:
    return cs.adaptify(model, "none", outputs="native", example_input=images(1, *EVEN, dtype))


BFLOAT16: dict[str, Callable[[nn.Module], nn.Module]] = {
    "converted in it": lambda model: native(model.bfloat16(), torch.bfloat16).optimize(),
    "moved before": lambda model: native(model).bfloat16().optimize(),
    "moved after": lambda model: native(model).optimize().to(torch.bfloat16),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", some(BFLOAT16, every=3))
@torch.no_grad()
def test_copies_in_bfloat16_follow_it_too(how: str) -> None:
    model = randomise(CropLike()).eval()
    fast = BFLOAT16[how](copy.deepcopy(model))
    for size in (EVEN, ODD):
        x = images(2, *size).bfloat16()
        assert fast(x).dtype == torch.bfloat16
        assert_same(fast(x).float(), model(x.float()), COARSE)


@pytest.mark.slow
@torch.no_grad()
def test_work_is_counted_on_the_way_that_is_taken() -> None:
    """As a network counts it that was converted there with the same strides; by the copy as by the network."""
    model, net = converted()
    x = images(2, *ODD)
    strides = net.plan.output_stride
    there = unverified(model, "none", output_stride=strides, outputs="native", example_input=x[:1])
    for one in (net, net.optimize()):
        ours, theirs = one.macs(x, mask="edges"), there.macs(x, mask="edges")
        assert (ours.mask, ours.high, ours.low) == (theirs.mask, theirs.high, theirs.low)


@torch.no_grad()
def test_loaded_weights_leave_one_way() -> None:
    """They are folded: no other way can be made of them, and none of those there were."""
    _, net = converted()
    fast, x = net.optimize(), images(1, *ODD)
    fast(x)
    fast.load_state_dict(fast.state_dict())
    with pytest.raises(cs.InvalidInput, match="another path"):
        fast(x)
    fast(images(1, *EVEN))


def by_one_side(x: Tensor, bins: int) -> Tensor:
    """All of the map where it is a square, and else not."""
    return F.avg_pool2d(x, int(x.size(2) / bins), int(x.size(2) / bins))


def by_bins(x: Tensor, bins: int) -> Tensor:
    return F.adaptive_avg_pool2d(x, (x.size(2) // bins, x.size(3) // bins))


def by_windows_that_fit(x: Tensor, bins: int) -> Tensor:
    """Strided windows of its own where they fit: output strides that no other size has."""
    fits = x.size(2) % bins == 0 and x.size(3) % bins == 0
    return F.avg_pool2d(x, bins) if fits else by_bins(x, bins)


class Pyramid(nn.Module):
    def __init__(self, pool: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 6), block(6, 6), block(6, 8))
        self.branches = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(2))
        self.pool, self.head = pool, nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        size, x = x.shape[2:], self.body(x)
        maps = [x]
        for bins, branch in zip((1, 3), self.branches, strict=True):
            maps.append(F.interpolate(branch(self.pool(x, bins)), size=x.shape[2:], mode="bilinear"))
        return F.interpolate(self.head(torch.cat(maps, 1)), size=size, mode="bilinear")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pool", "example"),
    [
        (by_one_side, (96, 96)),
        (by_one_side, (97, 97)),
        (by_bins, (96, 96)),
        (by_windows_that_fit, (96, 96)),
        (by_windows_that_fit, (97, 97)),
    ],
)
@torch.no_grad()
def test_a_pyramid_runs_at_sizes_other_than_that_of_its_conversion(
    pool: Callable[..., Tensor], example: tuple[int, int]
) -> None:
    """From a square, and from a size of which no window fits; at both, and at others."""
    model = randomise(Pyramid(pool)).eval()
    net = unverified(model, "none", outputs="native", example_input=images(1, *example))
    for size in ((96, 96), (97, 97), (90, 131)):
        x = images(2, *size)
        assert_same(net(x), model(x), EXACT)
    assert_same(net.optimize()(x), model(x), EXACT)
