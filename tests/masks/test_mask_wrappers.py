"""Masks made from masks: dilate, threshold, union, smooth, budgets of several levels, and how they are written."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import covering
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import adapted_strided as net
from networks import strided
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.elements.lattice import Geometry
from cadsurgery.masks import (
    Budget,
    Dilate,
    EdgeMask,
    FineMapSpec,
    FunctionMask,
    GradientMask,
    KeypointMask,
    MaskProvider,
    RandomMask,
    Smooth,
    Threshold,
    TrimapMask,
    Union,
    labelled,
    resolve_mask,
)

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
MAPS = [(16, 24), (13, 17), (1, 1), (3, 29)]
NOTHING = torch.empty(0)


class Given(MaskProvider):
    """Given levels or scores; the next of several at each call."""

    def __init__(self, *maps: Tensor) -> None:
        super().__init__()
        self.maps = list(maps)

    def next(self) -> Tensor:
        return self.maps.pop(0) if len(self.maps) > 1 else self.maps[0]

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        return self.next()

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        found = self.next()
        return found if found.is_floating_point() else (grid.max_level - found).float()


def grid_of(size: tuple[int, int], batch: int = 2) -> FineMapSpec:
    return FineMapSpec(batch, size, 8, 2, 4, 4)


def levels(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randint(0, 3, (batch, *size))


def in_window(values: Tensor, side: int, best: Callable[[Tensor], Tensor]) -> Tensor:
    """`best` of the side x side window around each sample, one by one."""
    found, half = values.clone(), side // 2
    for image, source in zip(found, values, strict=True):
        for y in range(values.shape[1]):
            for x in range(values.shape[2]):
                image[y, x] = best(source[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1])
    return found


@pytest.mark.parametrize(("size", "side", "dtype"), covering(MAPS, [1, 3, 7], DTYPES))
def test_dilate_gives_each_sample_the_finest_level_and_the_highest_score_of_its_window(
    size: tuple[int, int], side: int, dtype: torch.dtype
) -> None:
    given = torch.where(torch.rand(2, *size) < 0.9, 2, levels(size))
    found = Dilate(Given(given), side)(NOTHING, NOTHING, grid_of(size))
    assert torch.equal(found.long(), in_window(given, side, torch.amin))
    scores = torch.randn(2, *size).to(dtype)
    highest = Dilate(Given(scores), side).scores(NOTHING, NOTHING, grid_of(size))
    assert highest.dtype == dtype and torch.equal(highest, in_window(scores, side, torch.amax))


@pytest.mark.parametrize(("at", "dtype"), covering([(0.3,), (0.8, 0.2), (1.0, -1.0)], DTYPES))
def test_threshold_cuts_scores_into_levels(at: tuple[float, ...], dtype: torch.dtype) -> None:
    scores, grid = torch.randn(2, 13, 17).to(dtype), grid_of((13, 17))
    mask = Threshold(Given(scores), at)
    wanted = torch.full((2, 13, 17), 2)
    for level in reversed(range(len(at))):
        wanted[scores >= at[level]] = level
    assert torch.equal(mask(NOTHING, NOTHING, grid).long(), wanted)
    assert torch.equal(mask.scores(NOTHING, NOTHING, grid), scores)


@QUICK
@given(seed=st.integers(0, 99), count=st.integers(2, 4))
def test_a_union_is_the_finest_level_of_its_masks(seed: int, count: int) -> None:
    torch.manual_seed(seed)
    given, grid = [levels((13, 17)) for _ in range(count)], grid_of((13, 17))
    found = Union(*map(Given, given))(NOTHING, NOTHING, grid)
    assert torch.equal(found, torch.stack(given).amin(0))
    assert torch.equal(found, Union(*map(Given, reversed(given)))(NOTHING, NOTHING, grid))
    assert torch.equal(given[0], Union(*map(Given, [given[0]] * 2))(NOTHING, NOTHING, grid))


@QUICK
@given(seed=st.integers(0, 99))
def test_the_scores_of_a_union_follow_its_levels_and_then_the_rank_in_either_mask(seed: int) -> None:
    torch.manual_seed(seed)
    scores = [torch.randn(2, 13, 17), 1000 * torch.rand(2, 13, 17).bfloat16()]
    masks = [Threshold(Given(one), (float(one.float().quantile(0.8)),)) for one in scores]
    union, grid = Union(*masks), grid_of((13, 17))
    found, kept = union.scores(NOTHING, NOTHING, grid), union(NOTHING, NOTHING, grid)
    assert found[kept == 0].min() > found[kept == 2].max()
    for image in range(2):
        rank = [
            torch.tensor([(one[image] < value).sum() for value in one[image].flatten()]) for one in scores
        ]
        wanted = torch.maximum(*rank) / (13 * 17) + (2 - kept[image]).flatten()
        assert torch.allclose(found[image].flatten().float(), wanted, atol=1e-6)


@QUICK
@given(seed=st.integers(0, 99), hold=st.integers(0, 4))
def test_smooth_never_drops_a_sample_before_hold_frames_and_then_does(seed: int, hold: int) -> None:
    torch.manual_seed(seed)
    frames, grid = [levels((5, 6)) for _ in range(8)], grid_of((5, 6))
    mask, ranked = Smooth(Given(*frames), hold), Smooth(Given(*frames), hold)
    for time in range(len(frames)):
        found = mask(NOTHING, NOTHING, grid)
        window = torch.stack(frames[max(0, time - hold) : time + 1])
        assert (found <= window).all()
        assert (found == window).any(0).all()
        assert torch.equal(ranked.scores(NOTHING, NOTHING, grid), (2 - window).float().amax(0))


def fading(frames: int = 4) -> tuple[Smooth, list[Tensor]]:
    """A network's mask that holds, and frames whose edges vanish after the first."""
    return Smooth("edges:dilation=3", hold=2), [
        torch.randn(2, 3, 97, 129),
        *[torch.zeros(2, 3, 97, 129)] * frames,
    ]


