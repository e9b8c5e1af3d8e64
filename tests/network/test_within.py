"""A network in boxes of the picture gives what the whole call gives there, for less work."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import is_dataclass
from functools import cache
from itertools import takewhile
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import covering, random_levels
from networks import Encoded, ResidualSegmenter, Segmenter, seeded, strided, unverified
from random_networks import random_case
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import cadsurgery as cs
from benchmarks.zoo.corpus import CHECKOUT, read_corpus, subject
from cadsurgery.network.boxes import Box, boxes_of
from cadsurgery.network.regions import PicturePart, PictureReads, joined
from cadsurgery.network.within import _by_rows

SEEDS = int(os.environ.get("CADSURGERY_SEEDS", 300))
ERROR = {torch.float64: 1e-12, torch.float32: 1e-5}


Then = Callable[[Any, Tensor, Tensor], Any]


def several(net: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Maps of several sizes in a dictionary, one of classes, and one of the whole picture's mean."""
    out = F.interpolate(net.head(y), scale_factor=4, mode="bilinear")
    return {"out": out, "maps": [y, net.head(y)], "classes": out.argmax(1), "mean": y.mean((2, 3))}


def gated(net: Any, x: Tensor, y: Tensor) -> Tensor:
    gate = net.more(F.adaptive_avg_pool2d(y, 1)).sigmoid()
    return F.interpolate(net.head(y * gate), scale_factor=8.0, mode="bilinear")


def changed(net: Any, x: Tensor, y: Tensor) -> Tensor:
    """A map that is changed in place where something else has read it, and is read again."""
    z = net.more(y)
    y += F.avg_pool2d(z, 9, 1, 4)
    return net.head(y + z)


def encoded(then: Then) -> nn.Module:
    return Encoded(then, more=nn.Conv2d(8, 8, 5, padding=2))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: subject("unets:unet_transposed", CHECKOUT).build(),
    "segmenter": Segmenter,
    "residual segmenter": ResidualSegmenter,
    "gated": lambda: encoded(gated),
}
WAYS: dict[str, tuple[dict[str, Any], Any]] = {
    "as given": ({}, "none"),
    "as given, floors": ({"coarsest": 16}, "all"),
    "floors": ({"coarsest": 16}, "levels"),
    "strides": ({}, "levels"),
    "all high": ({}, "all"),
}
BOXES = {
    "inside": [[70, 81, 90, 99]],
    "corners": [[0, 0, 3, 5], [157, 187, 160, 192], [0, 180, 9, 192], [150, 0, 160, 2]],
    "borders": [[60, 0, 64, 4], [0, 100, 1, 120], [20, 190, 40, 192]],
    "one pixel": [[33, 47, 34, 48]],
    "overlapping": [[10, 10, 50, 60], [40, 30, 70, 65], [41, 31, 42, 32]],
    "fractions": [[10.2, 11.7, 12.9, 30.5]],
    "empty": [[20, 20, 20, 30], [5, 5, 9, 5]],
    "none": [],
    "all": [[0, 0, 160, 192]],
}


