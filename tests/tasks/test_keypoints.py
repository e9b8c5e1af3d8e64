"""Keypoints of folders: what is written, kept and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Run
from photos import Both, describer, save_some, scene
from PIL import Image
from torch import Tensor

import cadsurgery as cs
from cadsurgery.data.images import normalise
from cadsurgery.data.networks import source_of
from cadsurgery.tasks.keypoints import (
    Extraction,
    Extractor,
    Features,
    extract,
    read_features,
    write_features,
)
from recipes.hpatches.matching import mutual_matches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The photos of `save_some`."""
    return save_some(tmp_path / "images")


EXTRACT = ("keypoints", "extract", "photos:describer")


def test_features_of_a_folder_are_written_and_a_corrupt_image_is_reported(
    command_line: Run, folder: Path
) -> None:
    with Image.open(
        folder / "first.png"
    ) as image:  # held on its side; keypoints are in pixels as they are stored
        turned = image.getexif()
        turned[0x0112] = 6
        image.save(folder / "first.png", exif=turned)
    result = command_line(*EXTRACT, folder, "missing.png", "--output", "out", "--count", 50, "--json")
    assert result.code == 1
    assert [Path(failure["image"]).name for failure in result.json["failed"]] == ["missing.png", "broken.png"]
    rows = {Path(row["image"]).name: row for row in result.json["images"]}
    assert set(rows) == {"first.png", "second.png", "third.png"}
    assert Path("out/more/second.npz").is_file() and rows["third.png"]["keypoints"] == 0
    for row in rows.values():
        with np.load(row["output"]) as file:
            count = row["keypoints"]
            assert file["keypoints"].shape == (count, 2) and file["scores"].shape == (count,)
            assert file["descriptors"].shape == (count, 8) and file["keypoints"].dtype == np.float32
            np.testing.assert_allclose(np.linalg.norm(file["descriptors"], axis=1), 1, rtol=1e-5)
            with Image.open(row["image"]) as image:
                assert tuple(file["image_size"]) == image.size
    assert 0 < rows["first.png"]["keypoints"] <= 50
    told = command_line(*EXTRACT, folder, "--output", "out", "--count", 50)
    assert (
        told.code == 1 and "3 there already" in told.out and "1 failed" in told.out and "broken" in told.err
    )


