"""Masks that look at more than the image: detail of the features, confidence of a first pass, a learned estimator.

Each is computed again by hand: pixel by pixel, from the network's output, from the estimator's layers.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, images, slow
from feature_cases import NOTHING, SIZE, converted, grid_of, missed, trunk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cadsurgery as cs
from cadsurgery.masks import ConfidenceMask, DetailMask, FineMapSpec, LearnedMask
from cadsurgery.masks.scored import interpolation_error
from cadsurgery.network.macs import MASK_LAYERS

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
MASKS = (
    *("detail", "confidence:threshold=0.9", "confidence:measure=entropy,threshold=0.95,sigma=0", "learned"),
    *("detail | budget:fraction=0.3", "confidence | budget:fraction=0.3", "learned | budget:fraction=0.3"),
    *("edges + (confidence | budget:fraction=0.2)", "detail:threshold=2/0.5"),
)
# Of each kind one, where a case takes seconds.
FEW = ("confidence:threshold=0.9", "learned | budget:fraction=0.3")
FEW_MASKS = pytest.mark.parametrize("mask", [mask if mask in FEW else slow(mask) for mask in MASKS])
# What compilers make of a mask depends on what it looks at, and on whether it has a budget.
LOOKS = (*FEW, "detail", "edges + (confidence | budget:fraction=0.2)")
COUNTED = (
    "detail",
    "confidence | budget:fraction=0.3",
    "learned",
    "edges + (confidence | budget:fraction=0.2)",
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


class Dictionary(nn.Module):
    """A network whose output is a dictionary, `out` first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trunk()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = self.net(image)
        return OrderedDict(out=found, aux=-found)


def levels_at(scores: Tensor, thresholds: tuple[float, ...], lowest: int) -> Tensor:
    """Level i from threshold i on, the lowest below all."""
    levels = torch.full(scores.shape, lowest)
    for level in reversed(range(len(thresholds))):
        levels[scores >= thresholds[level]] = level
    return levels


@pytest.mark.slow
@FEW_MASKS
@torch.no_grad()
def test_a_batch_is_its_images_and_every_way_to_run_it_agrees(mask: str, tmp_path: Path) -> None:
    """One by one, optimised, copied, pickled, saved; and with the map it found given as a tensor. Compiled as a whole,
    before its first call or after it."""
    net, x = converted(mask, fill="guided"), images(3, *SIZE)
    expected, levels = net(x), net.levels
    assert_same(net(x, mask=net.levels.long()), expected, 1e-5)
    for i in range(3):
        assert_same(net(x[i : i + 1]), expected[i : i + 1], 1e-4)
        assert torch.equal(net.levels, levels[i : i + 1])
    cs.save(net, tmp_path / "net.safetensors")
    loaded = cs.load(tmp_path / "net.safetensors", trunk())
    for way in (net.optimize(), copy.deepcopy(net), pickle.loads(pickle.dumps(net)), loaded):
        assert_same(way(x), expected, 1e-4)
        assert torch.equal(way.levels, levels)
    if mask in LOOKS:
        uncalled = converted(mask, fill="guided")
        fast = torch.compile(uncalled, backend="eager")
        for _ in range(2):
            assert_same(fast(x), uncalled(x), 1e-5)


@pytest.mark.parametrize(
    ("mask", "batch"), covering([mask if mask in COUNTED else slow(mask) for mask in MASKS], [2, 1])
)
@torch.no_grad()
def test_counted_work_is_executed_work(mask: str, batch: int) -> None:
    """Law 7: the network's, the mask's own and the first pass's together are what torch sees being multiplied."""
    net, x = converted(mask), images(batch, *SIZE)
    net(x)
    report = net.macs(x)
    low, own = (
        net.macs(x, mask="none"),
        {entry.layer: entry for entry in report.layers if entry.layer in MASK_LAYERS},
    )
    assert report.of_mask == sum(entry.mask for entry in own.values())
    assert all((entry.high, entry.low) == (0, 0) for entry in own.values())
    plain = net.macs(x, mask=net.levels.long())
    assert report.mask == plain.mask + report.of_mask and plain.of_mask == 0
    assert (report.high, report.low) == (plain.high, plain.low)
    fast = net.optimize().macs(x)
    assert (fast.high, fast.low, fast.of_mask) == (report.high, report.low, report.of_mask)
    if "confidence" in mask:
        in_region = {decision.node for decision in net.plan.decisions if decision.action != "dense"}
        assert own["(first pass)"].mask == sum(e.mask for e in low.layers if e.layer in in_region)
    with FlopCounterMode(display=False) as counter:
        net(x)
    assert counter.get_total_flops() // 2 == report.mask


