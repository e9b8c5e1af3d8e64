"""Run a converted file on images and clips, and write its predictions: `cadsurgery run`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cadsurgery.data import stores
from cadsurgery.data.clips import WRITTEN, is_clip
from cadsurgery.data.images import check_size, no_images, stream_images, write_picture
from cadsurgery.data.networks import class_names
from cadsurgery.kernels.build import cores
from cadsurgery.masks.wrappers import Smooth
from cadsurgery.network.model import pictures_for
from cadsurgery.support.errors import FileError, InvalidInput, check_name
from cadsurgery.support.files import absent, check_folder, exists, is_folder
from cadsurgery.support.kinds import kind_by_ending
from cadsurgery.support.launcher import world
from cadsurgery.support.processes import gather, own_device, share
from cadsurgery.support.progress import Step
from cadsurgery.tasks.convert import check_precision, refuse_precision
from cadsurgery.tasks.figures import VIEWS, figure_picture, legend_figure
from cadsurgery.tasks.manifest import Predictions
from cadsurgery.tasks.predictor import Item, Predictor, Row, Settings
from cadsurgery.tasks.report import FilesReport
from cadsurgery.tasks.sides import kind_of
from cadsurgery.tasks.workers import predict_in_processes

# Fields of a row that state how much was computed, and their text.
_COMPUTED = {
    "active_fraction": "active fraction {:.3f}",
    "exit": "exit {:g}",
    "density": "density {:.3f}",
    "sampled": "sampled at {}",
}
_LISTED = 1000  # images whose rows a report has, and failures; all of them are in the manifest
# Why images are predicted one after the other, by one process.
_FOLLOW = "images follow each other as frames."
_FOR_A_PROCESS = 8  # images from which on another process is started unless --workers says how many


def predict(
    file: str | Path,
    images: Sequence[Path | str],
    output: Path | str,
    *,
    step: Step,
    fps: float = 25.0,
    resume: bool = False,
    workers: int | None = 1,
    ray: str = "",
    **options: Any,
) -> FilesReport:
    """Run a converted file on images and clips; what cannot be read is reported, and the others are processed.

    A clip is a file or the number of a camera; if `output` is a clip, the only source may be a folder of frames, of
    which `fps` are shown per second. Frames are read, predicted and written one `batch` at a time. At Ctrl-C the clip
    ends with its last frame, the rest is left out, and the report says so. A `smooth` mask starts anew with each clip
    and with each folder of images.

    If the names of the classes are known, rows have the share of each class, and a legend is written.

    Of many images rows and failures are in the manifest, and the first 1000 in the report. Images may also be named in
    a list, `@FILE`, or `-` for standard input, and images and `output` may be in object storage. `workers` processes
    with one thread each share the images; None for one each core, or one on a GPU. With `ray`, the address of a cluster
    or `local`, actors of Ray do, see `cadsurgery.ray`. Under a launcher each process runs its share of the images, and
    every process returns the same report.

    A folder of predictions has a manifest, `Predictions`; with `resume` the predictions in it are not made again.
    Further `options` are those of `Settings`.

    Raises:
        InvalidInput: the options do not fit the network, a result would replace another or its source, the folder holds
            predictions and `resume` is not set, or something else made them.
        FileError: there are no images, or the output cannot be written.
    """
    settings = Settings(str(file), **options)
    check_size(settings.size)
    if settings.view:
        check_name("view", settings.view, VIEWS)
    check_precision(settings.precision, settings.calibration, settings.largest_error)
    if ray and all(_name(str(path)).endswith(".parquet") for path in images):
        from cadsurgery.tasks.ray_data import predict_tables

        if resume:
            raise InvalidInput("--resume for Parquet.", next="leave --resume out, and name another --output.")
        return predict_tables([*map(str, images)], str(output), settings, ray, workers)
    sources, own = _Sources([*map(str, images)], str(output)), own_device(settings.device)
    converted = settings.load()
    _check_options(converted, settings)
    if resume:
        _check_resume(converted, sources)
    manifest = None if sources.is_one_clip else Predictions(sources.output, settings.identity(), resume)
    number, outcome = sources.count(manifest), _Outcome()
    workers = _count_workers(workers, ray, own, number, _follow(converted, sources))
    predictor = None if ray or (workers or 1) > 1 else Predictor(converted, settings, step)
    if manifest is not None:
        gather(None, own)  # until every process has read the manifest
        manifest.begin()
    with _interruption() as stopped, manifest or nullcontext():

        def left(items: Iterable[Item]) -> Iterator[Item]:
            missing = (item for _, item in share(items) if not outcome.skips(item, manifest))
            return takewhile(lambda item: not stopped.is_set(), missing)

        stills = left(sources.images() if sources.stills else ())
        if ray:
            from cadsurgery.tasks.ray_data import predict_over_ray

            answers = predict_over_ray(stills, settings, ray, workers)
        elif predictor is None:
            answers = predict_in_processes(stills, settings, workers or 1)
        else:
            clips = (predictor.clip_row(clip, fps, step, stopped) for clip in left(sources.clips))
            answers = chain(predictor.rows(stills), clips)
        step(f"image 1 of {number or '?'}", 0, number)
        for position, row in chain(answers, sources.refusals()):
            outcome.add(position, row)
            if manifest is not None and not row.get("interrupted"):
                manifest.add_prediction(row)
            finished = min((outcome.done + outcome.failed) * world().size, number or sys.maxsize)
            step(f"image {finished} of {number or '?'} ({Path(row['image']).name})", finished, number)
    outcome = _Outcome.merge(gather(outcome, own))
    if number is None and not (outcome.done or outcome.skipped or outcome.failed > len(sources.failures)):
        raise no_images(sources.failures)
    outcome.classes |= manifest.classes if manifest else set()
    return _report(outcome, sources, class_names(pictures_for(converted)), stopped.is_set(), resume)


def _report(
    outcome: _Outcome, sources: _Sources, names: Sequence[str], is_interrupted: bool, resume: bool
) -> FilesReport:
    """Return the report, and write the legend of the classes."""
    rows, failures = ([row for _, row in pairs] for pairs in (outcome.rows, outcome.failures))
    lines = [_describe(row) for row in rows]
    if outcome.done > len(rows):
        manifest = stores.join(sources.output, "manifest.jsonl")
        lines.append(f"... and {outcome.done - len(rows)} more: {manifest}")
    if shown := {names.index(name): name for name in outcome.classes}:
        legend = sources.legend
        if world().is_main:
            write_picture(figure_picture(legend_figure(dict(sorted(shown.items())))), legend)
        lines.append(f"legend: {stores.without_options(legend)}")
    skipped = outcome.skipped if resume else None
    also = f"{skipped} skipped, " if resume else ""
    text = "\n".join([*lines, f"{outcome.done} done, {also}{outcome.failed} failed"])
    counts = outcome.done, outcome.failed
    return FilesReport(tuple(rows), text, tuple(failures), is_interrupted, skipped, counts)


@dataclass
class _Outcome:
    """What became of the images: numbers, the first rows and failures with their positions, and the classes seen."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    rows: list[tuple[int, Row]] = field(default_factory=list)
    failures: list[tuple[int, Row]] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)

    def add(self, position: int, row: Row) -> None:
        """Count a row."""
        is_done = "output" in row
        self.done, self.failed = self.done + is_done, self.failed + (not is_done)
        listed = self.rows if is_done else self.failures
        if len(listed) < _LISTED:
            listed.append((position, row))
        self.classes |= row.get("classes", {}).keys()

    def skips(self, item: Item, manifest: Predictions | None) -> bool:
        """True if a prediction is in place, which is counted."""
        is_there = manifest is not None and manifest.is_written(item.source, item.target)
        self.skipped += is_there
        return is_there

    @staticmethod
    def merge(parts: Sequence[_Outcome]) -> _Outcome:
        """Return the outcome of all processes."""
        whole = _Outcome()
        for part in parts:
            whole.done, whole.failed = whole.done + part.done, whole.failed + part.failed
            whole.skipped, whole.classes = whole.skipped + part.skipped, whole.classes | part.classes
            whole.rows, whole.failures = whole.rows + part.rows, whole.failures + part.failures
        for pairs in (whole.rows, whole.failures):
            pairs.sort(key=itemgetter(0))
            del pairs[_LISTED:]
        return whole


