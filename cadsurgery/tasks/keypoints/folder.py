"""Write the features of folders of images, one file per image; existing files are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cadsurgery.data.images import find_images, read_picture_for
from cadsurgery.masks import resolve_mask
from cadsurgery.network.model import pictures_for
from cadsurgery.network.storage import checksum
from cadsurgery.support.errors import (
    CadError,
    FileError,
    NotInstalled,
    as_refusal,
    check_name,
    describe_error,
    import_optional,
)
from cadsurgery.support.files import make_folder, write_whole
from cadsurgery.support.progress import Step, silent
from cadsurgery.support.provenance import find_device
from cadsurgery.tasks.journal import NAME, Item, Results, Row, has_results
from cadsurgery.tasks.keypoints.extraction import Extraction, Extractor, Features
from cadsurgery.tasks.open import at_strides
from cadsurgery.tasks.predictor import lost
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
) -> tuple[list[Row], list[Row]]:
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
    check_name("form of files", form, FORMS)
    resolve_mask(settings.mask or "all")
    if form == "h5":
        _h5py()
    find_device(device)
    paths, lacking = find_images(images)
    folder = make_folder(output)
    step("building and converting")
    how: dict[str, Any] = {"weights": weights, "bands": bands, "trust": trust}
    work = partial(_open, network, options or {}, how, settings, device, folder)
    write = work()
    net = write.extractor.net
    identity = {
        **{"model": getattr(net.source, "name", type(net).__name__)},
        **{"weights": getattr(net.source, "weights", ""), "tensors": checksum(dict(net.state_dict()))},
        **{"plan": [list(net.plan.output_stride), net.plan.region], "form": form, **asdict(settings)},
        "options": {key: str(value) for key, value in sorted((options or {}).items())},
    }
    journal = Results(folder / NAME, identity, resume=has_results(folder / NAME))
    journal.begin()
    kept = dict[int, Row]()
    places = enumerate((path, (folder / place).with_suffix(f".{form}")) for path, place in paths.items())
    items = (Item(at, str(path), str(target)) for at, (path, target) in places)
    left = journal.left(items, lambda item: kept.update([write.row(item, is_kept=True)]))
    answers: Iterable[tuple[int, Row]] = map(write.row, left)
    if workers > 1:
        answers = share(left, work, workers, lost)
    done = dict(journal.taken_in(answers, len(paths), step))
    rows = sorted({**done, **kept}.items())
    written = [{**row, "kept": position in kept} for position, row in rows if "error" not in row]
    return written, [*lacking, *(row for _, row in rows if "error" in row)]


@dataclass(frozen=True)
class _FeatureWriter:
    """Writes the features of images into a folder; the target of each item is its file there."""

    extractor: Extractor
    folder: Path

    def __call__(self, items: Sequence[Item]) -> list[tuple[int, Row]]:
        """Write those of a block of images."""
        return [self.row(item) for item in items]

    def row(self, item: Item, *, is_kept: bool = False) -> tuple[int, Row]:
        """Write those of an image, unless its file is kept; return its position and row, or its failure."""
        try:
            features = read_features(Path(item.target)) if is_kept else self._write(item)
        except NotInstalled:  # no other image would do better
            raise
        except CadError as error:
            return lost(item, error)
        count = len(features.keypoints)
        return item.position, {"image": item.source, "output": item.target, "keypoints": count}

    def _write(self, item: Item) -> Features:
        target, source = Path(item.target), pictures_for(self.extractor.net)
        features = self.extractor(read_picture_for(source, item.source, upright=False))
        make_folder(target.parent)
        name = target.relative_to(self.folder).with_suffix(Path(item.source).suffix)
        write_features(features, target, str(name))
        return features


def _open(
    network: str | nn.Module,
    options: dict[str, Any],
    how: dict[str, Any],
    settings: Extraction,
    device_name: str,
    folder: Path,
) -> _FeatureWriter:
    """Open the network, in this process or another one."""
    (net,), _ = at_strides(network, (), options, mask="all", **how)
    device = find_device(device_name)
    return _FeatureWriter(Extractor(net.to(device).optimize(), settings, device), folder)


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
    with as_refusal(
        lambda error: FileError(
            f"{path} cannot be read as features.",
            why=describe_error(error),
            next="remove it and extract again.",
        )
    ):
        if path.suffix == ".h5":
            with _h5py().File(path, "r") as group:
                while "keypoints" not in group:  # in the only group, which may be nested
                    group = group[next(iter(group))]
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
    return Features(keypoints[:, :2], scores, descriptors, (height, width))


def _h5py() -> Any:
    next = "pip install 'cadsurgery[keypoints]', or use --form npz"
    return import_optional("h5py", "HDF5 files need h5py.", next)
