"""Show what a mask does to one image: maps, predictions, work and times. The computing part of `cadsurgery explore`."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cadsurgery.data.images import normalise, read_picture_for, shown, street_scene
from cadsurgery.data.networks import Source, class_names, stated_statistics
from cadsurgery.masks import EstimatedMask, MaskProvider, list_masks, resolve_mask
from cadsurgery.methods.method_files import load
from cadsurgery.methods.side import Side, work_and_time
from cadsurgery.network.adaptify import adaptify, plan
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import InvalidInput, check_name
from cadsurgery.support.progress import Step, silent, within
from cadsurgery.support.provenance import find_device, import_nothing
from cadsurgery.support.rows import Row
from cadsurgery.tasks.figures import OVERLAY, draw_lattice, draw_levels, prediction_picture
from cadsurgery.tasks.measuring import AGREEMENT, ERROR, compare
from cadsurgery.tasks.open import is_file, open_any, original, weights_in_words
from cadsurgery.tasks.predictor import classes_of

LIMITS = WRITTEN, THRESHOLD, BUDGET = "as written", "threshold", "budget"
FILLS = ("linear", "nearest", "guided")
SAMPLES = (0, 1, 2)  # seeds of generated street scenes
_SAMPLE_SIZE, _LONGEST = (384, 768), 1024  # pixels
_SECONDS = 10.0  # limit of the timing
_SHOWN = 3  # classes of a classifier


def masks_with_threshold() -> dict[str, float]:
    """Return the masks that have a threshold, which are those that look at the image, with its default."""
    return {mask.name: mask.options["threshold"][0] for mask in list_masks() if "threshold" in mask.options}


@dataclass(frozen=True)
class PageSettings:
    """The settings of the page.

    Attributes:
        mask: a mask in its text form; empty for the network's own.
        limit: one of `LIMITS`: the mask as it is written, with another threshold, or held to a budget.
        value: the threshold, or the share of the patches.
        output_stride: (high, low); None for the network's own.
        fill: one of `FILLS`; empty for the network's own.
    """

    mask: str = ""
    limit: str = WRITTEN
    value: float = 0.0
    output_stride: tuple[int, int] | None = None
    fill: str = ""

    def spec(self, own: str) -> str:
        """Return the text form of the mask with its limit; `own` is the network's own mask."""
        check_name("limit", self.limit, LIMITS)
        mask = self.mask or own
        if self.limit == THRESHOLD:
            return f"{mask}{',' if ':' in mask else ':'}threshold={self.value:g}"
        return f"{mask} | budget:fraction={self.value:g}" if self.limit == BUDGET else mask


class _Nets(NamedTuple):
    """A converted network, its optimised copy, and a copy that runs as an ordinary dense network."""

    net: AdaptiveModel
    fast: AdaptiveModel
    dense: AdaptiveModel


@dataclass(frozen=True)
class Subject:
    """A network that is explored.

    Attributes:
        name: name or file.
        words: name and weights, for people.
        source: its source, for which images are normalised.
        device: its device.
        mask: its own mask.
        strides: possible pairs of output strides, its own first.
        fills: possible fills, its own first.
        convert: converts it for a pair of output strides and a fill.
        made_by: arguments of `build_model` and of `adaptify` by which a network by name is made, or those of `load`
            for a file.
    """

    name: str
    words: str
    source: Source
    device: torch.device
    mask: str
    strides: tuple[tuple[int, int], ...]
    fills: tuple[str, ...]
    convert: Callable[[tuple[int, int], str], _Nets]
    made_by: Mapping[str, Any]


@dataclass(frozen=True)
class Explored:
    """What `explore` found.

    Attributes:
        level_map: the image, coloured by level.
        lattice: the cells of the elements on the image.
        prediction: the prediction on the image; None if the network returns no maps.
        dense: the prediction with everything kept high; None likewise.
        lines: findings in words.
        rows: `side`, `macs` and `milliseconds` of the network as given, with everything high, and with the mask.
        python: Python code that computes `output`.
        command: the command that does the same.
        output: the output of the network.
        levels: the level map (1, h, w).
    """

    level_map: Image.Image
    lattice: Image.Image
    prediction: Image.Image | None
    dense: Image.Image | None
    lines: tuple[str, ...]
    rows: tuple[Row, ...]
    python: str
    command: str
    output: Any
    levels: Tensor


def open_subject(name: str, weights: str = "auto", device: str = "cpu", trust: bool = False) -> Subject:
    """Open a network by name, or a converted file, whose output strides and fill are fixed.

    Raises:
        InvalidInput: the file holds a network of another method, or the network is adaptive only in part.
    """
    torch_device = find_device(device)
    if open_any(name, trust) is not None:
        raise InvalidInput(
            f"{name} holds a network of another method.",
            why="level maps and lattices are of adaptive networks.",
            next="run it: cadsurgery run FILE IMAGES.",
        )
    if not is_file(name):
        return _open_name(name, weights, torch_device)
    net = load(name, trust=trust).to(torch_device)
    assert isinstance(net, AdaptiveModel)
    _refuse_part(name, net.plan.part)
    source, nets = pictures_for(net), _prepare(net)
    return Subject(
        name,
        f"{name}: {source.name}, {weights_in_words(name, source)}",
        source,
        torch_device,
        net.mask.spec(),
        (net.plan.output_stride,),
        (net.geometry.fill,),
        lambda pair, fill: nets,
        {"trust": True} if trust else {},
    )


