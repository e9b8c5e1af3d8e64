"""`cadsurgery run --memory`: pictures that take more than the memory are read, computed and written in rows."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import covering, slow
from networks import saved_segmenter, seeded, segmenter, unverified
from PIL import Image
from predicting import NORTH_UP, ZONE, save_convolutions
from predicting import predict as predict_whole
from torch import nn

import cadsurgery as cs
from cadsurgery.data.images import normalise, read_image, street_scene
from cadsurgery.data.rasters import RasterRows
from cadsurgery.data.tiff import TiffRows
from cadsurgery.network.model import pictures_for
from cadsurgery.support import memory as amounts
from cadsurgery.tasks import large, pieces, run
from cadsurgery.tasks.commands import RunOptions
from cadsurgery.tasks.recommend import search

SIZE = (733, 301)  # odd; 2.5 MiB as float32
LITTLE = "2MiB"
predict = partial(predict_whole, memory=LITTLE)


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_segmenter(tmp_path_factory.mktemp("large") / "net.safetensors")


def written(path: Path, stored: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    tifffile.imwrite(path, stored, **options)
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    stored = (255 * street_scene(*SIZE)).round().byte().permute(1, 2, 0).numpy()
    return written(tmp_path / "page.tif", stored, photometric="rgb", tile=(64, 64), compression="zlib")


FORMS: list[dict[str, Any]] = [
    {},
    {"byteorder": ">"},
    {"rowsperstrip": 17},
    {"rowsperstrip": 17, "compression": "zlib"},
    {"tile": (64, 48), "compression": "zlib", "predictor": 2},
    {"planarconfig": "separate"},
    {"planarconfig": "separate", "tile": (64, 48)},
]


@pytest.mark.parametrize(("kind", "bands"), covering(["u1", "u2", "i2", "f4"], [1, 3, 6]))
def test_rows_of_a_file_are_those_of_the_picture(tmp_path: Path, bands: int, kind: str) -> None:
    values = np.random.default_rng(0).random((130, 99, bands))
    stored = (values * (np.iinfo(kind).max if kind[0] != "f" else 1)).astype(kind)
    for number, form in enumerate(FORMS):
        is_planar, options = "planarconfig" in form, dict(form)
        if (is_planar and bands == 1) or ("predictor" in form and kind == "f4"):
            continue
        if bands > 1 and not is_planar:
            options["planarconfig"] = "contig"
        array = np.moveaxis(stored, -1, 0) if is_planar else stored[..., 0] if bands == 1 else stored
        options["photometric"] = "rgb" if bands == 3 else "minisblack"
        path = written(tmp_path / f"{number}.tif", array, **options)
        whole, rows = read_image(path, channels=None), TiffRows(path)
        assert rows.shape == whole.shape
        for first, end in ((0, 130), (0, 1), (63, 65), (17, 129), (129, 130)):
            assert torch.allclose(rows.rows(first, end), whole[:, first:end], rtol=0, atol=1e-7), form
        rows.close()


@pytest.mark.parametrize("mask", ["all", "edges:threshold=0.1"])
def test_a_large_picture_is_predicted_as_one_that_fits(
    file: Path, picture: Path, tmp_path: Path, mask: str
) -> None:
    whole = predict(file, picture, tmp_path / "whole", mask=mask, memory="")
    rows = predict(file, picture, tmp_path / "rows", mask=mask)
    classes = np.array(Image.open(tmp_path / "whole" / "page.png"))
    Image.MAX_IMAGE_PIXELS, stored = None, Image.open(tmp_path / "rows" / "page.tif")
    assert (np.array(stored) == classes).mean() > 0.999  # ties, which rounding decides
    assert (
        stored.mode == "P" and stored.getpalette() == Image.open(tmp_path / "whole" / "page.png").getpalette()
    )
    for name in ("active_fraction", "levels", "size", "classes"):
        assert rows.rows[0].get(name) == pytest.approx(whole.rows[0].get(name), abs=1e-3)
    assert not [path for path in (tmp_path / "rows").iterdir() if path.name.startswith(".page")]
    assert predict(file, picture, tmp_path / "rows", mask=mask, resume=True).skipped == 1


PLACES: dict[str, list[Any]] = {
    "north up": NORTH_UP,
    "turned": [(34264, 12, 16, tuple(float(value) for value in range(16)), True)],
    "control points": [(33922, 12, 18, tuple(float(value) for value in range(18)), True)],
    "polynomials": [(50844, 12, 92, tuple(float(value) for value in range(92)), True)],
}
NAMES = [(34736, 12, 2, (0.5, 7.25), True), (34737, 2, None, "a zone|", True)]
ITEMS = '<GDALMetadata><Item name="AREA_OR_POINT">Area</Item>{}</GDALMetadata>'
OF_BAND = '<Item name="STATISTICS_MEAN" sample="0">117.2</Item>'


@pytest.mark.parametrize(("place", "byteorder"), zip(PLACES, "<><>", strict=True))
def test_a_prediction_in_rows_lies_where_its_picture_does(
    file: Path, tmp_path: Path, place: str, byteorder: str
) -> None:
    stored = np.random.default_rng(0).integers(1, 255, (*SIZE, 3), dtype=np.uint8)
    tags = [*PLACES[place], (34735, 3, len(ZONE), ZONE, True), *NAMES]
    given = [*tags, (42112, 2, None, ITEMS.format(OF_BAND), True), (42113, 2, None, "0", True)]
    picture = written(tmp_path / "map.tif", stored, photometric="rgb", extratags=given, byteorder=byteorder)
    predict(file, picture, tmp_path / "out", mask="all")
    with tifffile.TiffFile(picture) as source, tifffile.TiffFile(tmp_path / "out" / "map.tif") as made:
        before, after = source.pages.first.tags, made.pages.first.tags
        for code, *_ in tags:
            assert after[code].value == before[code].value and after[code].dtype == before[code].dtype
        assert after[42112].value == ITEMS.format("")  # means of the picture's bands are not those of classes
        assert 42113 not in after  # nor is class 0 no data


def test_a_position_that_is_not_carried_along_is_said_once(file: Path, tmp_path: Path) -> None:
    """PNG files hold none."""
    tags = [*PLACES["north up"], (34735, 3, len(ZONE), ZONE, True)]
    stored = np.random.default_rng(0).integers(1, 255, (*SIZE, 3), dtype=np.uint8)
    for name in "ab":
        written(tmp_path / "maps" / f"{name}.tif", stored, photometric="rgb", extratags=tags)
    with pytest.warns(
        cs.CadWarning, match=r"a\.tif is written without its position[\s\S]*--memory"
    ) as warned:
        predict(file, tmp_path / "maps", tmp_path / "resized", memory="", size=SIZE)
    assert len(warned) == 1


@pytest.mark.parametrize("is_placed", [True, False])
def test_rasters_are_predicted_as_rasters_without_an_option(
    file: Path, tmp_path: Path, is_placed: bool
) -> None:
    tags = [*PLACES["north up"], (34735, 3, len(ZONE), ZONE, True)] if is_placed else []
    stored = np.random.default_rng(0).integers(1, 255, (*SIZE, 3), dtype=np.uint8)
    picture = written(tmp_path / "map.tif", stored, photometric="rgb", extratags=tags)
    report = predict(file, picture, tmp_path / "own", memory="", mask="all")
    if not is_placed:
        assert (tmp_path / "own" / "map.png").exists() and "--memory auto" not in report.text
        return
    assert "map.tif says where it lies" in report.text
    predict(file, picture, tmp_path / "asked", mask="all")
    own, asked = (tifffile.TiffFile(tmp_path / name / "map.tif") for name in ("own", "asked"))
    assert np.array_equal(own.asarray(), asked.asarray())
    assert {tag.code for tag in own.pages.first.tags} == {tag.code for tag in asked.pages.first.tags}


@pytest.fixture
def convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    return lambda channels=5, larger=1: save_convolutions(tmp_path, monkeypatch, channels, larger)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize(
    ("place", "is_point"), [("north up", True), ("turned", False), ("control points", False)]
)
def test_pixels_of_a_smaller_prediction_are_as_far_apart_as_the_network_strides(
    convolutions: Callable[..., Path], tmp_path: Path, place: str, is_point: bool
) -> None:
    """GDAL places each at the spot of every fourth pixel of the picture, whose last one it may end behind."""
    rasterio = pytest.importorskip("rasterio")
    affine = tuple(map(float, (0.2, 0.01, 0, 5e5, 0.02, -0.3, 0, 5.2e6, *[0] * 7, 1)))
    places = {**PLACES, "turned": [(34264, 12, 16, affine, True)]}
    zone = (*ZONE[:11], 2 if is_point else 1, *ZONE[12:])
    tags = [*places[place], (34735, 3, len(zone), zone, True)]
    stored = np.random.default_rng(0).integers(1, 255, (723, 301, 3), dtype=np.uint8)
    picture = written(tmp_path / "map.tif", stored, photometric="rgb", extratags=tags)
    predict(convolutions(), picture, tmp_path / "out", mask="all")
    with rasterio.open(picture) as given, rasterio.open(tmp_path / "out" / "map.tif") as made:
        assert made.shape == (181, 76) and made.crs == given.crs
        for column, row in ((0, 0), (76, 0), (0, 181), (23, 163)) if place != "control points" else ():
            spot = given.transform @ (4 * column, 4 * row)
            assert spot == pytest.approx(made.transform @ (column, row), rel=1e-12)
        points = [
            [(p.col / step, p.row / step) for p in raster.gcps[0]] for raster, step in ((given, 4), (made, 1))
        ]
        for before, after in zip(*points, strict=True):
            assert before == pytest.approx(after)


@pytest.mark.parametrize(("size", "channels"), [((1300, 532), 1), ((40, 52), 300)])
def test_predictions_in_rows_are_compressed_tiles(
    convolutions: Callable[..., Path], tmp_path: Path, size: tuple[int, int], channels: int
) -> None:
    net = convolutions(channels, 4)
    stored = (255 * street_scene(*size)).byte().permute(1, 2, 0).numpy()
    source = written(tmp_path / "page.tif", stored, photometric="rgb")
    predict(net, source, tmp_path / "out", mask="all", memory="64MiB")
    loaded = cs.load(net, mask="all", trust=True)
    with torch.no_grad():
        whole = loaded(normalise(read_image(source)[None], pictures_for(loaded)))[0]
    with tifffile.TiffFile(tmp_path / "out" / "page.tif") as made:
        page, values = made.pages.first, torch.from_numpy(made.asarray().astype(np.float32))
    assert (page.tilewidth, page.tilelength) == (512, 512) and page.compression == 8
    assert page.predictor == (1 if channels == 1 else 2)  # that of floating-point values is not everywhere
    if channels == 1:
        assert torch.allclose(values, whole[0], atol=1e-5)
    else:
        assert (values == whole.argmax(0)).float().mean() > 0.999


@pytest.mark.parametrize(
    ("mask", "size"),
    [("edges:threshold=0.1", (300, 251)), ("content", (130, 33)), slow("all", (128, 96))],
)
def test_a_large_picture_is_padded_as_one_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: str, size: tuple[int, int]
) -> None:
    """Where the network takes multiples of 8 alone; masks see no padding, and the result is cut back."""
    monkeypatch.chdir(tmp_path)
    Path("pyramid.py").write_text(
        "import torch\nfrom torch import nn\nclass Pyramid(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        torch.manual_seed(0)\n"
        "        self.a, self.b, self.c = (nn.Conv2d(n, 8, 3, 2, 1) for n in (3, 8, 8))\n"
        "        self.up, self.head = nn.Upsample(scale_factor=2), nn.ConvTranspose2d(8, 5, 4, 4)\n"
        "    def forward(self, x):\n        fine = self.b(self.a(x).relu()).relu()\n"
        "        return self.head(fine + self.up(self.c(fine)))\n"
        "def network():\n    return Pyramid().eval()\n"
    )
    example = torch.rand(1, 3, 64, 64)
    net = unverified(cs.build_model("pyramid.py:network"), mask, coarsest=16, example_input=example)
    cs.save(net, "net.safetensors")
    stored = (255 * street_scene(*size)).byte().permute(1, 2, 0).numpy()
    source = written(tmp_path / "page.tif", stored, photometric="rgb")
    whole = predict(Path("net.safetensors"), source, tmp_path / "whole", memory="")
    rows = predict(Path("net.safetensors"), source, tmp_path / "rows", memory="2MiB")
    assert not rows.failed
    classes = np.array(Image.open(tmp_path / "whole" / "page.png"))
    assert (tifffile.imread(tmp_path / "rows" / "page.tif") == classes).mean() > 0.999  # ties by rounding
    assert classes.shape == size
    for name in ("padded_to", "size", "levels"):
        assert rows.rows[0].get(name) == pytest.approx(whole.rows[0].get(name), abs=1e-3)
    assert ("1 of the pictures padded at the right and below" in rows.text) == any(side % 8 for side in size)
    little = predict(Path("net.safetensors"), source, tmp_path / "little", memory="8KiB")
    assert [row["where"] for row in little.failed] == ["memory"]  # not the size as it is


def lacking_picture(path: Path, kind: str, size: tuple[int, int], lacking: np.ndarray) -> Path:
    """A picture whose pixels lack data in one of the ways that files have for it."""
    stored = np.clip(255 * street_scene(*size).permute(1, 2, 0).numpy(), 1, 255)
    if kind == "transparent":
        alpha = np.where(lacking, 0, 255)[..., None]
        pixels = np.concatenate([stored, alpha], 2).astype(np.uint8)
        return written(path, pixels, photometric="rgb", extrasamples=["unassalpha"])
    for band in [1] if kind == "NaN of one band" else range(3):
        stored[..., band][lacking] = math.nan if "NaN" in kind else 0
    tags = [] if "NaN" in kind else [(42113, 2, None, "0", True)]
    pixels = (stored / 255).astype(np.float32) if "NaN" in kind else stored.astype(np.uint8)
    return written(path, pixels, photometric="rgb", extratags=tags)


@pytest.mark.parametrize(
    ("kind", "output"),
    covering(["nodata", "NaN of one band", "transparent", "NaN"], [(5, 4), (1, 4), (256, 4), (5, 1)]),
)
def test_pixels_without_data_have_none_in_the_prediction(
    convolutions: Callable[..., Path], tmp_path: Path, kind: str, output: tuple[int, int]
) -> None:
    """The others have the values of a picture whose pixels without data have the mean colour."""
    channels, larger = output
    size, lacking = (1400, 96), np.zeros((1400, 96), bool)
    lacking[300:900], lacking[1000:1020, 40:] = True, True
    net = convolutions(channels, larger)
    source = lacking_picture(tmp_path / "page.tif", kind, size, lacking)
    report = predict(net, source, tmp_path / "out", mask="all", memory="16MiB")
    assert not report.failed and "pixels without data" in report.text
    assert report.rows[0]["without_data"] == lacking.sum()
    loaded = cs.load(net, mask="all", trust=True)
    image = normalise(read_image(source, channels=None)[:3], pictures_for(loaded))
    image = image.masked_fill(torch.from_numpy(lacking), 0).nan_to_num(0)
    with torch.no_grad():
        whole = loaded(image[None])[0]
    with tifffile.TiffFile(tmp_path / "out" / "page.tif") as made:
        values, none = made.asarray(), float(made.pages.first.tags[42113].value)
    assert values.dtype == {1: np.float32, 5: np.uint8, 256: np.uint16}[channels]
    step = 4 // larger
    there = ~lacking[step // 2 :: step, step // 2 :: step]
    found = ~np.isnan(values) if channels == 1 else values != none
    assert values.shape == tuple(whole.shape[1:]) and np.array_equal(found, there)
    if channels == 1:
        assert math.isnan(none) and np.allclose(values[there], whole[0].numpy()[there], atol=1e-5)
    else:
        assert (values == whole.argmax(0).numpy())[there].mean() > 0.999


def test_a_picture_without_data_is_not_computed(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (300, 128)
    computed = list[tuple[int, int]]()
    write = large.WrittenRows.write

    def noted(part: Any, first: int, values: torch.Tensor, counts: Any, milliseconds: float) -> None:
        if milliseconds:
            computed.append((first, len(values)))
        write(part, first, values, counts, milliseconds)

    monkeypatch.setattr(large.WrittenRows, "write", noted)
    blank = lacking_picture(tmp_path / "blank.tif", "nodata", size, np.ones(size, bool))
    assert predict(file, blank, tmp_path / "blank", mask="all").rows[0]["without_data"] == math.prod(size)
    assert not computed and set(np.unique(tifffile.imread(tmp_path / "blank" / "blank.tif"))) == {255}


def lacking_shape(name: str, size: tuple[int, int]) -> np.ndarray:
    """Pixels without data at the right, around a footprint that stands on its corner, or in spots."""
    down, across = np.mgrid[: size[0], : size[1]]
    y, x = down / size[0] - 0.5, across / size[1] - 0.5
    shapes = {"right": x > -0.2, "footprint": abs(x) + abs(y) > 0.4}
    return {**shapes, "spots": (x + 0.3) ** 2 + (y + 0.3) ** 2 > 0.02}[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "shape", "picture"),
    covering(
        ["all", "edges:threshold=0.1"],
        ["right", "footprint", "spots"],
        [((900, 1016), 4), ((901, 1010), 1)],
    ),
)
def test_columns_without_data_are_not_computed(
    convolutions: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mask: str,
    shape: str,
    picture: tuple[tuple[int, int], int],
) -> None:
    """The values elsewhere are those of whole rows, wherever the data lie; far fewer are computed."""
    size, larger = picture
    lacking, net, pixels = lacking_shape(shape, size), convolutions(1, larger), list[float]()
    source = lacking_picture(tmp_path / "page.tif", "nodata", size, lacking)
    with monkeypatch.context() as patch:
        for least in ("_LESS", "_LESS_OF_COARSE"):
            patch.setattr(pieces, least, 0)
        predict(net, source, tmp_path / "rows", mask=mask, memory="16MiB")
    find = large.find_pieces

    def noted(*given: Any) -> Any:
        found = find(*given)
        pixels.append(
            sum((p.part.bottom - p.part.top) * (p.part.right - p.part.left) for p in found if p.part)
        )
        return found

    monkeypatch.setattr(large, "find_pieces", noted)
    report = predict(net, source, tmp_path / "pieces", mask=mask, memory="16MiB")
    if mask == "all" or shape == "right":  # else whole rows are hardly more, with the margins of cells
        assert 0 < pixels[0] < (0.7 if shape != "spots" else 0.3) * lacking.size
    values, those = (tifffile.imread(tmp_path / name / "page.tif") for name in ("pieces", "rows"))
    assert np.array_equal(np.isnan(values), np.isnan(those)) and not np.isnan(values).all()
    assert np.allclose(values, those, atol=1e-5, equal_nan=True)
    assert report.rows[0]["without_data"] == lacking.sum()


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("kind", ["vrt", "img"])
def test_rasters_of_other_kinds_are_predicted_where_they_lie(
    convolutions: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """As the same picture in a GeoTIFF file, their pixels without data too."""
    rasterio = pytest.importorskip("rasterio")
    shutil = pytest.importorskip("rasterio.shutil")
    size, lacking = (713, 301), np.zeros((713, 301), bool)
    lacking[100:420] = True
    stored = np.clip(255 * street_scene(*size).permute(1, 2, 0).numpy(), 1, 255).astype(np.uint8)
    stored[lacking] = 0
    tags = [*PLACES["north up"], (34735, 3, len(ZONE), ZONE, True), (42113, 2, None, "0", True)]
    source = written(tmp_path / "map.tif", stored, photometric="rgb", tile=(64, 64), extratags=tags)
    other = tmp_path / f"other.{kind}"
    shutil.copy(source, other, driver={"vrt": "VRT", "img": "HFA"}[kind])
    net = convolutions()
    for path in (source, other):
        assert not predict(net, path, tmp_path / "out", mask="all", resume=path == other).failed
    with (
        rasterio.open(tmp_path / "out" / "map.tif") as one,
        rasterio.open(tmp_path / "out" / "other.tif") as two,
    ):
        assert np.array_equal(one.read(), two.read()) and one.shape == (179, 76)
        assert (one.crs, one.nodata, one.block_shapes) == (two.crs, 255.0, two.block_shapes)
        assert one.transform.almost_equals(two.transform, 1e-9)
        assert one.read_masks(1).astype(bool).mean() == pytest.approx(1 - 320 / 713, abs=0.01)


@pytest.mark.parametrize(("kind", "size"), [("NaN of one band", (601, 1003)), ("transparent", (300, 77))])
def test_pixels_without_data_are_found_by_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], kind: str
) -> None:
    """As by a look at all of the picture, of which no more than some blocks are read at a time."""
    lacking = np.random.default_rng(0).random(size) < 0.2
    source, read = lacking_picture(tmp_path / "page.tif", kind, size, lacking), TiffRows.rows
    windows = list[int]()

    def noted(self: Any, first: int, end: int, left: int = 0, right: int | None = None) -> torch.Tensor:
        found = read(self, first, end, left, right)
        windows.append(found[0].numel())
        return found

    monkeypatch.setattr(large, "_SEEN", 1)
    monkeypatch.setattr(TiffRows, "rows", noted)
    picture = large.LargePicture(str(source), None)
    assert np.array_equal(picture.lacking(0, size[0], size).numpy(), lacking)
    assert picture.without_data == lacking.sum() and max(windows) <= 512 * 512
    picture.file.close()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_picture_of_which_gdal_gives_no_position_lies_nowhere(tmp_path: Path) -> None:
    """Of PGM and PPM files it leaves the numbers of a transform as they are in memory."""
    pytest.importorskip("rasterio")
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(tmp_path / "grey.pgm")
    picture = RasterRows(tmp_path / "grey.pgm")
    assert picture.position == () and picture.shape == (1, 9, 12)
    picture.close()


@pytest.mark.parametrize(("form", "no_data"), [("tif", None), ("vrt", 3), ("png", 3), ("mosaic", None)])
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_palette_is_read_as_its_colours(file: Path, tmp_path: Path, form: str, no_data: int | None) -> None:
    """In each format of GDAL, as `read_image` reads it, and what has no data is NaN."""
    rasterio = pytest.importorskip("rasterio")
    shutil = pytest.importorskip("rasterio.shutil")
    values = np.random.default_rng(0).integers(0, 7, (67, 90), dtype=np.uint8)
    colours = np.random.default_rng(1).integers(0, 256, (7, 3), dtype=np.uint8)
    source, path = tmp_path / "map.tif", tmp_path / f"map.{form.replace('mosaic', 'vrt')}"
    profile = {"driver": "GTiff", "height": 67, "width": 90, "count": 1, "dtype": "uint8", "nodata": no_data}
    with rasterio.open(
        source, "w", photometric="palette", tiled=True, blockxsize=32, blockysize=32, **profile
    ) as made:
        made.write_colormap(1, {number: (*map(int, one), 255) for number, one in enumerate(colours)})
        made.write(values, 1)
    if form != "tif":
        shutil.copy(source, path, driver={"png": "PNG"}.get(form, "VRT"))
    if form == "mosaic":
        text = path.read_text()
        path.write_text(text.replace('rasterXSize="90"', 'rasterXSize="100"'))  # what no picture covers
    expected = (colours[values] / 255).astype(np.float32)
    expected[values == no_data] = np.nan
    rows = RasterRows(path)
    assert rows.shape == (3, 67, 100 if form == "mosaic" else 90) and rows.may_lack == (no_data is not None)
    found = rows.rows(0, 67)[..., :90]
    assert np.allclose(found.permute(1, 2, 0), expected, atol=1e-7, equal_nan=True)
    assert torch.equal(rows.rows(5, 40, 11, 70).nan_to_num(-1), found[:, 5:40, 11:70].nan_to_num(-1))
    if form in ("tif", "png"):
        same = read_image(path, channels=None)
        assert torch.equal(same[:, values != no_data], found[:, values != no_data])
    if form != "png":
        assert not predict(file, path, tmp_path / "out").failed
    rows.close()


def test_a_raster_that_gdal_does_not_read_is_refused(tmp_path: Path, file: Path) -> None:
    pytest.importorskip("rasterio")
    (tmp_path / "broken.vrt").write_text("<VRTDataset>")
    with pytest.raises(cs.FileError, match="cannot be read as a raster"):
        RasterRows(tmp_path / "broken.vrt")
    report = predict(file, tmp_path / "broken.vrt", tmp_path / "out")
    assert report.failed and not report.rows


def test_a_page_of_a_large_file_is_predicted_in_rows(file: Path, picture: Path, tmp_path: Path) -> None:
    pages = tmp_path / "pages.tif"
    whole = tifffile.imread(picture)
    with tifffile.TiffWriter(pages) as writer:
        for number in range(2):
            writer.write(whole[:: 1 - 2 * number], photometric="rgb", metadata=None)
    predict(file, Path(f"{pages},page=1"), tmp_path / "out", mask="all")
    written(tmp_path / "alone.tif", whole[::-1], photometric="rgb")
    predict(file, tmp_path / "alone.tif", tmp_path / "one", mask="all")
    assert np.array_equal(
        tifffile.imread(tmp_path / "out" / "pages.tif"), tifffile.imread(tmp_path / "one" / "alone.tif")
    )


def raster(path: Path, stored: np.ndarray, block: tuple[int, int] = (512, 512), **options: Any) -> Path:
    """A GeoTIFF (C, H, W) in tiles, as GDAL writes it, with smaller copies."""
    rasterio = pytest.importorskip("rasterio")
    lacking, copies = options.pop("lacking", None), options.pop("copies", ())
    where = {"transform": rasterio.Affine(0.2, 0, 5e5, 0, -0.2, 5.2e6), "crs": "EPSG:25832"}
    kind = {"driver": "GTiff", "count": len(stored), "height": stored.shape[1], "width": stored.shape[2]}
    tiles = {"tiled": True, "blockysize": block[0], "blockxsize": block[1], "dtype": stored.dtype}
    is_inside = options.pop("is_inside", True)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=is_inside),
        rasterio.open(path, "w", **kind, **tiles, **where) as file,
    ):
        file.write(stored)
        if lacking is not None:
            file.write_mask(np.where(lacking, 0, 255).astype(np.uint8))
    if copies:
        with rasterio.open(path, "r+") as file:
            file.build_overviews(copies, rasterio.enums.Resampling.nearest)
    return path


@pytest.mark.parametrize(("block", "kept"), [((256, 64), None), ((0, 0), (512, 512))])
def test_tiles_are_as_large_as_those_of_the_picture(
    convolutions: Callable[..., Path], tmp_path: Path, block: tuple[int, int], kept: tuple[int, int] | None
) -> None:
    """Where TIFF files may have such tiles; a picture in strips has no tiles."""
    stored = np.random.default_rng(0).integers(1, 255, (713, 301, 3), dtype=np.uint8)
    tile = {"tile": block} if kept is None else {"rowsperstrip": 16}
    source = written(tmp_path / "map.tif", stored, photometric="rgb", **tile)
    for larger in (1, 4):
        predict(convolutions(larger=larger), source, tmp_path / f"out{larger}", mask="all")
        with tifffile.TiffFile(tmp_path / f"out{larger}" / "map.tif") as made:
            page = made.pages.first
            assert (page.tilelength, page.tilewidth) == (kept or block)


@pytest.mark.parametrize(("kind", "channels"), [("tif", 5), slow("vrt", 1)])
def test_overviews_are_smaller_copies_of_the_same_prediction(
    convolutions: Callable[..., Path], tmp_path: Path, kind: str, channels: int
) -> None:
    """The file is a cloud-optimised GeoTIFF; everything else in it is as without."""
    rasterio = pytest.importorskip("rasterio")
    stored = np.clip(255 * street_scene(720, 608).numpy(), 1, 255).astype(np.uint8)
    source = raster(
        tmp_path / "map.tif", stored, (128, 128), lacking=np.arange(720)[:, None].repeat(608, 1) < 300
    )
    if kind == "vrt":
        shutil = pytest.importorskip("rasterio.shutil")
        shutil.copy(source, tmp_path / "map.vrt", driver="VRT")
    source, net = source.with_suffix(f".{kind}"), convolutions(channels, 4)
    predict(net, source, tmp_path / "plain", mask="all")
    predict(net, source, tmp_path / "copies", mask="all", overviews=True)
    with (
        rasterio.open(tmp_path / "plain" / "map.tif") as plain,
        rasterio.open(tmp_path / "copies" / "map.tif") as made,
    ):
        assert np.array_equal(plain.read(), made.read(), equal_nan=True) and plain.crs == made.crs
        assert (plain.transform, plain.dtypes, plain.block_shapes) == (
            made.transform,
            made.dtypes,
            made.block_shapes,
        )
        assert str(plain.nodata) == str(made.nodata) and plain.nodata is not None
        assert made.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and made.overviews(1) == [2, 4, 8]
        assert channels == 1 or plain.colormap(1) == made.colormap(1)
        quarter = made.read(1, out_shape=(made.height // 4, made.width // 4))
        values = set(np.unique(made.read(1)))
        assert channels == 1 or set(np.unique(quarter)) <= values
    assert not [path for path in (tmp_path / "copies").iterdir() if "cog" in path.name]


def test_overviews_need_files_that_can_have_them(file: Path, picture: Path, tmp_path: Path) -> None:
    Image.open(picture).save(tmp_path / "plain.png")
    with pytest.raises(cs.InvalidInput, match="--overviews for pictures without a position"):
        predict(file, tmp_path / "plain.png", tmp_path / "out", memory="", overviews=True)


@pytest.mark.parametrize(("kind", "level"), [("tif", 2), ("vrt", 1), slow("tif", 0)])
def test_a_level_is_a_smaller_copy_of_the_same_area(
    convolutions: Callable[..., Path], tmp_path: Path, kind: str, level: int
) -> None:
    """As the same pixels in a file of their own, which lies on the same area, without data at the same spots."""
    rasterio = pytest.importorskip("rasterio")
    stored = np.clip(255 * street_scene(720, 608).numpy(), 1, 255).astype(np.uint8)
    lacking = np.arange(720)[:, None].repeat(608, 1) < 300
    source = raster(tmp_path / "map.tif", stored, (128, 128), lacking=lacking, copies=(2, 4))
    if kind == "vrt":
        pytest.importorskip("rasterio.shutil").copy(source, tmp_path / "map.vrt", driver="VRT")
    named, net = f"{source.with_suffix(f'.{kind}')},level={level}", convolutions(5, 4)
    assert not predict(net, Path(named), tmp_path / "out", mask="all").failed
    options = {"overview_level": level - 1} if level else {}
    with rasterio.open(source, **options) as copy, rasterio.open(tmp_path / "out" / "map.tif") as made:
        assert made.shape == copy.shape and made.crs == copy.crs
        assert made.transform.almost_equals(copy.transform, 1e-9)
        assert np.array_equal(made.read_masks(1), copy.read_masks(1))
        pixels = np.moveaxis(np.where(copy.read_masks(1), copy.read(), 0), 0, -1)
    tag = [(42113, 2, None, "0", True)]
    alone = written(tmp_path / "alone.tif", pixels, photometric="rgb", extratags=tag)
    predict(net, alone, tmp_path / "one", mask="all")
    assert np.array_equal(
        tifffile.imread(tmp_path / "out" / "map.tif"), tifffile.imread(tmp_path / "one" / "alone.tif")
    )


def test_a_level_or_page_that_a_file_has_not_is_refused(tmp_path: Path, file: Path) -> None:
    stored = np.full((3, 64, 64), 9, np.uint8)
    source = raster(tmp_path / "map.tif", stored, (64, 64))
    pytest.importorskip("rasterio.shutil").copy(source, tmp_path / "map.vrt", driver="VRT")
    for named in ("map.tif,level=3", "map.tif,page=3", "map.vrt,level=3"):
        report = predict(file, Path(f"{tmp_path}/{named}"), tmp_path / f"out {named}")
        assert report.failed and not report.rows


@pytest.mark.filterwarnings("ignore:.*written without its position")
@pytest.mark.parametrize("is_inside", [True, False])
def test_pixels_that_a_mask_leaves_out_have_no_data(
    convolutions: Callable[..., Path], tmp_path: Path, is_inside: bool
) -> None:
    """A page of the file or GDAL's file beside it, read by tifffile as by rasterio; resized pictures are refused."""
    lacking = np.zeros((720, 304), bool)
    lacking[100:500], lacking[:, 250:] = True, True
    stored = np.clip(255 * street_scene(720, 304).numpy(), 1, 255).astype(np.uint8)
    source = raster(tmp_path / "map.tif", stored, (64, 64), lacking=lacking, is_inside=is_inside)
    assert (tmp_path / "map.tif.msk").exists() != is_inside
    one, other = TiffRows(source), RasterRows(source)
    for first, end in ((0, 720), (90, 101)):
        assert torch.equal(one.rows(first, end).nan_to_num(-1), other.rows(first, end).nan_to_num(-1))
    net = convolutions(5, 4)
    report = predict(net, source, tmp_path / "out", mask="all")
    assert report.rows[0]["without_data"] == lacking.sum()
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "map.tif") == 255, lacking)
    whole = predict(net, source, tmp_path / "resized", memory="", size=lacking.shape)
    assert whole.failed and f"{lacking.sum()} pixels without data" in str(whole.failed)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed on Linux")