def test_an_interrupted_extraction_goes_on_and_keeps_what_is_there(
    command_line: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, failed = extract(describer(), [folder], tmp_path / "whole", options={"output_stride": (1, 4)})
    calls = []
    original = Extractor.__call__

    def stops(self: Extractor, image: Tensor) -> Features:
        if calls:
            raise KeyboardInterrupt
        calls.append(image)
        return original(self, image)

    monkeypatch.setattr(Extractor, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        extract(describer(), [folder], tmp_path / "out", options={"output_stride": (1, 4)})
    monkeypatch.setattr(Extractor, "__call__", original)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npz")}
    assert len(before) == 1 and not list((tmp_path / "out").rglob(".*"))
    rows, again = extract(describer(), [folder], tmp_path / "out", options={"output_stride": (1, 4)})
    assert [row["kept"] for row in rows].count(True) == 1 and len(again) == len(failed) == 1
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    for row, other in zip(rows, whole, strict=True):
        found, expected = read_features(Path(row["output"])), read_features(Path(other["output"]))
        assert torch.equal(found.descriptors, expected.descriptors)
        assert torch.equal(found.keypoints, expected.keypoints)


def test_a_folder_of_features_made_otherwise_is_refused(
    command_line: Run, folder: Path, tmp_path: Path
) -> None:
    assert command_line(*EXTRACT, folder / "first.png", "--output", "out").code == 0
    refused = command_line(*EXTRACT, folder / "first.png", "--output", "out", "--count", 3, "--json")
    assert refused.code == 1 and "count: 512, now 3" in refused.json["where"] and refused.json["next"]
    with pytest.raises(cs.InvalidInput, match=r"another run(?s:.)*tensors: .* now"):  # of the same name
        extract(describer(), [folder / "first.png"], tmp_path / "own", options={"output_stride": (1, 4)})
        other = describer()
        next(other.parameters()).data.add_(0.1)
        extract(other, [folder / "first.png"], tmp_path / "own", options={"output_stride": (1, 4)})
    Path("out/manifest.jsonl").write_text("{\n{}\n")
    assert (
        command_line(*EXTRACT, folder / "first.png", "--output", "out", "--json").json["error"] == "FileError"
    )


def test_a_truncated_file_of_features_is_reported(command_line: Run, folder: Path) -> None:
    assert command_line(*EXTRACT, folder / "first.png", "--output", "out").code == 0
    Path("out/first.npz").write_bytes(b"PK")
    result = command_line(*EXTRACT, folder / "first.png", "--output", "out", "--json")
    assert result.code == 1 and "first.npz" in result.json["failed"][0]["what"]


@pytest.mark.parametrize("form", ["npz", "h5"])
def test_features_survive_their_file(form: str, tmp_path: Path) -> None:
    features = Features(torch.rand(5, 2), torch.rand(5), torch.rand(5, 7), (48, 64))
    write_features(features, tmp_path / f"a.{form}", "some/where/a.png")
    found = read_features(tmp_path / f"a.{form}")
    assert all(
        torch.equal(getattr(found, key), getattr(features, key))
        for key in ("keypoints", "scores", "descriptors")
    )
    assert found.size == (48, 64)


def test_hdf5_is_laid_out_as_hloc_reads_it(command_line: Run, folder: Path) -> None:
    import h5py

    assert command_line(*EXTRACT, folder / "first.png", "--form", "h5", "--output", "out").code == 0
    with h5py.File("out/first.h5") as file:
        group = file["first.png"]
        assert group["descriptors"].shape == (8, len(group["keypoints"]))


def test_descriptors_are_those_of_the_network_at_the_keypoints(command_line: Run) -> None:
    """In every way they can be found, and mapped back to the pixels of the file."""
    image = scene()
    net = cs.adaptify(describer(), "edges", output_stride=(1, 4), verify_laws=False).eval()
    for settings in (
        Extraction(),
        Extraction(reach="all", mask=""),
        Extraction(mask="all", raw=True, count=20),
    ):
        extractor = Extractor(net.optimize(), settings)
        found = extractor(image)
        points = found.keypoints.long()
        batch = normalise(image, source_of(net))[None]
        with cs_keypoints(found.keypoints), torch.no_grad():
            dense = net(batch, mask=settings.mask or None)[0]
        rows = dense[:, points[:, 1], points[:, 0]].T
        expected = rows if settings.raw else F.normalize(rows, dim=1)
        torch.testing.assert_close(found.descriptors, expected, rtol=1e-4, atol=1e-5)
    small = Extractor(net, Extraction(max_edge=64, multiple=8))
    assert small.resize(image).shape == (3, 48, 64) and small(image).keypoints[:, 0].max() > 64


def cs_keypoints(points: Tensor) -> Any:
    from cadsurgery.masks import keypoints_at

    return keypoints_at([points.double()])


def middle(images: Tensor) -> list[Tensor]:
    """One keypoint, in the middle."""
    return [torch.tensor([[image.shape[2] // 2, image.shape[1] // 2]]) for image in images]


def test_a_network_with_its_own_score_map_detects_and_describes(command_line: Run, folder: Path) -> None:
    arguments = ("keypoints", "extract", "photos:Both", folder / "first.png", "--output-stride", "1,4")
    own = command_line(
        *arguments, "--detector", "own", "--mask", "edges", "--output", "own", "--count", 40, "--json"
    )
    assert own.code == 0 and own.json["images"][0]["keypoints"] == 40
    features = read_features(Path("own/first.npz"))
    assert bool((features.scores.diff() <= 0).all()) and features.keypoints.min() >= 5
    given = command_line(*arguments, "--detector", f"{__name__}:middle", "--output", "given", "--json")
    middle = read_features(Path("given/first.npz"))
    assert given.code == 0 and middle.keypoints.tolist() == [[64, 48]] and middle.descriptors.shape == (1, 8)


def test_the_networks_own_detector_names_the_mask_that_goes_with_it(command_line: Run, folder: Path) -> None:
    arguments = (*EXTRACT[:2], "photos:Both", folder / "first.png", "--output-stride", "1,4", "--json")
    refused = command_line(*arguments, "--detector", "own")
    assert refused.code == 1 and "keypoints:detector=own" in refused.json["next"]
    taken = command_line(*arguments, "--detector", "own", "--mask", "keypoints:detector=own")
    assert taken.code == 0 and taken.json["images"][0]["keypoints"] > 0


def nothing(images: Tensor) -> None:
    """No points, by mistake."""


def failing(images: Tensor) -> None:
    raise RuntimeError("no weights of the detector")


def test_a_folder_without_features_is_used_again_after_a_detector_failed(
    command_line: Run, folder: Path
) -> None:
    arguments = ("keypoints", "extract", "photos:describer", folder / "first.png", "--json", "--detector")
    for name, said in (("nothing", "returns a list with points (n, 2)"), ("failing", "no weights")):
        failed = command_line(*arguments, f"{__name__}:{name}")
        assert failed.code == 1 and said in json.dumps(failed.json["failed"])
    assert command_line(*arguments, f"{__name__}:middle").code == 0
    other = command_line(*arguments, f"{__name__}:nothing")
    assert other.code == 1 and "another run" in other.json["what"]


def test_two_photos_are_matched_by_what_extract_wrote(command_line: Run, tmp_path: Path) -> None:
    """As docs/howto/keypoints shows it: a photo and the same, moved by eight pixels."""
    photo = scene(96, 136, 0)
    for name, left in (("left", 0), ("right", 8)):
        part = (255 * photo[:, :, left : left + 128]).byte().permute(1, 2, 0).numpy()
        Image.fromarray(part).save(tmp_path / f"{name}.png")
    assert command_line(*EXTRACT, "left.png", "right.png", "--mask", "all").code == 0
    left, right = (read_features(Path("features") / f"{name}.npz") for name in ("left", "right"))
    pairs = mutual_matches(left.descriptors, right.descriptors)
    moved = left.keypoints[pairs[:, 0]] - right.keypoints[pairs[:, 1]]
    assert len(pairs) > 5 and moved.median(0).values.tolist() == [8, 0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--detector", "surf"), "sift"),
        (("--detector", "own", "--mask", "all"), "score map"),
        (("--form", "txt"), "npz"),
        (("--set", "output_name=x"), "output"),
        (("--set", "multiple=500"), "multiple"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_extraction_refuses_what_cannot_be(
    command_line: Run, folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    result = command_line(*EXTRACT, folder / "first.png", "--output", "out", *arguments, "--json")
    assert result.code == 1
    error = result.json["failed"][0] if "failed" in result.json else result.json
    assert said in json.dumps(error)
    assert not list(Path().glob("out/*.npz"))


class Flat(Both):
    """Descriptors without places."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.trunk(x).mean((2, 3))


class Two(Both):
    """Two maps of descriptors."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {**super().forward(x), "more": self.trunk(x)}


def test_a_network_without_a_map_of_descriptors_is_refused_before_any_image(
    command_line: Run, folder: Path
) -> None:
    more = ("--output", "out", "--output-stride", "1,4")
    flat, two = (
        command_line("keypoints", "extract", f"{__name__}:{name}", folder, *more, "--json")
        for name in ("Flat", "Two")
    )
    assert flat.code == two.code == 1
    assert "no map of descriptors" in flat.json["what"] and "features" in flat.json["next"]
    assert "2 maps" in two.json["what"] and "descriptors or more" in two.json["next"]
    assert not Path("out/manifest.jsonl").exists()
    named = (f"{__name__}:Two", folder / "first.png", *more, "--set", "output_name=more")
    assert command_line("keypoints", "extract", *named).code == 0


def test_a_converted_network_is_given_other_output_strides(
    command_line: Run, folder: Path, tmp_path: Path
) -> None:
    net = cs.build_model("photos:describer", "none")
    cs.save(cs.adaptify(net, "edges", output_stride=(1, 4), verify_laws=False), tmp_path / "net.safetensors")
    arguments = ("keypoints", "extract", "net.safetensors", "--trust", folder / "first.png", "--mask", "")
    assert command_line(*arguments).code == 0
    assert command_line(*arguments, "--output-stride", "2,4", "-o", "coarse").code == 0
    fine, coarse = (
        json.loads(Path(out, "manifest.jsonl").read_text().splitlines()[0]) for out in ("features", "coarse")
    )
    assert fine["plan"][0] == [1, 4] and coarse["plan"][0] == [2, 4]
    assert fine["model"] == coarse["model"]
