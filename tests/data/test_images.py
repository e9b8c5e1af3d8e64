"""Laws of pictures: what is read is what a file shows; what is written is what its name says."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import Run, covering
from PIL import Image

import cadsurgery as cs
from cadsurgery.data import limits
from cadsurgery.data.datasets import SegmentationData
from cadsurgery.data.images import find_images, read_image, read_labels, write_picture
from cadsurgery.support.errors import LeftOut
from cadsurgery.tasks.figures import class_picture

GREY = np.random.default_rng(0).integers(0, 256, (48, 64), dtype=np.uint8)


def stored(path: Path, values: np.ndarray[Any, Any], **options: Any) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


# -- reading -------------------------------------------------------------------------------------------


def test_a_wide_picture_of_data_whose_range_is_not_known_is_refused() -> None:
    picture = Image.fromarray(GREY.astype(np.int32) * 1000)
    data = SegmentationData("mine", "all", (), ("strange",), lambda place: (picture, None), ((255, 255),))
    with pytest.raises(cs.FileError, match="of mode I") as caught:
        data[0]
    assert "strange" in caught.value.what and "8 or 16 bits" in caught.value.next


def test_pictures_are_turned_as_viewers_show_them_unless_pixels_as_stored_are_asked_for(
    tmp_path: Path,
) -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 6  # the camera was held on its side
    path = stored(tmp_path / "phone.png", GREY, exif=orientation)
    assert read_image(path).shape == (3, 64, 48)
    assert torch.equal(read_image(path, upright=False), read_image(path).rot90(1, (1, 2)))


@pytest.mark.parametrize("name", ["moving.png", "pages.tif"])
def test_a_file_of_several_pictures_is_refused(tmp_path: Path, name: str) -> None:
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.raises(cs.FileError, match="2 pictures") as caught:
        read_image(tmp_path / name)
    assert "file of its own" in caught.value.next


@pytest.mark.parametrize("name", ["large.png", "large.tif", "bands.tif"])
def test_large_pictures_are_read_up_to_a_stated_size_and_pils_limit_stays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, shape = tmp_path / name, GREY.shape
    if name == "bands.tif":
        tifffile.imwrite(path, np.stack([GREY] * 6), photometric="minisblack", planarconfig="separate")
    else:
        stored(path, GREY)
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", GREY.size // 3
    )  # PIL refuses twice its limit, and warns of it
    assert read_image(path, channels=None).shape[1:] == shape and GREY.size // 3 == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(limits, "MOST_PIXELS", GREY.size - 1)
    with pytest.raises(cs.FileError, match=rf"{name} has {shape[1]} x {shape[0]} pixels[\s\S]*tiles"):
        read_image(path, channels=None)


def test_a_picture_that_is_made_smaller_is_averaged(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    small = read_image(stored(tmp_path / "stripes.png", stripes), (8, 8))
    assert (small - 0.5).abs().max() < 0.05


def test_links_that_lead_nowhere_are_named_with_what_they_point_at(tmp_path: Path) -> None:
    stored(tmp_path / "a.png", GREY)
    (tmp_path / "gone.png").symlink_to("moved.png")
    with pytest.raises(cs.FileError, match=r"gone\.png is a link to moved\.png, which does not exist"):
        read_image(tmp_path / "gone.png")
    with pytest.warns(LeftOut, match=r"links to what does not exist: gone\.png"):
        assert len(find_images([tmp_path])[0]) == 1


# -- every mode and depth ------------------------------------------------------------------------------

RANDOM = np.random.default_rng(1)
KINDS_OF_PNG = {"grey": (0, 1), "RGB": (2, 3), "grey and alpha": (4, 2), "RGBA": (6, 4)}
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def chunk(name: bytes, content: bytes) -> bytes:
    check = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)


def png(
    path: Path, values: np.ndarray[Any, Any], kind: int, interlaced: bool = False, orientation: int = 1
) -> Path:
    """Write a PNG (H, W, C) of 8 or 16 bits, in passes or not, by its specification."""
    (height, width, _), bits = values.shape, 8 * values.dtype.itemsize
    passes = [values[y::down, x::right] for x, y, right, down in ADAM7] if interlaced else [values]
    rows = [row for part in passes if part.size for row in part.astype(values.dtype.newbyteorder(">"))]
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, int(interlaced))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = [
        chunk(b"IHDR", head),
        chunk(b"eXIf", exif.tobytes()[6:]),
        chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(content) + chunk(b"IEND", b""))
    return path


def random_values(bands: int, kind: str, size: tuple[int, int] = (21, 13)) -> np.ndarray[Any, Any]:
    return RANDOM.integers(0, np.iinfo(kind).max, (*size, bands), kind, endpoint=True)


def fractions(values: np.ndarray[Any, Any], largest: int | None = None) -> torch.Tensor:
    """Values (H, W, C) as parts of the largest one, (C, H, W)."""
    largest = largest or np.iinfo(values.dtype).max
    return torch.from_numpy((np.moveaxis(values, -1, 0) / largest).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "kind", "interlaced", "orientation"),
    covering([*KINDS_OF_PNG], ["uint8", "uint16"], [False, True], [1, 2, 3, 4, 5, 6, 7, 8]),
)
def test_a_png_is_read_as_it_was_written(
    tmp_path: Path, name: str, kind: str, interlaced: bool, orientation: int
) -> None:
    code, bands = KINDS_OF_PNG[name]
    values = random_values(bands, kind)
    path = png(tmp_path / "a.png", values, code, interlaced, orientation)
    every = [*range(1, bands + 1)]
    stored = read_image(path, channels=None, bands=every, upright=False)
    torch.testing.assert_close(stored, fractions(values), rtol=0, atol=1e-6)
    plain = png(tmp_path / "plain.png", values[..., :1].astype(np.uint8), 0, orientation=orientation)
    assert read_image(path).shape[1:] == read_image(plain).shape[1:]
    rounded = np.round(values / np.iinfo(kind).max * 255).astype(np.uint8)
    png(tmp_path / "shallow.png", rounded, code, orientation=orientation)
    assert (read_image(path) - read_image(tmp_path / "shallow.png")).abs().max() < 2 / 255
    small = read_image(path, (7, 5)), read_image(tmp_path / "shallow.png", (7, 5))
    assert (small[0] - small[1]).abs().max() < 3 / 255


@pytest.mark.parametrize(("largest", "magic"), covering([1, 100, 256, 65535], [2, 3, 5, 6]))
def test_a_pgm_or_ppm_is_read_as_parts_of_the_largest_value_that_it_states(
    tmp_path: Path, magic: int, largest: int
) -> None:
    values = RANDOM.integers(0, largest, (6, 5, 3 if magic in (3, 6) else 1), endpoint=True)
    if magic < 4:
        body = "# no value\n".join(f"{value}\n" for value in values.flatten()).encode()
    else:
        body = values.astype(">u2" if largest > 255 else np.uint8).tobytes()
    path = tmp_path / "a.pnm"
    path.write_bytes(f"P{magic} # 9 9 9\n5 6\n# 7\n{largest}\n".encode() + body)
    torch.testing.assert_close(read_image(path, channels=None), fractions(values, largest), rtol=0, atol=1e-6)
    if values.shape[2] == 1:
        assert np.array_equal(read_labels(path).numpy(), values[..., 0])  # classes are numbers, not shares
    path.write_bytes(path.read_bytes()[: -len(body) // 2])
    with pytest.raises(cs.FileError):
        read_image(path)


def test_a_value_beyond_the_largest_that_a_pgm_states_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 100\n" + bytes([7, 101]))
    with pytest.raises(cs.FileError, match="holds the value 101"):
        read_image(tmp_path / "a.pgm")


@pytest.mark.parametrize("name", ["a.jp2", "a.avif", "cmyk.tif"])
@pytest.mark.parametrize("deep", [True, False])
def test_colour_that_would_be_rounded_is_refused(tmp_path: Path, name: str, deep: bool) -> None:
    path, kind = tmp_path / name, "uint16" if deep else "uint8"
    values = random_values(4 if name == "cmyk.tif" else 3, kind, (32, 48))
    if name == "cmyk.tif":
        tifffile.imwrite(path, values, photometric="separated")
    else:
        cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
        bits = [cv2.IMWRITE_AVIF_DEPTH, 10 if deep else 8] if name == "a.avif" else []
        try:
            written = cv2.imwrite(str(path), values >> 6 if deep and bits else values, bits)
        except cv2.error:
            written = False
        if not written or Image.registered_extensions().get(path.suffix) not in Image.OPEN:
            pytest.skip(f"{path.suffix} is not written or read here")
    if not deep:
        assert read_image(path).shape == (3, 32, 48)
        return
    with pytest.raises(cs.FileError, match="more than 8 bits") as caught:
        read_image(path)
    assert "16 bits" in caught.value.next


# -- finding -------------------------------------------------------------------------------------------


def test_hidden_files_are_left_out_and_whatever_else_is_no_picture_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "more/b.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        stored(tmp_path / name, GREY)
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "more/._b.png", "notes.txt", "more/clip.mp4"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".hidden").mkdir()
    stored(tmp_path / ".hidden" / "c.png", GREY)
    (tmp_path / "link").symlink_to(tmp_path / "more")
    with pytest.warns(LeftOut) as warned:
        places, failures = find_images([tmp_path])
    assert list(places) == [tmp_path / "a.png", tmp_path / "more" / "b.gif"] and not failures
    (text,) = (str(warning.message) for warning in warned)
    assert text == (
        f"left out of {tmp_path}: no pictures: more/clip.mp4, notes.txt; "
        "links to folders, which are not followed: link."
    )


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(cs.FileError, match="no images") as caught:
        find_images([tmp_path])
    assert "clip.mp4" in caught.value.why


# -- writing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    covering(
        ["a.PNG", "a.jpg", "a.webp", "a.tiff", "a.pdf"],
        ["RGB", "RGBA", "P", "L"],
    ),
)
def test_a_picture_is_written_in_the_format_of_its_name(tmp_path: Path, name: str, mode: str) -> None:
    path = tmp_path / name
    write_picture(Image.effect_noise((64, 48), 60).convert(mode), path)
    if name.endswith(".pdf"):
        assert path.read_bytes().startswith(b"%PDF-")
        return
    with Image.open(path) as picture:
        assert picture.size == (64, 48)
        assert path.suffix.lower() in Image.registered_extensions()
        assert Image.registered_extensions()[path.suffix.lower()] == picture.format


def test_more_classes_than_a_palette_has_are_written_in_16_bits(tmp_path: Path) -> None:
    classes = torch.arange(300).view(10, 30)
    write_picture(class_picture(classes, 300), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(np.array(picture), classes.numpy())


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("a.svg", ["mask", "--size", "64x64", "--output"]),
        ("a", ["bench", "--model", "no.module:here", "--picture"]),
    ],
)
def test_a_name_that_is_no_pictures_is_refused_before_any_work(
    command_line: Run, tmp_path: Path, command: list[str], name: str
) -> None:
    result = command_line(*command, name, "--json")
    assert result.code == 1 and result.json["error"] == "FileError"
    assert name in result.json["what"] and ".png" in result.json["next"]
    assert not (tmp_path / name).exists()