def test_a_file_whose_mask_cannot_be_read_is_closed(tmp_path: Path) -> None:
    stored = np.full((64, 64), 9, np.uint8)
    source = written(tmp_path / "map.tif", stored)
    written(tmp_path / "turned.tif", stored, extratags=[(274, 3, 1, 6, True)]).rename(f"{source}.msk")
    with pytest.raises(cs.FileError, match="turned or mirrored") as refusal:
        TiffRows(source)
    assert refusal.tb is not None  # which keeps what was being opened
    assert not any(Path(f"/proc/self/fd/{one}").resolve() == source for one in os.listdir("/proc/self/fd"))


class Killed(BaseException):
    """The process ends here."""


def test_a_run_killed_while_it_writes_the_tiles_writes_them_when_it_goes_on(
    file: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    whole = predict(file, picture, tmp_path / "at once", mask="all")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(large.tiff, "write_tiled", killed)
        predict(file, picture, tmp_path / "out", mask="all")
    report = predict(file, picture, tmp_path / "out", mask="all", resume=True)
    ended, at_once = ((tmp_path / name / "page.tif").read_bytes() for name in ("out", "at once"))
    assert ended == at_once and report.rows[0]["levels"] == whole.rows[0]["levels"]


def test_the_file_type_follows_the_picture_whatever_the_memory(
    file: Path, picture: Path, tmp_path: Path
) -> None:
    memory = "1MiB"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(picture.with_name("photo.png"))
    small = picture.with_name("small.tif")
    tifffile.imwrite(small, np.zeros((40, 50, 3), np.uint8), photometric="rgb")
    for source, target in (
        (picture, "page.tif"),
        (small, "small.tif"),
        (picture.with_name("photo.png"), "photo.png"),
    ):
        report = predict(file, source, tmp_path / memory, memory=memory, resume=True)
        assert Path(report.rows[0]["output"]).name == target
        assert "the process took" in report.text and f"--memory {memory}" in report.text
    sized = predict(file, small, tmp_path / "sized", memory=memory, size=(32, 48))
    assert Path(sized.rows[0]["output"]).name == "small.png"


def test_ctrl_c_ends_a_large_picture_behind_its_band_and_resume_goes_on_there(
    file: Path, picture: Path, tmp_path: Path
) -> None:
    predict(file, picture, tmp_path / "at once", mask="all")
    told, ended_once = list[tuple[float, float]](), list[bool]()

    def step(
        text: str, done: float | None = None, of: float | None = None, limit: float | None = None
    ) -> None:
        if "row" in text and done is not None and of is not None:
            told.append((done, of))
            if len(told) == 3 and not ended_once:
                ended_once.append(True)
                signal.raise_signal(signal.SIGINT)

    options = RunOptions(output=str(tmp_path / "out"), workers=1, trust=True, memory=LITTLE, mask="all")
    report = run.predict(file, [picture], options, step=step)
    assert report.interrupted and report.counts == (0, 0) and len(told) == 3
    assert all(of == SIZE[0] for _, of in told) and 0 == told[0][0] < told[1][0] < told[2][0] < SIZE[0]
    assert f"interrupted at row {told[2][0]} of {SIZE[0]}; --resume continues there" in report.text
    assert not (tmp_path / "out" / "page.tif").exists()
    with pytest.raises(
        cs.InvalidInput, match="give --memory again"
    ):  # which would begin anew as another file
        predict(file, picture, tmp_path / "out", mask="all", memory="", resume=True)
    told.clear()
    more = RunOptions(**{**vars(options), "memory": "3MiB", "resume": True})
    assert run.predict(file, [picture], more, step=step).counts == (1, 0) and told[0][0] > 0
    ended, at_once = ((tmp_path / name / "page.tif").read_bytes() for name in ("out", "at once"))
    assert ended == at_once
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".page")]


