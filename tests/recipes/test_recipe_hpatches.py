"""Matching on sequences: what is found, refused and measured."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import describer, save, save_some, scene
from PIL import Image
from torch import Tensor

import cadsurgery as cs
from cadsurgery.tasks.keypoints import Extraction
from recipes.hpatches.evaluation import evaluate_matching
from recipes.hpatches.matching import (
    corner_error,
    match_errors,
    matching_accuracy,
    mutual_matches,
    warped,
)
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


# -- descriptors matched between two images of a plane -------------------------------------------------


QUICK = settings(max_examples=40, deadline=None, derandomize=True)
IDENTITY = torch.eye(3, dtype=torch.float64)
THRESHOLDS = tuple(range(1, 16))


def homography(seed: int) -> Tensor:
    """Some view of a plane: turned, scaled, moved, a little in perspective."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    scale = torch.tensor([[0.2, 0.2, 20.0], [0.2, 0.2, 20.0], [1e-4, 1e-4, 0.0]], dtype=torch.float64)
    return IDENTITY + scale * noise


def move_by(x: float, y: float) -> Tensor:
    return torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=torch.float64)


def spread(count: int, seed: int = 0) -> Tensor:
    """Points in an image of 200 x 300."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([299.0, 199.0])


def each(count: int) -> Tensor:
    """Every point with its own."""
    return torch.arange(count).unsqueeze(1).expand(-1, 2)


@QUICK
@given(
    seed=st.integers(0, 999),
    sizes=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    values=st.sampled_from([2, 1000]),
)
def test_a_match_is_the_nearest_of_its_nearest(seed: int, sizes: tuple[int, int], values: int) -> None:
    """Under the inner product; of equal ones the first counts."""
    torch.manual_seed(seed)
    first, second = (torch.randint(0, values, (size, 4)).double() for size in sizes)
    wanted = []
    for i, row in enumerate(first):
        if len(second):
            products = [float(row @ other) for other in second]
            j = products.index(max(products))
            back = [float(other @ second[j]) for other in first]
            if back.index(max(back)) == i:
                wanted.append([i, j])
    found = mutual_matches(first, second)
    assert found.dtype == torch.int64 and found.shape == (len(wanted), 2)
    assert found.tolist() == wanted


@pytest.mark.parametrize(
    ("first", "second"), [((3, 4), (3, 5)), ((0, 4), (2, 5)), ((4,), (3, 4)), ((1, 3, 4), (3, 4))]
)
def test_descriptors_of_different_networks_are_refused(
    first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    with pytest.raises(cs.InvalidInput) as caught:
        mutual_matches(torch.zeros(first), torch.zeros(second))
    assert str(first) in caught.value.what and "(n, C) and (m, C)" in caught.value.next


@QUICK
@given(
    offsets=st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), max_size=12),
    seed=st.integers(0, 99),
)
def test_known_errors_give_the_known_accuracy(offsets: list[tuple[int, int]], seed: int) -> None:
    """K4: points moved by a homography, then each by so many pixels."""
    first, truth = spread(len(offsets), seed), homography(seed)
    second = warped(first, truth) + torch.tensor(offsets, dtype=torch.float64).reshape(-1, 2)
    order = torch.randperm(len(offsets))
    matches = torch.stack((order, torch.arange(len(offsets))), 1)
    errors = match_errors(first, second[order], matches, truth)
    lengths = [math.hypot(*offsets[int(i)]) for i in order]
    assert errors.tolist() == pytest.approx(lengths, abs=1e-8)
    limits = [limit + 1e-6 for limit in THRESHOLDS]
    wanted = [sum(length <= limit for length in lengths) / max(1, len(lengths)) for limit in limits]
    assert matching_accuracy(errors, limits) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(4))
def test_points_are_moved_as_opencv_moves_them(seed: int) -> None:
    points, truth = spread(50, seed), homography(seed)
    wanted = cv2.perspectiveTransform(points.numpy()[None], truth.numpy())[0]
    found = warped(points, truth)
    assert found.dtype == torch.float64 and np.allclose(found.numpy(), wanted)


@pytest.mark.parametrize("seed", range(3))
def test_a_third_of_wrong_matches_does_not_matter(seed: int) -> None:
    first, truth = spread(90, seed), homography(seed)
    second = warped(first, truth)
    second[:30] = spread(30, seed + 50)
    assert corner_error(first, second, each(90), truth, (200, 300)) < 0.1


@pytest.mark.parametrize(("x", "y"), [(3.0, 4.0), (0.0, 0.0), (-30.0, 40.0)])
def test_the_error_is_how_far_the_corners_are_off(x: float, y: float) -> None:
    """All matches say that nothing moved; the truth says all of it did."""
    points = spread(40)
    found = corner_error(points, points, each(40), move_by(x, y), (200, 300))
    assert found == pytest.approx(math.hypot(x, y), abs=1e-3)
