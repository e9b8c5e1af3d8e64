"""Masks of one's own kind: gradients, trimaps of labels, functions of the user; and what the grid says.

Each is written down again with loops or convolutions over every pixel.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import covering
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import strided
from torch import Tensor

import cadsurgery as cs
from cadsurgery.masks import (
    FineMapSpec,
    FunctionMask,
    GradientMask,
    MaskProvider,
    TrimapMask,
    labelled,
    resolve_mask,
)
from cadsurgery.masks.provider import PROVIDERS

QUICK = settings(max_examples=20, deadline=None, derandomize=True)


def grid_of(size: tuple[int, int], batch: int = 2, stride: int = 8, low: int = 2) -> FineMapSpec:
    """The grid of an image size whose stages halve `low` times."""
    fine = (-(-size[0] // stride), -(-size[1] // stride))
    return FineMapSpec(batch, fine, stride, low, 2**low, 2**low)


def blocks(size: tuple[int, int], batch: int = 2, classes: int = 3, seed: int = 0) -> Tensor:
    """Labels (B, H, W) of random rectangles."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(batch, *size, dtype=torch.long)
    for image in labels:
        for value in (*range(1, classes), 255):
            y, x = (int(torch.randint(0, side, (), generator=generator)) for side in size)
            image[y : y + size[0] // 3, x : x + size[1] // 4] = value
    return labels


def levels_near(found: list[Tensor], sides: list[int], grid: FineMapSpec) -> Tensor:
    """Level i where the i-th side x side window around the sample's pixel holds a True of the i-th map (B, H, W)."""
    levels = torch.full((grid.batch, *grid.size), grid.max_level)
    for level in reversed(range(len(sides))):
        half = sides[level] // 2
        for image, chosen in zip(levels, found[level], strict=True):
            for y in range(grid.size[0]):
                for x in range(grid.size[1]):
                    py, px = y * grid.output_stride, x * grid.output_stride
                    window = chosen[max(0, py - half) : py + half + 1, max(0, px - half) : px + half + 1]
                    if bool(window.any()):
                        image[y, x] = min(level, grid.max_level)
    return levels


@pytest.mark.parametrize(
    ("strides", "patch", "side", "size"),
    [
        ((8, 32), 4, 4, (13, 17)),
        ((8, 16), 4, 2, (13, 17)),
        ((4, 16), 8, 4, (25, 33)),
        ((16, 32), 2, 2, (7, 9)),
    ],
)
def test_a_provider_sees_the_entering_features_and_the_cells_of_the_lowest_level_and_of_all_stages(
    strides: tuple[int, int], patch: int, side: int, size: tuple[int, int]
) -> None:
    seen: list[FineMapSpec] = []

    class Seeing(MaskProvider):
        def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
            assert image.shape == (2, 3, 97, 129) and features.shape == (2, 4, *size)
            seen.append(grid)
            return torch.full((grid.batch, *grid.size), grid.max_level)

    model = cs.adaptify(strided(), Seeing(), output_stride=strides, verify_laws=False)
    model(torch.randn(2, 3, 97, 129))
    levels = {4: 2, 2: 1}[side]
    assert seen == [FineMapSpec(2, size, strides[0], max_level=levels, patch=patch, side=side)]
    assert (model.lattice.side_map == side).all()


def slope(image: Tensor) -> Tensor:
    """(B, H, W) float64: length of the central differences, each pixel and axis by itself."""
    grey = image.double()[:, 0] * 0.299 + image.double()[:, 1] * 0.587 + image.double()[:, 2] * 0.114
    height, width = grey.shape[1:]
    found = torch.zeros_like(grey)
    for y in range(height):
        for x in range(width):
            across = grey[:, y, min(x + 1, width - 1)] - grey[:, y, max(x - 1, 0)]
            along = grey[:, min(y + 1, height - 1), x] - grey[:, max(y - 1, 0), x]
            found[:, y, x] = (across**2 + along**2).sqrt()
    return found


@pytest.mark.parametrize("size", [(33, 50), (40, 31)])
def test_the_gradient_is_the_length_of_the_central_differences(size: tuple[int, int]) -> None:
    image, grid = torch.randn(2, 3, *size, dtype=torch.float64), grid_of(size)
    strength = slope(image)
    assert torch.allclose(GradientMask().strength(image), strength, atol=1e-12)
    found = GradientMask((2.5, 2.2), (3, 3))(image, image, grid)
    wanted = levels_near([strength >= 2.5, strength >= 2.2], [3, 3], grid)
    assert torch.equal(found.long(), wanted) and len(wanted.unique()) == 3


@pytest.mark.parametrize("sigma", [0.5, 2.0, 30.0])
def test_smoothing_keeps_slopes_and_weakens_noise(sigma: float) -> None:
    """A ramp has the same slope after any symmetric filter; noise has less."""
    ramp = torch.arange(401, dtype=torch.float64).expand(1, 3, 5, 401)
    middle = GradientMask(sigma=sigma).strength(ramp)[..., 200]
    assert torch.allclose(middle, GradientMask().strength(ramp)[..., 200])
    noise = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    assert GradientMask(sigma=sigma).strength(noise).mean() < GradientMask().strength(noise).mean()


@pytest.mark.parametrize(
    ("text", "size", "dtype"),
    covering(
        ["gradient:sigma=1", "edges", "gradient:threshold=2,dilation=1"],
        [(65, 97), (9, 70)],
        [torch.float32, torch.float64, torch.bfloat16],
    ),
)
def test_scores_reach_the_threshold_where_the_level_is_zero(
    text: str, size: tuple[int, int], dtype: torch.dtype
) -> None:
    image, grid, mask = torch.randn(2, 3, *size).to(dtype), grid_of(size), resolve_mask(text)
    scores = mask.scores(image, image, grid)
    assert scores.dtype == dtype and scores.shape == (2, *grid.size)
    assert torch.equal(scores >= mask.threshold[0], mask(image, image, grid) == 0)


def on_boundary(labels: Tensor, ignore: int) -> Tensor:
    """Bool (B, H, W): another label among the four neighbours, pixel by pixel."""
    found = torch.zeros_like(labels, dtype=torch.bool)
    batch, height, width = labels.shape
    for image in range(batch):
        for y in range(height):
            for x in range(width):
                for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        pair = (int(labels[image, y, x]), int(labels[image, y + dy, x + dx]))
                        found[image, y, x] |= pair[0] != pair[1] and ignore not in pair
    return found


@pytest.mark.parametrize(
    ("widths", "size", "ignore"), covering([[9], [3, 17], [1, 33]], [(33, 50), (40, 31)], [255, 1])
)
def test_a_trimap_keeps_what_has_a_boundary_within_its_window(
    size: tuple[int, int], widths: list[int], ignore: int
) -> None:
    labels, grid, image = blocks(size), grid_of(size), torch.zeros(2, 3, *size)
    with labelled(labels):
        found = TrimapMask(tuple(widths), ignore)(image, image, grid)
    boundary = on_boundary(labels, ignore)
    assert torch.equal(found.long(), levels_near([boundary] * len(widths), widths, grid))


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_the_scores_of_a_trimap_are_minus_the_distance_in_samples(stride: int) -> None:
    size = (33, 50)
    labels, grid, image = blocks(size), grid_of(size, stride=stride), torch.zeros(2, 3, *size)
    labels[1] = 4  # an image without a boundary
    with labelled(labels):
        scores = TrimapMask().scores(image, image, grid)
    wanted = torch.full_like(scores, -max(grid.size))
    places = on_boundary(labels, 255)[0].nonzero()
    for y in range(grid.size[0]):
        for x in range(grid.size[1]):
            apart = (places - torch.tensor([y * stride, x * stride])).abs().amax(1).min()
            wanted[0, y, x] = -(int(apart) // stride)
    assert torch.equal(scores, wanted)


@QUICK
@given(size=st.tuples(st.integers(1, 90), st.integers(1, 90)), value=st.floats(-5, 5, width=32))
def test_scores_of_any_size_are_resized_to_the_fine_map(size: tuple[int, int], value: float) -> None:
    grid, image = grid_of((65, 97)), torch.zeros(2, 3, 65, 97)
    scores = FunctionMask(lambda image: torch.full((2, *size), value)).scores(image, image, grid)
    assert scores.shape == (2, *grid.size)
    assert torch.allclose(scores, torch.full_like(scores, value), atol=1e-5)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of a user."""
    module = ModuleType("usermasks")
    module.bright = lambda image: image.mean(1)  # type: ignore[attr-defined]
    module.left = lambda image: torch.ones(1, 12, 16).cumsum(2) < 6  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "usermasks", module)
    return module


def test_a_function_that_can_be_imported_works_by_name_and_in_files(
    module: ModuleType, tmp_path: Path
) -> None:
    text = "usermasks:bright | threshold:at=0.4/0.1"
    model, image = cs.adaptify(strided(), text, verify_laws=False), torch.randn(2, 3, 96, 128)
    assert model.mask.spec() == text and model.mask.storable
    expected = model(image)
    levels = model.levels
    mean = F.interpolate(image.mean(1, keepdim=True), size=(12, 16), mode="bilinear", antialias=True)[:, 0]
    wanted = torch.where(mean >= 0.4, 0, torch.where(mean >= 0.1, 1, 2))
    assert torch.equal(levels, model.geometry.lattice(wanted).levels)
    cs.save(model, tmp_path / "net.safetensors")
    with pytest.raises(cs.FileError, match="usermasks"):
        cs.load(tmp_path / "net.safetensors", strided())
    again = cs.load(tmp_path / "net.safetensors", strided(), trust=True)
    assert again.mask.spec() == text and torch.equal(again(image), expected)


ONE_FILE = """
@cs.mask_provider("dark", source="our lab")
class DarkMask(MaskProvider):
    'Keep high what is dark, {version}.'

    def __init__(self, below: float = 0.0) -> None:
        super().__init__()
        self.below = below

    def forward(self, image, features, grid):
        return self.scores(image, features, grid) > -self.below if {version} == 2 else None

    def scores(self, image, features, grid):
        return -F.adaptive_avg_pool2d(image.mean(1, keepdim=True), grid.size)[:, 0]
"""


def test_a_new_mask_is_one_file_or_a_cell_of_a_notebook_that_is_run_twice(tmp_path: Path) -> None:
    """It is listed with its options, converts, works inside others, and is saved and loaded by name."""
    scope = {"cs": cs, "MaskProvider": MaskProvider, "F": F, "__name__": "__main__"}
    image = torch.randn(1, 3, 96, 128)
    image[..., 64:] -= 3
    try:
        for version in (1, 2):
            exec(ONE_FILE.format(version=version), scope)
        (info,) = (info for info in cs.list_masks() if info.name == "dark")
        assert info.summary == "Keep high what is dark, 2."
        assert (info.options, info.source, info.form) == ({"below": 0.0}, "our lab", "dark")
        net = cs.adaptify(strided(), "dark:below=-1")
        expected = net(image)
        assert net.active_fraction == 0.5 == net.macs(image).active_fraction and net.mask.storable
        cs.save(net, tmp_path / "net.safetensors")
        again = cs.load(tmp_path / "net.safetensors", strided())
        assert again.mask.spec() == "dark:below=-1.0" and torch.equal(again(image), expected)
        net(image, mask="dark + edges | budget:fraction=0.25")
        assert net.active_fraction == 0.25
        with pytest.raises(ValueError, match=r"by __main__\.DarkMask"):
            exec(ONE_FILE.format(version=3), {**scope, "__name__": "another.module"})
    finally:
        PROVIDERS.pop("dark", None)
