"""Write the features of folders of images, one file per image; existing files are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from cadsurgery.support.processes import own_device
from cadsurgery.support.progress import Step, silent
from cadsurgery.tasks.for_each import Failure, Failures, for_each
from cadsurgery.tasks.journal import NAME, Results, has_results
from cadsurgery.tasks.keypoints.extraction import Extraction, Extractor, Features
from cadsurgery.tasks.open import at_strides

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
    step: Step = silent,
    trust: bool = False,
) -> tuple[list[dict[str, Any]], list[Failure]]:
    """Write the features of every image; an image that cannot be used is reported, and the others are processed.

    Files are written atomically, and the folder has a journal, see `Results`: what is in it is kept, so that an
    interrupted run can be resumed. Under `torchrun` or `accelerate launch` each process
    takes its share of the images, and every process returns the rows of all.

    Args:
        network: as in `cadsurgery.evaluate`.
        images: files and folders.
        output: output folder; images of folders keep their relative paths.
        settings: settings of the extraction.
        form: `npz` or `h5`, see `write_features`.
        weights, options, device, bands, step, trust: as in `cadsurgery.evaluate`.

    Returns:
        Rows of the images with a file (`image`, `output`, `keypoints`, and `kept`: the file existed), and failures.

    Raises:
        UnknownName: there is no such format.
        InvalidInput: the network does not return what is requested, or the folder has features of other settings.
        FileError: there are no images, or the folder cannot be written.
        NotInstalled: the detector or the format needs a package that is not installed.
    """
    settings = settings or Extraction()
    if form not in FORMS:
        raise UnknownName("form of files", form, FORMS)
    resolve_mask(settings.mask or "all")
    if form == "h5":
        _h5py()
    torch_device, (paths, lacking) = own_device(device), find_images(images)
    folder = make_folder(output)
    step("building and converting")
    (net,), _ = at_strides(network, (), options or {}, mask="all", weights=weights, bands=bands, trust=trust)
    source = net.source
    identity = {
        **{"model": getattr(source, "name", type(net).__name__), "weights": getattr(source, "weights", "")},
        **{"plan": [list(net.plan.output_stride), net.plan.region], "form": form, **asdict(settings)},
        "options": {key: str(value) for key, value in sorted((options or {}).items())},
    }
    extractor = Extractor(net.to(torch_device).optimize(), settings, torch_device)
    journal = Results(folder / NAME, identity, resume=has_results(folder / NAME))
    journal.begin()

    def describe(item: tuple[Path, Path]) -> dict[str, Any]:
        path, place = item
        target = folder / place.with_suffix(f".{form}")
        is_there = journal.is_written(str(path), str(target))
        if is_there:
            features = read_features(target)
        else:
            journal.note_start(str(path))
            features = extractor(read_picture_for(pictures_for(extractor.net), path, upright=False))
            make_folder(target.parent)
            write_features(features, target, str(place.with_suffix(path.suffix)))
        row = {"image": str(path), "output": str(target), "keypoints": len(features.keypoints)}
        if not is_there:
            journal.add_result(row)
        return {**row, "kept": is_there}

    failures = Failures("image", lacking)
    return for_each(
        list(paths.items()), describe, failures, torch_device, name=lambda item: str(item[0]), step=step
    )


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
