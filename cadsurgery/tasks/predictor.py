"""Open a converted file once and predict images with it: for one process, for several, and for Ray."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cadsurgery.data.areas import read_area
from cadsurgery.data.clips import open_clip, write_clip
from cadsurgery.data.images import normalise, read_picture_for, write_picture
from cadsurgery.data.networks import class_names
from cadsurgery.data.stores import is_remote
from cadsurgery.data.tiff import position_at, split_page
from cadsurgery.masks.context import sized
from cadsurgery.masks.wrappers import Smooth
from cadsurgery.methods.method_files import load
from cadsurgery.methods.registry import method_of
from cadsurgery.network.model import pictures_for
from cadsurgery.network.optimized import BFLOAT16
from cadsurgery.network.within import read_within
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import CadError, FileError, InvalidInput, NotInstalled
from cadsurgery.support.files import make_folder
from cadsurgery.support.progress import Step, silent
from cadsurgery.support.provenance import find_device
from cadsurgery.tasks.commands import RunOptions
from cadsurgery.tasks.figures import CLASSES, OVERLAY, class_picture, prediction_picture
from cadsurgery.tasks.journal import Item, Row, fingerprint
from cadsurgery.tasks.large import MULTIPLES, LargePicture, WrittenRows, cut_back, predict_large
from cadsurgery.tasks.measuring import refuse_images
from cadsurgery.tasks.open import read_by
from cadsurgery.tasks.pieces import step_of
from cadsurgery.tasks.workers import STOPPED

Given = TypeVar("Given")
Result = TypeVar("Result")
DEPTH = 2  # results that wait for the caller


def ahead(items: Iterable[Given], work: Callable[[Given], Result]) -> Iterator[Result]:
    """Yield the result for each item, in order; a thread works on up to `DEPTH` items while the caller uses others."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque[Future[Result]]()
        for item in items:
            waiting.append(thread.submit(work, item))
            if len(waiting) > DEPTH:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def lost(item: Item, error: CadError) -> tuple[int, Row]:
    """Return the position and the row of an image that failed."""
    return item.position, {"image": item.source, **error.to_dict()}


