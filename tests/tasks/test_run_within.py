"""`cadsurgery run --within`: only an area of a picture is computed, whole or in rows, with the values of all of it."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import covering
from PIL import Image
from predicting import NORTH_UP, ZONE, save_convolutions
from predicting import predict as predict_mask
from torch.utils._python_dispatch import TorchDispatchMode

import cadsurgery as cs
from cadsurgery.data.areas import read_area
from cadsurgery.data.images import normalise, read_image, street_scene
from cadsurgery.elements import lattice
from cadsurgery.masks import masking
from cadsurgery.network.model import pictures_for
from cadsurgery.support.torch_internals import tree_leaves
from cadsurgery.tasks import large
from cadsurgery.tasks.commands import RunOptions

SIZE = (510, 766)  # which the network rounds up to 512 x 768
CORNER = (5e5, 5.2e6, 0.2)  # east, north, metres a pixel
PLACE = [*NORTH_UP, (34735, 3, len(ZONE), ZONE, True)]
predict = partial(predict_mask, mask="all")
MEMORIES = ["", "16MiB"]


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    return lambda channels=5: save_convolutions(tmp_path, monkeypatch, channels, 4)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    stored = np.clip(255 * street_scene(*SIZE).permute(1, 2, 0).numpy(), 1, 255).astype(np.uint8)
    tifffile.imwrite(tmp_path / "map.tif", stored, photometric="rgb", tile=(64, 64), extratags=PLACE)
    Image.fromarray(stored).save(tmp_path / "map.png")
    return tmp_path / "map.tif"


def corners(left: int, top: int, right: int, bottom: int) -> list[list[float]]:
    """A rectangle of pixels in the raster's coordinates."""
    east, north, side = CORNER
    return [
        [east + side * x, north - side * y]
        for x, y in ((left, top), (right, top), (right, bottom), (left, bottom))
    ]