def _open_name(name: str, weights: str, device: torch.device) -> Subject:
    model, source = original(name, weights)
    planned = plan(model)
    _refuse_part(name, planned.part)
    # Otherwise masks would estimate from an image how it is normalised.
    stated: dict[str, Any] = {} if stated_statistics(model) else {"normalisation": (source.mean, source.std)}

    @lru_cache(maxsize=2)
    def convert(pair: tuple[int, int], fill: Any) -> _Nets:
        net = adaptify(model, DEFAULT_MASK, output_stride=pair, fill=fill, verify_laws=False, **stated)
        return _prepare(net.to(device))

    strides = dict.fromkeys((planned.output_stride, *planned.possible))
    words = f"{source.name}, {source.note}"
    made_by = {"weights": weights, **stated}
    return Subject(name, words, source, device, DEFAULT_MASK, tuple(strides), FILLS, convert, made_by)


def _refuse_part(name: str, part: str) -> None:
    if part:
        raise InvalidInput(
            f"of {name} only the part {part} is adaptive.",
            why="its maps are of another size than the image.",
            next=f"cadsurgery mask --model {name} draws its lattice.",
        )


def _prepare(net: AdaptiveModel) -> _Nets:
    return _Nets(net, net.optimize(), net.optimize(fuse=False))


def explore(
    subject: Subject, image: Path | int, setting: PageSettings, rounds: int = 3, step: Step = silent
) -> Explored:
    """Run a network on an image with a mask, and beside it with everything kept high.

    Args:
        subject: the network.
        image: a file, or the seed of a generated street scene. Larger images than 1024 pixels are reduced.
        setting: mask, output strides and fill.
        rounds: timing rounds; 0 to skip timing.
        step: progress callback.

    Raises:
        FileError: the image cannot be read.
        UnknownName: there is no such mask or fill.
        InvalidInput: an impossible mask or pair of output strides, or a mask that names a function.
    """
    pair, fill = setting.output_stride or subject.strides[0], setting.fill or subject.fills[0]
    check_name("fill", fill, subject.fills)
    if pair not in subject.strides:
        raise InvalidInput(
            f"output strides {pair[0]} and {pair[1]} are not possible for {subject.name}.",
            next=f"choose from {', '.join(map(str, subject.strides))}.",
        )
    spec = setting.spec(subject.mask)
    is_own = spec == subject.mask
    picture, size = _read(image, subject.source)
    step("converting")
    net, fast, dense = subject.convert(pair, fill)
    if not is_own and not setting.mask and net.mask.find(EstimatedMask) is not None:
        raise InvalidInput(
            "a learned mask is explored as it is stored.", next=f"choose {WRITTEN!r}, or another mask."
        )
    mask = fast.mask if is_own else _mask_of_page(spec, bool(setting.mask)).eval().to(subject.device)
    batch = normalise(picture, subject.source).unsqueeze(0)
    batch = batch.to(subject.device, memory_format=torch.channels_last)
    step("running it")
    with torch.inference_mode():
        output, lattice, reference = fast(batch, mask=mask), fast.lattice, dense(batch, mask="all")
    counted, own = net.macs(batch, mask=mask), net.plan.identity_level
    high = "as given, everything high" if own == 0 else "everything high"
    as_given = Side("as given", partial(dense, mask="none"), counted.given or 0)
    sides = [
        *([as_given] if own == net.plan.max_level else []),
        Side(high, partial(dense, mask="all"), counted.high),
        Side(spec, partial(fast, mask=mask), counted.mask),
    ]
    rows = work_and_time(sides, batch, rounds, seconds=_SECONDS, step=within(step, "measuring"))
    pixels, stride = shown(picture).permute(1, 2, 0).numpy(), net.plan.strides[0]
    prediction, high_prediction = (
        _overlay(picture, output_of_side) for output_of_side in (output, reference)
    )
    lines = [subject.words, f"active fraction {lattice.active_fraction:.3f}, {lattice.count} elements"]
    lines += filter(None, [_quality(output, reference, (picture.shape[1], picture.shape[2]))])
    if prediction is None:
        answers = {"with the mask": output, "everything high": reference}
        lines += filter(None, [_answer(name, answer, subject.source) for name, answer in answers.items()])
    return Explored(
        _picture(draw_levels(pixels, lattice, stride)),
        _picture(draw_lattice(pixels, lattice, stride)),
        prediction,
        high_prediction,
        tuple(lines),
        tuple(rows),
        *_code(subject, spec, pair, fill, image, size),
        output,
        lattice.levels,
    )