@pytest.mark.parametrize("how", ["reset", "batch", "size", "copy", "pickle"])
def test_smooth_starts_anew_for_another_video(how: str) -> None:
    mask, frames = fading()
    model = net(mask)
    model(frames[0])
    if how == "reset":
        mask.reset()
    if how in ("copy", "pickle"):
        model = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    model({"batch": frames[1][:1], "size": frames[1][:, :, :64]}.get(how, frames[1]))
    assert model.active_fraction == 0


@pytest.mark.parametrize("optimised", [False, True])
def test_each_thread_is_a_video(optimised: bool) -> None:
    """Two cameras with a thread each, whose frames take turns: one shows edges at first, the other never."""
    mask, frames = fading()
    model = net(mask).optimize() if optimised else net(mask)
    kept: dict[str, list[bool]] = {"first": [], "other": []}
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as other:
        for frame in frames:
            for name, camera, shown in (("first", first, frame), ("other", other, frames[-1])):

                def call(shown: Tensor = shown) -> bool:
                    model(shown)
                    return model.active_fraction > 0

                kept[name].append(camera.submit(call).result())
    assert kept == {"first": [True, True, True, False, False], "other": [False] * 5}


@pytest.mark.parametrize(
    ("size", "fractions", "per_batch"),
    covering(MAPS, [(0.1, 0.3), (0.0, 0.5), (0.25, 0.25), (0.34, 1.0), (1.0, 1.0)], [False, True]),
)
def test_a_budget_of_fractions_keeps_nested_shares(
    size: tuple[int, int], fractions: tuple[float, float], per_batch: bool
) -> None:
    scores, grid = torch.randn(2, *size), grid_of(size)
    found = Budget(Given(scores), fractions, per_batch)(NOTHING, NOTHING, grid)
    legal = Geometry((2, 2)).lattice(found.long()).levels
    assert torch.equal(legal, found)
    for level, fraction in enumerate(fractions):
        alone = Budget(Given(scores), fraction, per_batch)(NOTHING, NOTHING, grid)
        assert torch.equal(found <= level, alone == 0)
    counts = tuple(int((found[:, ::4, ::4] <= level).sum()) for level in range(2))
    assert counts == Budget("random", fractions, per_batch).kept_patches(grid)


TEXTS = [
    *(
        "gradient:threshold=2/1,dilation=3/9,sigma=0.8",
        "trimap:width=3/15",
        "keypoints:dilations=9/17",
    ),
    "edges | budget:fraction=0.3",
    "edges | dilate:size=5",
    "edges:dilation=3 | threshold:at=2/1",
    "edges:threshold=2 + gradient:threshold=3,sigma=1",
    "edges:threshold=2,dilation=3 | smooth:hold=2",
    "edges + random:seed=1 | dilate | budget:fraction=0.1/0.3",
]


@pytest.mark.parametrize(("text", "dtype"), covering(TEXTS, DTYPES))
def test_a_batch_equals_its_images_one_by_one(text: str, dtype: torch.dtype) -> None:
    """A dull image among them too: each is looked at by itself."""
    image, labels = torch.randn(3, 3, 65, 97).to(dtype), torch.randint(0, 2, (3, 13, 97))
    image[1], labels = image[1] / 100 + 3, labels.repeat_interleave(5, 1)
    text = text.replace(
        "random:seed=1", "gradient:threshold=4"
    )  # random masks draw another map for each image of a batch
    with labelled(labels):
        together = resolve_mask(text)(image, image, grid_of((9, 13), 3))
    for position in range(3):
        one = image[position : position + 1]
        with labelled(labels[position : position + 1]):
            alone = resolve_mask(text)(one, one, grid_of((9, 13), 1))
        assert torch.equal(alone[0], together[position])


