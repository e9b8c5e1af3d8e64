"""Channels of pictures: bands of files in any order and form become as many channels as a network reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import Run, covering
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as torchvision_functional

import cadsurgery as cs
from cadsurgery.data import open_pictures
from cadsurgery.data.images import (
    as_channels,
    check_values,
    find_images,
    normalise,
    read_image,
    read_labels,
    read_picture_for,
    shown,
    statistics_of,
)
from cadsurgery.data.networks import IMAGENET_MEAN, IMAGENET_STD, Source, channels_of, source_of
from cadsurgery.data.tiff import TiffRows

RANDOM = np.random.default_rng(0)
HEIGHT, WIDTH = 20, 28


def values(bands: int, dtype: str) -> np.ndarray[Any, Any]:
    """Random values (bands, H, W) over the whole range of a type; floating-point ones also beyond 0..1."""
    if dtype.startswith("float"):
        return RANDOM.uniform(-0.5, 2.5, (bands, HEIGHT, WIDTH)).astype(dtype)
    limits = np.iinfo(dtype)
    return RANDOM.integers(limits.min, limits.max, (bands, HEIGHT, WIDTH), dtype, endpoint=True)


def scaled(stored: np.ndarray[Any, Any]) -> Tensor:
    """Integers over the largest value of their type, others as they are."""
    largest = np.iinfo(stored.dtype).max if stored.dtype.kind in "iu" else 1
    return torch.from_numpy((stored.astype(np.float64) / largest).astype(np.float32))


def tiff(path: Path, stored: np.ndarray[Any, Any], planar: bool = True, **options: Any) -> Path:
    """Write bands (C, H, W) as one picture, planar or chunky."""
    pixels = stored if planar else np.ascontiguousarray(np.moveaxis(stored, 0, -1))
    form = "separate" if planar else "contig"
    options = {"photometric": "minisblack", **options}
    tifffile.imwrite(path, pixels, planarconfig=form if len(stored) > 1 else None, **options)
    return path


# -- files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "planar", "form"),
    covering(["uint8", "uint16", "int16", "float32"], [True, False], ["strips", "tiles", "deflate"]),
)
def test_bands_of_a_tiff_are_its_values_over_the_range_of_their_type(
    tmp_path: Path, dtype: str, planar: bool, form: str
) -> None:
    options = {"strips": {}, "tiles": {"tile": (16, 16)}, "deflate": {"compression": "zlib"}}[form]
    stored = values(6, dtype)
    found = read_image(tiff(tmp_path / "tile.tif", stored, planar, **options), channels=6)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scaled(stored), rtol=1e-6, atol=1e-7)


# How several pictures come into one file, by what is told of their axis.
STACKS: dict[str, dict[str, Any]] = {
    "an array": {},
    "times, ImageJ": {"metadata": {"axes": "TYX"}, "imagej": True},
    "times, OME": {"metadata": {"axes": "TYX"}, "ome": True},
}


@pytest.mark.parametrize(
    ("count", "dtype", "stack"), covering([2, 3, 6], ["uint8", "uint16", "float32"], [*STACKS])
)
def test_pictures_in_a_stack_are_no_bands_and_each_is_read_by_its_page(
    tmp_path: Path, stack: str, dtype: str, count: int
) -> None:
    stored, path = values(count, dtype), tmp_path / "stack.tif"
    tifffile.imwrite(path, stored, photometric="minisblack", **STACKS[stack])
    for channels in (None, 1, count):
        with pytest.raises(cs.FileError, match=f"holds {count} pictures") as caught:
            read_image(path, channels=channels)
        assert f"{path},page=0" in caught.value.next and "planarconfig" in caught.value.next
        assert f"page 0: {WIDTH} x {HEIGHT}" in caught.value.what
    with pytest.raises(cs.FileError):
        TiffRows(path)
    if stack == "times, ImageJ":  # behind each other in one page
        return
    for number in range(count):
        page = read_image(f"{path},page={number}", channels=1)
        torch.testing.assert_close(page, scaled(stored[number : number + 1]), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(TiffRows(f"{path},page={number}").rows(0, HEIGHT), page)
    with pytest.raises(cs.FileError, match=f"no page {count}"):
        read_image(f"{path},page={count}")


def pages_of(layout: str, stored: np.ndarray[Any, Any], write: Any) -> None:
    """Write a picture (H, W, C) and what stands beside it in files of this kind."""
    kind: dict[str, Any] = {"photometric": "rgb" if stored.shape[-1] == 3 else "minisblack", "metadata": None}
    kind |= {"planarconfig": "contig"} if stored.shape[-1] > 1 else {}
    inside = stored[..., 0] > 9
    stored = stored if stored.shape[-1] > 1 else stored[..., 0]
    half, mask = stored[::2, ::2], {"subfiletype": 4, "photometric": 4, "metadata": None}
    slide = "Aperio Image Library v11\n{} (64x64) JPEG|AppMag = 20"
    if layout == "a copy before it":
        write(half, **kind, subfiletype=1)
        write(stored, **kind)
    elif layout == "copies and masks":
        write(stored, **kind)
        write(inside, **mask)
        write(half, **kind, subfiletype=1)
        write(inside[::2, ::2], **{**mask, "subfiletype": 5})
    elif layout == "SubIFDs":
        write(stored, **kind, subifds=2)
        write(half, **kind, subfiletype=1)
        write(half[::2, ::2], **kind, subfiletype=1)
    elif layout == "a slide":
        write(stored, **kind, tile=(16, 16), description=slide.format("full"))
        write(stored[::4, ::4], **kind, description="Aperio thumbnail")
        write(stored[::4, ::4], **kind, tile=(16, 16), description=slide.format("quarter"))
        write(stored[:10, :9], **kind, subfiletype=1, description="Aperio label 9x10")
        write(stored[:10, :14], **kind, subfiletype=9, description="Aperio macro 14x10")


LAYOUTS = ("a copy before it", "copies and masks", "SubIFDs", "a slide")


@pytest.mark.parametrize(
    ("bands", "dtype", "bigtiff", "byteorder"),
    covering([1, 3, 5], ["uint8", "uint16", "float32"], [False, True], ["<", ">"]),
)
def test_the_full_picture_is_read_among_copies_masks_and_labels(
    tmp_path: Path, bands: int, dtype: str, bigtiff: bool, byteorder: Any
) -> None:
    stored = np.moveaxis(values(bands, dtype), 0, -1)
    for layout in LAYOUTS:
        path = tmp_path / f"{layout}.tif"
        with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder=byteorder) as file:
            pages_of(layout, stored, file.write)
        expected = scaled(np.ascontiguousarray(np.moveaxis(stored, -1, 0)))
        found = read_image(path, channels=None)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=layout)
        rows = TiffRows(path).rows(0, HEIGHT)
        if layout == "copies and masks":  # pixels that the mask leaves out have no data
            expected = expected.masked_fill(torch.from_numpy(stored[..., 0] <= 9), torch.nan)
        torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-7, equal_nan=True, msg=layout)
        if bands == 1 and dtype != "float32":
            assert np.array_equal(read_labels(path).numpy(), stored[..., 0]), layout
    half = read_image(f"{tmp_path / 'a copy before it.tif'},page=0", channels=None)
    assert half.shape == (bands, HEIGHT // 2, WIDTH // 2)
    inside = read_image(f"{tmp_path / 'copies and masks.tif'},page=1", channels=1)
    assert set(inside.unique().tolist()) <= {0, 1}


def test_a_page_is_named_wherever_a_picture_is(tmp_path: Path, command_line: Run) -> None:
    first, second = values(3, "uint8"), values(3, "uint8")
    with tifffile.TiffWriter(tmp_path / "two.tif") as file:
        for stored in (first, second):
            file.write(np.moveaxis(stored, 0, -1), photometric="rgb", metadata=None)
    named = f"{tmp_path / 'two.tif'},page=1"
    assert torch.equal(open_pictures(named)[0][0], scaled(second))
    assert [str(path) for path in find_images([Path(named)])[0]] == [named]
    assert command_line("mask", named, "--output-stride", "2,8", "-o", "mask.png").code == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(cs.FileError, match="has no pages"):
        read_image(f"{tmp_path / 'a.png'},page=0")
    with pytest.raises(cs.FileError, match=r"no file .*gone\.tif"):
        read_image(f"{tmp_path / 'gone.tif'},page=0")
    (tmp_path / "two.tif,page=1").write_bytes((tmp_path / "a.png").read_bytes())  # a file of this name
    assert read_image(named).shape == (3, 8, 8)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_bands_whose_0_is_white_are_read_as_viewers_show_them(tmp_path: Path, dtype: str) -> None:
    stored = values(2, dtype)
    path = tiff(tmp_path / "tile.tif", stored, photometric="miniswhite")
    torch.testing.assert_close(read_image(path, channels=2), 1 - scaled(stored))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_of_bands_is_turned_as_pictures_are(tmp_path: Path, orientation: int) -> None:
    stored = values(5, "uint8")
    tags = [(274, "H", 1, orientation, True)]
    deep = tiff(tmp_path / "tile.tif", stored, extratags=tags)
    plain = Image.fromarray(stored[0])
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain.save(tmp_path / "plain.png", exif=exif)
    expected = read_image(tmp_path / "plain.png", channels=1)
    torch.testing.assert_close(read_image(deep, channels=1, bands=[1]), expected)
    as_stored = read_image(deep, channels=None, upright=False)
    torch.testing.assert_close(as_stored, scaled(stored))


def test_what_needs_another_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiff(tmp_path / "tile.tif", values(6, "uint16"), compression="zlib")
    page = tifffile.TiffFile(path).pages.first
    data = bytearray(path.read_bytes())
    place = page.tags["Compression"].valueoffset
    data[place : place + 2] = (5).to_bytes(2, "little")  # LZW
    path.write_bytes(data)
    monkeypatch.setattr(tifffile.TIFF.DECOMPRESSORS, "_codecs", {1: None}, raising=False)
    if 5 in tifffile.TIFF.DECOMPRESSORS:
        pytest.skip("imagecodecs is installed")
    with pytest.raises(cs.FileError, match="compressed by LZW") as caught:
        read_image(path, channels=6)
    assert "imagecodecs" in caught.value.next


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["1", "LA", "P", "CMYK", "I;16"])
def test_every_kind_of_picture_is_read_in_grey_and_in_colour(tmp_path: Path, mode: str) -> None:
    noise = Image.effect_noise((WIDTH, HEIGHT), 60)
    path = tmp_path / f"picture.{'tif' if mode == 'CMYK' else 'png'}"
    (noise if mode == "I;16" else noise.convert("RGB")).convert(mode).save(path)
    grey, colour = (read_image(path, channels=channels) for channels in (1, 3))
    for found, channels in ((grey, 1), (colour, 3)):
        assert found.shape == (channels, HEIGHT, WIDTH) and 0 <= found.min() < found.max() <= 1
    torch.testing.assert_close(as_channels(colour, 1), grey, rtol=0, atol=2e-4)


def test_transparency_is_left_out_unless_a_band_or_as_many_channels_ask_for_it(tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "clear.png")
    bands = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    assert torch.equal(read_image(tmp_path / "clear.png"), bands[:3])
    assert torch.equal(read_image(tmp_path / "clear.png", channels=4), bands)
    assert torch.equal(read_image(tmp_path / "clear.png", channels=2, bands=[4, 1]), bands[[3, 0]])
    assert torch.equal(read_image(tmp_path / "clear.png", channels=None), bands[:3])


@pytest.mark.parametrize(("bands", "channels"), [(4, 3), (2, 1), (4, None), (2, 3), (4, 1)])
def test_transparency_is_left_out_and_colours_stay_in_their_order(bands: int, channels: int | None) -> None:
    image = torch.rand(bands, 5, 6)
    found = as_channels(image, channels, has_alpha=True)
    colours = as_channels(image[:-1], channels)
    assert torch.equal(found, colours)


# -- rules ---------------------------------------------------------------------------------------------


def test_grey_is_torchvisions_luma_and_colour_is_grey_repeated() -> None:
    image = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    expected = torchvision_functional.rgb_to_grayscale(image)
    torch.testing.assert_close(as_channels(image, 1), expected)
    grey = torch.rand(1, 5, 7)
    assert torch.equal(as_channels(grey, 3), grey.expand(3, -1, -1))


@pytest.mark.parametrize(("stored", "channels"), [(6, 3), (3, 6), (2, 1)])
def test_where_there_is_no_rule_both_numbers_and_the_remedy_are_named(
    tmp_path: Path, stored: int, channels: int
) -> None:
    path = tiff(tmp_path / "tile.tif", values(stored, "float32"))
    with pytest.raises(cs.InvalidInput) as caught:
        read_image(path, channels=channels)
    assert f"{stored} band" in caught.value.what and f"reads {channels} channel" in caught.value.what
    assert "tile.tif" in caught.value.what
    assert ("--bands" in caught.value.next) == (stored > channels)
    with pytest.raises(cs.InvalidInput, match=f"no band {stored + 1}") as caught:
        read_image(path, channels=1, bands=[stored + 1])
    assert "--bands" in caught.value.next


@pytest.mark.parametrize("bands", [(0,), "3,2,1", (1.5,), (True,)])
def test_what_is_no_list_of_bands_is_refused(bands: Any) -> None:
    with pytest.raises(cs.InvalidInput, match="bands"):
        cs.open_data("scene:1", bands=bands)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_pictures_are_normalised_for_each_channel(channels: int) -> None:
    image = torch.rand(channels, 8, 9)
    mean = tuple(float(channel) for channel in torch.rand(channels))
    std = tuple(float(channel) + 0.1 for channel in torch.rand(channels))
    found = normalise(image, Source("mine", mean=mean, std=std, channels=channels))
    expected = torchvision_functional.normalize(image, list(mean), list(std))
    torch.testing.assert_close(found, expected)
    usual = normalise(image, Source("mine", channels=channels))
    if channels != 3:
        averages = [[sum(part) / 3] * channels for part in (IMAGENET_MEAN, IMAGENET_STD)]
        torch.testing.assert_close(usual, torchvision_functional.normalize(image, *averages))


def test_mean_and_deviation_of_bands_are_those_of_all_pixels() -> None:
    pictures = [5 * torch.rand(6, 8, 9) - 1, torch.rand(6, 4, 3)]
    pixels = torch.cat([picture.double().flatten(1) for picture in pictures], 1)
    mean, std = statistics_of(pictures)
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean(1), check_dtype=False)
    torch.testing.assert_close(torch.tensor(std).double(), pixels.std(1, correction=0), check_dtype=False)
    assert statistics_of([torch.full((2, 3, 4), 0.5)]) == ((0.5, 0.5), (1.0, 1.0))
    with pytest.raises(cs.InvalidInput, match="no pictures"):
        statistics_of([])
    with pytest.raises(cs.InvalidInput, match="6 and 3 channels"):
        statistics_of([torch.rand(6, 4, 4), torch.rand(3, 4, 4)])


def test_values_in_another_unit_than_the_networks_are_refused(tmp_path: Path) -> None:
    path = tiff(tmp_path / "slice.tif", 1000 * values(1, "float32"))
    with pytest.raises(cs.InvalidInput, match=r"slice\.tif holds floating-point values") as caught:
        read_picture_for(Source("mine", channels=1), path)
    assert "--normalisation" in caught.value.next
    source = Source("mine", mean=(1000.0,), std=(500.0,), channels=1)
    assert read_picture_for(source, path).shape == (1, HEIGHT, WIDTH)
    check_values(torch.full((3, 2, 2), 1.6), Source("mine"), "a bright picture")


def test_pixels_without_data_are_refused_where_a_network_reads_them(tmp_path: Path) -> None:
    stored = values(6, "float32")
    stored[:, 0, 0], stored[2, 3, 4] = -9999, np.nan
    path = tiff(tmp_path / "tile.tif", stored, extratags=[(42113, "s", 0, "-9999", True)])
    assert read_image(path, channels=6).isnan().sum() == 7  # as it is, for Python
    with pytest.raises(cs.InvalidInput, match="2 pixels without data") as caught:
        read_picture_for(Source("mine", channels=6), path)
    assert "fill them" in caught.value.next


# Values for pixels without data as files state them, by type, and the value that is stored.
NO_DATA = {
    "uint8": {"0.0": 0, " 7\0": 7},
    "int16": {"-32768": -32768},
    "float32": {"-3.4028234663852886e+38": np.finfo(np.float32).min, "nan": np.nan},
}
STATED = [(kind, text) for kind, texts in NO_DATA.items() for text in texts]


@pytest.mark.parametrize(("stated", "bands"), covering([*STATED], [1, 3, 4]))
def test_the_value_for_no_data_is_no_signal_in_any_type(
    tmp_path: Path, stated: tuple[str, str], bands: int
) -> None:
    dtype, text = stated
    stored = values(bands, dtype)
    stored[stored == NO_DATA[dtype][text]] = 1
    stored[:, 2:5, 3] = NO_DATA[dtype][text]
    forms: list[dict[str, Any]] = [{}, {"compression": "zlib"}, {"tile": (16, 16)}, {"planar": False}]
    for number, form in enumerate(forms):
        tags = [(42113, "s", 0, text, True)]
        path = tiff(tmp_path / f"{number}.tif", stored, extratags=tags, **form)
        whole, rows = (
            read_image(path, channels=bands, bands=[*range(1, bands + 1)]),
            TiffRows(path).rows(0, HEIGHT),
        )
        for found in (whole, rows):
            assert found[:, 2:5, 3].isnan().all() and found.isnan().sum() == 3 * bands, form
        with pytest.raises(cs.InvalidInput, match="3 pixels without data"):
            read_picture_for(None, path)
        with pytest.raises(cs.InvalidInput, match="pixels without data"):  # resized, they spread
            read_picture_for(None, path, (10, 14))
    plain = tiff(tmp_path / "plain.tif", stored)
    assert read_image(plain, channels=None).isnan().any() == (text == "nan")


@pytest.mark.parametrize("text", ["-9999", "0.5", "1e9", "nothing", ""])
def test_a_value_that_no_pixel_can_have_marks_none(tmp_path: Path, text: str) -> None:
    stored = values(3, "uint8")
    path = tiff(tmp_path / "tile.tif", stored, extratags=[(42113, "s", 0, text or "\0", True)])
    torch.testing.assert_close(read_picture_for(None, path), scaled(stored))


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 6])
def test_pictures_of_any_bands_are_drawn_in_colour(bands: int) -> None:
    drawn = shown(torch.rand(bands, 8, 9) * 2000 - 500)
    assert drawn.shape == (3, 8, 9) and drawn.min() == 0 and drawn.max() == 1
    assert torch.equal(shown(drawn), drawn)


# -- data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_grey_and_colour_pictures_is_read_in_the_channels_of_the_network(
    tmp_path: Path, channels: int
) -> None:
    colour = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for name, pixels in (("a", colour[..., 0]), ("b", colour), ("c", colour[..., 0].astype(np.uint16) * 257)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    data = cs.open_data(f"images:{tmp_path}", "all").read_for(Source("mine", channels=channels))
    images = torch.stack([data[place][0] for place in range(3)])
    assert images.shape == (3, channels, HEIGHT, WIDTH)
    torch.testing.assert_close(images[0], images[2])
    torch.testing.assert_close(images[1], read_image(tmp_path / "b.png", channels=channels))


# -- networks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 6])
def test_a_network_reads_as_many_channels_as_its_first_layer(channels: int) -> None:
    network = nn.Sequential(nn.Conv2d(channels, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert channels_of(network) == channels == source_of(network).channels
    assert network.training and all(
        torch.equal(before[name], value) for name, value in network.state_dict().items()
    )
    assert channels_of(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3, 2, 1))) == 3