def _mask_of_page(spec: str, is_typed: bool) -> MaskProvider:
    """Return the mask of a text. A text that was typed on the page imports nothing: who sees the page may run masks
    on this machine, not any function.

    Raises:
        InvalidInput: a typed mask names a function.
    """
    with import_nothing(_refuse_import) if is_typed else contextlib.nullcontext():
        return resolve_mask(spec)


def _refuse_import(code: str) -> InvalidInput:
    return InvalidInput(
        "a mask that is typed on the page cannot name a function.",
        where=code,
        why="the page runs only masks, whoever opens it.",
        next="choose another mask, or use the function on the command line: cadsurgery mask --mask ...",
    )


def _read(image: Path | int, source: Source) -> tuple[Tensor, tuple[int, int] | None]:
    """Return a picture, and the size that it was reduced to, if it was."""
    if isinstance(image, int):
        return street_scene(*_SAMPLE_SIZE, image, source.channels), None
    picture = read_picture_for(source, image)
    height, width = picture.shape[1:]
    if max(height, width) <= _LONGEST:
        return picture, None
    size = tuple(max(1, round(side * _LONGEST / max(height, width))) for side in (height, width))
    return read_picture_for(source, image, size), size  # type: ignore[return-value, arg-type]


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))


def _overlay(picture: Tensor, output: Any) -> Image.Image | None:
    """Draw the classes of an output on the picture; None if it is no map."""
    maps = [tensor for tensor in tensors_of(output)[:1] if tensor.dim() == 4]
    return prediction_picture(picture, classes_of(maps[0][0]), OVERLAY) if maps else None


def _quality(output: Any, reference: Any, size: tuple[int, int]) -> str:
    """Compare an output with the one with everything kept high, in words; empty if they cannot be compared."""
    try:
        figures = compare(output, reference, size)
    except InvalidInput:
        return ""
    if figures[ERROR] is not None:
        return f"relative error {figures[ERROR]:.1%} against everything high"
    return f"{figures[AGREEMENT]:.1%} of the predictions are those of everything high"


def _answer(name: str, output: Any, source: Source) -> str:
    """Return the most probable classes of a classifier in words; empty for other networks."""
    scores = next(iter(tensors_of(output)), torch.empty(0))
    if scores.dim() != 2:
        return ""
    best = scores[0].float().softmax(0).topk(min(_SHOWN, scores.shape[1]))
    names: Mapping[int, str] = dict(enumerate(class_names(source)))
    best_classes = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return f"{name}: " + ", ".join(
        f"{names.get(place, f'class {place}')} {share:.0%}" for share, place in best_classes
    )


def _code(
    subject: Subject,
    spec: str,
    pair: tuple[int, int],
    fill: str,
    image: Path | int,
    size: tuple[int, int] | None,
) -> tuple[str, str]:
    """Return Python code that computes the output, and the command that does the same; a generated image has no file,
    which `run` needs: its place is named PHOTO."""
    sizes = ["--size", f"{size[0]}x{size[1]}"] if size else []
    if is_file(subject.name):
        changed = {} if spec == subject.mask else {"mask": spec}
        lines = [f"net = cs.load({_arguments(subject.name, **changed, **subject.made_by)})"]
        place = image.name if isinstance(image, Path) else "PHOTO"
        words = ["run", subject.name, place, *sizes, *(["--mask", spec] if changed else [])]
        words += ["--trust"] * bool(subject.made_by)
    else:
        stated = dict(subject.made_by)
        weights, options = stated.pop("weights"), {"output_stride": pair, "fill": fill}
        lines = ["torch.manual_seed(0)"] if subject.source.weights in ("random", "own") else []
        lines += [
            f"model = cs.build_model({_arguments(subject.name, weights)})",
            f"net = cs.adaptify(model, {_arguments(spec, **options, **stated, verify_laws=False)})",
        ]
        words = ["convert", subject.name, "--weights", weights, "--mask", spec]
        words += ["--output-stride", f"{pair[0]},{pair[1]}", "--fill", fill]
        for name, values in stated.items():
            words += [f"--{name}", "/".join(",".join(map(str, numbers)) for numbers in values)]
        words += [*(["--image", image.name] if isinstance(image, Path) else []), *sizes]
    more: dict[str, Any] = {} if subject.source.channels == 3 else {"channels": subject.source.channels}
    if isinstance(image, Path):
        how = _arguments(*filter(None, [size]), **more)
        read = f"read_image(Path({image.name!r}){how and f', {how}'})"
    else:
        read = f"street_scene({_arguments(*_SAMPLE_SIZE, image, **more)})"
    code = [
        *(["from pathlib import Path"] if isinstance(image, Path) else []),
        *(["import torch"] if lines[0].startswith("torch.") else []),
        "import cadsurgery as cs",
        f"from cadsurgery.images import normalise, {read.partition('(')[0]}",
        "",
        *lines,
        f"output = net(normalise({read}, net.source).unsqueeze(0))",
        "",
    ]
    return "\n".join(code), "cadsurgery " + shlex.join(words)


def _arguments(*values: Any, **named: Any) -> str:
    """Return the arguments of a call, as they are written."""
    return ", ".join([*map(repr, values), *(f"{name}={value!r}" for name, value in named.items())])
