"""Run a converted file on images and clips, and write its predictions: `cadsurgery run`."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.data.clips import WRITTEN, is_clip, open_clip, write_clip
from cadsurgery.data.images import check_size, find_images, normalise, read_image, write_picture
from cadsurgery.data.networks import Source, class_names
from cadsurgery.masks.wrappers import Smooth
from cadsurgery.methods.storage import load
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.network.optimized import FLOAT
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import FileError, InvalidInput, check_name
from cadsurgery.support.files import absent, check_folder, exists, is_folder, make_folder
from cadsurgery.support.kinds import kind_by_ending
from cadsurgery.support.launcher import world
from cadsurgery.support.processes import gather, own_device
from cadsurgery.support.progress import Step
from cadsurgery.tasks.convert import check_precision, refuse_precision
from cadsurgery.tasks.export import images_like
from cadsurgery.tasks.figures import (
    CLASSES,
    OVERLAY,
    VIEWS,
    class_picture,
    figure_picture,
    legend_figure,
    prediction_picture,
)
from cadsurgery.tasks.for_each import Failures, for_each
from cadsurgery.tasks.manifest import Manifest, fingerprint
from cadsurgery.tasks.report import FilesReport
from cadsurgery.tasks.side import Kind
from cadsurgery.tasks.sides import kind_of

# Fields of a row that state how much was computed, and their text.
_COMPUTED = {
    "active_fraction": "active fraction {:.3f}",
    "exit": "exit {:g}",
    "density": "density {:.3f}",
    "sampled": "sampled at {}",
}
# A source and its result: images of one batch, or one clip.
_Job = list[tuple[Path, Path]]


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
    view: str = "",
    batch: int = 1,
    fps: float = 25.0,
    resume: bool = False,
) -> FilesReport:
    """Run a converted file on images and clips; what cannot be read is reported, and the others are processed.

    `int8` is calibrated on the images of the folder `calibration`, resized to `size` or to the size of the first of
    them. If `until` is not 0, a network with exits stops after this many milliseconds, see `AnytimeModel.until`.

    A clip is a file or the number of a camera; if `output` is a clip, the only source may be a folder of frames, of
    which `fps` are shown per second. Frames are read, predicted and written one `batch` at a time. At Ctrl-C the clip
    ends with its last frame, the rest is left out, and the report says so. A `smooth` mask starts anew with each clip
    and with each folder of images.

    `view` is one of `VIEWS`, by default `classes` for images and `overlay` for clips. If the names of the classes are
    known, rows have the share of each class, and a legend is written.

    Under a launcher each process runs its share of the images, and every process returns the rows of all.

    A folder of predictions has a `Manifest`; with `resume` the predictions in it are not made again.

    Raises:
        InvalidInput: the options do not fit the network, a result would replace another or its source, the folder holds
            predictions and `resume` is not set, or something else made them.
        FileError: there are no images, or the output cannot be written.
    """
    check_size(size)
    if view:
        check_name("view", view, VIEWS)
    torch_device = own_device(device)
    jobs, lacking = _find_jobs(images, output, batch)
    check_precision(precision, calibration, largest_error)
    converted = load(file, mask=mask or None, trust=trust).to(torch_device)
    kind = kind_of(converted)
    _check_options(converted, kind, until, batch, precision)
    if resume:
        _check_resume(converted, jobs, output)
    manifest, skipped = None, 0
    if not _is_clip_file(output):
        made_by = {
            "network": fingerprint(file),
            "mask": mask or "the file's",
            "size": size,
            "view": view,
            "device": torch_device.type,
            "precision": precision,
            "calibration": calibration and calibration.absolute(),
            "largest_error": largest_error,
            "until": until,
        }
        manifest = Manifest(output, made_by, resume)
        jobs, skipped = _left(jobs, manifest)
    source, shown = pictures_for(converted), None
    net: Any
    if kind is not None:
        net = converted.optimize()
    else:
        if calibration is not None:
            step("reading the calibration images")
            shown = images_like(_first_image(calibration, size), source, calibration)
        assert isinstance(converted, AdaptiveModel)
        net = converted.optimize(
            precision=precision, calibration=shown, largest_error=largest_error, step=step
        )
    if manifest is not None:
        make_folder(output)
        gather(None, torch_device)  # until every process has read the manifest
        manifest.begin()
    run = _Run(net, kind, source, torch_device, until or math.inf, class_names(source))
    failures = Failures("image", lacking, *([manifest.add_failure] if manifest else []))
    folders = list[Path | None]()  # of the last image; None for a clip

    def draw(job: _Job) -> list[dict[str, Any]]:
        (path, target), *_ = job
        folder = None if _is_clip(target) else path.parent
        if folder is None or folders[-1:] != [folder]:
            run.start_anew()
        folders.append(folder)
        if stopped.is_set():
            return []
        rows = (
            [run.draw_clip(path, target, view or OVERLAY, size, batch, fps, step, stopped)]
            if folder is None
            else run.draw_images(job, view or CLASSES, size, failures)
        )
        for row in rows:
            if manifest is not None and not row.get("interrupted"):
                manifest.add(row)
        return rows

    with _interruption() as stopped:
        done, failed = for_each(
            jobs, draw, failures, torch_device, name=lambda job: str(job[0][0]), size=len, step=step
        )
    rows = [row for some in done for row in some]
    lines = [_describe(row) for row in rows]
    earlier = manifest.classes if manifest else set[str]()
    names = {run.names.index(name): name for name in earlier.union(*(row.get("classes", ()) for row in rows))}
    if names and world().is_main:
        legend = output / "classes.legend.png" if is_folder(output) else output.with_suffix(".legend.png")
        write_picture(figure_picture(legend_figure(dict(sorted(names.items())))), legend)
        lines.append(f"legend: {legend}")
    also = f"{skipped} skipped, " if resume else ""
    text = "\n".join([*lines, f"{len(rows)} done, {also}{len(failed)} failed"])
    return FilesReport(tuple(rows), text, tuple(failed), stopped.is_set(), skipped if resume else None)


def _check_options(converted: nn.Module, kind: Kind | None, until: float, batch: int, precision: str) -> None:
    """Refuse a time limit, a batch or a precision that does not fit the network.

    Raises:
        InvalidInput: it has no exits, runs images one by one, or runs in float only.
    """
    if until and not (kind and kind.has_thresholds):
        raise InvalidInput(
            "--until needs a network with exits, and this file holds none.",
            next="convert one with cadsurgery convert --method anytime, and train its heads.",
        )
    if batch > 1 and (kind or _has_smooth(converted)):
        raise InvalidInput(
            f"--batch {batch} for a {f'network {kind.words}' if kind else 'mask with smooth'}.",
            why="it computes another amount for each image."
            if kind
            else "images follow each other as frames.",
            next="leave --batch out.",
        )
    if kind is not None:
        refuse_precision(precision, kind.words)


def _check_resume(converted: nn.Module, jobs: Sequence[_Job], output: Path) -> None:
    """Refuse to resume where a prediction depends on those before it: within a clip, or with `smooth`.

    Raises:
        InvalidInput: the output is one clip, or the mask of images has `smooth`.
    """
    is_smooth = _has_smooth(converted) and not all(_is_clip(target) for job in jobs for _, target in job)
    if is_smooth or _is_clip_file(output):
        raise InvalidInput(
            f"--resume for {'images and a mask with smooth' if is_smooth else 'a single clip'}.",
            why="images follow each other as frames."
            if is_smooth
            else "a clip is written whole or not at all.",
            next="leave --resume out, and name another --output.",
        )


def _has_smooth(converted: nn.Module) -> bool:
    return any(isinstance(module, Smooth) for module in converted.modules())


def _left(jobs: list[_Job], manifest: Manifest) -> tuple[list[_Job], int]:
    """Return the jobs without the sources whose predictions are in place, and the number of these sources."""
    left = [[pair for pair in job if not manifest.is_written(*pair)] for job in jobs]
    return [job for job in left if job], sum(map(len, jobs)) - sum(map(len, left))


def _find_jobs(sources: Sequence[Path], output: Path, batch: int) -> tuple[list[_Job], list[dict[str, str]]]:
    """Return the images in batches and the clips, with their results, and failures of sources that are missing."""
    if _is_clip_file(output):
        check_folder(output)
        if missing := [path for path in sources if not (exists(path) or is_clip(path))]:
            raise absent(missing[0], "file or folder")
        if len(sources) != 1 or not (is_clip(sources[0]) or is_folder(sources[0])):
            raise InvalidInput(
                f"{output} is a clip, and its source is none.",
                next="give one clip, camera number or folder of frames, or a folder: --output predictions.",
            )
        clips = {sources[0]: output}
    else:
        _refuse_ending(output)
        clips = {path: output / f"{path.stem}.mp4" for path in sources if is_clip(path)}
    for path, target in clips.items():
        if list(clips.values()).count(target) > 1 or target.resolve() == path.resolve():
            raise InvalidInput(
                f"{target} would replace {'its source' if len(clips) == 1 else 'another clip'}.",
                next="choose another --output, or run the clips one by one.",
            )
    stills = [path for path in sources if path not in clips]
    places, lacking = find_images(stills) if stills or not clips else ({}, [])
    images = iter((path, output / place) for path, place in places.items())
    batches = iter(lambda: list(islice(images, batch)), [])
    return [*batches, *([pair] for pair in clips.items())], lacking


def _refuse_ending(output: Path) -> None:
    """Refuse a folder that is named like a file, which the user will not expect to be a folder.

    Raises:
        FileError: predictions are not written to files of this ending.
    """
    if not is_folder(output) and (kind := kind_by_ending(output)) is not None:
        raise FileError(
            f"{output} is named like {kind.words}, and predictions are not written into one.",
            next=f"name a folder: --output {output.stem}; or, for a clip or a folder of frames, a file that ends in "
            f"{', '.join(WRITTEN)}.",
        )


def _is_clip(target: Path) -> bool:
    return target.suffix.lower() in WRITTEN


def _is_clip_file(output: Path) -> bool:
    """True if the output is one clip, False if it is a folder of predictions."""
    return _is_clip(output) and not is_folder(output)


@dataclass(frozen=True)
class _Run:
    """An optimised network, and how it is run.

    Attributes:
        net: the network.
        kind: its kind, if a method made it.
        source: its source, for which images are normalised.
        device: its device.
        until: time limit in milliseconds of a network with exits.
        names: names of its classes; empty if unknown.
    """

    net: Any
    kind: Kind | None
    source: Source
    device: torch.device
    until: float
    names: tuple[str, ...]

    def start_anew(self) -> None:
        """Forget the frames that `smooth` masks have seen."""
        for module in self.net.modules():
            if isinstance(module, Smooth):
                module.reset()

    def __call__(self, pictures: Sequence[Tensor]) -> Iterator[tuple[Tensor, int, dict[str, Any]]]:
        """Run pictures of one size as a batch; yield the classes of each, the number of channels, and fields of its
        row."""
        images = normalise(torch.stack(list(pictures)), self.source).to(self.device)
        start = time.perf_counter()
        with torch.inference_mode():
            if self.kind is not None:
                returned, details = self.kind.run(self.net, images, self.until)
                known = [details]
            else:
                returned, levels = self.net(images), self.net.levels.flatten(1)
                numbers = range(self.net.geometry.max_level + 1)
                shares = torch.stack([(levels == level).double().mean(1) for level in numbers], 1)
                shares = shares if len(shares) == len(images) else shares.mean(0).expand(len(images), -1)
                known = [{"active_fraction": high, "levels": [high, *low]} for high, *low in shares.tolist()]
        prediction = _first_tensor(returned)
        milliseconds = 1e3 * (time.perf_counter() - start) / len(pictures)
        for scores, details in zip(prediction, known, strict=True):
            yield classes_of(scores), scores.shape[0], {**details, "milliseconds": milliseconds}

    def draw_images(
        self, job: _Job, view: str, size: tuple[int, int] | None, failures: Failures
    ) -> list[dict[str, Any]]:
        """Predict a batch of images, those of one size together, and write a picture of each."""
        read, rows = list[tuple[Path, Path, Tensor]](), []
        for path, target in job:
            with failures.noting(str(path)):
                read.append((path, target, read_image(path, size)))
        for _, group in groupby(read, lambda one: one[2].shape):
            same = list(group)
            with failures.noting(*(str(path) for path, *_ in same)):
                results = list(self([picture for *_, picture in same]))
                for (path, target, picture), (classes, channels, details) in zip(same, results, strict=True):
                    with failures.noting(str(path)):
                        make_folder(target.parent)
                        flat = view == CLASSES
                        drawn = (
                            class_picture(classes, channels)
                            if flat
                            else prediction_picture(picture, classes, view)
                        )
                        write_picture(drawn, target)
                        shares = self._shares(self._count(classes, channels))
                        place = {"image": str(path), "output": str(target), "size": [*picture.shape[1:]]}
                        rows.append({**place, **details, **shares})
        return rows

    def draw_clip(
        self,
        path: Path,
        target: Path,
        view: str,
        size: tuple[int, int] | None,
        batch: int,
        fps: float,
        step: Step,
        stopped: threading.Event,
    ) -> dict[str, Any]:
        """Predict the frames of a clip and write them as a clip, until it ends or `stopped` is set."""
        done, sums, counts, start = 0, Counter[str](), Counter[int](), time.perf_counter()
        first: torch.Size | None = None
        with open_clip(path, size, fps) as clip, write_clip(target, clip.rate) as add:
            while frames := list(islice(clip.frames, 0 if stopped.is_set() else batch)):
                for number, frame in enumerate(frames, done + 1):
                    first = first or frame.shape
                    if frame.shape != first:
                        raise FileError(
                            f"frame {number} of {path} is {frame.shape[1]}x{frame.shape[2]}, the first one is "
                            f"{first[1]}x{first[2]}.",
                            next="resize them: --size HxW.",
                        )
                for frame, (classes, channels, details) in zip(frames, self(frames), strict=True):
                    flat = view == CLASSES
                    add(class_picture(classes) if flat else prediction_picture(frame, classes, view))
                    counts += self._count(classes, channels)
                    details.pop("levels", None)
                    sums.update({key: value for key, value in details.items() if not isinstance(value, str)})
                done += len(frames)
                speed = done / (time.perf_counter() - start)
                of = f" of {clip.count}" if clip.count else ""
                step(f"{path.name}, frame {done}{of}, {speed:.1f} frames/s", done, clip.count)
            if not done:
                raise FileError(f"{path} holds no frames.", next="give a clip with pictures.")
        means = {key: sums[key] / done if key in sums else value for key, value in details.items()}
        ended = {"frames": done, "frames_per_second": speed, "interrupted": stopped.is_set()}
        return {"image": str(path), "output": str(target), **means, **ended, **self._shares(counts)}

    def _count(self, classes: Tensor, channels: int) -> Counter[int]:
        """Count the pixels of each class; nothing if the classes have no names."""
        if channels != len(self.names):
            return Counter()
        return Counter(dict(enumerate(classes.flatten().long().bincount().tolist())))

    def _shares(self, counts: Counter[int]) -> dict[str, dict[str, float]]:
        """Return the share of each class that occurs, by name, as a field of a row."""
        whole = counts.total()
        shares = {self.names[index]: count / whole for index, count in sorted(counts.items()) if count}
        return {"classes": shares} if shares else {}


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets, so that the current frame is finished; the second one interrupts."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only this one can handle signals
        yield stopped
        return

    def stop(number: int, frame: object) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _describe(row: dict[str, Any]) -> str:
    """Describe the result for an image or a clip in one line."""
    computed = ", ".join(words.format(row[name]) for name, words in _COMPUTED.items() if name in row)
    text = f"{computed}, {row['milliseconds']:.0f} ms"
    if "frames" in row:
        ended = "interrupted after " if row["interrupted"] else ""
        text = f"{ended}{row['frames']} frames, {row['frames_per_second']:.1f} frames/s, {text} each"
    return f"{row['image']}: {text} -> {row['output']}"


def _first_image(folder: Path, size: tuple[int, int] | None) -> Tensor:
    """Return the first image of a folder as a batch of one."""
    found, _ = find_images([folder])
    return read_image(next(iter(found)), size).unsqueeze(0)


def _first_tensor(output: Any) -> Tensor:
    tensors = tensors_of(output)
    if not tensors or tensors[0].dim() != 4:
        shape = tuple(tensors[0].shape) if tensors else ()
        raise InvalidInput(
            f"the network's output {shape} is not a map, so there is nothing to draw.",
            next="use cs.load in Python for classifiers, or convert a segmentation network.",
        )
    return tensors[0]


def classes_of(scores: Tensor) -> Tensor:
    """Return class numbers (H, W): the channel with the highest score; for one channel its value in 256 steps."""
    scores = scores.float()
    if scores.shape[0] > 1:
        return scores.argmax(0)
    low, high = scores.aminmax()
    return ((scores[0] - low) / (high - low).clamp(min=1e-12) * 255).round()
