"""Images that 8 bits are calibrated by: all forms give the same batches, and what is no such image is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Segmenter, made_once, seeded, unverified
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.utils import save_image

import cadsurgery as cs
from cadsurgery.network.calibration import images_to_calibrate
from cadsurgery.network.model import AdaptiveModel

SCENES = cs.open_data("scene:4,height=48,width=64")


@made_once
def adapted(**options: Any) -> AdaptiveModel:
    options = {"normalisation": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), **options}
    return unverified(seeded(Segmenter, torch.float32), "edges", **options)


def expected() -> Tensor:
    return torch.cat([cs.images.normalise(image, None)[None] for image, _ in SCENES])


def folder(path: Path) -> Path:
    for place, (image, _) in enumerate(SCENES):
        save_image(image, path / f"{place}.png")
    return path


FORMS: dict[str, Any] = {
    "a batch": lambda path: expected(),
    "batches": lambda path: list(expected().split(2)),
    "images": lambda path: list(expected()),
    "pairs": lambda path: [(image, SCENES[at][1]) for at, image in enumerate(expected())],
    "a loader of pairs": lambda path: DataLoader(FORMS["pairs"](path), 2),  # type: ignore[arg-type]
    "a folder": folder,
    "the name of a folder": lambda path: str(folder(path)),
    "data": lambda path: SCENES,
    "a spec of data": lambda path: f"images:{folder(path)}",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form: str, tmp_path: Path) -> None:
    batches = images_to_calibrate(adapted(), FORMS[form](tmp_path))
    torch.testing.assert_close(torch.cat(batches), expected(), rtol=0, atol=0.02)  # PNGs have 8 bits


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([], "empty"),
        (3, "int 3"),
        ([torch.zeros(48, 64)], r"list of a float32 tensor of shape \(48, 64\)"),
        ([{"image": torch.zeros(3, 48, 64)}], "list of dict"),
        ((torch.zeros(1, 3, 48, 64), torch.zeros(1, 48, 64).long()), "tuple of a int64 tensor"),
    ],
)
def test_other_forms_are_refused_with_those_that_are_taken(images: Any, words: str) -> None:
    with pytest.raises(cs.InvalidInput, match=words) as refusal:
        images_to_calibrate(adapted(), images)
    assert "(B, C, H, W)" in refusal.value.next
    assert "folder" in refusal.value.next


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.stack([image for image, _ in SCENES]), r"look like 0\.\.1, not normalised"),
        (torch.stack([255 * image for image, _ in SCENES]), r"look like 0\.\.255"),
    ],
)
def test_images_that_are_not_normalised_for_the_network_are_refused(images: Tensor, words: str) -> None:
    with pytest.raises(cs.InvalidInput, match=words) as refusal:
        images_to_calibrate(adapted(), images)
    assert 'net.normalisation = "raw"' in refusal.value.next
    assert torch.equal(images_to_calibrate(adapted(normalisation="raw"), images)[0], images)
