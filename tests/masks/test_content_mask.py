"""Masks of cells: `content` keeps what differs from a smooth background by more than noise, `preview` what responds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import strided
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.masks import FineMapSpec, resolve_mask
from cadsurgery.masks.content import median, samples_of

CELL = 32


def grid(size: tuple[int, int], batch: int = 1) -> FineMapSpec:
    return FineMapSpec(batch, size, 1, 5, CELL, CELL)


def page(noise: float, slope: float = 0.0) -> Tensor:
    """A page, lit unevenly and noisy, with writing in one cell."""
    torch.manual_seed(0)
    light = torch.linspace(0, slope, 160).view(1, 1, 1, -1)
    image = 2 + light + noise * torch.randn(1, 3, 128, 160)
    image[..., 40:56:4, 40:60] -= 3
    return image


def kept(image: Tensor, spec: str = "content:margin=0") -> Tensor:
    return resolve_mask(spec)(image, image, grid((128, 160)))[0, ::CELL, ::CELL]


@pytest.mark.parametrize(
    ("noise", "slope", "margin"),
    [(0.0, 0.0, 0), (0.05, 0.0, 0), (0.2, 0.0, 0), (0.05, 4.0, 0), (0.05, 0.0, 1)],
)
def test_writing_is_kept_whatever_the_paper_and_the_light(noise: float, slope: float, margin: int) -> None:
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[1 - margin : 2 + margin, 1 - margin : 2 + margin] = True
    assert torch.equal(kept(page(noise, slope), "content" if margin else "content:margin=0"), expected)


def test_a_blank_page_keeps_nothing_and_sizes_may_be_odd() -> None:
    blank = torch.full((2, 3, 101, 75), 0.5)
    map_ = resolve_mask("content")(blank, blank, grid((101, 75), 2))
    assert map_.shape == (2, 101, 75) and not map_.any()


@pytest.mark.parametrize("options", [{"coarsest": 32}, {"output_stride": (4, 32)}])
def test_cells_are_kept_where_the_map_has_the_image(options: dict[str, Any]) -> None:
    """A padding of 100 in front puts the image in the middle of the map, up to half a cell; what is around is low."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=100), nn.ReLU(), strided(5, inputs=4)).eval()
    image = page(0.05)
    net = cs.adaptify(model, "content:margin=0", example_input=image, verify_laws=False, **options)
    net(image)
    side = CELL // options.get("output_stride", (1,))[0]
    assert net.levels.shape[1:] == tuple(-(-(length + 198) * side // CELL) for length in (128, 160))
    expected = torch.zeros_like(net.levels[0, ::side, ::side], dtype=torch.bool)
    expected[1 + 96 // CELL, 1 + 96 // CELL] = True
    assert torch.equal(net.levels[0, ::side, ::side] == 0, expected)


def dark(spread: float) -> tuple[Tensor, tuple[float, float]]:
    """A bright cell on a noisy ground that use a part of 0..1, and mean and deviation of the picture."""
    torch.manual_seed(0)
    picture = 0.05 + 0.005 * torch.randn(1, 1, 128, 160)
    picture[..., 40:56, 40:60] += 0.8
    picture = (spread * picture).clamp(min=0)
    return picture, (float(picture.mean()), float(picture.std()))


@pytest.mark.parametrize(("spread", "channels"), [(1.0, 1), (1 / 200, 3)])
def test_of_dark_pictures_the_same_is_kept_if_their_statistics_are_stated(
    spread: float, channels: int
) -> None:
    """12 bits in a file of 16 use a sixteenth of 0..1."""
    picture, (mean, std) = dark(spread)
    model = strided(3, inputs=channels).eval()
    example = ((picture - mean) / std).expand(-1, channels, -1, -1)
    net = cs.adaptify(
        model,
        "content:margin=0",
        coarsest=CELL,
        normalisation=(mean, std),
        example_input=example,
        verify_laws=False,
    )
    net(example)
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[1, 1] = True
    side = net.levels.shape[1] // 4
    assert torch.equal(net.levels[0, ::side, ::side] == 0, expected)


@pytest.mark.parametrize("mask", ["content", "content + edges:threshold=90"])
def test_a_mask_that_keeps_nothing_of_the_example_says_contrast_and_threshold(mask: str) -> None:
    picture, _ = dark(1 / 16)
    example = picture.expand(-1, 3, -1, -1)
    words = r"keeps nothing of the example[\s\S]*contrast of at most 0?\S+ in it, and its threshold is \d"
    with pytest.warns(cs.CadWarning, match=words):
        cs.adaptify(strided(3), mask, coarsest=CELL, example_input=example, verify_laws=False)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (101, 75)])
def test_samples_on_a_grid_have_the_median_of_each_picture(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.rand(2, *size) * torch.tensor([1.0, 5.0]).view(2, 1, 1)
    expected = values.flatten(1).quantile(0.5, 1)
    assert ((median(samples_of(values)) - expected).abs() < expected * max(0.05, 2 / min(size))).all()


# -- `preview`: the network on a smaller picture says where something is -------------------------------


class Spots(nn.Module):
    """Strided convolutions with positive weights, and a map of the picture's size, high where the picture is bright."""

    def __init__(self, answer: str = "map") -> None:
        super().__init__()
        self.answer = answer
        self.down = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 4), (4, 4), (4, 4)))
        for conv in self.down:
            nn.init.constant_(conv.weight, 0.1)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Any:
        y = x
        for conv in self.down:
            y = conv(y).relu()
        if self.answer == "class":
            return y.mean((2, 3))
        y = F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
        return {"out": y, "deep": y[:, :1]} if self.answer == "dictionary" else y


