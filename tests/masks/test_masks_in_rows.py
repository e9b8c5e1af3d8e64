"""Masks of parts: read in rows a picture has the mask that it has whole, as has each image of a padded batch alone."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import covering, slow, some
from subjects import adaptive_detector, given_detector
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.elements.lattice import Geometry
from cadsurgery.masks import masking, resolve_mask, sized
from cadsurgery.masks.masking import Masking
from cadsurgery.masks.unit import Normalisation, Unit
from cadsurgery.support.errors import InvalidInput

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
    reach = mask._reach(mask.grid(fine(image, stride)))
    assert reach is not None
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


# -- batches that are padded below and at the right: each image has the mask that it has alone ---------


PADDED = [(64, 96), (50, 61), (96, 33)]
COMMON = (96, 96)
MASKS = [
    "edges:threshold=0.2",
    "gradient:sigma=1",
    "content",
    "detail",
    "edges | budget:fraction=0.3",
    "gradient | dilate:size=5",
    "content + edges",
]


class Net(nn.Module):
    """Takes a `pixel_mask`, which it does not read, as networks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, 8, 3, 2, 1), nn.ReLU()) for a in (3, 8, 8)), nn.Conv2d(8, 4, 1)
        )

    def forward(self, image: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.body(image)
        return out


@cache
def converted(mask: str, form: str) -> Any:
    torch.manual_seed(0)
    net = cs.adaptify(Net().eval(), mask, normalisation="none", verify_laws=False)
    return {"converted": net, "optimised": net.optimize(), "in bands": net.optimize(memory="1GiB")}[form]


def pictures() -> list[Tensor]:
    torch.manual_seed(1)
    smooth = [F.interpolate(torch.rand(1, 3, 4, 4), size, mode="bicubic")[0].clamp(0, 1) for size in PADDED]
    for picture in smooth:
        picture[:, 9:20, 8:17] = 0.0
    return smooth


def padded(images: list[Tensor], value: float = 0.0) -> Tensor:
    return torch.stack(
        [F.pad(x, (0, COMMON[1] - x.shape[2], 0, COMMON[0] - x.shape[1]), value=value) for x in images]
    )


def check(levels: Tensor, net: Any, images: list[Tensor], has_same_features: bool) -> None:
    """Compare the levels of a batch with those of its images alone, outside of cells that the border cuts. Features
    at the border are computed from the padding, too."""
    cell, lowest = net.geometry.sides[-1], net.plan.max_level
    for own, image in zip(levels, images, strict=True):
        net(image[None])
        alone = net.levels[0]
        height, width = (length // cell * cell for length in alone.shape)
        assert torch.equal(own[:height, :width], alone[:height, :width]) or not has_same_features
        rows, columns = (-(-length // cell) * cell for length in alone.shape)
        assert (own[rows:] == lowest).all() and (own[:, columns:] == lowest).all()


@pytest.mark.parametrize(("mask", "form"), covering([*MASKS], ["converted", "optimised", "in bands"]))
def test_an_image_in_a_padded_batch_has_the_levels_that_it_has_alone(mask: str, form: str) -> None:
    net, images = converted(mask, form), pictures()
    if form == "in bands" and "detail" in mask:
        with pytest.raises(InvalidInput, match="reads features"):
            net(padded(images), sizes=PADDED)
        return
    for value in (0.0, 0.7):  # what the padding holds does not matter
        net(padded(images, value), sizes=PADDED)
        check(net.levels, net, images, has_same_features="detail" not in mask)


def test_sizes_may_be_those_of_a_context_a_tensor_or_a_pixel_mask() -> None:
    net, batch = converted(MASKS[0], "converted"), padded(pictures())
    net(batch, sizes=PADDED)
    wanted = net.levels
    inside = padded([torch.ones(1, *size) for size in PADDED])[:, 0]
    with sized(PADDED):
        net(batch)
    assert torch.equal(net.levels, wanted)
    for call in ({"sizes": torch.tensor(PADDED)}, {"pixel_mask": inside}, {"pixel_mask": inside.bool()}):
        net(batch, **call)
        assert torch.equal(net.levels, wanted)
    net(batch, pixel_mask=inside.flip(1))  # padding above: another form, which is taken as it comes
    as_it_comes = net.levels
    net(batch)
    assert torch.equal(net.levels, as_it_comes) and not torch.equal(wanted, as_it_comes)


@pytest.mark.parametrize("mask", some(MASKS))
def test_counting_uses_the_masks_of_the_call(mask: str) -> None:
    """Also under masks for which counting runs the network: they read features."""
    net, batch = converted(mask, "converted"), padded(pictures())
    net(batch, sizes=PADDED)
    assert net.macs(batch, sizes=PADDED).active_fraction == pytest.approx(net.active_fraction)
    inside = padded([torch.ones(1, *size) for size in PADDED])[:, 0]
    assert net.macs(batch, pixel_mask=inside).active_fraction == pytest.approx(net.active_fraction)
    assert net.macs(batch).active_fraction != pytest.approx(net.active_fraction)


def test_masks_of_the_whole_batch_keep_nothing_in_the_padding() -> None:
    net, images = converted(MASKS[0], "converted"), pictures()
    net(padded(images), sizes=PADDED, mask="edges | budget:fraction=0.5,per_batch=true")
    cell, stride = net.geometry.sides[-1], net.plan.output_stride[0]
    for own, size in zip(net.levels, PADDED, strict=True):
        rows, columns = (-(-length // (cell * stride)) * cell for length in size)
        assert (own[rows:] == net.plan.max_level).all() and (own[:, columns:] == net.plan.max_level).all()


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["edges | budget:fraction=0.3", slow("content")])
def test_detectors_say_how_large_the_images_of_their_batches_are(mask: str) -> None:
    net = copy.deepcopy(adaptive_detector())
    net.mask = mask
    images = [torch.rand(3, 96, 128), torch.rand(3, 192, 96)]
    with torch.no_grad():
        for form in (net, net.optimize()):
            form(images)
            both = form.levels.clone()
            for own, image in zip(both, images, strict=True):
                form([image])
                height, width = form.levels.shape[1:]
                assert torch.equal(own[:height, :width], form.levels[0])
                assert (own[height:] == form.plan.max_level).all() and (
                    own[:, width:] == form.plan.max_level
                ).all()
            assert form.macs(images).active_fraction == pytest.approx(float((both == 0).double().mean()))
    assert not any(given_detector().transform._forward_hooks.values())