def test_the_published_estimator_takes_the_published_work() -> None:
    """2.206e10 at 1024 x 2048 with bias and ReLU; its convolutions alone, which are what is counted, 2.2054e10."""
    mask, grid = LearnedMask(), FineMapSpec(1, (128, 256), 8, 1, 2, 2)
    features = torch.empty(1, 512, 128, 256, device="meta")
    mask.logits(torch.zeros(1, 512, 2, 2), FineMapSpec(1, (2, 2), 8, 1, 2, 2))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        mask.to("meta").logits(features, grid)
    macs = counter.get_total_flops() // 2
    convolutions = 9 * (128 * 256 * (512 * 128 + 128 * 64) + 64 * 128 * (64 * 64 + 64 * 2))
    assert macs == convolutions
    positions, pooled = 128 * 256, 64 * 128
    others = 2 * positions * (128 + 64) + positions * 64 + 2 * pooled * 64 + pooled * 2  # bias, ReLU, pooling
    assert macs + others == pytest.approx(2.206e10, rel=1e-3)


@QUICK
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
def test_what_interpolation_misses_is_the_definition(
    batch: int, channels: int, height: int, width: int
) -> None:
    """At any size, a single row or column too; zero at every second sample."""
    features = torch.randn(batch, channels, height, width, dtype=torch.float64)
    found = interpolation_error(features)
    assert torch.allclose(found, missed(features), atol=1e-12)
    assert (found[:, ::2, ::2] == 0).all()


@pytest.mark.parametrize(
    ("size", "thresholds"),
    covering([(17, 25), (1, 30), (30, 1), (1, 1), (16, 8)], [(1.5,), (2.0, 0.7), (0.0,)]),
)
def test_detail_is_levels_of_the_relative_error(size: tuple[int, int], thresholds: tuple[float, ...]) -> None:
    features, grid = torch.randn(2, 3, *size, dtype=torch.float64), grid_of(size)
    error = missed(features)
    relative = error / error.mean((1, 2), keepdim=True).clamp(min=1e-300)
    found = DetailMask(thresholds, sigma=0)(NOTHING, features, grid)
    assert torch.equal(found.long(), levels_at(relative, thresholds, 2))
    scaled = DetailMask(thresholds, sigma=0)(NOTHING, 32 * features, grid)
    assert torch.equal(scaled, found), "the threshold is relative"


def test_detail_is_smoothed_and_a_flat_map_has_none() -> None:
    features, grid = torch.zeros(1, 2, 21, 33), grid_of((21, 33), 1)
    assert (DetailMask()(NOTHING, features, grid) == 2).all()
    features[:, :, 9, 15] = 1  # no second sample: all of it is missed
    sharp, smooth = (DetailMask(sigma=sigma).scores(NOTHING, features, grid) for sigma in (0.0, 2.0))
    assert sharp.argmax() == smooth.argmax() == 9 * 33 + 15
    assert sharp.max() > 10 * smooth.max() and (sharp > 0).sum() < (smooth > 0).sum()
    assert torch.allclose(sharp.mean(), torch.tensor(1.0)), "relative to the mean over the image"


def doubt(logits: Tensor, measure: str) -> Tensor:
    """(B, H, W) of class scores, by hand."""
    shares = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    if measure == "entropy":
        return -(shares * shares.log()).sum(1) / math.log(logits.shape[1])
    ordered = shares.sort(dim=1).values
    return 1 - (ordered[:, -1] - ordered[:, -2])