@pytest.mark.parametrize(("text", "size"), covering(TEXTS, [(96, 128), (97, 129)]))
def test_a_budget_behind_any_wrapper_keeps_its_share(text: str, size: tuple[int, int]) -> None:
    model = net(f"{text} | budget:fraction=0.25")
    with labelled(torch.randint(0, 2, (2, *size))):
        model(torch.randn(2, 3, *size))
    kept = (model.levels[:, ::4, ::4] == 0).flatten(1).sum(1)
    assert kept.tolist() == [round(0.25 * (model.levels[0, ::4, ::4].numel()))] * 2


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("edges + gradient", ("union", "edges", "gradient")),
        ("edges+gradient:sigma=1e+1", ("union", "edges", "gradient")),
        ("edges + gradient | budget", ("budget", ("union", "edges", "gradient"))),
        ("edges + (gradient | budget)", ("union", "edges", ("budget", "gradient"))),
        ("(edges|dilate)+gradient|budget", ("budget", ("union", ("dilate", "edges"), "gradient"))),
        ("edges + (random + all)", ("union", "edges", ("union", "random", "all"))),
        ("edges + random + all", ("union", "edges", "random", "all")),
        ("((edges))", "edges"),
        ("(edges | smooth) | dilate", ("dilate", ("smooth", "edges"))),
    ],
)
def test_the_plus_binds_tighter_than_the_pipe_and_parentheses_tighter_still(text: str, shape: object) -> None:
    def shape_of(mask: MaskProvider) -> object:
        return (mask.name, *map(shape_of, mask.parts)) if mask.parts else mask.name

    mask = resolve_mask(text)
    assert shape_of(mask) == shape
    again = resolve_mask(mask.spec())
    assert shape_of(again) == shape and again.spec() == mask.spec()


NUMBERS = st.floats(-1e20, 1e20, allow_nan=False)
ODD = st.integers(0, 30).map(lambda half: 2 * half + 1)
LEAVES = st.one_of(
    st.builds(EdgeMask, st.lists(NUMBERS, min_size=1, max_size=3).map(tuple), ODD),
    st.builds(GradientMask, NUMBERS, ODD, st.floats(0, 1000)),
    st.builds(TrimapMask, st.lists(ODD, min_size=1, max_size=3).map(tuple), st.integers(-1, 300)),
    st.builds(RandomMask, st.floats(0, 1), st.integers(1, 9), st.integers(-1, 2**31)),
    st.builds(
        KeypointMask,
        st.sampled_from(["sift", "given", "own"]),
        st.integers(1, 10**6),
        st.lists(st.one_of(ODD, st.sampled_from([0, math.inf])), min_size=1, max_size=4),
    ),
    st.sampled_from(
        [
            *("all", "none", "content", "preview", "detail:threshold=2/0.5"),
            *("confidence:measure=entropy,threshold=0.95,sigma=0", "learned:channels=8/6/4,seed=4"),
        ]
    ).map(resolve_mask),
)
FALLING = st.lists(NUMBERS, min_size=1, max_size=3, unique=True).map(lambda v: tuple(sorted(v, reverse=True)))
SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=3).map(lambda v: tuple(sorted(v)))
MASKS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(Dilate, inner, ODD),
        st.builds(Threshold, inner, FALLING),
        st.builds(Smooth, inner, st.integers(0, 9)),
        st.builds(Budget, inner, SHARES, st.booleans()),
        st.lists(inner, min_size=2, max_size=3).map(lambda masks: Union(*masks)),
    ),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(mask=MASKS)
def test_a_spec_reads_back_as_the_same_mask(mask: MaskProvider) -> None:
    def same(one: MaskProvider, other: MaskProvider) -> bool:
        alike = type(one) is type(other) and one.options() == other.options()
        return alike and all(same(*pair) for pair in zip(one.parts, other.parts, strict=True))

    again = resolve_mask(mask.spec())
    assert same(again, mask) and again.spec() == mask.spec()
    assert mask.storable


def bright(image: Tensor) -> Tensor:
    return image[:, 0, ::8, ::8]


@pytest.mark.parametrize(
    "mask",
    [
        Union("edges", lambda image: bright(image) > 0),
        Budget(FunctionMask(bright)),
        Threshold(FunctionMask(nn.Conv2d(3, 1, 1))),
        KeypointMask(bright),
    ],
)
def test_a_function_is_not_stored_and_load_asks_for_a_mask(mask: MaskProvider, tmp_path: Path) -> None:
    assert not mask.storable
    cs.save(net(mask), tmp_path / "net.safetensors")
    with pytest.raises(cs.FileError, match="function or provider of your own"):
        cs.load(tmp_path / "net.safetensors", strided())
