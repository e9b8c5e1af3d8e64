"""Non-uniform sampling of the input: the published formulas by brute force, and their invariants (seed 3 and 6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, assert_same, covering, images, slow
from networks import Chain, Classifier, build, made_once, randomise
from random_networks import LATER, random_case
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery import resampling
from cadsurgery.kernels.dispatch import function
from cadsurgery.masks import MaskProvider, keypoints_at, labelled
from cadsurgery.methods.resampling import back
from cadsurgery.methods.resampling.back import invert_warp
from cadsurgery.methods.resampling.locations import upsample
from cadsurgery.resampling import (
    PUBLISHED_SMOOTHNESS,
    boundaries,
    interpolate_back,
    sample,
    target_locations,
    uniform_locations,
)

TYPES = (torch.float32, torch.float64)


def scene(height: int, width: int, seed: int = 0, batch: int = 2) -> Tensor:
    """(batch, height, width) labels: blobs of three classes on a background, some pixels ignored."""
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(
        torch.rand(batch, 4, 5, 6, generator=generator),
        size=(height, width),
        mode="bicubic",
        align_corners=False,
    )
    labels = smooth.argmax(1) + 10
    labels[torch.rand(labels.shape, generator=generator) < 0.02] = 255
    return labels


def locations(batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64, fold: float = 0.0) -> Tensor:
    """Grids near the boundaries of a scene; with `fold` noise that turns some cells over."""
    labels = scene(60, 84, seed, batch)
    found = target_locations(boundaries(labels, (12,)))
    noise = (
        torch.rand(found.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=found.dtype) - 0.5
    )
    return (found + fold * noise).to(dtype)


@pytest.mark.parametrize(("targets", "ignore"), [(None, None), ((11, 13), 255)])
def test_a_boundary_pixel_has_a_neighbour_of_another_label(targets: Any, ignore: int | None) -> None:
    labels = scene(13, 17)
    found = boundaries(labels, targets, ignore)
    for image, marks in zip(labels.tolist(), found.tolist(), strict=True):
        for row, line in enumerate(marks):
            for column, mark in enumerate(line):
                own, around = image[row][column], set()
                for down, across in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                    if 0 <= row + down < 13 and 0 <= column + across < 17:
                        around.add(image[row + down][column + across])
                expected = around - {own} and own != ignore and (targets is None or own in targets)
                assert mark == bool(expected)
    assert torch.equal(boundaries(labels[0], targets, ignore), found[0])


def nearest(boundary: Tensor, grid: int) -> Tensor:
    """Marked pixels nearest to the anchors, the mean of several, by brute force."""
    height, width = boundary.shape
    places = boundary.nonzero().double()
    found = torch.empty(grid, grid, 2, dtype=torch.float64)
    for i in range(grid):
        for j in range(grid):
            anchor = torch.tensor([i * (height - 1) // (grid - 1), j * (width - 1) // (grid - 1)])
            distance = (places - anchor).square().sum(1)
            found[i, j] = places[distance == distance.min()].mean(0)
    return found / torch.tensor([height - 1, width - 1], dtype=torch.float64)


def energy(found: Tensor, wanted: Tensor, smoothness: float) -> Tensor:
    pairs = found.diff(dim=0).square().sum() + found.diff(dim=1).square().sum()
    return (found - wanted).square().sum() + smoothness * pairs


@pytest.mark.parametrize(("smoothness", "grid"), [(0.01, 3), (PUBLISHED_SMOOTHNESS, 8), (100.0, 5)])
def test_the_gradient_of_the_energy_vanishes_on_what_is_free(smoothness: float, grid: int) -> None:
    """The energy is convex: with the sides where they are, these are the locations that minimise it."""
    boundary = boundaries(scene(61, 83)[1])
    found = target_locations(boundary, grid, smoothness).requires_grad_()
    energy(found, nearest(boundary, grid), smoothness).backward()
    assert found.grad is not None
    assert found.grad[1:-1, :, 0].abs().max() < 1e-10 and found.grad[:, 1:-1, 1].abs().max() < 1e-10


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (7, 2)])
def test_images_smaller_than_the_grid_have_locations(size: tuple[int, int]) -> None:
    boundary = torch.zeros(size, dtype=torch.bool)
    boundary[0, -1] = True
    found = target_locations(boundary, 8)
    assert found.isfinite().all() and found.min() >= 0 and found.max() <= 1
    y = interpolate_back(torch.rand(1, 2, 9, 9), found[None], size)
    assert y.shape == (1, 2, *size) and y.isfinite().all()


def test_gradients_go_through_sampling_to_the_image_and_the_locations() -> None:
    image = torch.rand(2, 2, 7, 9, dtype=torch.float64, requires_grad=True)
    places = locations()[:, ::2, ::2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sample(x, places, (5, 6)), (image,))
    assert torch.autograd.gradcheck(lambda x, y: sample(x, y, (5, 6), "bilinear"), (image, places))


def affine(points: Tensor, size: tuple[int, int]) -> Tensor:
    """A function of the place in the image, in -1..2."""
    rows, columns = points[..., 0] / (size[0] - 1), points[..., 1] / (size[1] - 1)
    return 2 * rows - columns + 0.5


def pixels(size: tuple[int, int]) -> Tensor:
    return torch.stack(
        torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij"), -1
    )


def points_of(places: Tensor, samples: tuple[int, int], size: tuple[int, int]) -> Tensor:
    return upsample(places, samples) * torch.tensor([size[0] - 1, size[1] - 1])


@pytest.mark.parametrize(("samples", "dtype"), covering([(24, 24), (5, 6), (90, 110)], TYPES))
def test_what_is_affine_in_the_image_comes_back(dtype: torch.dtype, samples: tuple[int, int]) -> None:
    size, places = (61, 83), locations(dtype=dtype)
    scores = affine(points_of(places, samples, size), size).unsqueeze(1).to(dtype)
    found = interpolate_back(scores, places, size)
    expected = affine(pixels(size), size).expand(2, 1, -1, -1)
    assert (found - expected).abs().max() < (1e-5 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize(("fold", "samples"), [(0.0, (33, 40)), (1.0, (15, 29))])
def test_the_inverse_of_the_warp_is_its_inverse(fold: float, samples: tuple[int, int]) -> None:
    size = (61, 83)
    places = locations(3, fold=fold)
    found = invert_warp(places, samples, size).permute(1, 2, 3, 0)
    points = points_of(places, samples, size).permute(0, 3, 1, 2)
    around = 2 * found.flip(-1) / torch.tensor([samples[1] - 1, samples[0] - 1]) - 1
    there = F.grid_sample(points, around, align_corners=True)
    assert_same(there.permute(0, 2, 3, 1), pixels(size).expand(3, -1, -1, -1), 1e-9)


@pytest.mark.parametrize(
    ("fold", "samples", "size", "dtype"),
    [(0.4, (15, 29), (61, 83), torch.float64), (0.0, (24, 24), (30, 601), torch.float32)],
)
def test_compiled_code_inverts_as_torch_does(
    fold: float,
    samples: tuple[int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = locations(3, fold=fold, dtype=dtype)
    if not function("invert", "float64"):
        pytest.skip("there is no compiler here")
    compiled = invert_warp(places, samples, size).permute(1, 2, 3, 0)
    monkeypatch.setattr(back, "function", lambda *names: None)
    by_torch = invert_warp(places, samples, size).permute(1, 2, 3, 0)
    differs = ((compiled - by_torch).abs() > (2e-3 if dtype == torch.float32 else 1e-8)).any(-1)
    # Next to where a fold ends rounding decides what is found.
    assert differs.double().mean() <= (0.01 if fold else 0)


class Several(Chain):
    """Returns a dictionary of lists, and what is no map."""

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:  # type: ignore[override]
        y = scale * super().forward(x)
        return {"out": y, "more": [y[:, :2, ::2, ::2], y.mean((2, 3))], "note": "text"}


@made_once
def resampled(sampler: object = "uniform", size: Any = 32, model: type[Chain] = Chain, **options: Any) -> Any:
    net = cs.resample(randomise(model()).eval(), sampler, size, **options)
    if isinstance(net.sampler, resampling.LearnedSampler):
        randomise(net.sampler.net)
        nn.init.normal_(net.sampler.net.last.weight, std=0.02)
    return net.eval()


def test_an_untrained_sampler_gives_the_uniform_grid() -> None:
    net = cs.resample(Chain().eval(), "learned", 32)
    randomise(net.sampler.net.features)
    found = net.sampler(images(2, 61, 83))
    assert (found - uniform_locations(8)).abs().max() < 1e-6


@pytest.mark.parametrize(("dtype", "size"), covering(TYPES, [(61, 83), (48, 64)]))
def test_the_uniform_grid_at_the_size_of_the_image_is_the_original(
    dtype: torch.dtype, size: tuple[int, int]
) -> None:
    model, x = randomise(Several()).to(dtype).eval(), images(2, *size, dtype)
    net = cs.resample(model, "uniform", size)
    with torch.no_grad():
        found, expected = net(x, scale=2.0), model(x, scale=2.0)
    assert_same(found["out"], expected["out"], 1e-5)
    assert found["more"][0].shape == (2, 2, *size) and found["note"] == "text"
    assert_same(found["more"][1], expected["more"][1], TOLERANCE[dtype])


def test_the_network_sees_what_is_sampled_and_its_scores_come_back() -> None:
    net, x = resampled("learned", (24, 40)), images(2, 61, 83)
    with torch.no_grad():
        found = net(x)
        places = net.sampler(x)
        expected = interpolate_back(net.network(sample(x, places, (24, 40))), places, (61, 83))
    assert torch.equal(found, expected) and torch.equal(net.locations, places)
    assert (places - uniform_locations(8)).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["learned", "labels", slow("edges")])
def test_an_image_is_the_same_in_any_batch(sampler: str) -> None:
    net, x, labels = resampled(sampler, ignore=None, targets=None), images(2, 61, 83), scene(61, 83)
    with torch.no_grad(), labelled(labels):
        both = net(x)
    for one in range(2):
        with torch.no_grad(), labelled(labels[one : one + 1]):
            assert_same(net(x[one : one + 1]), both[one : one + 1])


class Spot(MaskProvider):
    """Scores one place."""

    image_only = True

    def scores(self, image: Tensor, features: Tensor, grid: Any) -> Tensor:
        scores = image.new_zeros(grid.batch, *grid.size)
        scores[:, grid.size[0] // 4, grid.size[1] // 2] = 1
        return scores


def test_the_places_a_mask_scores_highest_take_the_place_of_boundaries() -> None:
    net, x = resampled(Spot()), images(2, 64, 80)
    expected = torch.zeros(16, 20, dtype=torch.bool)
    expected[4, 10] = True
    assert_same(net.sampler(x)[1], target_locations(expected), 1e-12)
    flat = resampled(lambda image: torch.zeros(image.shape[0], 16, 20, dtype=torch.bool), example_input=x)
    assert torch.equal(flat.sampler(x)[0], uniform_locations(8))


@pytest.mark.slow
def test_the_sampled_image_goes_through_an_adaptive_network() -> None:
    model, x = build("fcn_resnet50", by=8, num_classes=4), images(2, 97, 131)
    adaptive = cs.adaptify(model, "edges", verify_laws=False)
    net = cs.resample(adaptive, "edges", (64, 72))
    with torch.no_grad():
        high, low = (net(x, mask=mask)["out"] for mask in ("all", "none"))
        dense = cs.resample(model, "edges", (64, 72))(x)["out"]
    assert_same(high, dense)
    assert not torch.allclose(low, dense) and high.shape == (2, 4, 97, 131)
    assert net.macs(x).network == adaptive.macs(sample(x, net.sampler(x), (64, 72))).mask


@pytest.mark.parametrize("sampler", [slow("learned"), "edges"])
def test_an_inference_copy_gives_the_same(sampler: str) -> None:
    net, x = resampled(sampler, 48), images(2, 61, 83)
    fast = net.optimize()
    with torch.no_grad():
        assert_same(fast(x), net(x), 1e-3)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert fast.macs(x) == net.macs(x)


@torch.no_grad()
def test_a_network_between_the_finest_and_the_coarsest_level_is_optimised_as_it_is() -> None:
    case = random_case(LATER + 217)
    plan = cs.plan(case.model, example_input=case.given)
    assert plan.identity_level == 1 < plan.max_level
    net = cs.resample(case.model, "uniform", (48, 64), example_input=case.example)
    assert_same(net.optimize()(case.image), net(case.image), 1e-9)


def test_what_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    with pytest.raises(cs.InvalidInput, match="cannot be stored"):
        cs.save(resampled(Spot()), file)
    assert not [*tmp_path.iterdir()]


IMAGE, PLACES, SCORES = (
    torch.rand(2, 3, 9, 11),
    uniform_locations(8).expand(2, -1, -1, -1),
    torch.rand(2, 3, 9, 9),
)


def in_context(context: AbstractContextManager[None], sampler: str = "uniform") -> object:
    with context:
        return resampled(sampler)(IMAGE)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: boundaries(torch.zeros(3)), cs.InvalidInput, "a class for every pixel"),
        (lambda: target_locations(torch.rand(3, 4)), cs.InvalidInput, "bool map"),  # type: ignore[arg-type]
        (lambda: target_locations(torch.ones(3, 4, dtype=torch.bool), 1), cs.InvalidInput, "integer of 2 to"),
        (lambda: sample(IMAGE[0], PLACES, 8), cs.InvalidInput, "give a batch"),
        (lambda: sample(IMAGE, PLACES * math.nan, 8), cs.InvalidInput, "NaN"),
        (lambda: sample(IMAGE, PLACES, (8, 8.5)), cs.InvalidInput, "size="),  # type: ignore[arg-type]
        (lambda: sample(IMAGE, PLACES, 8, "bicubic"), cs.UnknownName, "nearest"),  # type: ignore[arg-type]
        (lambda: sample(IMAGE.long(), PLACES, 8, "bilinear"), cs.InvalidInput, "integers"),
        (lambda: interpolate_back(SCORES.long(), PLACES, 8), cs.InvalidInput, "floating-point scores"),
        (lambda: resampled(share=0.0), cs.InvalidInput, "share"),
        (lambda: resampled("leaned"), cs.UnknownName, "did you mean learned"),
        (lambda: resampled(3), cs.InvalidInput, "is not a sampler"),
        (lambda: resampled(torch.ones(1, 4, 4, dtype=torch.bool)), cs.InvalidInput, "any size"),
        (lambda: resampled("confidence"), cs.InvalidInput, "before the network"),
        (lambda: resampled(model=Classifier), cs.CannotConvert, "returns no map"),
        (lambda: cs.resample(resampled()), cs.InvalidInput, "sampled already"),
        (lambda: resampled()(IMAGE[0]), cs.InvalidInput, "image batch"),
        (lambda: resampled("labels")(IMAGE), cs.InvalidInput, "no labels, which sampler"),
        (
            lambda: in_context(labelled(torch.zeros(2, 5, 5, dtype=torch.int64)), "labels"),
            cs.InvalidInput,
            r"(?s)labels have shape .*give labels of shape \(2, 9, 11\)",
        ),
        (lambda: in_context(keypoints_at([torch.zeros(0, 2)] * 2)), cs.InvalidInput, "keypoints"),
        (lambda: resampled().optimize().train(), cs.InvalidInput, "cannot be trained"),
        (lambda: resampled("learned").train()(IMAGE[:1]), cs.InvalidInput, "one image at a time"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    call: Callable[[], Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        call()
