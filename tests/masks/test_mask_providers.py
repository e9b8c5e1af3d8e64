"""Masks of one's own kind: gradients, trimaps of labels, functions of the user; and what the grid says.

Each is written down again with loops or convolutions over every pixel.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import strided
from torch import Tensor

import cadsurgery as cs
from cadsurgery.masks import (
    EdgeMask,
    FineMapSpec,
    FunctionMask,
    GradientMask,
    MaskProvider,
    Threshold,
    TrimapMask,
    labelled,
    resolve_mask,
)
from cadsurgery.masks.filters import GREY, grey_of
from cadsurgery.masks.provider import PROVIDERS

QUICK = settings(max_examples=20, deadline=None, derandomize=True)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SIZES = [(64, 96), (65, 97), (33, 50), (9, 70)]


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


# -- the grid ------------------------------------------------------------------------------------------


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


# -- gradient ------------------------------------------------------------------------------------------


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


@QUICK
@given(seed=st.integers(0, 99), value=st.floats(-3, 3), sigma=st.sampled_from([0.0, 0.7, 3.0]))
def test_a_gradient_does_not_know_dark_from_bright(seed: int, value: float, sigma: float) -> None:
    torch.manual_seed(seed)
    image, mask = torch.randn(1, 3, 17, 30, dtype=torch.float64), GradientMask(sigma=sigma)
    strength = mask.strength(image)
    assert torch.allclose(mask.strength(-image), strength)
    assert torch.allclose(mask.strength(image + value), strength)
    assert torch.allclose(mask.strength(image.flip(3)), strength.flip(2))
    assert torch.allclose(mask.strength(image.transpose(2, 3)), strength.transpose(1, 2))


@pytest.mark.parametrize("sigma", [0.5, 2.0, 30.0])
def test_smoothing_keeps_slopes_and_weakens_noise(sigma: float) -> None:
    """A ramp has the same slope after any symmetric filter; noise has less."""
    ramp = torch.arange(401, dtype=torch.float64).expand(1, 3, 5, 401)
    middle = GradientMask(sigma=sigma).strength(ramp)[..., 200]
    assert torch.allclose(middle, GradientMask().strength(ramp)[..., 200])
    noise = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    assert GradientMask(sigma=sigma).strength(noise).mean() < GradientMask().strength(noise).mean()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_numbers_of_channels_are_averaged(channels: int) -> None:
    image = torch.randn(2, channels, 33, 50)
    mean = image.mean(1, keepdim=True)
    for mask in (EdgeMask(), GradientMask()):
        assert torch.allclose(mask.strength(image), mask.strength(mean))


@pytest.mark.parametrize(
    ("text", "size", "dtype"),
    covering(["gradient:sigma=1", "edges", "gradient:threshold=2,dilation=1"], SIZES, DTYPES),
)
def test_scores_reach_the_threshold_where_the_level_is_zero(
    text: str, size: tuple[int, int], dtype: torch.dtype
) -> None:
    image, grid, mask = torch.randn(2, 3, *size).to(dtype), grid_of(size), resolve_mask(text)
    scores = mask.scores(image, image, grid)
    assert scores.dtype == dtype and scores.shape == (2, *grid.size)
    assert torch.equal(scores >= mask.threshold[0], mask(image, image, grid) == 0)


# -- trimap --------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("of_image", DTYPES)
def test_labels_and_images_of_any_type_give_the_same_trimap(
    dtype: torch.dtype, of_image: torch.dtype
) -> None:
    size = (65, 97)
    labels, grid, image = blocks(size), grid_of(size), torch.zeros(2, 3, *size)
    with labelled(labels):
        expected = TrimapMask(9)(image, image, grid)
    with labelled(labels.to(dtype)):
        other = image.to(of_image)
        assert torch.equal(TrimapMask(9)(other, other, grid), expected)
    assert (expected == 0).any() and (expected == 2).any()


def test_a_network_takes_labels_and_a_wider_trimap_keeps_more() -> None:
    model, image = cs.adaptify(strided(), "trimap:width=9", verify_laws=False), torch.randn(2, 3, 97, 129)
    fractions = []
    with labelled(blocks((97, 129))):
        for mask in ("trimap:width=1", None, "trimap:width=33", "trimap:width=55"):
            model(image, mask=mask)
            fractions.append(model.active_fraction)
        assert model.macs(image).active_fraction == fractions[1]
    assert fractions == sorted(fractions) and fractions[0] < fractions[-1]


def test_a_trimap_without_labels_says_how_to_give_them() -> None:
    model = cs.adaptify(strided(), "trimap", verify_laws=False)
    with pytest.raises(cs.InvalidInput) as caught:
        model(torch.randn(2, 3, 64, 64))
    assert "labelled(labels)" in caught.value.next and "--labels" in caught.value.next
    with (
        pytest.raises(cs.InvalidInput, match=r"\(2, 64, 32\)") as caught,
        labelled(torch.zeros(2, 64, 32).long()),
    ):
        model(torch.randn(2, 3, 64, 64))
    assert "(2, 64, 64)" in caught.value.next


@pytest.mark.parametrize(
    "labels", [torch.zeros(1, 2, 8, 8), torch.zeros(8, 8).long(), torch.zeros(0, 8, 8).long(), "a"]
)
def test_labels_that_are_none_are_refused(labels: object) -> None:
    with pytest.raises(cs.InvalidInput) as caught, labelled(labels):  # type: ignore[arg-type]
        pass
    assert "integer tensor (batch, height, width)" in caught.value.next


# -- functions of the user -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel", [False, True])
def test_scores_of_the_fine_size_are_taken_as_they_are(dtype: torch.dtype, channel: bool) -> None:
    grid = grid_of((65, 97))
    scores = torch.rand(2, *grid.size, dtype=dtype)
    mask = FunctionMask(lambda image: scores.unsqueeze(1) if channel else scores)
    image = torch.zeros(2, 3, 65, 97)
    assert torch.equal(mask.scores(image, image, grid).to(dtype), scores)
    wanted = torch.where(scores.float() >= 0.8, 0, torch.where(scores.float() >= 0.2, 1, 2))
    assert torch.equal(Threshold(mask, (0.8, 0.2))(image, image, grid).long(), wanted)


@QUICK
@given(size=st.tuples(st.integers(1, 90), st.integers(1, 90)), value=st.floats(-5, 5, width=32))
def test_scores_of_any_size_are_resized_to_the_fine_map(size: tuple[int, int], value: float) -> None:
    grid, image = grid_of((65, 97)), torch.zeros(2, 3, 65, 97)
    scores = FunctionMask(lambda image: torch.full((2, *size), value)).scores(image, image, grid)
    assert scores.shape == (2, *grid.size)
    assert torch.allclose(scores, torch.full_like(scores, value), atol=1e-5)


def test_many_scores_are_averaged_and_not_sampled() -> None:
    grid, image = FineMapSpec(1, (8, 8), 8, 2, 4, 4), torch.zeros(1, 3, 64, 64)
    fine = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    scores = FunctionMask(lambda image: fine.float().unsqueeze(0)).scores(image, image, grid)
    assert torch.allclose(scores, torch.full_like(scores, 0.5), atol=0.05)


def test_a_map_of_levels_is_ranked_by_its_levels() -> None:
    grid, image = grid_of((65, 97)), torch.zeros(2, 3, 65, 97)
    levels = torch.randint(0, 3, (2, *grid.size))
    assert torch.equal(FunctionMask(lambda image: levels).scores(image, image, grid).long(), 2 - levels)
    with pytest.raises(cs.InvalidInput, match="NoneType"):
        FunctionMask(lambda image: None).scores(image, image, grid)  # type: ignore[arg-type, return-value]


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


def test_a_function_by_name_may_return_a_map_and_stand_in_a_union(module: ModuleType) -> None:
    model, image = cs.adaptify(strided(), "usermasks:left", verify_laws=False), torch.randn(2, 3, 96, 128)
    model(image)
    assert torch.equal(model.levels, model.geometry.lattice(module.left(image).expand(2, -1, -1)).levels)
    union = resolve_mask("edges + (usermasks:left | dilate:size=3)")
    assert "usermasks:left | dilate:size=3" in union.spec() and union.storable
    assert not FunctionMask(module.left).storable


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (None, "NoneType"),
        (torch.zeros(2, 2, 8, 8), r"\(2, 2, 8, 8\)"),
        (torch.zeros(1, 8, 8), r"\(1, 8, 8\)"),
        (torch.zeros(8, 8), r"\(8, 8\)"),
        (torch.zeros(2, 0, 8), r"\(2, 0, 8\)"),
        (torch.full((2, 8, 8), torch.nan), "NaN"),
    ],
)
def test_what_is_no_score_map_is_refused(returned: object, what: str) -> None:
    mask, image = FunctionMask(lambda image: returned), torch.zeros(2, 3, 64, 64)  # type: ignore[arg-type, return-value]
    with pytest.raises(cs.InvalidInput, match=what) as caught:
        Threshold(mask)(image, image, grid_of((64, 64)))
    assert caught.value.next


def test_scores_without_a_threshold_are_refused_with_what_to_write(module: ModuleType) -> None:
    image = torch.zeros(2, 3, 64, 64)
    with pytest.raises(cs.InvalidInput, match=r"floating-point(?s:.)*threshold:at=0\.5"):
        cs.adaptify(strided(), "usermasks:bright", verify_laws=False)(image)


# -- all of them ---------------------------------------------------------------------------------------


ONE_FILE = """
import torch.nn.functional as F

