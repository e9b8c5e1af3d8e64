"""Folders of image sequences with homographies, as HPatches and the Oxford sequences come."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cadsurgery.data.images import SUFFIXES
from cadsurgery.support.errors import FileError

# Sequences of HPatches that the published protocol leaves out for their size (D2-Net's evaluation: 108 of 116 stay).
LEFT_OUT = frozenset(
    (
        *("i_contruction", "i_crownnight", "i_dc", "i_pencils", "i_whitebuilding"),
        *("v_artisans", "v_astronautis", "v_talent"),
    )
)
KINDS = {"i": "illumination", "v": "viewpoint"}
_LAYOUT = (
    "expected are folders with images 1.ppm (or .png, .jpg), 2.ppm, ... and files H_1_2, H_1_3, ... (or H_1_2.txt) of "
    "3 x 3 numbers; HPatches: hpatches-sequences-release of https://github.com/hpatches/hpatches-dataset."
)


@dataclass(frozen=True)
class ImageSequence:
    """Images of one plane, or from one place.

    Attributes:
        name: of its folder.
        images: files of the first image and of the others.
        numbers: k of the others.
        homographies: (3, 3) float64, from the first image to each of the others, in pixels x, y.
    """

    name: str
    images: tuple[Path, ...]
    numbers: tuple[int, ...]
    homographies: tuple[Tensor, ...]

    @property
    def kind(self) -> str:
        """`illumination` or `viewpoint`, which HPatches names begin with; empty for others."""
        return KINDS.get(self.name.partition("_")[0], "") if "_" in self.name else ""


def find_sequences(folder: Path, *, everything: bool = False) -> tuple[list[ImageSequence], list[str]]:
    """The sequences in a folder, by name; a folder that is one itself counts.

    Args:
        folder: of sequences.
        everything: also those that the published protocol leaves out.

    Returns:
        The sequences, and the names of those left out.

    Raises:
        FileError: no such folder, no sequence in it, an image that is missing, or a homography that cannot be read.
    """
    if not folder.is_dir():
        raise FileError(f"there is no folder {folder}.", next=_LAYOUT)
    candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    folders = {path: files for path in candidates if (files := _homographies(path))}
    if not folders:
        raise FileError(f"there are no sequences in {folder}.", next=_LAYOUT)
    out = sorted(path.name for path in folders if path.name in LEFT_OUT and not everything)
    sequences = [_read(path, files) for path, files in folders.items() if path.name not in out]
    if not sequences:
        raise FileError(
            f"all sequences in {folder} are left out by the published protocol.",
            why=", ".join(out),
            next="keep them with --all-sequences.",
        )
    return sequences, out


def _homographies(folder: Path) -> dict[int, Path]:
    """Files H_1_k by k."""
    files = {}
    for path in folder.iterdir():
        match = re.fullmatch(r"H_1_(\d+)(\.txt)?", path.name)
        if match and path.is_file():
            files[int(match[1])] = path
    return dict(sorted(files.items()))


def _read(folder: Path, files: dict[int, Path]) -> ImageSequence:
    images = []
    for number in (1, *files):
        image = next((p for suffix in SUFFIXES if (p := folder / f"{number}{suffix}").is_file()), None)
        if image is None:
            raise FileError(f"image {number} of the sequence {folder} is missing.", next=_LAYOUT)
        images.append(image)
    return ImageSequence(folder.name, tuple(images), tuple(files), tuple(map(_homography, files.values())))


def _homography(path: Path) -> Tensor:
    try:
        values = np.loadtxt(path, dtype=np.float64)
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read as numbers.", why=str(error), next=_LAYOUT) from error
    if values.shape != (3, 3) or not np.isfinite(values).all() or abs(np.linalg.det(values)) < 1e-12:
        raise FileError(f"{path} is no homography.", why=f"it holds {values.shape} numbers.", next=_LAYOUT)
    return torch.from_numpy(values)