def parts_of(whole: Any, boxes: Tensor, number: int, size: tuple[int, int]) -> list[list[Tensor]]:
    """What the boxes of a picture have of the maps of the whole call."""
    found = []
    for x0, y0, x1, y1 in boxes.double().tolist():
        maps = []
        for value in tree_leaves(whole):
            at = value.dim() - 2
            for axis, (first, end) in ((at, (y0, y1)), (at + 1, (x0, x1))):
                low, high = int(first // 1), int(-(-end // 1)) if end > first else int(first // 1)
                length, of = value.shape[axis], size[axis - at]
                start = low * length // of
                stop = -(-high * length // of) if high > low else start
                value = value.narrow(axis, start, stop - start)
            maps.append(value[number : number + 1])
        found.append(maps)
    return found


def assert_parts(whole: Any, found: list[list[Any]], boxes: list[Tensor], size: tuple[int, int]) -> None:
    """What was found in boxes is the same part of the whole call."""
    assert len(found) == len(boxes)
    largest = [value.abs().max() for value in tree_leaves(whole)]
    for number, (parts, of_picture) in enumerate(zip(found, boxes, strict=True)):
        for part, expected in zip(parts, parts_of(whole, of_picture, number, size), strict=True):
            for one, other, most in zip(tree_leaves(part), expected, largest, strict=True):
                assert one.shape == other.shape and one.dtype == other.dtype
                error = ERROR.get(one.dtype, 0)
                assert not one.numel() or (one - other).abs().max() <= error * most


@cache
def made(name: str, way: str, dtype: torch.dtype = torch.float64, fast: bool = True) -> cs.AdaptiveModel:
    options, mask = WAYS[way]
    model = seeded(NETWORKS[name], dtype)
    example = torch.randn(1, 3, 64, 64, dtype=dtype)
    net = unverified(model, "none" if mask == "levels" else mask, example_input=example, **options)
    return net.optimize() if fast else net


def converted(then: Then, mask: str = "all") -> cs.AdaptiveModel:
    """A network that ends with a function, with floors."""
    model, example = seeded(lambda: encoded(then)), torch.randn(1, 3, 64, 64).double()
    return unverified(model, mask, coarsest=16, example_input=example)


def some_levels(net: cs.AdaptiveModel, images: Tensor) -> Tensor:
    net(images)
    geometry, (_, height, width) = net.geometry, net.levels.shape
    most = geometry.max_level
    return random_levels(len(images), (height, width), geometry.strides[:most], max_level=most)


def mask_of(net: cs.AdaptiveModel, images: Tensor, way: str) -> Tensor | None:
    """Random cells for a way that has some; None for the network's own mask."""
    return some_levels(net, images) if WAYS[way][1] == "levels" else None


@pytest.mark.parametrize(("name", "way"), covering([*NETWORKS], [*WAYS]))
@torch.no_grad()
def test_boxes_hold_what_the_whole_call_gives_there(name: str, way: str) -> None:
    net, image = made(name, way), torch.randn(1, 3, 192, 160, dtype=torch.float64)
    mask = mask_of(net, image, way)
    whole = net(image, mask=mask)
    for boxes in BOXES.values():
        given = torch.tensor(boxes).reshape(-1, 4)
        assert_parts(whole, cs.read_within(net, image, [given], mask=mask), [given], (192, 160))


def levels_up_to(net: cs.AdaptiveModel, image: Tensor, highest: int) -> Tensor:
    """Random cells: of a level at most in the left part of the picture, of all levels in the right half."""
    left, right = some_levels(net, image), some_levels(net, image)
    middle = left.shape[2] // 2
    return torch.cat([left[..., :middle].clamp(max=highest), right[..., middle:]], 2)


@pytest.mark.parametrize("way", ["floors", "strides"])
@pytest.mark.parametrize(
    "name", ["segmenter", *(pytest.param(n, marks=pytest.mark.slow) for n in ("unet", "residual segmenter"))]
)
@torch.no_grad()
def test_the_reach_is_that_of_the_largest_cells_of_the_part(name: str, way: str) -> None:
    """Values are those of the whole call, for no more pixels than with the largest cells that there may be."""
    net, image = made(name, way), torch.randn(1, 3, 160, 1024, dtype=torch.float64)
    box, pixels = torch.tensor([[40, 70, 60, 90]]), list[int]()
    for highest in range(net.geometry.max_level + 1):
        mask = levels_up_to(net, image, highest)
        whole = net(image, mask=mask)
        assert_parts(whole, cs.read_within(net, image, [box], mask=mask), [box], (160, 1024))
        region = net.in_region(image, boxes_of([box], image), lambda region: region, lambda *_: None, mask)
        assert region is not None
        ((part, _),) = region.parts.items()
        assert part.area <= region.reads.part_for(Box(70, 90, 40, 60)).area
        assert region.highest(0, part) <= highest or part.right > 512
        pixels.append(part.area)
    assert pixels == sorted(pixels) and pixels[0] < pixels[-1]


@pytest.mark.parametrize(
    ("copy_of", "dtype", "way"),
    covering(["itself", "fast", "in a memory"], [*ERROR], ["as given, floors", "floors", "as given"]),
)
@torch.no_grad()
def test_batches_types_and_copies(copy_of: str, dtype: torch.dtype, way: str) -> None:
    """Each picture of a batch has boxes of its own."""
    net, images = made("unet", way, dtype, copy_of == "fast"), torch.randn(3, 3, 96, 128, dtype=dtype)
    net = net.optimize(memory="1GiB") if copy_of == "in a memory" else net
    mask = mask_of(net, images, way)
    boxes = [torch.tensor([[0, 0, 9, 9], [90, 60, 128, 96]]), torch.zeros(0, 4), torch.tensor([[0, 0, 9, 9]])]
    assert_parts(net(images, mask=mask), cs.read_within(net, images, boxes, mask=mask), boxes, (96, 128))


@torch.no_grad()
def test_sizes_that_do_not_divide_go_by_rows_or_parts_and_stay_exact() -> None:
    """Resizes by odd factors depend on the size of the picture."""
    net = made("segmenter", "as given, floors")
    for size in ((101, 93), (97, 64), (64, 97)):
        image = torch.randn(1, 3, *size, dtype=torch.float64)
        boxes = torch.tensor([[0, 0, 5, 5], [30, 40, 44, 60], [size[1] - 3, size[0] - 9, size[1], size[0]]])
        assert_parts(net(image), cs.read_within(net, image, [boxes]), [boxes], size)


@torch.no_grad()
def test_outputs_keep_their_structure() -> None:
    net = converted(several, "none").optimize()
    image, boxes = torch.randn(2, 3, 96, 64).double(), [torch.tensor([[8, 12, 30, 50]]), torch.zeros(0, 4)]
    whole = net(image)
    for output in ("out", "maps", "classes"):
        ((part,), nothing) = cs.read_within(net, image, boxes, output=output)
        assert nothing == [] and type(part) is type(whole[output])
        assert_parts(whole[output], [[part], []], boxes, (96, 64))
    with pytest.raises(cs.UnknownName, match="no output named 'aux'"):
        cs.read_within(net, image, boxes, output="aux")
    with pytest.raises(cs.CannotConvert, match=r"test_within\.py"):
        cs.read_within(net, image, boxes)


@torch.no_grad()
def test_what_is_changed_in_place_is_read_as_it_is_then() -> None:
    net, image = converted(changed), torch.randn(1, 3, 160, 128).double()
    boxes = torch.tensor([[60, 70, 70, 90], [0, 0, 4, 4]])
    assert_parts(net(image), cs.read_within(net, image, [boxes]), [boxes], (160, 128))
    assert net.macs(image, within=[boxes]).of_whole < 1


@torch.no_grad()
def test_transposed_convolutions_with_norms_are_computed_in_boxes_and_bands() -> None:
    """Their norms are folded in an inference copy, and their weights have another place there."""

    def make() -> nn.Module:
        up = [nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
        more = [nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)]
        return nn.Sequential(*strided(3, 8), *up, *more, nn.Conv2d(6, 3, 1))

    net = unverified(seeded(make), "all", coarsest=16, example_input=torch.randn(1, 3, 64, 64).double())
    image, boxes = torch.randn(1, 3, 160, 128).double(), torch.tensor([[60, 70, 70, 90], [0, 0, 4, 4]])
    whole = net.optimize()(image)
    folded = net.optimize(False, memory="1GiB")
    for copied in (net.optimize(), net.optimize(memory="1GiB"), folded):
        assert_parts(whole, cs.read_within(copied, image, [boxes]), [boxes], (160, 128))
        torch.testing.assert_close(copied(image), whole)


DEPENDING: dict[str, Then] = {
    "a factor of its size": lambda net, x, y: y / y.shape[3],
    "a value of its size": lambda net, x, y: y * torch.full((1,), float(y.shape[2]), dtype=y.dtype),
    "coordinates": lambda net, x, y: y + torch.arange(y.shape[2], dtype=y.dtype).view(1, 1, -1, 1),
    "columns": lambda net, x, y: y * torch.linspace(0, 1, y.shape[3], dtype=y.dtype).view(1, 1, 1, -1),
    "aligned corners": lambda net, x, y: F.interpolate(y, (48, 32), mode="bilinear", align_corners=True),
    "an odd factor": lambda net, x, y: F.interpolate(y, size=(41, 57), mode="bilinear"),
    "a mean": lambda net, x, y: y - y.mean((2, 3), keepdim=True),
    "a largest value": lambda net, x, y: y / y.amax((2, 3), keepdim=True).clamp(min=1),
    "bins": lambda net, x, y: F.interpolate(F.adaptive_avg_pool2d(y, 2), y.shape[2:], mode="bilinear"),
    "a norm": lambda net, x, y: F.instance_norm(y),
    "circular padding": lambda net, x, y: F.pad(y, (1, 1, 1, 1), mode="circular"),
    "flipped": lambda net, x, y: y + y.flip(2),
    "sorted": lambda net, x, y: y.flatten(2).sort(2).values.view(y.shape),
}


@pytest.mark.parametrize("what", DEPENDING)
@torch.no_grad()
def test_what_depends_on_size_or_place_is_exact_or_refused_with_its_line(what: str) -> None:
    net = converted(lambda net, x, y: net.head(DEPENDING[what](net, x, y)))
    image = torch.randn(1, 3, 128, 96, dtype=torch.float64)
    boxes = torch.tensor([[20, 30, 40, 50], [0, 0, 4, 4], [90, 120, 96, 128]])
    try:
        found = cs.read_within(net, image, [boxes])
    except cs.CannotConvert as refusal:
        assert "test_within.py" in refusal.where and refusal.why and "net(image)" in refusal.next
    else:
        assert_parts(net(image), found, [boxes], (128, 96))


# -- areas -----------------------------------------------------------------------------------------------


def reached(area: Tensor, size: tuple[int, int]) -> Tensor:
    found = torch.zeros(size, dtype=torch.bool)
    for row in range(size[0]):
        for column in range(size[1]):
            spans = [
                slice(place * own // length, -(-(place + 1) * own // length))
                for place, own, length in zip((row, column), area.shape, size, strict=True)
            ]
            found[row, column] = area[spans[0], spans[1]].any()
    return found


@pytest.mark.parametrize("shape", [(96, 64), (12, 8), (7, 5), (200, 100)])
@torch.no_grad()
def test_an_area_of_any_size_has_the_values_of_the_whole_call(shape: tuple[int, int]) -> None:
    net, image = made("segmenter", "as given, floors"), torch.randn(2, 3, 96, 64, dtype=torch.float64)
    area = torch.zeros(2, *shape, dtype=torch.bool)
    area[0, : shape[0] // 4, shape[1] // 2] = area[0, -1, -1] = True  # of the second picture nothing
    whole, found = net(image), cs.read_within(net, image, area=area)
    assert found.shape == whole.shape
    inside = torch.stack([reached(one, tuple(whole.shape[2:])) for one in area]).unsqueeze(1).expand_as(whole)
    assert found[~inside].isnan().all() and not found[inside].isnan().any()
    assert (found - whole)[inside].abs().max() <= 1e-12 * whole.abs().max()
    low = net(image, mask="none")
    assert torch.equal(cs.read_within(net, image, area=area, outside=low)[~inside], low[~inside])
    assert bool((cs.read_within(net, image, area=area, outside=7)[~inside] == 7).all())


@torch.no_grad()
def test_polygons_are_areas() -> None:
    net, image = made("unet", "as given, floors"), torch.randn(1, 3, 96, 64, dtype=torch.float64)
    square = torch.tensor([[10, 20], [30, 20], [30, 40], [10, 40]])
    found = cs.read_within(net, image, area=[square, square.numpy() + 30])
    asked = ~found.isnan().all(1)[0]
    area = torch.zeros(96, 64, dtype=torch.bool)
    area[20:40, 10:30] = area[50:70, 40:60] = True
    assert bool(asked[area].all()) and int(asked.sum()) <= 2 * 22 * 22
    inside = asked.expand_as(found)
    assert (found - net(image))[inside].abs().max() < 1e-12


@torch.no_grad()
def test_an_area_keeps_the_structure_of_outputs_and_classes_need_a_value() -> None:
    net = converted(several, "none")
    image, area = torch.randn(1, 3, 64, 64).double(), torch.zeros(4, 4, dtype=torch.bool)
    area[1, 2] = True
    for output in ("maps", "classes"):
        found = cs.read_within(net, image, area=area, output=output, outside=0)
        for one, whole in zip(tree_leaves(found), tree_leaves(net(image)[output]), strict=True):
            height, width = whole.shape[-2:]
            part = slice(height // 4, height // 2), slice(width // 2, 3 * width // 4)
            assert one.shape == whole.shape and torch.allclose(one[(..., *part)], whole[(..., *part)])
    with pytest.raises(cs.InvalidInput, match="no NaN"):
        cs.read_within(net, image, area=area, output="classes")


# -- work ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["as given, floors", "floors", "as given"])
@torch.no_grad()
def test_less_is_computed_and_macs_say_how_much(way: str) -> None:
    net, image = made("unet", way), torch.randn(2, 3, 512, 512, dtype=torch.float64)
    mask = mask_of(net, image, way)
    boxes = [torch.tensor([[200, 200, 232, 232]]), torch.zeros(0, 4)]
    report, whole = net.macs(image, mask=mask, within=boxes), net.macs(image, mask=mask)
    assert report.whole == whole.mask and report.mask == round(report.of_whole * whole.mask)
    assert report.of_whole < 0.8 and "in the boxes" in str(report)
    everything = [torch.tensor([[0, 0, 512, 512]])] * 2
    assert net.macs(image, mask=mask, within=everything).of_whole == pytest.approx(1, abs=0.01)


@torch.no_grad()
def test_macs_by_rows_count_what_the_mean_needs() -> None:
    net, image = made("gated", "as given, floors"), torch.randn(1, 3, 256, 256, dtype=torch.float64)
    share = net.macs(image, within=[torch.tensor([[0, 0, 256, 16]])]).of_whole
    assert 0.3 < share < 1  # the stem of all of it, and a part of the head


def gradient_reach(model: nn.Module, image: Tensor, pixel: tuple[int, int]) -> tuple[int, int, int, int]:
    """The rows and columns of a picture that an output pixel depends on."""
    image = image.clone().requires_grad_()
    model(image)[0, :, pixel[0], pixel[1]].sum().backward()
    assert image.grad is not None
    touched = image.grad[0].abs().sum(0) > 0
    rows, columns = touched.any(1).nonzero().flatten(), touched.any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def probed(model: nn.Module) -> nn.Module:
    """A copy whose weights are positive and whose activations let everything through."""
    model = copy.deepcopy(model).double()
    for parameter in model.parameters():
        parameter.data = parameter.data.abs() + 0.01
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "segmenter", "residual segmenter"])
def test_the_part_holds_what_gradients_reach_and_little_more(name: str) -> None:
    model, size = probed(seeded(NETWORKS[name])), 256
    net = unverified(model, "all", coarsest=16, example_input=torch.rand(1, 3, 64, 64).double())
    image = torch.rand(1, 3, size, size).double()
    box = Box(127, 128, 127, 128)
    reads = net.in_region(image, [[box]], lambda region: region.reads, lambda *_: None)
    assert isinstance(reads, PictureReads)
    found = reads.part_for(box)
    height, width = net(image).shape[2:]
    reach = gradient_reach(model, image, (127 * height // size, 127 * width // size))
    assert found.top <= reach[0] and found.bottom >= reach[1]
    assert found.left <= reach[2] and found.right >= reach[3]
    step = max(one.step for one in reads.axes)
    assert found.bottom - found.top <= 1.15 * (reach[1] - reach[0]) + 2 * step


def test_parts_are_joined_where_that_is_no_more_work() -> None:
    whole = Box(0, 1000, 0, 1000)
    apart = [PicturePart(Box(0, 10, 0, 10), [0]), PicturePart(Box(500, 510, 500, 510), [1])]
    assert {part.box for part in joined(apart, whole)} == {part.box for part in apart}
    near = [
        PicturePart(Box(0, 100, 0, 100), [0]),
        PicturePart(Box(10, 110, 0, 100), [1]),
        PicturePart(Box(0, 100, 90, 190), [2]),
    ]
    (part,) = joined(near, whole)
    assert part.box == Box(0, 110, 0, 190) and sorted(part.boxes) == [0, 1, 2]
    large = [PicturePart(Box(0, 1000, 0, 600), [0]), PicturePart(Box(0, 600, 0, 1000), [1])]
    assert [part.box for part in joined(large, whole)] == [whole]


# -- refusals --------------------------------------------------------------------------------------------


NOTHING, SQUARE = [torch.zeros(0, 4)], torch.ones(2, 2, dtype=torch.bool)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another number": ({"boxes": NOTHING * 2}, "boxes are given for 2 images"),
    "no list": ({"boxes": "box"}, "boxes are"),
    "three numbers": ({"boxes": [torch.zeros(2, 3)]}, "they are"),
    "strings": ({"boxes": [["a"]]}, "they are"),
    "not finite": ({"boxes": [torch.tensor([[0, 0, float("nan"), 4]])]}, "NaN or infinite"),
    "turned": ({"boxes": [torch.tensor([[9, 0, 4, 4]])]}, "ends before it begins"),
    "outside": ({"boxes": [torch.tensor([[0, 0, 65, 4]])]}, "reaches beyond the image"),
    "before": ({"boxes": [torch.tensor([[-1, 0, 5, 4]])]}, "reaches beyond the image"),
    "nothing": ({}, "neither boxes nor an area"),
    "both": ({"area": SQUARE, "boxes": NOTHING}, "both given"),
    "outside of boxes": ({"boxes": NOTHING, "outside": 0}, "outside= is for an area"),
    "no booleans": ({"area": torch.ones(2, 2)}, "the area is"),
    "areas of two": ({"area": SQUARE.expand(2, 2, 2)}, "given for 2 images"),
    "two corners": ({"area": [torch.zeros(2, 2)]}, "a polygon is"),
    "a corner": ({"area": [torch.full((3, 2), float("inf"))]}, "NaN or infinite"),
    "another shape": ({"area": SQUARE, "outside": torch.zeros(1, 1)}, "has the shapes"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_boxes_and_areas_are_refused_in_words(what: str) -> None:
    net, (options, words) = made("unet", "as given, floors"), WRONG[what]
    with pytest.raises(cs.InvalidInput, match=words) as caught:
        cs.read_within(net, torch.rand(1, 3, 64, 64).double(), **options)
    assert caught.value.next


def test_networks_that_are_not_computed_in_boxes_are_refused_in_words() -> None:
    image, boxes = torch.rand(1, 3, 64, 64), [torch.tensor([[0, 0, 4, 4]])]
    with pytest.raises(cs.InvalidInput, match="cannot be computed in boxes"):
        cs.read_within(nn.Conv2d(3, 3, 3), image, boxes)  # type: ignore[arg-type]
    net = deepcopy(made("unet", "as given, floors", torch.float32, fast=False)).train()
    with pytest.raises(cs.InvalidInput, match="training mode"):
        cs.read_within(net, image, boxes)
    with pytest.raises(cs.InvalidInput, match="with an image only"):
        net.macs(image, image, within=boxes)


def test_gradients_flow_through_boxes() -> None:
    net = made("unet", "as given, floors", fast=False)
    image = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    ((part,),) = cs.read_within(net, image, [torch.tensor([[50, 50, 60, 60]])])
    part.sum().backward()
    found = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    net(image)[:, :, 50:60, 50:60].sum().backward()
    for one, parameter in zip(found, net.parameters(), strict=True):
        assert one is not None and parameter.grad is not None and torch.allclose(one, parameter.grad)


# -- random networks, and those of the corpus ------------------------------------------------------------


def random_boxes(draw: random.Random, size: tuple[int, int]) -> Tensor:
    boxes = []
    for _ in range(draw.randint(0, 3)):
        x, y = draw.randint(0, size[1] - 1), draw.randint(0, size[0] - 1)
        wide, tall = draw.choice([1, 5, 20, size[1]]), draw.choice([1, 5, 20, size[0]])
        boxes.append([x, y, min(x + wide, size[1]), min(y + tall, size[0])])
    return torch.tensor(boxes).reshape(-1, 4)


def check_random(seed: int) -> int:
    """Compare a random network in random boxes; return how often it was computed."""
    case, draw, computed = random_case(seed), random.Random(seed), 0
    if case.more:
        return 0
    for options, mask in WAYS.values():
        torch.manual_seed(seed)
        size = draw.choice([(128, 160), (160, 96), (draw.randint(70, 160), draw.randint(70, 160))])
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        try:
            net = unverified(
                case.model, "none" if mask == "levels" else mask, example_input=case.given, **options
            )
            net = net.optimize() if draw.random() < 0.5 else net
            levels = some_levels(net, images) if mask == "levels" else None
            whole = net(images, mask=levels)
        except cs.CadError:
            continue
        boxes = [random_boxes(draw, size) for _ in images]
        try:
            found = cs.read_within(net, images, boxes, mask=levels)
        except cs.CannotConvert as refusal:
            assert refusal.why and refusal.next, seed
            continue
        assert_parts(whole, found, boxes, size)
        computed += 1
    return computed


@pytest.mark.parametrize("seed", [3, 14, 31])
@torch.no_grad()
def test_random_networks_in_boxes(seed: int) -> None:
    check_random(seed)


@pytest.mark.slow
@torch.no_grad()
def test_many_random_networks_in_boxes() -> None:
    assert sum(check_random(seed) for seed in range(SEEDS)) >= SEEDS // 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_networks_of_the_corpus_in_boxes(way: str) -> None:
    """Outputs of any layout: their axes of height and width are those that the package names."""
    computed, size, boxes = (
        0,
        (160, 224),
        torch.tensor([[20, 30, 44, 50], [0, 0, 3, 3], [210, 150, 224, 160]]),
    )
    options, mask = WAYS[way]
    for one in (one for one in read_corpus(CHECKOUT) if one.call is None):
        torch.manual_seed(0)
        image, example = torch.rand(1, 3, *size).double(), torch.rand(1, 3, *(one.size or (96, 128))).double()
        try:
            model = one.build().eval().double()
            net = unverified(model, "none" if mask == "levels" else mask, example_input=example, **options)
            net = net.optimize()
            levels = mask_of(net, image, way)
            output = net(image, mask=levels)
            whole = tree_leaves(vars(output) if is_dataclass(output) else output)
        except Exception:  # it takes other arguments, or no such picture, and says so by any error
            continue
        try:
            values = net.in_region(
                image,
                boxes_of([boxes], image),
                lambda region: region.read(net.answer),  # noqa: B023 (called at once)
                _by_rows,
                levels,
            )
        except cs.CannotConvert as refusal:
            assert refusal.why and refusal.next, one.name
            continue
        for part, (x0, y0, x1, y1) in zip(values.parts[0], boxes.tolist(), strict=True):
            for own, other, axes in zip(tree_leaves(part), whole, values.axes, strict=False):
                for axis, span, of in (
                    zip(axes or (), ((y0, y1), (x0, x1)), size, strict=True) if axes else ()
                ):
                    first = span[0] * other.shape[axis] // of
                    end = -(-span[1] * other.shape[axis] // of)
                    other = other.narrow(axis, first, end - first)
                if axes:
                    assert (own - other).abs().max() <= 1e-12 * other.abs().max().clamp(min=1), one.name
        computed += 1
    assert computed >= 20


# Of families of timm and torchvision whose last map depends on a part of the picture, a network each.
FAMILIES = [
    "alexnet",
    "cs3darknet_focus_s",
    "efficientnet_es_pruned",
    "googlenet",
    "inception_resnet_v2",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenetv1_100",
    "nf_resnet26",
    "regnet_x_400mf",
    "resnetblur50",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "tf_efficientnet_lite0",
    "vovnet39a",
    "convnext_atto",
    "cspdarknet53",
    "cspresnet50",
    "darknet17",
    "densenet121",
    "dla34",
    "dpn48b",
    "fasternet_t0",
    "fastvit_t8",
    "fbnetc_100",
    "gernet_s",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "inception_next_atto",
    "mobilenetv4_conv_small_035",
    "mobileone_s0",
    "repvgg_a0",
    "res2net50_14w_8s",
    "resnet18",
    "resnetv2_18d",
    "resnext26ts",
    "selecsls42",
    "starnet_s050",
    "vgg11",
    "xception41",
]


class LastMap(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.features = timm.create_model(name, features_only=True, out_indices=(-1,))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[0]


def last_map(name: str) -> nn.Module:
    """A network up to its last map; one of torchvision without what reads all of that."""
    if timm.is_model(name):
        return LastMap(name)
    options = {"init_weights": False} if name == "googlenet" else {}
    children = torchvision.models.get_model(name, weights=None, **options).named_children()
    before = takewhile(lambda child: child[0] not in ("avgpool", "classifier", "fc"), children)
    return nn.Sequential(*(child for place, child in before if not place.lower().startswith("aux")))


class Mean(nn.AvgPool2d):
    """In place of a largest value, whose gradient reaches one of those that are read."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)


def transparent(model: nn.Module) -> nn.Module:
    """A network whose gradients reach all that it reads: weights that average, norms that change nothing, activations
    that do not end."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.abs() + 1e-3
        if parameter.dim() > 1:
            rest = [1] * (parameter.dim() - 1)
            parameter.data /= parameter.data.flatten(1).sum(1).view(-1, *rest)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.fill_(float(name.endswith("var")))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.MaxPool2d:
                setattr(module, name, Mean(child))
            elif type(child) is nn.ReLU6:
                setattr(module, name, nn.ReLU())
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_reach_of_families_is_that_of_gradients(name: str) -> None:
    model, length, width = last_map(name).eval(), 2048, 128 if name.startswith("inception_") else 64
    net = unverified(model, "all", coarsest=32, example_input=torch.rand(1, 3, width, width))
    box, image = Box(length // 2, length // 2 + 1, 32, 33), torch.rand(1, 3, length, width)
    reads = net.in_region(image, [[box]], lambda region: region.reads, lambda *_: None)
    assert reads is not None
    first, end = reads.needed(box)[0][reads.seen.image]
    model, image = transparent(model).double(), image.double().requires_grad_()
    output = model(image)
    rows = box.of_map((output.shape[2], output.shape[3]), (length, width)).spans[0]
    output[0, :, slice(*rows)].sum().backward()
    assert image.grad is not None
    touched = image.grad[0].abs().sum((0, 2)).nonzero().flatten()
    assert first <= touched[0] and end > touched[-1]
    assert end - first <= 1.15 * int(touched[-1] + 1 - touched[0])


@torch.no_grad()
def test_padded_batches_have_boxes_of_some_pictures() -> None:
    """Masks are those of each picture without its padding, also where a part is computed of one picture only."""
    net, images = made("unet", "floors"), torch.randn(2, 3, 128, 96, dtype=torch.float64)
    net.mask = "gradient | budget:fraction=0.4"
    boxes = [torch.zeros(0, 4), torch.tensor([[10, 10, 20, 30], [0, 60, 9, 69]])]
    with cs.masks.sized([(128, 96), (100, 80)]):
        assert_parts(net(images), cs.read_within(net, images, boxes), boxes, (128, 96))