@pytest.mark.parametrize("measure", ["margin", "entropy"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["tensor", "dictionary"])
@torch.no_grad()
def test_confidence_is_that_of_the_network_with_everything_low(measure: str, wrapped: bool) -> None:
    net, x = converted(model=Dictionary() if wrapped else trunk()), 3 * images(2, *SIZE)
    low = net(x, mask="none")
    expected = doubt(low["out"] if wrapped else low, measure)
    size = net.levels.shape[1:]
    expected = F.interpolate(expected[:, None], size=size, mode="bilinear", antialias=True)[:, 0]
    thresholds = (expected.quantile(0.7).item(), expected.quantile(0.3).item())
    net(x, mask=ConfidenceMask(thresholds, measure, sigma=0))
    found = levels_at(expected, thresholds, 2)
    assert torch.equal(net.levels, net.geometry.lattice(found).levels)
    assert len(net.levels.unique()) == 3


@pytest.mark.parametrize("low", [1, 2])
@pytest.mark.parametrize("size", [(13, 18), (16, 8), (1, 5)])
def test_one_score_per_level_and_cell(low: int, size: tuple[int, int]) -> None:
    """Of the estimator's layers, pooled to the cells of the lowest level; the best is taken on each cell's samples."""
    mask, grid, features = LearnedMask(), grid_of(size, low=low), torch.randn(2, 7, *size)
    logits = mask.logits(features, grid)
    side = 2**low
    cells = (-(-size[0] // side), -(-size[1] // side))
    assert logits.shape == (2, low + 1, *cells)
    first, second, third, last = (layer for layer in mask.estimator if isinstance(layer, nn.Conv2d))
    hidden = F.max_pool2d(F.relu(second(F.relu(first(features)))), side, ceil_mode=True)
    assert torch.allclose(logits, last(F.relu(third(hidden))), atol=1e-6)
    levels = mask(NOTHING, features, grid)
    for y in range(size[0]):
        for x in range(size[1]):
            assert torch.equal(levels[:, y, x], logits[:, :, y // side, x // side].argmax(1))
    assert torch.equal(levels, mask(NOTHING, features, grid)), "without noise it is the same every time"
    scores = mask.scores(NOTHING, features, grid)
    expected = torch.einsum("blhw,l->bhw", logits.softmax(1), torch.arange(low, -1, -1).float())
    assert scores.shape == (2, *size) and torch.allclose(scores[:, ::side, ::side], expected, atol=1e-6)


def test_noise_is_drawn_from_torchs_generator() -> None:
    mask, grid, features = LearnedMask(noise=True), grid_of((32, 40)), torch.randn(2, 6, 32, 40)
    mask(NOTHING, features, grid)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(mask(NOTHING, features, grid))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    generator = torch.Generator()
    logits = mask.logits(features, grid)
    samples = [mask.sample(logits, grid, generator.manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


@pytest.mark.parametrize("low", [1, 2])
def test_the_share_kept_is_that_of_a_two_level_map_with_as_many_elements(low: int) -> None:
    mask, grid = LearnedMask(), grid_of((32, 48), low=low)
    logits = torch.randn(
        2, low + 1, 32 // grid.side, 48 // grid.side, dtype=torch.float64, requires_grad=True
    )
    kept = mask.kept(logits, grid)
    levels = logits.argmax(1)
    if low == 1:
        assert kept.item() == pytest.approx((levels == 0).double().mean().item())
    elements = (4.0 ** -levels.double()).mean().item()  # per sample of the fine map
    assert kept.item() + (1 - kept.item()) / grid.side**2 == pytest.approx(elements)
    kept.backward()
    assert logits.grad is not None and logits.grad[:, 0].max() > 0 and logits.grad[:, -1].max() <= 0
    noisy = [mask.kept(logits, grid, torch.Generator().manual_seed(seed)).item() for seed in (0, 0, 1)]
    assert noisy[0] == noisy[1] != noisy[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mask",
    [
        "learned:fraction=0.3,channels=8/6/4",
        "edges + learned:seed=3 | budget:fraction=0.4",
    ],
)
def test_what_it_has_learned_is_stored_beside_the_network(
    mask: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    net, x = converted(mask), images(2, *SIZE).to(dtype)
    net(images(1, *SIZE))
    net.to(dtype)
    with torch.no_grad():
        for parameter in net.mask.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        expected = net(x)
    assert not any("mask" in name or "estimator" in name for name in net.state_dict())
    assert net.state_dict().keys() == trunk().state_dict().keys()
    cs.save(net, tmp_path / "net.safetensors")
    back = cs.load(tmp_path / "net.safetensors", trunk())
    assert back.mask.spec() == net.mask.spec()
    for (name, one), other in zip(net.mask.named_parameters(), back.mask.parameters(), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype == dtype, name
    with torch.no_grad():
        assert torch.equal(back(x), expected) and torch.equal(back.levels, net.levels)


def test_tensors_of_a_mask_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    net = converted("learned:channels=8/6/4")
    net(images(1, *SIZE))
    mask = net.mask
    assert isinstance(mask, LearnedMask)
    del mask.estimator[7].bias
    mask.estimator[7].register_buffer("offset", torch.zeros(3))
    cs.save(net, tmp_path / "net.safetensors")
    with pytest.raises(cs.FileError, match="do not fit") as refused:
        cs.load(tmp_path / "net.safetensors", trunk())
    assert "offset" in str(refused.value) and 'mask="edges"' in str(refused.value)
