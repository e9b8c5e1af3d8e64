"""Run a converted file on folders of images and write its predictions as pictures: `cadsurgery run`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadsurgery.data.images import check_size, find_images, normalise, read_image, write_picture
from cadsurgery.methods.storage import load
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.network.optimized import FLOAT
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.files import make_folder
from cadsurgery.support.processes import own_device
from cadsurgery.support.progress import Step
from cadsurgery.tasks.convert import check_precision, refuse_precision
from cadsurgery.tasks.export import images_like
from cadsurgery.tasks.figures import class_picture
from cadsurgery.tasks.for_each import Failures, for_each
from cadsurgery.tasks.report import FilesReport
from cadsurgery.tasks.sides import kind_of

# Fields of a row that state how much was computed, and their text.
_COMPUTED = {
    "active_fraction": "active fraction {:.3f}",
    "exit": "exit {}",
    "density": "density {:.3f}",
    "sampled": "sampled at {}",
}


def predict(
    file: str | Path,
    images: Sequence[Path],
    output: Path,
    mask: str,
    size: tuple[int, int] | None,
    device: str,
    step: Step,
    trust: bool = False,
    precision: str = FLOAT,
    calibration: Path | None = None,
    largest_error: float | None = None,
    until: float = 0.0,
) -> FilesReport:
    """Run a converted file on images; an unreadable image is reported, and the others are processed.

    `int8` is calibrated on the images of the folder `calibration`, resized to `size` or to the size of the first of
    them. If `until` is not 0, a network with exits stops after this many milliseconds, see `AnytimeModel.until`.

    Under a launcher each process runs its share of the images, and every process returns the rows of all.

    Raises:
        InvalidInput: the options do not fit the network.
        FileError: there are no images, or the output folder cannot be written.
    """
    check_size(size)
    torch_device = own_device(device)
    paths, lacking = find_images(images)
    check_precision(precision, calibration, largest_error)
    converted = load(file, mask=mask or None, trust=trust).to(torch_device)
    kind = kind_of(converted)
    if until and not (kind and kind.has_thresholds):
        raise InvalidInput(
            "--until needs a network with exits, and this file holds none.",
            next="convert one with cadsurgery convert --method anytime, and train its heads.",
        )
    source, shown = pictures_for(converted), None
    net: Any
    if kind is not None:
        refuse_precision(precision, kind.words)
        net = converted.optimize()
    else:
        if calibration is not None:
            step("reading the calibration images")
            first = next(iter(find_images([calibration])[0]))
            shown = images_like(read_image(first, size).unsqueeze(0), source, calibration)
        assert isinstance(converted, AdaptiveModel)
        net = converted.optimize(
            precision=precision, calibration=shown, largest_error=largest_error, step=step
        )
    make_folder(output)

    def draw(item: tuple[Path, Path]) -> dict[str, Any]:
        path, place = item
        batch = normalise(read_image(path, size), source).unsqueeze(0).to(torch_device)
        start = time.perf_counter()
        with torch.inference_mode():
            if kind is not None:
                returned, details = kind.run(net, batch, until or math.inf)
            else:
                returned, details = net(batch), {"active_fraction": net.active_fraction}
        prediction = _first_tensor(returned)
        milliseconds = 1e3 * (time.perf_counter() - start)
        target = output / place
        target.parent.mkdir(parents=True, exist_ok=True)
        write_picture(class_picture(_classes(prediction), prediction.shape[1]), target)
        return {"image": str(path), "output": str(target), **details, "milliseconds": milliseconds}

    failures = Failures("image", lacking)
    rows, failed = for_each(
        list(paths.items()), draw, failures, torch_device, name=lambda item: str(item[0]), step=step
    )
    lines = []
    for row in rows:
        computed = ", ".join(words.format(row[name]) for name, words in _COMPUTED.items() if name in row)
        lines.append(f"{row['image']}: {computed}, {row['milliseconds']:.0f} ms -> {row['output']}")
    text = "\n".join([*lines, f"{len(rows)} done, {len(failed)} failed"])
    return FilesReport(tuple(rows), text, tuple(failed))


def _first_tensor(output: Any) -> Tensor:
    tensors = tensors_of(output)
    if not tensors or tensors[0].dim() != 4:
        shape = tuple(tensors[0].shape) if tensors else ()
        raise InvalidInput(
            f"the network's output {shape} is not a map, so there is nothing to draw.",
            next="use cs.load in Python for classifiers, or convert a segmentation network.",
        )
    return tensors[0]


def _classes(prediction: Tensor) -> Tensor:
    """Return class numbers (H, W): the channel with the highest score; for one channel its value in 256 steps."""
    scores = prediction[0].float()
    if scores.shape[0] > 1:
        return scores.argmax(0)
    low, high = scores.aminmax()
    return ((scores[0] - low) / (high - low).clamp(min=1e-12) * 255).round()
