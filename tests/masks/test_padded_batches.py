"""Batches that are padded below and at the right: each image has the mask that it has alone."""

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
from cadsurgery.masks import sized
from cadsurgery.support.errors import InvalidInput

SIZES = [(64, 96), (50, 61), (96, 33)]
WHOLE = (96, 96)
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
    smooth = [F.interpolate(torch.rand(1, 3, 4, 4), size, mode="bicubic")[0].clamp(0, 1) for size in SIZES]
    for picture in smooth:
        picture[:, 9:20, 8:17] = 0.0
    return smooth


def padded(images: list[Tensor], value: float = 0.0) -> Tensor:
    return torch.stack(
        [F.pad(x, (0, WHOLE[1] - x.shape[2], 0, WHOLE[0] - x.shape[1]), value=value) for x in images]
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
            net(padded(images), sizes=SIZES)
        return
    for value in (0.0, 0.7):  # what the padding holds does not matter
        net(padded(images, value), sizes=SIZES)
        check(net.levels, net, images, has_same_features="detail" not in mask)


def test_sizes_may_be_those_of_a_context_a_tensor_or_a_pixel_mask() -> None:
    net, batch = converted(MASKS[0], "converted"), padded(pictures())
    net(batch, sizes=SIZES)
    wanted = net.levels
    inside = padded([torch.ones(1, *size) for size in SIZES])[:, 0]
    with sized(SIZES):
        net(batch)
    assert torch.equal(net.levels, wanted)
    for call in ({"sizes": torch.tensor(SIZES)}, {"pixel_mask": inside}, {"pixel_mask": inside.bool()}):
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
    net(batch, sizes=SIZES)
    assert net.macs(batch, sizes=SIZES).active_fraction == pytest.approx(net.active_fraction)
    inside = padded([torch.ones(1, *size) for size in SIZES])[:, 0]
    assert net.macs(batch, pixel_mask=inside).active_fraction == pytest.approx(net.active_fraction)
    assert net.macs(batch).active_fraction != pytest.approx(net.active_fraction)


def test_masks_of_the_whole_batch_keep_nothing_in_the_padding() -> None:
    net, images = converted(MASKS[0], "converted"), pictures()
    net(padded(images), sizes=SIZES, mask="edges | budget:fraction=0.5,per_batch=true")
    cell, stride = net.geometry.sides[-1], net.plan.output_stride[0]
    for own, size in zip(net.levels, SIZES, strict=True):
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