import cadsurgery as cs


@cs.mask_provider("dark", source="our lab")
class DarkMask(cs.MaskProvider):
    \"\"\"Keep high what is dark.\"\"\"

    def __init__(self, below: float = 0.0) -> None:
        super().__init__()
        self.below = below

    def forward(self, image, features, grid):
        return self.scores(image, features, grid) > -self.below

    def scores(self, image, features, grid):
        return -F.adaptive_avg_pool2d(image.mean(1, keepdim=True), grid.size)[:, 0]
"""


@pytest.fixture
def dark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file, imported for the length of a test."""
    (tmp_path / "one_mask.py").write_text(ONE_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("one_mask")
    yield
    del sys.modules["one_mask"], PROVIDERS["dark"]


@pytest.mark.usefixtures("dark")
def test_a_new_mask_is_one_file(tmp_path: Path) -> None:
    """It is listed with its options, converts, works inside others, and is saved and loaded by name."""
    (info,) = (info for info in cs.list_masks() if info.name == "dark")
    assert info.summary == "Keep high what is dark."
    assert (info.options, info.source, info.form) == ({"below": 0.0}, "our lab", "dark")
    image = torch.randn(1, 3, 96, 128)
    image[..., 64:] -= 3
    net = cs.adaptify(strided(), "dark:below=-1")
    expected = net(image)
    assert net.active_fraction == 0.5 and net.macs(image).active_fraction == 0.5
    cs.save(net, tmp_path / "net.safetensors")
    again = cs.load(tmp_path / "net.safetensors", strided())
    assert again.mask.spec() == "dark:below=-1.0" and torch.equal(again(image), expected)
    net(image, mask="dark + edges | budget:fraction=0.25")
    assert net.active_fraction == 0.25


@pytest.mark.usefixtures("dark")
def test_a_file_with_a_mask_that_is_not_registered_says_so(tmp_path: Path) -> None:
    cs.save(cs.adaptify(strided(), "dark", verify_laws=False), tmp_path / "net.safetensors")
    provider = PROVIDERS.pop("dark")
    with pytest.raises(cs.FileError) as caught:
        cs.load(tmp_path / "net.safetensors", strided())
    assert "register it first" in caught.value.next
    PROVIDERS["dark"] = provider


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 13, 17), (1, 1, 1), (1, 31, 8)])
def test_the_grey_image_does_not_depend_on_the_layout(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    """Channels outside, side by side as pictures come, and a part of such a map."""
    batch, height, width = size
    whole = torch.randn(batch, height + 2, width + 3, 3).to(dtype).permute(0, 3, 1, 2)
    weights = torch.tensor(GREY, dtype=dtype)
    for image in (whole, whole.contiguous(), whole[:, :, 1:-1, :width], whole[:1]):
        exact = torch.einsum("bchw,c->bhw", image.double(), weights.double())
        found = grey_of(image)
        assert found.dtype == dtype and found.shape == exact.shape
        assert_same(found.double(), exact, 2 * torch.finfo(dtype).eps)


def test_providers_of_users_may_call_the_fine_map_by_its_older_name() -> None:
    assert cs.masks.Grid is cs.masks.FineMapSpec
