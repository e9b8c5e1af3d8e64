"""Run a converted file on images and clips, and write its predictions: `cadsurgery run`."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import chain, islice, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cadsurgery.data.clips import WRITTEN, is_camera, is_clip, pyav
from cadsurgery.data.images import check_size, no_images, stream_images, write_picture
from cadsurgery.data.networks import class_names
from cadsurgery.data.rasters import check_overviews
from cadsurgery.data.stores import refuse_stream
from cadsurgery.data.tiff import position_at, split_page
from cadsurgery.kernels.build import cores
from cadsurgery.masks.wrappers import Smooth
from cadsurgery.methods.registry import method_of
from cadsurgery.network.model import pictures_for
from cadsurgery.network.optimized import FLOAT, check_precision
from cadsurgery.support.errors import FileError, InvalidInput, check_name, warn
from cadsurgery.support.files import absent, as_file_error, check_folder, exists, is_folder
from cadsurgery.support.kinds import kind_by_ending
from cadsurgery.support.memory import AUTO, bytes_of, free_memory, in_mebibytes, peak_memory
from cadsurgery.support.progress import Step
from cadsurgery.support.provenance import find_device
from cadsurgery.tasks import ray_data
from cadsurgery.tasks.commands import RunOptions
from cadsurgery.tasks.figures import CLASSES, VIEWS, figure_picture, legend_figure
from cadsurgery.tasks.journal import NAME, Item, Results, Row
from cadsurgery.tasks.large import (
    SMALL,
    header_of,
    memory_of_levels,
    memory_of_whole,
    target_for,
)
from cadsurgery.tasks.predictor import PredictionSettings, Predictor, lost
from cadsurgery.tasks.report import FilesReport
from cadsurgery.tasks.workers import processes, refuse_launchers, share

# Fields of a row that state how much was computed, and their text.
_COMPUTED = {
    "active_fraction": "active fraction {:.3f}",
    "exit": "exit {:g}",
    "density": "density {:.3f}",
    "sampled": "sampled at {}",
}
_LOOKED_AT = 1000  # images whose sizes are looked at
_LISTED = 1000  # images whose rows a report has, and failures; all of them are in the manifest
# Why images are predicted one after the other, by one process.
_FOLLOW = "images follow each other as frames."
_BATCHES = 16  # that a process gets at a time
_FOR_A_PROCESS = 8  # images from which on another process is started unless --workers says how many


def predict(
    file: str | Path, images: Sequence[Path | str], options: RunOptions, *, step: Step
) -> FilesReport:
    """Run a converted file on images and clips; what cannot be read is reported, and the others are processed.

    A clip is a file or the number of a camera; if the output is a clip, the only source may be a folder of frames, of
    which `fps` are shown per second. Frames are read, predicted and written one `batch` at a time. At Ctrl-C the clip
    ends with its last frame, the rest is left out, and the report says so. A `smooth` mask starts anew with each clip
    and with each folder of images.

    If the names of the classes are known, rows have the share of each class, and a legend is written.

    Of many images rows and failures are in the manifest, and the first 1000 in the report. Images may also be named in
    a list, `@FILE`, or `-` for standard input, and images and `output` may be in object storage. `workers` processes
    with one thread each share the images; None for one each core, or one on a GPU. With `ray`, the address of a cluster
    or `local`, processes of Ray do.

    Predictions have a journal, `Results`, in their folder or beside the one clip; with `resume` those that are in it
    are not made again, nor the rows of a large picture that are there, see `cadsurgery.tasks.large.WrittenRows`.

    Raises:
        InvalidInput: the options do not fit the network, a result would replace a file, the folder holds
            predictions and `resume` is not set, or something else made them; or a launcher started several processes.
        FileError: there are no images, or the output cannot be written.
        NotInstalled: clips, object storage or Ray need a package that is not installed.
    """
    refuse_launchers("run")
    settings = PredictionSettings(str(file), options)
    output, resume, workers, ray = options.output, options.resume, options.workers, options.ray
    check_size(options.size)
    if options.view:
        check_name("view", options.view, VIEWS)
    check_precision(options.precision)
    if ray and all(str(path).endswith(".parquet") for path in images):
        if resume:
            raise InvalidInput("--resume for Parquet.", next="leave --resume out, and name another --output.")
        if options.within:
            raise InvalidInput("--within for Parquet.", next="leave --within out, or give files.")
        return ray_data.predict_tables([*map(str, images)], output, settings, ray, workers)
    sources, own = _Sources([*map(str, images)], output, options), find_device(options.device)
    if sources.clips:
        pyav()  # refuse before any work
    converted, chosen = settings.load(), ""
    _check_options(converted, options)
    if not options.memory and not ray:
        chosen = _why_in_rows(converted, sources, options)
    if (chosen or options.memory == AUTO) and not ray:
        workers = workers or 1
        # Each process has its share, of which the levels of a picture take a part.
        levels = max((memory_of_levels(converted, size) for size, *_ in sources.headers), default=0)
        options = replace(options, memory=f"{max(bytes_of(AUTO) // workers - levels, 1)}")
        settings, sources.memory = replace(settings, options=options), options.memory
    if options.overviews and not options.memory:
        raise InvalidInput(
            f"--overviews {'under --ray' if ray else 'for pictures without a position'}.",
            why="they are for TIFF files, and without --memory PNG files are written.",
            next="give --memory, e.g. 2GiB, or leave --overviews out.",
        )
    more_than_one = (workers or 1) > 1
    wanted = {"--ray": ray, "--workers": more_than_one, "--resume": resume, "--within": options.within}
    is_shared = _check_sharing(converted, sources, {option for option, value in wanted.items() if value})
    asked = {**settings.identity, "fps": options.fps} if sources.is_one_clip else settings.identity
    what = sources.output
    journal = Results(sources.journal, asked, resume, what=what, is_replaced=sources.is_one_clip)
    sources.refuse_replacing(journal.is_new)
    number, outcome = sources.count(journal, settings), _Processed()
    pool = partial(ray_data.tasks, ray, settings) if ray else processes
    if workers is None:
        # A process has one thread; OMP_NUM_THREADS and torch.set_num_threads say how many there may be.
        usual = min(cores(), torch.get_num_threads()) if is_shared and own.type == "cpu" else 1
        usual = max(1, min(usual, (number or sys.maxsize) // _FOR_A_PROCESS))
        workers = ray_data.count_processes(ray, settings) if ray else usual
    predictor = None if ray or workers > 1 else Predictor(converted, settings)
    with _interruption() as stopped, journal:
        if predictor is not None:
            predictor.stopped, predictor.step = stopped, step

        def left(items: Iterable[Item]) -> Iterator[Item]:
            until_stopped = takewhile(lambda _: not stopped.is_set(), items)
            return journal.left(until_stopped, lambda item: outcome.counts.update(["skipped"]))

        stills = left(sources.images() if sources.stills else ())
        if predictor is None:
            size = _BATCHES * options.batch
            answers = share(stills, settings.predicting, workers, lost, size=size, pool=pool)
        else:
            clips = (predictor.clip_row(clip, options.fps, step, stopped) for clip in left(sources.clips))
            answers = chain(predictor.rows(stills), clips)
        for position, row in journal.taken_in(chain(answers, sources.refusals()), number, step):
            outcome.add(position, row)
    if sources.is_one_clip and outcome.counts["failed"]:
        journal.remove()  # there is nothing to resume
    if number is None and outcome.counts.total() <= len(sources.failures):
        raise no_images(sources.failures)
    names = class_names(pictures_for(converted))
    shown = {number: name for number, name in enumerate(names) if name in journal.classes}
    return _report(outcome, sources, shown, stopped.is_set(), options, chosen)


def _report(
    outcome: _Processed,
    sources: _Sources,
    shown: Mapping[int, str],
    is_interrupted: bool,
    options: RunOptions,
    chosen: str,
) -> FilesReport:
    """Return the report, and write the legend of the classes that are `shown`."""
    rows, failures = outcome.rows("done"), outcome.rows("failed")
    done, failed, skipped = (outcome.counts[became] for became in ("done", "failed", "skipped"))
    lines = [_describe(row) for row in rows]
    if padded := sum("padded_to" in row for row in rows):
        lines.append(
            f"{padded} of the pictures padded at the right and below to sizes that the network takes, and the results "
            "cut back (--size resizes instead)"
        )
    lines += [
        f"{row['image']}: {row['without_data']} pixels without data, which its prediction marks as such (GDAL's nodata)"
        for row in rows
        if "without_data" in row
    ]
    lines += [
        f"{row['image']}: {row['asked']} of {row['size'][0] * row['size'][1]} pixels are inside the area; the others "
        "have no data"
        for row in rows
        if "asked" in row
    ]
    if done > len(rows):
        lines.append(f"... and {done - len(rows)} more: {sources.output}/{NAME}")
    if shown:
        write_picture(figure_picture(legend_figure(shown)), sources.legend)
        lines.append(f"legend: {sources.legend}")
    for row in outcome.rows("interrupted"):
        at, height = row["rows"]
        lines.append(f"{row['image']}: interrupted at row {at} of {height}; --resume continues there")
    if chosen:
        lines.append(f"computed in bands of rows, as by --memory auto: {chosen}")
    if memory := options.memory:
        amount = in_mebibytes(bytes_of(memory)) if memory.isdigit() else memory
        lines.append(
            f"the process took {in_mebibytes(peak_memory())} at most; --memory {amount} is only for maps"
        )
    also = f"{skipped} skipped, " if options.resume else ""
    text = "\n".join([*lines, f"{done} done, {also}{failed} failed"])
    return FilesReport(
        rows, text, failures, is_interrupted, skipped if options.resume else None, (done, failed)
    )


@dataclass
class _Processed:
    """What became of the images.

    Attributes:
        counts: numbers of those `done`, `failed`, `interrupted` and `skipped`.
        listed: position, what became of it, and row of the first of them.
    """

    counts: Counter[str] = field(default_factory=Counter)
    listed: list[tuple[int, str, Row]] = field(default_factory=list)

    def add(self, position: int, row: Row) -> None:
        """Count a row."""
        became = "done" if "output" in row else "interrupted" if "interrupted" in row else "failed"
        self.counts[became] += 1
        if self.counts[became] <= _LISTED:
            self.listed.append((position, became, row))

    def rows(self, became: str) -> tuple[Row, ...]:
        """Return the first rows of those that became so, in order."""
        listed = sorted(self.listed, key=itemgetter(0))
        return tuple(row for _, how, row in listed if how == became)[:_LISTED]


def _check_sharing(converted: nn.Module, sources: _Sources, wanted: set[str]) -> bool:
    """Refuse options that do not fit the sources; return whether other processes can be started.

    Raises:
        InvalidInput: see above.
    """
    sharing = {"--ray", "--workers"}
    reasons = {
        "a mask with smooth": (bool(sources.stills) and _has_smooth(converted), {*sharing, "--resume"}),
        "clips": (bool(sources.clips), {*sharing, "--within"}),
        "a camera": (any(is_camera(Path(clip.source)) for clip in sources.clips), {"--resume"}),
    }
    against = {reason: options for reason, (holds, options) in reasons.items() if holds}
    for reason, options in against.items():
        for option in options & wanted:
            raise InvalidInput(f"{option} for {reason}.", why=_FOLLOW, next=f"leave {option} out.")
    return not any(options & sharing for options in against.values())


def _check_options(converted: nn.Module, options: RunOptions) -> None:
    """Refuse a time limit, a batch, a precision or a memory that does not fit the network.

    Raises:
        InvalidInput: it has no exits, runs images one by one, runs in float only, or is not computed in bands.
    """
    kind, batch = method_of(converted), options.batch
    if options.until and not (kind and kind.has_thresholds):
        raise InvalidInput(
            "until= needs a network that can stop early, and this file holds none.",
            next="convert one with cadsurgery convert --method (docs/methods), and train it.",
        )
    if batch > 1 and (kind or _has_smooth(converted)):
        raise InvalidInput(
            f"--batch {batch} for a {f'network {kind.words}' if kind else 'mask with smooth'}.",
            why="it computes another amount for each image." if kind else _FOLLOW,
            next="leave --batch out.",
        )
    if options.within:
        if not exists(split_page(options.within)[0]):
            raise absent(split_page(options.within)[0], "file")
        if kind is not None or options.size is not None:
            reason = "--size" if kind is None else f"a network {kind.words}"
            raise InvalidInput(
                f"--within for {reason}.",
                why="areas are those of the pictures as they are, and are computed by networks that choose how finely "
                "to compute each place.",
                next="leave --within out.",
            )
    if options.overviews:
        check_overviews()
    if options.memory:
        bytes_of(options.memory)
        if kind is not None or find_device(options.device).type != "cpu":
            place = f"on {options.device}" if kind is None else f"for a network {kind.words}"
            raise InvalidInput(
                f"--memory {options.memory} {place}.",
                why="bands of rows are computed on the CPU, of networks that choose how finely to compute each place.",
                next="leave it out.",
            )
    if kind is not None and options.precision != FLOAT:
        raise InvalidInput(
            f"precision={options.precision} for a network {kind.words}.",
            why="networks made by methods run in the precision of their weights.",
            next="leave it out.",
        )


def _why_in_rows(converted: nn.Module, sources: _Sources, options: RunOptions) -> str:
    """Return why pictures are computed in bands of rows without --memory: the largest one's maps would take more than
    is free, or one is a raster with a position, which its prediction has, too; empty if neither, or none can be so."""
    free, kind, pictures = free_memory(), method_of(converted), pictures_for(converted)
    if free is None or kind is not None or pictures is None or "-" in sources.stills:
        return ""
    if find_device(options.device).type != "cpu" or not sources.is_plain:
        return ""
    size, _, largest = max(sources.headers, key=lambda one: math.prod(one[0]), default=((0, 0), False, ""))
    whole = cache(partial(memory_of_whole, converted, pictures.channels))
    needed = whole(size) if math.prod(size) >= SMALL else 0
    if needed > free:
        amounts = in_mebibytes(needed, free), in_mebibytes(free, needed)
        sides = f"{size[1]} x {size[0]} pixels"
        return f"{largest}, {sides}, would take up to {amounts[0]} whole, and {amounts[1]} are free"
    size, _, raster = next((one for one in sources.headers if one[1]), ((0, 0), False, ""))
    if raster and whole(size):
        return f"{raster} says where it lies, and so does its prediction, a TIFF file"
    return ""


def _has_smooth(converted: nn.Module) -> bool:
    return any(isinstance(module, Smooth) for module in converted.modules())


class _Sources:
    """The images and clips of a run, and where their predictions go.

    Attributes:
        output: folder of the predictions, or the one clip.
        is_one_clip: True if the output is a clip.
        clips: the clips; positions follow those of all images.
        stills: files, folders, addresses and lists of images.
        memory: what the maps of a picture may take; empty if pictures are computed whole.
        is_plain: False if pictures are resized or drawn upon.
        failures: errors of sources that hold no images, as far as they were searched.
    """

    def __init__(self, sources: Sequence[str], output: str, options: RunOptions) -> None:
        """Refuse streams, clips that do not fit the output, and a folder that predictions would be written among its
        pictures.

        Raises:
            InvalidInput: see above.
        """
        for source in sources:
            refuse_stream(source)
        self.memory, self._is_said = options.memory, False
        self.is_plain = options.size is None and options.view in ("", CLASSES)
        self.output, self.is_one_clip = output, _is_clip_file(Path(output))
        self.failures: dict[str, FileError] = {}
        clips = _find_clips([*map(Path, sources)], Path(output))
        self.clips = [Item(sys.maxsize, str(path), str(target)) for path, target in clips.items()]
        self.stills = [source for source in sources if Path(source) not in clips]
        if os.path.realpath(output) in map(os.path.realpath, self.stills):
            raise InvalidInput(
                f"predictions would be written among the pictures in {output}.",
                why="they would replace pictures, and be taken for pictures when the run resumes.",
                next=f"choose another folder: --output {os.path.join(output, 'predictions')}.",
            )

    @cached_property
    def headers(self) -> list[tuple[tuple[int, int], bool, str]]:
        """Of the first images the size, whether the file says where it lies, and its path; not of those in lists."""
        given = [
            (source, Path(source).name)
            for source in self.stills
            if source != "-" and not source.startswith("@")
        ]
        listed = islice(stream_images(given, {}, self.output), _LOOKED_AT) if given else ()
        return [(*header, image) for image, _ in listed if (header := header_of(image))]

    def count(self, journal: Results, settings: PredictionSettings) -> int | None:
        """Return the number of images and clips; None for images on standard input.

        Raises:
            FileError: there are no images, or the list of them cannot be read.
            InvalidInput: see `Results.is_written`, and `part_of` for large pictures that were begun.
        """
        if "-" in self.stills:
            return None
        number, images = 0, self.images() if self.stills else iter(())
        for item in chain(images, self.clips):
            number += 1
            if not self.is_one_clip:
                journal.is_written(item.source, item.target)  # refuses before any work
            if item.target.endswith(".tif"):
                settings.part_of(item)  # likewise
        if number == (len(self.clips) if self.stills else 0):
            raise no_images(self.failures)
        return number

    def refuse_replacing(self, is_new: bool) -> None:
        """Refuse to replace a clip, or a picture in place of the legend, that no run has written, which there is a
        journal of.

        Raises:
            InvalidInput: see above.
        """
        if not is_new:
            return
        for place in (self.output, self.legend) if self.is_one_clip else (self.legend,):
            if exists(place):
                raise InvalidInput(
                    f"the {'clip' if place == self.output else 'legend'} would replace a file that no run has written.",
                    where=place,
                    next="choose another --output, or move or delete the file.",
                )

    def images(self) -> Iterator[Item]:
        """Yield all images in order."""
        is_listed = any(source == "-" or source.startswith("@") for source in self.stills)
        given = [(source, Path(source).name) for source in self.stills]
        streamed: Iterable[tuple[str, str]] = _listed(self.stills) if is_listed else given
        for position, (image, place) in enumerate(stream_images(streamed, self.failures, self.output)):
            target = target_for(image, os.path.join(self.output, place), self.memory, is_plain=self.is_plain)
            if not self._is_said and not target.endswith(".tif") and position_at(image):
                self._is_said = True
                warn(
                    f"the prediction of {image} is written without its position and coordinate system (GeoTIFF).\n"
                    "  Why: PNG files hold none.\n"
                    "  Next: TIFF files with it are written in bands of rows: with --memory, without --size and "
                    "--view; only the first is reported."
                )
            yield Item(position, image, target)

    def refusals(self) -> Iterator[tuple[int, Row]]:
        """Yield the rows of sources that hold no images, before all others."""
        for position, (path, refusal) in enumerate(self.failures.items()):
            yield position - len(self.failures), {"image": path, **refusal.to_dict()}

    @property
    def journal(self) -> str:
        """File of the journal."""
        if self.is_one_clip:
            clip = Path(self.output)
            return str(clip.with_name(f".{clip.name}.jsonl"))
        return os.path.join(self.output, NAME)

    @property
    def legend(self) -> str:
        """File of the legend of the classes."""
        if self.is_one_clip:
            return str(Path(self.output).with_suffix(".legend.png"))
        return os.path.join(self.output, "classes.legend.png")


def _listed(sources: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield sources and those that lists name, one a line; an image in a list keeps its folders.

    Raises:
        FileError: a list cannot be read.
    """
    for source in sources:
        if source != "-" and not source.startswith("@"):
            yield source, Path(source).name
            continue
        next = "give a text file with a path in each line."
        with (
            as_file_error(f"the list {source} cannot be read.", next),
            nullcontext(sys.stdin) if source == "-" else open(source[1:], encoding="utf-8") as lines,
        ):
            for line in filter(None, map(str.strip, lines)):
                parts = line.rpartition("://")[2].split(os.sep)
                yield line, os.path.join(*(part for part in parts if part not in ("", ".", "..")))


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
        if not is_folder(output) and (kind := kind_by_ending(output)) is not None:
            raise FileError(
                f"{output} is named like {kind.words}, and predictions are not written into one.",
                next=f"name a folder: --output {output.stem}; or, for a clip or a folder of frames, a file that ends "
                f"in {', '.join(WRITTEN)}.",
            )
        clips = {path: output / f"{path.stem}.mp4" for path in sources if is_clip(path)}
    for path, target in clips.items():
        if list(clips.values()).count(target) > 1 or target.resolve() == path.resolve():
            raise InvalidInput(
                f"{target} would replace {'its source' if len(clips) == 1 else 'another clip'}.",
                next="choose another --output, or run the clips one by one.",
            )
    return clips


def _is_clip_file(output: Path) -> bool:
    """True if the output is one clip, False if it is a folder of predictions."""
    return output.suffix.lower() in WRITTEN and not is_folder(output)


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
        with suppress(OSError):  # at once, whatever the screen is doing
            os.write(2, b"\nending behind the current picture, frame or band; Ctrl-C again breaks it off\n")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _describe(row: dict[str, Any]) -> str:
    """Describe the result for an image or a clip in one line."""
    computed = ", ".join(words.format(row[name]) for name, words in _COMPUTED.items() if name in row)
    text = ", ".join(filter(None, [computed, f"{row['milliseconds']:.0f} ms"]))
    if "frames" in row:
        ended = "interrupted after " if row["interrupted"] else ""
        text = f"{ended}{row['frames']} frames, {row['frames_per_second']:.1f} frames/s, {text} each"
    return f"{row['image']}: {text} -> {row['output']}"