def test_what_cannot_be_read_in_rows_is_refused_in_words(file: Path, picture: Path, tmp_path: Path) -> None:
    grey = np.zeros((20, 30), np.uint8)
    cases = {
        "turned": (grey, {"extratags": [(274, 3, 1, 6, True)]}, "turned or mirrored"),
        "palette": (grey, {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, "PALETTE"),
    }
    for name, (stored, options, why) in cases.items():
        with pytest.raises(cs.FileError, match="cannot be read in rows") as refusal:
            TiffRows(written(tmp_path / f"{name}.tif", stored, **options))
        assert why in refusal.value.why and "tile" in refusal.value.next
    with tifffile.TiffWriter(tmp_path / "pages.tif") as file_of_two:
        file_of_two.write(grey)
        file_of_two.write(grey[:10])
    with pytest.raises(cs.FileError, match="holds 2 pictures"):
        TiffRows(tmp_path / "pages.tif")
    (tmp_path / "cut.tif").write_bytes(b"II*\0")
    with pytest.raises(cs.FileError, match="cannot be read as a TIFF"):
        TiffRows(tmp_path / "cut.tif")
    for options in ({"view": "overlay"}, {"size": (32, 32)}):
        report = predict(file, picture, tmp_path / next(iter(options)), **options)
        assert "read in rows" in report.failed[0]["what"] and not report.rows


def test_a_large_strip_that_is_decoded_as_a_whole_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(
        tmp_path / "strip.tif", np.zeros((200, 30), np.uint8), rowsperstrip=200, compression="zlib"
    )
    monkeypatch.setattr("cadsurgery.data.tiff._MOST_DECODED", 1000)
    with pytest.raises(cs.FileError, match="cannot be read in rows") as refusal:
        TiffRows(path)
    assert "200 rows" in refusal.value.why


def test_a_memory_needs_a_network_that_is_computed_in_bands(
    file: Path, picture: Path, tmp_path: Path
) -> None:
    with pytest.raises(cs.InvalidInput, match="no amount of memory"):
        predict(file, picture, tmp_path / "out", memory="much")


@pytest.mark.parametrize("workers", [1, slow(2)])
def test_automatic_memory_is_shared_by_processes(
    file: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Each gets its part of what is free, less a margin; the report says how much."""
    monkeypatch.setattr("cadsurgery.support.memory.free_memory", lambda: 64 * 2**20)
    report = predict(file, picture, tmp_path / "out", memory="auto", workers=workers)
    assert not report.failed and f"--memory {32 // workers} MiB" in report.text
    monkeypatch.setattr(run, "memory_of_levels", lambda net, size: 10 * 2**20)
    report = predict(file, picture, tmp_path / "less", memory="auto", workers=workers)
    assert f"--memory {32 // workers - 10} MiB" in report.text


@pytest.mark.parametrize("mask", ["edges", "all"])
def test_the_memory_of_a_level_map_is_known(file: Path, mask: str) -> None:
    net = cs.load(file, mask=mask, trust=True).optimize(memory="16MiB")
    levels = net.rows(torch.rand(3, *SIZE)).levels
    assert large.memory_of_levels(net, SIZE) == (levels.nbytes if mask == "edges" else 0)


@pytest.mark.parametrize("kind", ["tif", "png"])
def test_pictures_that_would_not_fit_are_computed_in_bands(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The report says so in one line; with more memory they are computed whole, but for rasters."""
    monkeypatch.setattr(large, "SMALL", 0)
    monkeypatch.setattr(run, "SMALL", 0)
    pixels = (255 * street_scene(*SIZE)).round().byte().permute(1, 2, 0).numpy()
    source = tmp_path / f"page.{kind}"
    if kind == "tif":
        written(source, pixels, photometric="rgb", extratags=PLACES["north up"])
    else:
        Image.fromarray(pixels).save(source)
    for free, does_fit in ((2**23, False), (2**40, True)):
        for module in (run, amounts):
            monkeypatch.setattr(module, "free_memory", lambda free=free: free)
        report = predict(file, source, tmp_path / f"out{free}", memory="", mask="all")
        lines = [line for line in report.text.splitlines() if "as by --memory auto" in line]
        assert not report.failed and len(lines) == (0 if does_fit and kind == "png" else 1)
        assert does_fit or f"page.{kind}, {SIZE[1]} x {SIZE[0]} pixels" in lines[0]
        assert Path(report.rows[0]["output"]).name == f"page.{kind}"


def test_recommend_names_what_computes_pictures_whose_maps_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What does not fit is refused before it is computed; what fits, and what no plan is made of, is tried."""
    model, image = seeded(segmenter, torch.float32), torch.zeros(1, 3, 512, 512)
    monkeypatch.setattr(search, "SMALL", 1)
    for free, refused in ((2**20, True), (2**36, False), (None, False)):
        monkeypatch.setattr(search, "free_memory", lambda free=free: free)
        if refused:
            with pytest.raises(cs.InvalidInput, match="do not fit into memory") as refusal:
                search.refuse_what_does_not_fit(model, image)
            assert "--memory" in refusal.value.next
        else:
            search.refuse_what_does_not_fit(model, image)
    monkeypatch.setattr(search, "free_memory", lambda: 1)
    search.refuse_what_does_not_fit(nn.Conv2d(3, 3, 1), image)
