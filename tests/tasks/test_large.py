"""`cadsurgery run --memory`: pictures that take more than the memory are read, computed and written in rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from networks import saved_segmenter, seeded, segmenter
from PIL import Image
from torch import nn

import cadsurgery as cs
from cadsurgery.data.images import read_image, street_scene
from cadsurgery.data.tiff import TiffRows
from cadsurgery.support.memory import free_memory
from cadsurgery.support.progress import silent
from cadsurgery.tasks import large, predictor, run
from cadsurgery.tasks.commands import RunOptions
from cadsurgery.tasks.recommend import fits
from cadsurgery.tasks.report import FilesReport

SIZE = (733, 301)  # odd; 2.5 MiB as float32
LITTLE, MUCH = "2MiB", "1GiB"


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_segmenter(tmp_path_factory.mktemp("large") / "net.safetensors")


def predict(file: Path, picture: Path, output: Path, **options: Any) -> FilesReport:
    options = {"output": str(output), "workers": 1, "trust": True, "memory": LITTLE, **options}
    return run.predict(file, [picture], RunOptions(**options), step=silent)


def written(path: Path, stored: np.ndarray, **options: Any) -> Path:
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


@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "f4"])
@pytest.mark.parametrize("bands", [1, 3, 6])
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
    whole = predict(file, picture, tmp_path / "whole", mask=mask, memory=MUCH)
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


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("mask", ["all", "edges:threshold=0.1"])
def test_a_killed_run_goes_on_behind_the_rows_that_are_there(
    file: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: str
) -> None:
    for module in (predictor, run):
        monkeypatch.setattr(module, "class_names", lambda _: tuple("abcdef"))
    whole = predict(file, picture, tmp_path / "at once", mask=mask)
    write, seen = large._WrittenRows.write, list[int]()

    def until_killed(part: Any, first: int, *others: Any) -> None:
        if len(seen) == 3:
            raise Killed
        seen.append(first)
        write(part, first, *others)

    monkeypatch.setattr(large._WrittenRows, "write", until_killed)
    with pytest.raises(Killed):
        predict(file, picture, tmp_path / "out", mask=mask)
    assert not (tmp_path / "out" / "page.tif").exists()
    before = seen.copy()
    seen.clear()

    def noted(part: Any, first: int, *others: Any) -> None:
        seen.append(first)
        write(part, first, *others)

    monkeypatch.setattr(large._WrittenRows, "write", noted)
    report = predict(file, picture, tmp_path / "out", mask=mask, resume=True)
    assert seen[0] > before[1]  # the first rows are not computed again
    ended, at_once = ((tmp_path / name / "page.tif").read_bytes() for name in ("out", "at once"))
    assert ended == at_once
    assert report.rows[0]["classes"] == whole.rows[0]["classes"]


def test_another_picture_or_mask_does_not_go_on_with_what_is_there(
    file: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(part: Any, *_: Any) -> None:
        raise Killed

    write = large._WrittenRows.write
    monkeypatch.setattr(large._WrittenRows, "write", lambda part, *rest: (write(part, *rest), killed(part)))
    with pytest.raises(Killed):
        predict(file, picture, tmp_path / "out")
    picture.write_bytes(picture.read_bytes() + b"\0")
    seen = list[int]()

    def noted(part: Any, first: int, *others: Any) -> None:
        seen.append(first)
        write(part, first, *others)

    monkeypatch.setattr(large._WrittenRows, "write", noted)
    predict(file, picture, tmp_path / "out", resume=True)
    assert seen[0] == 0


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


# -- recommend ----------------------------------------------------------------------------------------


def test_recommend_names_what_computes_pictures_whose_maps_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What does not fit is refused before it is computed; what fits, and what no plan is made of, is tried."""
    model, image = seeded(segmenter, torch.float32), torch.zeros(1, 3, 512, 512)
    monkeypatch.setattr(fits, "_SMALLER", 1)
    for free, refused in ((2**20, True), (2**36, False), (None, False)):
        monkeypatch.setattr(fits, "free_memory", lambda free=free: free)
        if refused:
            with pytest.raises(cs.InvalidInput, match="do not fit into memory") as refusal:
                fits.refuse_what_does_not_fit(model, image)
            assert "--memory" in refusal.value.next
        else:
            fits.refuse_what_does_not_fit(model, image)
    monkeypatch.setattr(fits, "free_memory", lambda: 1)
    fits.refuse_what_does_not_fit(nn.Conv2d(3, 3, 1), image)


def test_the_system_tells_the_memory_that_is_free() -> None:
    assert (free_memory() or 2**20) >= 2**20