def areas(folder: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """Files of areas of every kind, and the pixels that each is meant to have."""
    box, other = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    box[100:260, 40:300] = True
    other[100:260, 40:300], other[130:200, 100:200], other[400:512, 600:700] = True, False, True
    Image.fromarray(other).save(folder / "area.png")
    (folder / "boxes.json").write_text(json.dumps({"boxes": [[40, 100.5, 299.2, 260]]}))
    rings = [corners(40, 100, 300, 260), corners(100, 130, 200, 200)]
    beyond = [corners(600, 400, 700, 900)]
    features = [{"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": [rings, beyond]}}]
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::25832"}}
    shapes = {"type": "FeatureCollection", "crs": crs, "features": features}
    (folder / "shapes.geojson").write_text(json.dumps(shapes))
    smaller = Image.fromarray(other).resize((SIZE[1] // 2, SIZE[0] // 2), Image.Resampling.NEAREST)
    smaller.save(folder / "smaller.png")
    return {
        "boxes": (folder / "boxes.json", box),
        **{name: (folder / name, other) for name in ("area.png", "shapes.geojson", "smaller.png")},
    }


@pytest.mark.parametrize(
    ("kind", "mask", "memory"),
    covering(
        ["boxes", "area.png", "shapes.geojson", "smaller.png"], ["all", "edges:threshold=0.1"], MEMORIES
    ),
)
def test_an_area_has_the_values_of_the_whole_prediction(
    network: Callable[..., Path], picture: Path, tmp_path: Path, kind: str, mask: str, memory: str
) -> None:
    """The other pixels are marked as without data: 255, transparent in PNG files and stated in TIFF files."""
    (area, asked), net = areas(tmp_path)[kind], network()
    is_raster = bool(memory) or kind == "shapes.geojson"
    ending = "tif" if is_raster else "png"
    source = picture.with_suffix(f".{ending}")
    whole = predict(net, source, tmp_path / "whole", memory=memory, mask=mask)
    part = predict(net, source, tmp_path / "part", memory=memory, mask=mask, within=str(area))
    values, those = (np.array(Image.open(tmp_path / name / f"map.{ending}")) for name in ("part", "whole"))
    assert np.array_equal(values == 255, ~asked) and not (those == 255).any()
    assert (values == those)[asked].mean() > 0.999  # ties, which rounding decides
    assert part.rows[0]["asked"] == asked.sum() and "asked" not in whole.rows[0]
    assert f"{asked.sum()} of {asked.size} pixels are inside the area" in part.text
    if is_raster:
        assert (
            tifffile.TiffFile(tmp_path / "part" / "map.tif").pages.first.tags[42113].value.startswith("255")
        )
    else:
        assert Image.open(tmp_path / "part" / "map.png").info["transparency"] == 255


@pytest.mark.parametrize("memory", MEMORIES)
def test_values_of_one_channel_are_there_inside_only(
    network: Callable[..., Path], picture: Path, tmp_path: Path, memory: str
) -> None:
    (area, asked), net = areas(tmp_path)["area.png"], network(1)
    source = picture if memory else picture.with_suffix(".png")
    predict(net, source, tmp_path / "part", memory=memory, within=str(area))
    if not memory:
        values = np.array(Image.open(tmp_path / "part" / "map.png"))
        assert np.array_equal(values == 255, ~asked) and {0, 254} <= set(np.unique(values))
        return
    predict(net, picture, tmp_path / "whole", memory=memory)
    part, whole = (tifffile.imread(tmp_path / name / "map.tif") for name in ("part", "whole"))
    assert np.array_equal(np.isnan(part), ~asked) and np.allclose(part[asked], whole[asked], atol=1e-5)


class Largest(TorchDispatchMode):
    """Notes the types of tensors that take the memory of so many values of theirs, or more."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.types = least, set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            is_held = isinstance(one, torch.Tensor) and not one.is_meta
            if is_held and one.untyped_storage().nbytes() >= self.least * one.itemsize:
                self.types.add(one.dtype)
        return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "lacks"),
    [("edges:threshold=0.1", True), ("edges:threshold=0.1", False), ("content", True)],
)
def test_of_the_whole_picture_only_a_byte_of_levels_is_kept(
    network: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: str, lacks: bool
) -> None:
    """Everything else is there for some rows at a time, whatever the area."""
    source, area = tmp_path / "map.tif", tmp_path / "area.json"
    stored = np.tile(np.clip(255 * street_scene(512, 512).permute(1, 2, 0).numpy(), 1, 255), (4, 1, 1))
    stored[600:900] *= not lacks
    tags = [(42113, 2, None, "0", True)]
    tifffile.imwrite(source, stored.astype(np.uint8), photometric="rgb", tile=(64, 64), extratags=tags)
    area.write_text("[[100, 700, 200, 1400]]")
    monkeypatch.setattr(large, "_SEEN", 1 << 16)
    monkeypatch.setattr(masking, "_BAND", 1 << 15)
    monkeypatch.setattr(masking, "_SEEN", 1 << 16)
    monkeypatch.setattr(lattice, "_AT_ONCE", 1 << 10)
    net, largest = cs.load(network(), mask=mask, trust=True).optimize(memory="8MiB"), Largest(2048 * 512)
    with largest:
        picture = large.LargePicture(str(source), pictures_for(net), options=RunOptions(within=str(area)))
        part = large.WrittenRows(str(source), tmp_path / "out.tif", {}, resume=False)
        row = large.predict_large(net, picture, part, lambda *_: Counter(), threading.Event())
        picture.file.close()
    assert row["asked"] == 70_000 and 0 < row["active_fraction"] < 1 and picture.lacks == lacks
    assert largest.types == {torch.int8}


def test_shares_of_levels_are_those_of_the_area(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "map.tif", np.ones((64, 96, 3), np.uint8), photometric="rgb")
    (tmp_path / "area.json").write_text("[[10, 8, 50, 40]]")
    options = RunOptions(within=str(tmp_path / "area.json"))
    picture = large.LargePicture(str(tmp_path / "map.tif"), None, options=options)
    levels = torch.zeros(1, 16, 24, dtype=torch.int8)
    levels[:, 4:] = 2  # of the rows 2 to 9 of the area two have level 0
    assert large._shares_of(levels, picture, 2) == [0.25, 0, 0.75]
    assert large._shares_of(torch.ones(1, 1, 1).expand(1, 16, 24), picture, 1) == [0, 1]
    picture.file.close()


@pytest.mark.parametrize("mask", ["content", "edges | budget:fraction=0.3"])
def test_an_area_has_the_levels_of_the_whole_mask(
    network: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: str
) -> None:
    """Where masks compare with thresholds or ranks of all of the picture, too."""
    source, area, find = tmp_path / "map.tif", tmp_path / "area.json", large.find_pieces
    stored = np.clip(255 * street_scene(700, 1600).permute(1, 2, 0).numpy(), 1, 255).astype(np.uint8)
    tifffile.imwrite(source, stored, photometric="rgb", tile=(64, 64))
    area.write_text("[[100, 300, 300, 400], [1300, 50, 1400, 120]]")
    found = list[Any]()
    monkeypatch.setattr(large, "find_pieces", lambda *given: found.append(find(*given)) or found[-1])
    assert not predict(
        network(), source, tmp_path / "out", mask=mask, memory="16MiB", within=str(area)
    ).failed
    net = cs.load(network(), mask=mask, trust=True).optimize(memory="16MiB")
    image = normalise(read_image(source), pictures_for(net))
    levels, (pieces,) = net.rows(image).levels, found
    assert len(pieces) == 2 and levels.unique().numel() > 1
    for piece in pieces:
        part = levels[:, piece.part.top : piece.part.bottom, piece.part.left : piece.part.right]
        assert torch.equal(piece.mask.levels, part)


def test_rows_and_columns_outside_of_an_area_are_not_computed(
    network: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, size = tmp_path / "large.tif", (1024, 1536)
    tifffile.imwrite(picture, np.zeros((*size, 3), np.uint8), photometric="rgb", tile=(64, 64))
    net, pixels, find = network(), list[int](), large.find_pieces

    def noted(*given: Any) -> Any:
        found = find(*given)
        pixels.append(sum((p.part.bottom - p.part.top) * (p.part.right - p.part.left) for p in found))
        return found

    monkeypatch.setattr(large, "find_pieces", noted)
    (tmp_path / "one.json").write_text("[[300, 200, 364, 264], [700, 10, 701, 11]]")
    predict(net, picture, tmp_path / "out", memory="16MiB", within=str(tmp_path / "one.json"))
    assert pixels[0] < 0.05 * size[0] * size[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*written without its position")
def test_what_is_drawn_upon_a_picture_is_inside_the_area(
    network: Callable[..., Path], picture: Path, tmp_path: Path
) -> None:
    (area, asked), net = areas(tmp_path)["area.png"], network()
    source = picture.with_suffix(".png")
    predict(net, source, tmp_path / "part", view="overlay", within=str(area))
    predict(net, source, tmp_path / "whole", view="overlay")
    part, whole = (np.array(Image.open(tmp_path / name / "map.png")) for name in ("part", "whole"))
    assert np.array_equal(part[~asked], np.array(Image.open(source))[~asked])
    assert (part == whole).all(2)[asked].mean() > 0.999


def test_another_area_is_another_question(
    network: Callable[..., Path], picture: Path, tmp_path: Path
) -> None:
    net, output = network(), tmp_path / "out"
    found = areas(tmp_path)
    predict(net, picture, output, memory="16MiB", within=str(found["boxes"][0]))
    again = predict(net, picture, output, memory="16MiB", within=str(found["boxes"][0]), resume=True)
    assert again.skipped == 1
    for other in (str(found["area.png"][0]), ""):
        with pytest.raises(cs.InvalidInput, match="within"):
            predict(net, picture, output, memory="16MiB", within=other, resume=True)


def named(system: str, *rings: Any) -> str:
    crs = {"type": "name", "properties": {"name": system}}
    return json.dumps({"type": "Polygon", "crs": crs, "coordinates": list(rings)})


INSIDE = corners(0, 0, 50, 50)
WRONG: dict[str, tuple[str, str]] = {
    "other system": (
        named("urn:ogc:def:crs:EPSG::3857", INSIDE),
        "EPSG:3857, and .* in EPSG:25832[\\s\\S]*ogr2ogr",
    ),
    "elsewhere": (
        json.dumps({"type": "Polygon", "coordinates": [[[9, 47], [10, 47], [10, 48]]]}),
        "no pixel of",
    ),
    "a line": (json.dumps({"type": "LineString", "coordinates": INSIDE}), "holds no area[\\s\\S]*LineString"),
    "no JSON": ("{", "is no JSON file"),
    "turned box": ("[[30, 30, 10, 40]]", "holds no area[\\s\\S]*left, top"),
    "no boxes": ("[]", "no pixel of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_area_of_the_picture_is_refused_in_words(tmp_path: Path, case: str) -> None:
    text, words = WRONG[case]
    (tmp_path / "area.geojson").write_text(text)
    with pytest.raises(cs.CadError, match=words):
        read_area(tmp_path / "area.geojson", SIZE, "map.tif", PLACE)


def test_an_area_of_another_size_or_without_pixels_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((100, 100), np.uint8)).save(tmp_path / "other.png")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "none.png")
    with pytest.raises(cs.InvalidInput, match=r"100 x 100 pixels, and map\.tif has 766 x 510"):
        read_area(tmp_path / "other.png", SIZE, "map.tif")
    with pytest.raises(cs.InvalidInput, match=r"no pixel of map\.tif is inside"):
        read_area(tmp_path / "none.png", SIZE, "map.tif")
    with pytest.raises(cs.FileError, match=r"missing\.png"):
        read_area(tmp_path / "missing.png", SIZE, "map.tif")
    points = [(33922, 12, 18, tuple(map(float, range(18))), True)]
    (tmp_path / "area.geojson").write_text(WRONG["elsewhere"][0])
    with pytest.raises(cs.InvalidInput, match="control points"):
        read_area(tmp_path / "area.geojson", SIZE, "map.tif", points)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("place", ["none", "area", "point", "matrix"])
def test_polygons_are_where_gdal_places_them(tmp_path: Path, place: str) -> None:
    """Pixels whose middle is inside, of the picture's own transform; in pixels without one."""
    rasterio = pytest.importorskip("rasterio")
    features = pytest.importorskip("rasterio.features")
    rng = np.random.default_rng(0)
    affine = tuple(map(float, (0.2, 0.01, 0, 5e5, 0.02, -0.3, 0, 5.2e6, *[0] * 7, 1)))
    zone = (*ZONE[:11], 2 if place == "point" else 1, *ZONE[12:])
    keys = (34735, 3, len(zone), zone, True)
    position = {"none": [], "matrix": [(34264, 12, 16, affine, True), keys]}.get(place, [*PLACE[:2], keys])
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((60, 80), np.uint8), extratags=position, metadata=None)
    with rasterio.open(tmp_path / "a.tif") as raster:
        transform = raster.transform if place != "none" else rasterio.Affine.identity()
    for _ in range(5):
        pixels = rng.uniform(-10, 90, (5, 2))
        ring = [list(transform @ tuple(map(float, corner))) for corner in pixels]
        shape = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
        (tmp_path / "area.geojson").write_text(json.dumps(shape))
        found = read_area(tmp_path / "area.geojson", (60, 80), "a.tif", position)(0, 60)
        wanted = features.rasterize([shape], (60, 80), transform=transform).astype(bool)
        assert (found.numpy() != wanted).mean() < 0.002  # pixels whose middle is on an edge
        assert torch.equal(found[13:40], read_area(tmp_path / "area.geojson", (60, 80), "", position)(13, 40))


def test_an_area_is_refused_where_it_has_no_meaning(
    network: Callable[..., Path], picture: Path, tmp_path: Path
) -> None:
    net, area = network(), str(areas(tmp_path)["area.png"][0])
    with pytest.raises(cs.InvalidInput, match="--within for --size"):
        predict(net, picture, tmp_path / "out", within=area, size=(64, 64))
    with pytest.raises(cs.FileError):
        predict(net, picture, tmp_path / "out", within="nowhere.png")