def spotted(height: int, width: int, *places: tuple[int, int]) -> Tensor:
    """Return a dark picture with a bright square in the middle of some cells of 32 pixels."""
    image = torch.zeros(1, 3, height, width)
    for row, column in places:
        image[..., 32 * row + 8 : 32 * row + 24, 32 * column + 8 : 32 * column + 24] = 4
    return image


def previewing(answer: str = "map", mask: str = "preview") -> Any:
    model = Spots(answer).eval()
    return cs.adaptify(
        model,
        mask,
        coarsest=32,
        example_input=torch.rand(1, 3, 128, 128),
        normalisation="raw",
        verify_laws=False,
    )


def kept_of(net: Any) -> Tensor:
    return net.levels[0, ::32, ::32] == 0


@pytest.mark.parametrize(
    ("answer", "size", "mask", "margin"),
    [
        ("map", (256, 320), "preview:threshold=0.6,margin=0,scale=0.5", 0),
        ("dictionary", (230, 301), "preview:threshold=0.6,margin=0,scale=0.5", 0),
        ("map", (256, 320), "preview:threshold=0.6,scale=0.5", 1),
        ("map", (256, 320), "preview:least=1e6", None),
    ],
)
def test_cells_with_a_response_are_kept_and_those_around(
    answer: str, size: tuple[int, int], mask: str, margin: int | None
) -> None:
    """What is less than the least is no response."""
    net, places = previewing(answer, mask), ((2, 3), (5, 7))
    expected = torch.zeros(-(-size[0] // 32), -(-size[1] // 32), dtype=torch.bool)
    for row, column in places if margin is not None else ():
        expected[row - margin : row + margin + 1, column - margin : column + margin + 1] = True
    for form in (net, net.optimize()):
        with torch.no_grad():
            form(spotted(*size, *places))
        assert torch.equal(kept_of(form), expected)


def test_optimised_copies_look_at_the_network_as_given() -> None:
    """What lies between the samples of the floor, 32 pixels apart, shows only on the network's own grid."""
    net, image = previewing(mask="preview:scale=1,threshold=0.5,margin=0"), torch.zeros(1, 3, 128, 128)
    image[..., 70:78, 40:60] = 4
    net(image)
    expected = kept_of(net)
    assert expected.sum() == 1
    fast = net.optimize()
    fast(image)
    assert torch.equal(kept_of(fast), expected)


def test_a_conversion_to_a_finer_stride_previews_the_network_as_given() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)).eval()
    net = cs.adaptify(
        model,
        "preview:threshold=0.5,margin=0,scale=0.5",
        output_stride=(2, 8),
        normalisation="raw",
        verify_laws=False,
    )
    net(spotted(128, 128, (1, 2)))
    assert 0 < net.active_fraction < 0.3


def test_its_work_is_counted() -> None:
    """Law 7: the preview takes the multiply-accumulates of the network as given on the smaller picture."""
    net, image = previewing(mask="preview:scale=0.5"), spotted(256, 256, (4, 4))
    layer = next(layer for layer in net.macs(image).layers if layer.layer == "(first pass)")
    assert layer.mask == net.macs(torch.zeros(1, 3, 128, 128), mask="all").given
