"""Image sequences with homographies: folders like HPatches or the Oxford sequences, and generated views of photos."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadsurgery.data.images import SUFFIXES, find_images, read_image
from cadsurgery.masks.detectors import opencv
from cadsurgery.support.errors import FileError
from cadsurgery.support.files import is_folder
from cadsurgery.support.folders import visible, warn_of_left_out
from cadsurgery.support.kinds import FOLDER, check_kind

# Sequences of HPatches that the published protocol leaves out because of their size (D2-Net keeps 108 of 116).
LEFT_OUT = frozenset(
    (
        *("i_contruction", "i_crownnight", "i_dc", "i_pencils", "i_whitebuilding"),
        *("v_artisans", "v_astronautis", "v_talent"),
    )
)
KINDS = {"i": "illumination", "v": "viewpoint"}
PHOTOS = "images:"  # prefix of a folder of photos without homographies
VIEWS = 3  # number of views per photo
SHRUNK = 0.25  # largest inset of a view's corner, as a share of the photo's side
_LAYOUT = (
    "expected are folders with images 1.ppm (or .png, .jpg), 2.ppm, ... and files H_1_2, H_1_3, ... (or H_1_2.txt) of "
    "3 x 3 numbers; HPatches: hpatches-sequences-release of https://github.com/hpatches/hpatches-dataset."
)


@dataclass(frozen=True)
class ImageSequence:
    """Images of one plane, or taken from one position.

    Attributes:
        name: name of the folder.
        images: files of the first image and of the others.
        numbers: numbers k of the others.
        homographies: (3, 3) float64, from the first image to each of the others, in pixels x, y.
    """

    name: str
    images: tuple[Path, ...]
    numbers: tuple[int, ...]
    homographies: tuple[Tensor, ...]

    @property
    def kind(self) -> str:
        """`illumination` or `viewpoint`, by the prefix of HPatches names; empty for others."""
        return KINDS.get(self.name.partition("_")[0], "") if "_" in self.name else ""

    def read(self, place: int) -> Tensor:
        """Read an image (3, H, W); place 0 is the first."""
        return read_image(self.images[place], upright=False)


@dataclass(frozen=True)
class Photo:
    """A photo and generated views of it, with known homographies.

    A view is a quadrangle of the photo, stretched to the size of the photo; it contains nothing from outside.

    Attributes:
        name: path of the file.
        seed: seed of the quadrangles.
        kind, numbers: as in `ImageSequence`.
    """

    name: str
    seed: int
    kind: str = ""
    numbers: tuple[int, ...] = tuple(range(2, VIEWS + 2))

    @cached_property
    def homographies(self) -> tuple[Tensor, ...]:
        """(3, 3) float64, from the photo to each view, in pixels x, y."""
        cv2: Any = opencv()
        height, width = self.read(0).shape[1:]
        corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
        found = []
        for number in self.numbers:
            moved = SHRUNK * np.random.default_rng((self.seed, number)).random((4, 2)) * (1 - 2 * corners)
            quadrangle, whole = (
                np.float32(part * (width - 1, height - 1)) for part in (corners + moved, corners)
            )
            found.append(torch.from_numpy(cv2.getPerspectiveTransform(quadrangle, whole)))
        return tuple(found)

    def read(self, place: int) -> Tensor:
        """Read the photo (3, H, W), or generate a view of it."""
        image = read_image(Path(self.name), upright=False)
        if place == 0:
            return image
        cv2: Any = opencv()
        pixels, homography = image.permute(1, 2, 0).numpy(), self.homographies[place - 1].numpy()
        view = cv2.warpPerspective(pixels, homography, pixels.shape[1::-1], flags=cv2.INTER_LINEAR)
        return torch.from_numpy(view).permute(2, 0, 1).contiguous()


def open_sequences(
    place: str, *, everything: bool = False
) -> tuple[Sequence[ImageSequence | Photo], list[str]]:
    """Return the sequences of a folder, see `find_sequences`; for `images:FOLDER`, each image with its views.

    Raises:
        FileError: there are no images, or as in `find_sequences`.
    """
    if not place.startswith(PHOTOS):
        return find_sequences(Path(place), everything=everything)
    images, _ = find_images([Path(place.removeprefix(PHOTOS))])
    return [Photo(str(path), seed) for seed, path in enumerate(images)], []


def find_sequences(folder: Path, *, everything: bool = False) -> tuple[list[ImageSequence], list[str]]:
    """Return the sequences in a folder, by name; the folder itself may be a sequence.

    Args:
        folder: folder of sequences.
        everything: include sequences that the published protocol leaves out.

    Returns:
        The sequences, and the names of those left out.

    Raises:
        FileError: there is no such folder, it has no sequence, an image is missing, or a homography cannot be read.
    """
    check_kind(folder, FOLDER)
    if not is_folder(folder):
        raise FileError(f"there is no folder {folder}.", next=_LAYOUT)
    candidates = [folder, *(path for path in visible(folder) if path.is_dir())]
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
    _warn_of_unused(folder, folders, sequences)
    return sequences, out


def _warn_of_unused(
    folder: Path, folders: Mapping[Path, Mapping[int, Path]], sequences: Sequence[ImageSequence]
) -> None:
    """Warn of whatever is neither a sequence nor a file of one. Sequences that the protocol leaves out are reported."""
    used = {folder, *folders, *(path for files in folders.values() for path in files.values())}
    used |= {path for sequence in sequences for path in sequence.images}
    places = {folder, *(sequence.images[0].parent for sequence in sequences)}
    names = sorted(
        str(path.relative_to(folder)) for place in places for path in visible(place) if path not in used
    )
    warn_of_left_out(folder, {"neither sequences nor their files": names})


def _homographies(folder: Path) -> dict[int, Path]:
    """Return the files H_1_k by k."""
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
        raise FileError(f"{path} is not a homography.", why=f"it holds {values.shape} numbers.", next=_LAYOUT)
    return torch.from_numpy(values)