@dataclass(frozen=True)
class PredictionSettings:
    """What predictions are made by, which can be sent to other processes: a converted file, and options of a run."""

    file: str
    options: RunOptions = field(default_factory=RunOptions)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a manifest states: all that predictions depend on."""
        names = ("size", "view", "precision", "until")
        how, made_by = self.options, {"network": fingerprint(self.file)}
        made_by |= {"mask": how.mask or "the file's", **{name: getattr(how, name) for name in names}}
        # Not stated by default, so that folders of earlier versions can be gone on with.
        made_by |= {name: value for name, value in {"bands": how.bands, **how.conversion}.items() if value}
        if how.within:
            made_by["within"] = fingerprint(split_page(how.within)[0])
        return {**made_by, "device": find_device(how.device).type}

    def part_of(self, item: Item) -> WrittenRows:
        """Return the prediction of a large picture as far as it is written.

        Raises:
            InvalidInput, FileError: see `WrittenRows`.
        """
        return WrittenRows(item.source, Path(item.target), self.identity, self.options.resume)

    def load(self) -> nn.Module:
        """Open the file on the device of this process."""
        how = self.options
        net = load(self.file, mask=how.mask or None, trust=how.trust)
        read_by(net, how.bands, how.conversion.get("normalisation"))
        return net.to(find_device(how.device))

    def with_one_thread(self) -> Predictor:
        """Open the file for this process alone, one of many on a machine."""
        torch.set_num_threads(1)
        return Predictor(self.load(), self)

    def predicting(self) -> Callable[[Sequence[Item]], list[tuple[int, Row]]]:
        """Open the file; return what predicts a block of images, see `cadsurgery.tasks.workers.share`."""
        predictor = self.with_one_thread()
        return lambda items: list(predictor.rows(items))


class Picture(NamedTuple):
    """An image on its way: its pixels, which of them are asked for, or the error that ended it; and class numbers
    (H, W), channels of the network's output and fields of its row. One that is read in rows is written in rows, too;
    `written` are the fields of its row."""

    item: Item
    pixels: Tensor | None = None
    area: Tensor | None = None
    error: CadError | None = None
    result: tuple[Tensor, int, Row] | None = None
    large: LargePicture | None = None
    written: Row | None = None


def _write(drawn: Image.Image, target: str) -> Row:
    """Write a prediction; return fields of its row."""
    if not is_remote(target):
        make_folder(Path(target).parent)
    write_picture(drawn, target)
    return {"output": target}


class Predictor:
    """An optimised network, and how it is run.

    Attributes:
        net: the network.
        kind: its kind, if a method made it.
        source: its source, for which images are normalised.
        stopped: set to end a picture that is computed in bands behind the current one.
        step: progress callback for such pictures.
        names: names of its classes; empty if unknown.
    """

    def __init__(self, converted: nn.Module, settings: PredictionSettings) -> None:
        """Optimise a network that `settings` opened."""
        self.settings, self.options = settings, settings.options
        self.device = find_device(self.options.device)
        self.kind, self.source = method_of(converted), pictures_for(converted)
        self.names, self._folder = class_names(self.source), ""
        options = {"precision": self.options.precision, "memory": self.options.memory or None}
        options = {} if self.kind is not None else options
        self.net: Any = converted.optimize(**options)  # type: ignore[operator]
        self._dtype = torch.bfloat16 if self.options.precision == BFLOAT16 else None
        self.stopped, self.step = STOPPED, silent
        self._multiples: dict[torch.Size, int] = {}  # to which pictures of a size are padded; 1 for none
        self._rounded: dict[torch.Size, torch.Size] = {}  # pixels that the results of a size reach to

    def start_anew(self) -> None:
        """Forget the frames that `smooth` masks have seen."""
        for module in self.net.modules():
            if isinstance(module, Smooth):
                module.reset()

    def __call__(self, pictures: Tensor, areas: Tensor | None = None) -> Iterator[tuple[Tensor, int, Row]]:
        """Run pictures of one size as a batch, perhaps only in areas (B, H, W); yield the classes of each, the number
        of channels, and fields of its row.

        Pictures of a size that the network does not take are padded to multiples that it takes, at the right and
        below, with the mean colour; their results are cut back, and rows say `padded_to`.
        """
        images = normalise(pictures, self.source).to(self.device, self._dtype)
        start, size, refusal = time.perf_counter(), images.shape[2:], None
        known_multiple = self._multiples.get(size)
        for multiple in MULTIPLES if known_multiple is None else (known_multiple,):
            padded = F.pad(images, (0, -size[1] % multiple, 0, -size[0] % multiple))
            if multiple > 1 and known_multiple is None and padded.shape == images.shape:
                continue
            try:
                prediction, known = self._run(padded, size, areas)
                break
            except NotInstalled:
                raise
            except (CadError, RuntimeError) as error:  # networks refuse image sizes with errors of their own
                refusal = refusal or refuse_images(error, images.shape[2:])
                self.start_anew()
        else:
            assert refusal is not None
            raise refusal if self.options.size else _with_size(refusal)
        self._multiples[size] = multiple
        milliseconds = 1e3 * (time.perf_counter() - start) / len(pictures)
        more = {"padded_to": [*padded.shape[2:]]} if padded.shape != images.shape else {}
        prediction = cut_back(prediction, padded.shape[2:], size)
        if areas is not None and prediction.shape[2:] == areas.shape[1:]:  # it may have a margin
            prediction = prediction.masked_fill(~areas[:, None], math.nan)
        for scores, details in zip(prediction, known, strict=True):
            yield (
                classes_of(scores, areas is not None),
                scores.shape[0],
                {**details, "milliseconds": milliseconds, **more},
            )

    def _run(
        self, images: Tensor, size: Sequence[int], areas: Tensor | None = None
    ) -> tuple[Tensor, list[Row]]:
        """Run images, of which `size` is what is not padding; return the prediction and fields of the row of each."""
        with torch.inference_mode():
            if self.kind is not None:
                returned, details = self.kind.run(self.net, images, self.options.until or math.inf)
                return _first_tensor(returned), [details]
            is_padded = images.shape[2:] != size
            if areas is not None:
                with sized([(size[0], size[1])] * len(images) if is_padded else None):
                    return self._within(images, areas), [{}] * len(images)
            returned = self.net(images, sizes=[tuple(size)] * len(images)) if is_padded else self.net(images)
            levels = cut_back(self.net.levels, images.shape[2:], size).flatten(1)
            numbers = range(self.net.geometry.max_level + 1)
            shares = torch.stack([(levels == level).double().mean(1) for level in numbers], 1)
            shares = shares if len(shares) == len(images) else shares.mean(0).expand(len(images), -1)
            known = [{"active_fraction": high, "levels": [high, *low]} for high, *low in shares.tolist()]
            return _first_tensor(returned), known

    def _within(self, images: Tensor, areas: Tensor) -> Tensor:
        """Compute images in their areas (B, H, W). Where the network rounds sides up, areas are padded to the pixels
        that the result covers, which the first run of each size shows."""
        size = images.shape[2:]
        while True:
            tall, wide = self._rounded.get(size, size)
            area = F.pad(areas, (0, wide - areas.shape[2], 0, tall - areas.shape[1]))
            maps = _first_tensor(read_within(self.net, images, area=area))
            sides = zip(size, maps.shape[2:], strict=True)
            rounded = torch.Size(round(step_of(pixels, samples) * samples) for pixels, samples in sides)
            if rounded == (tall, wide):
                return maps
            self._rounded[size] = rounded

    def rows(
        self, items: Iterable[Item], put: Callable[[Image.Image, str], Row] = _write
    ) -> Iterator[tuple[int, Row]]:
        """Predict images and `put` each prediction to its target; yield the position and row of each, in order.

        The next images are read and the last predictions are put while one is computed. Images of one size that follow
        each other run together, up to `batch`.
        """
        return ahead(self._predict(ahead(items, self._read)), partial(self._finish, put))

    def _read(self, item: Item) -> Picture:
        try:
            if item.target.endswith(".tif"):
                return Picture(item, large=LargePicture(item.source, self.source, self._dtype, self.options))
            read = read_picture_for(self.source, item.source, self.options.size, content=item.content)
            if not self.options.within:
                return Picture(item, read)
            size, position = (read.shape[1], read.shape[2]), position_at(item.source)
            area = read_area(self.options.within, size, item.source, position)
            return Picture(item, read, area(0, size[0]))
        except CadError as error:
            return Picture(item, error=error)

    def _predict(self, pictures: Iterable[Picture]) -> Iterator[Picture]:
        for shape, alike in groupby(pictures, lambda picture: getattr(picture.pixels, "shape", None)):
            while together := list(islice(alike, self.options.batch)):
                yield from self._predict_together(together) if shape else map(self._predict_large, together)

    def _predict_large(self, picture: Picture) -> Picture:
        if picture.large is None:
            return picture
        try:
            part = self.settings.part_of(picture.item)
            stopping, overviews = (self.stopped, self.step), self.options.overviews
            row = predict_large(self.net, picture.large, part, self._count, *stopping, overviews)
            return picture._replace(written=row | self._shares(row.pop("counts", Counter())))
        except CadError as error:
            return picture._replace(error=error)
        finally:
            picture.large.file.close()

    def _predict_together(self, pictures: list[Picture]) -> Iterator[Picture]:
        folder = pictures[0].item.source.rpartition("/")[0]
        if folder != self._folder:
            self.start_anew()
            self._folder = folder
        pixels = torch.stack([picture.pixels for picture in pictures if picture.pixels is not None])
        areas = [picture.area for picture in pictures if picture.area is not None]
        try:
            results = list(self(pixels, torch.stack(areas) if areas else None))
        except NotInstalled:
            raise
        except CadError as refusal:
            return iter([picture._replace(error=refusal) for picture in pictures])
        return (picture._replace(result=result) for picture, result in zip(pictures, results, strict=True))

    def _finish(self, put: Callable[[Image.Image, str], Row], picture: Picture) -> tuple[int, Row]:
        item, pixels, area, error, result, *_ = picture
        row: Row = {"image": item.source, **(picture.written or {})}
        if pixels is not None and result is not None:
            try:
                row |= put(self.draw(pixels, *result[:2]), item.target)
                shares = self._shares(self._count(*result[:2]))
                asked = {} if area is None else {"asked": int(area.sum())}
                row |= {"size": [*pixels.shape[1:]], **asked, **result[2], **shares}
            except CadError as refusal:
                error = refusal
        return item.position, row | (error.to_dict() if error else {})

    def draw(self, pixels: Tensor, classes: Tensor, channels: int = 256, usual: str = CLASSES) -> Image.Image:
        """Draw the prediction of an image or a frame."""
        view = self.options.view or usual
        return (
            class_picture(classes, channels) if view == CLASSES else prediction_picture(pixels, classes, view)
        )

    def clip_row(self, clip: Item, fps: float, step: Step, stopped: threading.Event) -> tuple[int, Row]:
        """Predict the frames of a clip and write them as a clip, until it ends or `stopped` is set; return its
        position and row."""
        self.start_anew()
        try:
            return clip.position, self._draw_clip(Path(clip.source), Path(clip.target), fps, step, stopped)
        except NotInstalled:
            raise
        except CadError as error:
            return lost(clip, error)

    def _draw_clip(self, path: Path, target: Path, fps: float, step: Step, stopped: threading.Event) -> Row:
        frames, sums, classes, last, start = 0, Counter[str](), Counter[int](), Row(), time.perf_counter()
        first: Sequence[int] = ()
        make_folder(target.parent)
        with (
            open_clip(path, self.options.size, fps, self.source) as clip,
            write_clip(target, clip.rate, clip.time_base) as add,
        ):
            batches = iter(lambda: list(islice(clip.timed, self.options.batch)), [])
            while not (frames and stopped.is_set()) and (batch := next(batches, [])):
                times, pictures = zip(*batch, strict=True)
                first = first or pictures[0].shape[1:]
                for number, picture in enumerate(pictures, frames + 1):
                    if (size := picture.shape[1:]) != first:
                        raise FileError(
                            f"frame {number} of {path} is {size[0]}x{size[1]}, the first one is {first[0]}x{first[1]}.",
                            next="resize them: --size HxW.",
                        )
                for second, picture, (found, channels, last) in zip(
                    times, pictures, self(torch.stack(pictures)), strict=True
                ):
                    add(self.draw(picture, found, usual=OVERLAY), second)
                    classes += self._count(found, channels)
                    last.pop("levels", None)
                    sums.update({key: value for key, value in last.items() if not isinstance(value, str)})
                frames += len(pictures)
                speed = frames / (time.perf_counter() - start)
                of = f" of {clip.count}" if clip.count else ""
                step(f"{path.name}, frame {frames}{of}, {speed:.1f} frames/s", frames, clip.count)
            if not frames:
                raise FileError(f"{path} holds no frames.", next="give a clip with pictures.")
        means = {key: sums[key] / frames if key in sums else last[key] for key in last}
        ended = {"frames": frames, "frames_per_second": speed, "interrupted": stopped.is_set()}
        return {"image": str(path), "output": str(target), **means, **ended, **self._shares(classes)}

    def _count(self, classes: Tensor, channels: int) -> Counter[int]:
        """Count the pixels of each class; nothing if the classes have no names."""
        if channels != len(self.names):
            return Counter()
        numbers = classes.flatten().long()
        return Counter(dict(enumerate(numbers[numbers >= 0].bincount().tolist())))

    def _shares(self, counts: Counter[int]) -> dict[str, dict[str, float]]:
        """Return the share of each class that occurs, by name, as a field of a row."""
        whole = counts.total()
        shares = {self.names[index]: count / whole for index, count in sorted(counts.items()) if count}
        return {"classes": shares} if shares else {}


def _with_size(refusal: CadError) -> CadError:
    """Return the error for pictures of a size that a network does not take, with the option that resizes them."""
    if not isinstance(refusal, InvalidInput) or "--size" in refusal.next or "NaN" in refusal.what:
        return refusal
    parts = {"where": refusal.where, "why": refusal.why}
    also = "If the network takes one size, give that to run: --size HxW."
    return InvalidInput(refusal.what, **parts, next=f"{refusal.next} {also}".strip())


def _first_tensor(output: Any) -> Tensor:
    tensors = tensors_of(output)
    if not tensors or tensors[0].dim() != 4:
        shape = tuple(tensors[0].shape) if tensors else ()
        raise InvalidInput(
            f"the network's output {shape} is not a map, so there is nothing to draw.",
            next="use cs.load in Python for classifiers, or convert a segmentation network.",
        )
    return tensors[0]


def classes_of(scores: Tensor, is_in_part: bool = False) -> Tensor:
    """Return class numbers (H, W): the channel with the highest score; for one channel its value in 256 steps. In a
    prediction of a part of the picture scores elsewhere are NaN, which has the number -1, and there are 255 steps."""
    scores = scores.float()
    values, lacking = scores[0], scores[0].isnan() if is_in_part else None
    if len(scores) > 1:
        found = scores.argmax(0)
    else:
        low, high = (values if lacking is None else values[~lacking]).aminmax()
        steps = 255 if lacking is None else 254
        found = ((values - low) / (high - low).clamp(min=1e-12) * steps).round()
    return found if lacking is None else found.masked_fill(lacking, -1)
