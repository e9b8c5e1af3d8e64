"""Matching on sequences: what is found, refused and measured."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Run
from photos import describer, save, save_some, scene
from PIL import Image
from torch import Tensor

import cadsurgery as cs
from cadsurgery.tasks.keypoints import Extraction
from recipes.hpatches.evaluation import evaluate_matching
from recipes.hpatches.matching import warped
from recipes.hpatches.sequences import find_sequences

HOMOGRAPHY = torch.tensor([[0.98, -0.06, 6.0], [0.05, 1.01, -4.0], [1e-4, 5e-5, 1.0]], dtype=torch.float64)


@pytest.fixture
def run(command_line: Run) -> Run:
    return partial(command_line, module="recipes.hpatches.match")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The photos of `save_some`."""
    return save_some(tmp_path / "images")


def moved(image: Tensor, homography: Tensor) -> Tensor:
    """The image whose pixel H p is the pixel p of the given one."""
    _, height, width = image.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    source = warped(torch.stack((x, y), -1).reshape(-1, 2), torch.linalg.inv(homography))
    grid = 2 * source / torch.tensor([width - 1, height - 1]) - 1
    return F.grid_sample(image[None].double(), grid.view(1, height, width, 2), align_corners=True)[0].float()


@pytest.fixture
def sequences(tmp_path: Path) -> Path:
    """Two sequences of three images, of known homographies; one that the protocol leaves out."""
    root = tmp_path / "sequences"
    for name, seed in (("i_wall", 0), ("v_wall", 1), ("v_talent", 2)):
        image = scene(seed=seed)
        save(image, root / name / "1.png")
        for number, homography in ((2, torch.eye(3, dtype=torch.float64)), (3, HOMOGRAPHY)):
            save(moved(image, homography), root / name / f"{number}.ppm")
            np.savetxt(root / name / f"H_1_{number}{'.txt' if number == 3 else ''}", homography.numpy())
    return root


# -- sequences -----------------------------------------------------------------------------------------


def test_sequences_are_found_and_those_of_the_protocol_left_out(sequences: Path) -> None:
    found, out = find_sequences(sequences)
    assert [one.name for one in found] == ["i_wall", "v_wall"] and out == ["v_talent"]
    assert [one.kind for one in found] == ["illumination", "viewpoint"]
    assert found[0].numbers == (2, 3) and torch.equal(found[0].homographies[1], HOMOGRAPHY)
    every, nothing = find_sequences(sequences, everything=True)
    assert len(every) == 3 and not nothing
    assert [one.name for one in find_sequences(sequences / "v_wall")[0]] == ["v_wall"]


def test_sequences_that_are_none_are_refused_with_the_layout(sequences: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path / "usernets"):
        with pytest.raises(cs.FileError, match="H_1_2"):
            find_sequences(path)
    with pytest.raises(cs.FileError, match="protocol"):
        find_sequences(sequences / "v_talent")
    for text in ("1 2 3", "a b", "0 0 0\n0 0 0\n0 0 0"):
        (sequences / "i_wall" / "H_1_2").write_text(text)
        with pytest.raises(cs.FileError, match="H_1_2"):
            find_sequences(sequences)
    (sequences / "i_wall" / "1.png").unlink()
    with pytest.raises(cs.FileError, match="image 1"):
        find_sequences(sequences)


EVAL = ("photos:describer", "--output-stride", "1,4", "--count", 100, "--rounds", 1)


@pytest.mark.slow
def test_matching_is_evaluated_for_several_masks_in_one_run(
    run: Run, sequences: Path, tmp_path: Path
) -> None:
    masks = ("--mask", "none", "--mask", "keypoints:detector=given,dilations=9/21", "--mask", "all")
    files = ("--output", "r.json", "--picture", "p.png", "--matches", "m.png")
    result = run(*EVAL, "--data", sequences, "--reach", "all", *masks, *files, "--json")
    assert result.code == 0, result
    report = json.loads((tmp_path / "r.json").read_text())
    assert report == result.json and report["left_out"] == ["v_talent"] and report["sequences"] == 2
    none, some, every = report["rows"]
    assert none["macs"] < some["macs"] < every["macs"] and none["active_fraction"] == 0
    for row in report["rows"]:
        assert len(row["pairs"]) == 4 and len(row["mma"]) == 15 and row["milliseconds"] > 0
        assert all(a <= b for a, b in zip(row["mma"], row["mma"][1:], strict=False))
        same = [pair for pair in row["pairs"] if pair["number"] == 2]
        assert all(pair["accuracy"][0] == 1 and pair["corner_error"] < 1e-3 for pair in same)
        halves = [row["mma_illumination"][2], row["mma_viewpoint"][2]]
        assert sum(halves) / 2 == pytest.approx(row["mma"][2])
    for name in ("p.png", "m.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 500
    told = run(*EVAL, "--data", sequences, "--all-sequences", "--output-stride", "2,4")
    assert told.code == 0 and "3 sequences" in told.out and "1 to 4" in told.out and "2 to 4" in told.out


def test_an_unreadable_image_costs_its_pair_and_the_exit_code(run: Run, sequences: Path) -> None:
    (sequences / "i_wall" / "3.ppm").write_bytes(b"no image")
    result = run(*EVAL, "--data", sequences, "--json")
    assert result.code == 1 and len(result.json["failed"]) == 1
    assert [len(row["pairs"]) for row in result.json["rows"]] == [3]
    (sequences / "i_wall" / "1.png").write_bytes(b"no image")
    result = run(*EVAL, "--data", sequences, "--json")
    assert result.code == 1 and result.json["sequences"] == 1
    (sequences / "v_wall" / "1.png").write_bytes(b"no image")
    assert run(*EVAL, "--data", sequences, "--json").json["error"] == "FileError"


def test_photos_are_matched_with_views_of_themselves(run: Run, folder: Path) -> None:
    masks = ("--mask", "none", "--mask", "all", "--detector", "sift")
    result = run(*EVAL, "--data", f"images:{folder}", *masks, "--json")
    assert result.code == 1 and [failure["error"] for failure in result.json["failed"]] == ["FileError"]
    assert result.json["sequences"] == 3
    for row in result.json["rows"]:
        assert len(row["pairs"]) == 9 and 0 < row["mma"][2] <= row["mma"][9] <= 1
    with pytest.raises(cs.FileError, match="no file or folder"):
        evaluate_matching(describer(), "images:nowhere")


def test_evaluation_refuses_what_cannot_be(run: Run, sequences: Path) -> None:
    with pytest.raises(cs.InvalidInput, match="rounds"):
        evaluate_matching(describer(), sequences, rounds=-1)
    with pytest.raises(cs.FileError, match="folder"):
        evaluate_matching(describer(), sequences, output=Path("nowhere/r.json"))
    with pytest.raises(cs.InvalidInput, match="count"):
        Extraction(count=0)
