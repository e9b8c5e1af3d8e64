"""Write the features of folders of images, one file per image; existing files are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from cadsurgery.data.images import find_images, read_picture_for
from cadsurgery.masks import resolve_mask
from cadsurgery.network.model import pictures_for
from cadsurgery.support.errors import (
    CadError,
    FileError,
    UnknownName,
    describe_error,
    import_optional,
)
from cadsurgery.support.files import make_folder, write_whole
from cadsurgery.support.progress import Step, silent
from cadsurgery.support.provenance import find_device
from cadsurgery.tasks.for_each import Failure, noted
from cadsurgery.tasks.journal import NAME, Results, has_results
from cadsurgery.tasks.keypoints.extraction import Extraction, Extractor, Features
from cadsurgery.tasks.open import at_strides
from cadsurgery.tasks.workers import refuse_launchers, share

FORMS = ("npz", "h5")


def extract(
    network: str | nn.Module,
    images: Sequence[Path],
    output: Path,
    settings: Extraction | None = None,
    *,
    form: str = "npz",
    weights: str = "auto",
    options: dict[str, Any] | None = None,
    device: str = "cpu",
    bands: Sequence[int] = (),
    workers: int = 1,
    step: Step = silent,
    trust: bool = False,
) -> tuple[list[dict[str, Any]], list[Failure]]:
    """Write the features of every image; an image that cannot be used is reported, and the others are processed.

    Files are written atomically, and the folder has a journal, see `Results`: what is in it is kept, so that an
    interrupted run can be resumed.

    Args:
        network: as in `cadsurgery.evaluate`.
        images: files and folders.
        output: output folder; images of folders keep their relative paths.
        settings: settings of the extraction.
        form: `npz` or `h5`, see `write_features`.
        weights, options, device, bands, workers, step, trust: as in `cadsurgery.evaluate`.

    Returns:
        Rows of the images with a file (`image`, `output`, `keypoints`, and `kept`: the file existed), and failures.

    Raises:
        UnknownName: there is no such format.
        InvalidInput: the network does not return what is requested, or the folder has features of other settings.
        FileError: there are no images, or the folder cannot be written.
        NotInstalled: the detector or the format needs a package that is not installed.
    """
    settings = settings or Extraction()
    refuse_launchers("keypoints extract")
    if form not in FORMS:
        raise UnknownName("form of files", form, FORMS)
    resolve_mask(settings.mask or "all")
    if form == "h5":
        _h5py()
    find_device(device)
    paths, lacking = find_images(images)
    folder = make_folder(output)
    step("building and converting")
    work = _ExtractionWork(
        network, folder, settings, form, weights, options or {}, device, tuple(bands), trust
    )
    extractor = work.extractor()
    net = extractor.net
    identity = {
        **{"model": getattr(net.source, "name", type(net).__name__)},
        **{"weights": getattr(net.source, "weights", "")},
        **{"plan": [list(net.plan.output_stride), net.plan.region], "form": form, **asdict(settings)},
        "options": {key: str(value) for key, value in sorted((options or {}).items())},
    }
    journal = Results(folder / NAME, identity, resume=has_results(folder / NAME))
    journal.begin()
    count, done = len(paths), dict[int, dict[str, Any]]()
    items = [_ImageItem(at, str(path), str(place)) for at, (path, place) in enumerate(paths.items())]

    def left() -> Iterator[_ImageItem]:
        for item in items:
            if not journal.is_written(item.source, str(work.target(item))):
                journal.note_start(item.source)
                yield item
                continue
            row: dict[str, Any] = {"image": item.source}
            with noted(row):
                target = work.target(item)
                row |= {
                    "output": str(target),
                    "keypoints": len(read_features(target).keypoints),
                    "kept": True,
                }
            done[item.position] = row

    missing = left()
    answers: Iterable[tuple[int, dict[str, Any]]] = (work.extract(extractor, item) for item in missing)
    if workers > 1:
        answers = share(missing, work, workers, _lost)
    step(f"image 1 of {count}", 0, count)
    for position, row in answers:
        journal.add_result({name: value for name, value in row.items() if name != "kept"})
        done[position] = row
        step(f"image {len(done)} of {count} ({Path(row['image']).name})", len(done), count)
    rows = [row for _, row in sorted(done.items())]
    return [row for row in rows if "error" not in row], [*lacking, *(row for row in rows if "error" in row)]


class _ImageItem(NamedTuple):
    """An image, its position among all, and its place in the folder."""

    position: int
    source: str
    place: str


@dataclass(frozen=True, eq=False)
class _ExtractionWork:
    """What is extracted, as the arguments of `extract` say; it can be sent to other processes."""

    network: str | nn.Module
    folder: Path
    settings: Extraction
    form: str
    weights: str
    options: dict[str, Any]
    device: str
    bands: tuple[int, ...]
    trust: bool

    def extractor(self) -> Extractor:
        """Open the network."""
        how: dict[str, Any] = {"weights": self.weights, "bands": self.bands, "trust": self.trust}
        (net,), _ = at_strides(self.network, (), self.options, mask="all", **how)
        device = find_device(self.device)
        return Extractor(net.to(device).optimize(), self.settings, device)

    def target(self, item: _ImageItem) -> Path:
        """Return the file of an image."""
        return self.folder / Path(item.place).with_suffix(f".{self.form}")

    def extract(self, extractor: Extractor, item: _ImageItem) -> tuple[int, dict[str, Any]]:
        """Write the features of an image; return its position and row, or its failure."""
        row: dict[str, Any] = {"image": item.source}
        with noted(row):
            picture = read_picture_for(pictures_for(extractor.net), item.source, upright=False)
            features, target = extractor(picture), self.target(item)
            make_folder(target.parent)
            write_features(features, target, str(Path(item.place).with_suffix(Path(item.source).suffix)))
            row |= {"output": str(target), "keypoints": len(features.keypoints), "kept": False}
        return item.position, row

    def begin(self) -> Callable[[Sequence[_ImageItem]], list[tuple[int, dict[str, Any]]]]:
        """Open the network in a process; return what extracts a block of images."""
        extractor = self.extractor()
        return lambda items: [self.extract(extractor, item) for item in items]


def _lost(item: _ImageItem, error: CadError) -> tuple[int, dict[str, Any]]:
    return item.position, {"image": item.source, **error.to_dict()}


def write_features(features: Features, path: Path, name: str = "") -> None:
    """Write features to a file, atomically.

    `.npz` has the format of D2-Net and the HPatches benchmark: keypoints (n, 2), scores (n,), descriptors (n, C),
    image_size (width, height). `.h5` has the format of hloc: the same values in a group named after the image, with
    descriptors as (C, n).

    Raises:
        NotInstalled: `.h5` is requested and h5py is not installed.
        FileError: the path cannot be written.
    """
    height, width = features.size
    values = {
        "keypoints": features.keypoints.numpy(),
        "scores": features.scores.numpy(),
        "descriptors": features.descriptors.numpy(),
        "image_size": np.array([width, height], dtype=np.int64),
    }
    if path.suffix == ".h5":
        h5py = _h5py()
        with write_whole(path) as temporary, h5py.File(temporary, "w") as file:
            group = file.create_group(name or path.stem)
            for key, value in values.items():
                group.create_dataset(key, data=value.T if key == "descriptors" else value)
        return
    with write_whole(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **values)  # type: ignore[arg-type]


def read_features(path: Path) -> Features:
    """Read features from a file written by `write_features`.

    Raises:
        FileError: the file is missing, unreadable, or lacks these values.
    """
    try:
        if path.suffix == ".h5":
            with _h5py().File(path, "r") as file:
                group = _only_group(file)
                values = {key: np.asarray(group[key]) for key in group}
            values["descriptors"] = values["descriptors"].T
        else:
            with np.load(path, allow_pickle=False) as file:
                values = dict(file)
        keypoints, scores, descriptors = (
            torch.from_numpy(np.ascontiguousarray(values[key]))
            for key in ("keypoints", "scores", "descriptors")
        )
        width, height = (int(length) for length in values["image_size"])
    except CadError:
        raise
    except Exception as error:  # readers of both formats raise many types
        raise FileError(
            f"{path} cannot be read as features.",
            why=describe_error(error),
            next="remove it and extract again.",
        ) from error
    return Features(keypoints[:, :2], scores, descriptors, (height, width))


def _only_group(file: Any) -> Any:
    """Return the group that contains the values, which may be nested."""
    while "keypoints" not in file:
        file = file[next(iter(file))]
    return file


def _h5py() -> Any:
    next = "pip install 'cadsurgery[keypoints]', or use --form npz"
    return import_optional("h5py", "HDF5 files need h5py.", next)