def _follow(converted: nn.Module, sources: _Sources) -> str:
    """Return the reason why images are predicted by the processes that are here; empty if others can be started."""
    if world().size > 1:
        return "torchrun"
    return "clips" if sources.clips else "a mask with smooth" if _has_smooth(converted) else ""


def _count_workers(
    workers: int | None, ray: str, device: torch.device, images: int | None, reason: str
) -> int | None:
    """Return the number of processes; by default that of the cores, or 1 on a GPU, and fewer for few images. Ray
    chooses for itself.

    Raises:
        InvalidInput: there is a reason against other processes.
    """
    if reason and (ray or (workers or 1) > 1):
        option = "--ray" if ray else f"--workers {workers}"
        raise InvalidInput(
            f"{option} for {reason}.",
            why="its processes are the workers." if reason == "torchrun" else _FOLLOW,
            next=f"leave {option.split()[0]} out.",
        )
    if ray or workers is not None:
        return workers
    if reason or device.type != "cpu":
        return 1
    return max(1, cores() if images is None else min(cores(), images // _FOR_A_PROCESS))


def _check_options(converted: nn.Module, settings: Settings) -> None:
    """Refuse a time limit, a batch or a precision that does not fit the network.

    Raises:
        InvalidInput: it has no exits, runs images one by one, or runs in float only.
    """
    kind, batch = kind_of(converted), settings.batch
    if settings.until and not (kind and kind.has_thresholds):
        raise InvalidInput(
            "--until needs a network with exits, and this file holds none.",
            next="convert one with cadsurgery convert --method anytime, and train its heads.",
        )
    if batch > 1 and (kind or _has_smooth(converted)):
        raise InvalidInput(
            f"--batch {batch} for a {f'network {kind.words}' if kind else 'mask with smooth'}.",
            why="it computes another amount for each image." if kind else _FOLLOW,
            next="leave --batch out.",
        )
    if kind is not None:
        refuse_precision(settings.precision, kind.words)


def _check_resume(converted: nn.Module, sources: _Sources) -> None:
    """Refuse to resume where a prediction depends on those before it: within a clip, or with `smooth`.

    Raises:
        InvalidInput: the output is one clip, or the mask of images has `smooth`.
    """
    is_smooth = _has_smooth(converted) and bool(sources.stills)
    if is_smooth or sources.is_one_clip:
        raise InvalidInput(
            f"--resume for {'images and a mask with smooth' if is_smooth else 'a single clip'}.",
            why=_FOLLOW if is_smooth else "a clip is written whole or not at all.",
            next="leave --resume out, and name another --output.",
        )


def _has_smooth(converted: nn.Module) -> bool:
    return any(isinstance(module, Smooth) for module in converted.modules())


class _Sources:
    """The images and clips of a run, and where their predictions go.

    Attributes:
        output: folder of the predictions, or the one clip.
        is_one_clip: True if the output is a clip.
        clips: the clips; positions follow those of all images.
        stills: files, folders, addresses and lists of images.
        failures: errors of sources that hold no images, as far as they were searched.
    """

    def __init__(self, sources: Sequence[str], output: str) -> None:
        """Refuse clips that do not fit the output, and a folder that predictions would be written among its pictures.

        Raises:
            InvalidInput: see above.
        """
        self.output, self.is_one_clip = output, _is_clip_file(Path(output))
        self.failures: dict[str, FileError] = {}
        clips = _find_clips([*map(Path, sources)], Path(output))
        self.clips = [Item(sys.maxsize, str(path), str(target)) for path, target in clips.items()]
        self.stills = [source for source in sources if Path(source) not in clips]
        places = [os.path.realpath(stores.without_options(path)) for path in (output, *self.stills)]
        if places[0] in places[1:]:
            raise InvalidInput(
                f"predictions would be written among the pictures in {stores.without_options(output)}.",
                why="they would replace pictures, and be taken for pictures when the run goes on.",
                next=f"choose another folder: --output {stores.without_options(stores.join(output, 'predictions'))}.",
            )

    def count(self, manifest: Predictions | None) -> int | None:
        """Return the number of images and clips; None for images on standard input.

        Raises:
            FileError: there are no images, or the list of them cannot be read.
            InvalidInput: see `Predictions.is_written`.
        """
        if "-" in self.stills:
            return None
        number, items = 0, self.images() if self.stills else iter(self.clips)
        for item in items:
            number += 1
            if manifest is not None:
                manifest.is_written(item.source, item.target)  # refuses before any work
        if not number:
            raise no_images(self.failures)
        return number + (len(self.clips) if self.stills else 0)

    def images(self) -> Iterator[Item]:
        """Yield all images in order."""
        is_listed = any(source == "-" or source.startswith("@") for source in self.stills)
        given = [(source, _name(source)) for source in self.stills]
        streamed: Iterable[tuple[str, str]] = _listed(self.stills) if is_listed else given
        for position, (image, place) in enumerate(stream_images(streamed, self.failures, self.output)):
            yield Item(position, image, stores.join(self.output, place))

    def refusals(self) -> Iterator[tuple[int, Row]]:
        """Yield the rows of sources that hold no images, before all others, once in all processes."""
        for position, (path, refusal) in enumerate(self.failures.items() if world().is_main else ()):
            yield position - len(self.failures), {"image": path, **refusal.to_dict()}

    @property
    def legend(self) -> str:
        """File of the legend of the classes."""
        if self.is_one_clip:
            return str(Path(self.output).with_suffix(".legend.png"))
        return stores.join(self.output, "classes.legend.png")


def _listed(sources: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield sources and those that lists name, one a line; an image in a list keeps its folders.

    Raises:
        FileError: a list cannot be read.
    """
    for source in sources:
        if source != "-" and not source.startswith("@"):
            yield source, _name(source)
            continue
        try:
            with nullcontext(sys.stdin) if source == "-" else open(source[1:], encoding="utf-8") as lines:
                for line in filter(None, map(str.strip, lines)):
                    parts = Path(stores.without_options(line)).parts
                    yield line, os.path.join(*(part for part in parts if part not in (os.sep, "..")))
        except (OSError, ValueError) as error:
            raise FileError(
                f"the list {source} cannot be read.",
                why=str(error),
                next="give a text file with a path in each line.",
            ) from error


def _name(source: str) -> str:
    return Path(stores.without_options(source)).name


def _find_clips(sources: Sequence[Path], output: Path) -> dict[Path, Path]:
    """Return the clips among the sources, each with its result."""
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
    return clips


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
