"""A picture that is read in rows has the mask that it has whole, and masks never see more than a band of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import covering
from torch import Tensor

from cadsurgery.elements.lattice import Geometry
from cadsurgery.masks import masking, resolve_mask
from cadsurgery.masks.masking import Masking
from cadsurgery.masks.unit import Normalisation, Unit

LOCAL = [
    "all",
    "none",
    "edges:threshold=0.2,dilation=5",
    "edges:threshold=0.5/0.1,dilation=3/31",
    "gradient:threshold=0.2",
    "gradient:sigma=1.5",
    "content",
    "content:margin=0,share=0.02",
    "content:margin=3",
    "edges | dilate:size=5",
    "gradient | threshold:at=0.3/0.1",
    "content | threshold:at=0.2",
    "content + edges:threshold=0.9",
    "edges | budget:fraction=0.3",
    "content | dilate:size=5 | budget:fraction=0.1/0.5",
    "gradient | budget:fraction=0.4,per_batch=true",
]
WHOLE = [
    "random:seed=1",
    "detail",
    "detail | budget:fraction=0.3",
    "edges | budget:fraction=0.3 | dilate:size=3",
]
SIZES = [(160, 72), (131, 57), (64, 65), (9, 33)]


def picture(size: tuple[int, int], batch: int = 1) -> Tensor:
    torch.manual_seed(0)
    image = F.interpolate(torch.rand(batch, 3, 5, 4), size, mode="bicubic").clamp(0, 1)
    image += 0.01 * torch.rand(image.shape)
    image[:, :, size[0] // 3 : size[0] // 2, 5:19] = 0.0
    return image


def make(spec: str, stride: int) -> Any:
    geometry = Geometry((2, 2))
    unit = Unit(Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "given"))
    return Masking(resolve_mask(spec), geometry, stride, unit=unit)


def fine(image: Tensor, stride: int) -> Tensor:
    return image.new_zeros(()).expand(len(image), 1, *(-(-length // stride) for length in image.shape[2:]))


@pytest.mark.parametrize(
    ("spec", "size", "stride", "batch", "kind"),
    covering(LOCAL, SIZES, [1, 2, 4], [1, 2], [torch.float32, torch.float64, torch.uint8]),
    ids=str,
)
def test_a_mask_judges_rows_as_it_judges_the_picture(
    spec: str,
    size: tuple[int, int],
    stride: int,
    batch: int,
    kind: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masking, "_BAND", 1)  # the least rows
    mask, image = make(spec, stride), picture(size, batch)
    image = (image * 255).to(kind) if kind == torch.uint8 else image.to(kind)
    whole = mask(image, fine(image, stride))
    seen = []

    def read(first: int, end: int) -> Tensor:
        seen.append(end - first)
        return image[:, :, first:end]

    rows = mask.of_rows(read, size[0], fine(image, stride))
    assert torch.equal(rows.levels, whole.levels)
    grid = mask.grid(fine(image, stride))
    reach = next(
        found
        for found in (mask.provider.reach(grid), mask.provider.reach_of_patches(grid))
        if found is not None
    )
    assert max(seen) <= min(size[0], 4 * stride + 2 * (reach + 4 * stride))


@pytest.mark.parametrize("spec", WHOLE)
def test_masks_of_the_whole_picture_read_it_once(spec: str) -> None:
    mask, image, reads = make(spec, 2), picture((64, 72)), []
    features = F.avg_pool2d(image, 2)

    def read(first: int, end: int) -> Tensor:
        reads.append((first, end))
        return image[:, :, first:end]

    assert torch.equal(mask.of_rows(read, 64, features).levels, mask(image, features).levels)
    assert reads == [(0, 64)]


@pytest.mark.parametrize("scale", [1.0, 255.0, 4095.0])
def test_a_unit_that_is_not_known_is_estimated_in_bands(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all of a picture if it is small, else by bands of it; masks see no more of it at once."""
    image = picture((640, 48)) * scale
    masks = [Masking(resolve_mask("edges"), Geometry((2, 2)), 1, unit=Unit()) for _ in range(3)]
    whole = masks[0](image, fine(image, 1))
    assert torch.equal(
        masks[1].of_rows(lambda a, b: image[:, :, a:b], 640, fine(image, 1)).levels, whole.levels
    )
    monkeypatch.setattr(masking, "_SEEN", 48 * 160)
    monkeypatch.setattr(masking, "_BAND", 1)
    seen = list[int]()

    def read(first: int, end: int) -> Tensor:
        seen.append(end - first)
        return image[:, :, first:end]

    found = masks[2].of_rows(read, 640, fine(image, 1)).levels
    assert max(seen) < 64 and (found == whole.levels).float().mean() > 0.9
    known, other = masks[2].unit.normalisation, masks[0].unit.normalisation
    assert known is not None and other is not None and known.is_fitted == other.is_fitted
