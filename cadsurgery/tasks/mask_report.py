"""Pictures of masks: one with its map and lattice, or several side by side with their quality and cost."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor

from cadsurgery.data import SegmentationData, open_pictures, sample_of
from cadsurgery.data.clips import WRITTEN, is_clip, write_clip
from cadsurgery.data.images import (
    check_labels_fit,
    check_picture,
    labelled_scene,
    normalise,
    read_labels,
    resized,
    write_picture,
)
from cadsurgery.data.networks import Source
from cadsurgery.data.samples import pictures_of
from cadsurgery.data.sources import split_place
from cadsurgery.data.stores import refuse_stream
from cadsurgery.data.tiff import split_page
from cadsurgery.elements.lattice import Geometry, Lattice
from cadsurgery.masks import FineMapSpec, MaskProvider, resolve_mask
from cadsurgery.masks.provider import check_levels
from cadsurgery.masks.unit import read_normalisation
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.network.storage import read_metadata
from cadsurgery.support import files
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.support.errors import FileError, InvalidInput
from cadsurgery.support.files import check_folder
from cadsurgery.support.progress import Step, counted
from cadsurgery.support.rows import Row, percent, plain
from cadsurgery.support.tables import Column, table
from cadsurgery.tasks.commands import MaskOptions
from cadsurgery.tasks.figures import comparison_figure, mask_figure
from cadsurgery.tasks.measuring import AGREEMENT, ERROR, FIDELITY, as_labels, compare
from cadsurgery.tasks.open import (
    example_image,
    is_file,
    normalised_by,
    open_converted,
    with_statistics,
)
from cadsurgery.tasks.report import Report, figure_picture

# Returns the lattice of a mask; in a network, if masks are compared, also fields of its row: quality and cost.
Look = Callable[[MaskProvider], tuple[Lattice, dict[str, Any]]]
# What masks are evaluated by on a picture: the high output stride, the lowest level, the function, and notes.
Seen = tuple[int, int, Look, list[str]]
# Fields of a row that hold a quality, and their names in tables and pictures.
QUALITIES = {AGREEMENT: "agreement", FIDELITY: "balanced fidelity", ERROR: "relative error"}


def masks_to_compare(max_level: int, has_labels: bool) -> tuple[str, ...]:
    """Return masks that are worth comparing, in text form.

    Args:
        max_level: the lowest level; a mask may have a threshold for each level above it.
        has_labels: True to include the oracle, which needs labels.
    """
    is_graded = max_level > 1
    return (
        *("detail | budget:fraction=0.1", "detail | budget:fraction=0.2"),
        *(DEFAULT_MASK, f"{DEFAULT_MASK} | budget:fraction=0.2"),
        *(("edges:threshold=0.95/0.1,dilation=5/15",) if is_graded else ()),
        "gradient:threshold=0.5,dilation=7,sigma=1",
        *((f"trimap:width={'9/25' if is_graded else 25}",) if has_labels else ()),
    )


def _row(asked: str, mask: str, lattice: Lattice, more: Mapping[str, Any]) -> Row:
    """Create the row of one mask on one image, labelled as the user wrote the mask.

    It has the elements after the last stage and the fine pixels, which are the elements of dense high; in a network
    also `more`, its quality and cost.
    """
    fine = lattice.size[0] * lattice.size[1]
    values = {"mask": mask, "active_fraction": lattice.active_fraction, "elements": lattice.count}
    values |= {"fine_pixels": fine, "share_of_elements": lattice.count / fine}
    return Row(asked, {**values, **more})


def _title(row: Row, width: int = 52) -> str:
    """Return a short title: the mask, its quality if known, its active fraction and its cost."""
    lines = [textwrap.fill(row.label, width, break_on_hyphens=False)]
    qualities = {name: row.get(name) for name in QUALITIES if row.get(name) is not None}
    if qualities:
        lines.append(", ".join(f"{QUALITIES[name]} {100 * value:.1f} %" for name, value in qualities.items()))
    cost = f"active {row.active_fraction:.2f}"
    if row.get("of_given") is not None:
        cost = f"MACs {row.of_given:.2f} of the network as given, {cost}"
    elif row.get("of_high") is not None:
        cost = f"MACs {row.of_high:.2f} of everything high, {cost}"
    else:
        cost += f", elements {row.share_of_elements:.2f}"
    return "\n".join((*lines, cost))


@dataclass(frozen=True)
class MaskReport(Report):
    """The report of `cadsurgery mask`: a row for each mask, and the picture.

    A row has `mask`, `active_fraction`, `elements`, `fine_pixels` and `share_of_elements`; that of a clip has their
    means, and the number of `frames`. Masks that are compared in a
    network also have

    - for class scores `pixel_accuracy`, the share of pixels with the class that the dense network predicts, and
      `balanced_fidelity`, the mean IoU over these classes; for other maps `relative_error`. All are relative to the
      same network with everything kept high, see `cadsurgery.tasks.measuring`, and None where they do not apply;
    - `macs`: multiply-accumulates with the `mask`, of the network as `given` (None if unknown), and with everything
      `high` and `low`; `of_given` and `of_high`: those with the mask relative to these.

    Attributes:
        rows: one row per mask, in order.
        file: the picture.
        compared: True for several masks side by side.
        notes: limits of the comparison.
    """

    rows: tuple[Row, ...]
    file: str
    compared: bool
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `--json`: for one mask its row, for several a list."""
        rows = [plain(row.values) for row in self.rows]
        if not self.compared:
            return {**rows[0], "file": self.file}
        return {"masks": rows, "notes": list(self.notes), "file": self.file}

    def parts(self) -> Iterator[RenderableType]:
        """Yield one mask as a line, several as a table."""
        row = self.rows[0]
        if not self.compared:
            elements = f"{row.elements:.0f} elements for {row.fine_pixels} fine pixels"
            mean = f"mean of {row.frames} frames: " if row.get("frames") else ""
            yield Text(f"{mean}active fraction {row.active_fraction:.3f}, {elements}; wrote {self.file}")
            return
        measured = [name for name in QUALITIES if row.get(name) is not None]
        columns: list[Column[Row]] = [Column("mask", lambda row: Text(row.label), False)]
        columns += [Column(QUALITIES[name], name, form=percent) for name in measured]
        if row.get("macs"):
            columns.append(Column("MACs", lambda row: f"{row.macs['mask']:.3e}"))
            columns.append(Column("of given", "of_given", form=".2f"))
            columns.append(Column("of all high", "of_high", form=".2f"))
        columns.append(Column("active fraction", "active_fraction", form=".3f"))
        columns.append(Column("elements", "elements"))
        if not row.get("macs"):
            columns.append(Column("of all high", "share_of_elements", form=".2f"))
        yield table(self.rows, columns, f"masks on {row.fine_pixels} fine pixels")
        for note in self.notes:
            yield Text(note, style="dim")
        yield Text(f"wrote {self.file}", style="bold green")


def draw_masks(image: str, options: MaskOptions, *, step: Step) -> MaskReport:
    """Draw masks on an image, for a network or for given strides; see `cadsurgery mask --help`.

    Several masks in a network are compared by the quality of its prediction and by its cost. Of a clip the first frame
    that is used is drawn or, if the output is a clip, all of them.

    Raises:
        InvalidInput: several masks without `compare`, or labels of another size than the image.
    """
    masks, compare, model, size = options.masks, options.compare, options.model, options.size
    if len(masks) > 1 and not compare:
        raise InvalidInput(
            f"{len(masks)} masks for one picture.", next="add --compare to draw them side by side."
        )
    if options.output.suffix.lower() in WRITTEN:
        return _draw_frames(image, options, step)
    check_picture(options.output)
    frames = _frames(image, options.bands)
    path = _existing(image) if frames is None else None

    def pictures(source: Source | None, size: tuple[int, int] | None = size) -> Iterator[Tensor]:
        if frames is None:
            yield example_image(path, size, source=source, bands=options.bands)
        else:
            yield from (resized(frame, size) for frame in pictures_of(frames)(source))

    see, stored_mask, source = _open(options, pictures, step)
    picture = next(pictures(source))
    truth = _labels(options.labels, image, lambda: next(pictures(None, None)), size, picture)
    asked = [(text, resolve_mask(text)) for text in masks]
    step("running it with everything kept high" if source else "drawing")
    stride, max_level, look, notes = see(picture)
    if not asked:
        examples = masks_to_compare(max_level, truth is not None) if compare else ()
        asked = [(text, resolve_mask(text)) for text in examples]
        if stored_mask is not None or not compare:
            first = stored_mask or resolve_mask(DEFAULT_MASK)
            asked = [(first.spec(), first), *(entry for entry in asked if entry[1].spec() != first.spec())]
    rows, lattices = [], []
    with as_labels(truth):
        for text, mask in counted(asked, step, "mask", "drawing", name=lambda entry: entry[0]):
            lattice, more = look(_with_weights(mask, stored_mask))
            rows.append(_row(text, mask.spec(), lattice, more))
            lattices.append(lattice)
    if compare:
        title = f"{model}, random weights" if _RANDOM in notes else model
        figure = comparison_figure(picture, lattices, [_title(row) for row in rows], stride, title)
    else:
        figure = mask_figure(picture, lattices[0], stride, title=rows[0].mask)
    write_picture(figure_picture(figure), options.output)
    return MaskReport(tuple(rows), str(options.output), compare, tuple(notes))


def _frames(image: str, bands: Sequence[int]) -> SegmentationData | None:
    """Return the frames of a clip; None for anything else."""
    place = split_place(image.removeprefix("clip:"))[0]
    named = image.startswith("clip:") or is_clip(Path(place))
    return open_pictures(image, bands=bands) if named else None


def _with_weights(mask: MaskProvider, stored: MaskProvider | None) -> MaskProvider:
    """Return the mask of a file, which comes with its learned weights, if it is the same."""
    return stored if stored is not None and stored.spec() == mask.spec() else mask


def _draw_frames(image: str, options: MaskOptions, step: Step) -> MaskReport:
    """Draw a mask on the frames of a clip, or on the pictures of a folder, as a clip.

    Raises:
        InvalidInput: there is no clip, masks are to be compared, or labels are given.
    """
    if not image or options.compare or options.labels is not None:
        raise InvalidInput(
            f"{options.output} is a clip, and what is to be drawn is "
            f"{'a generated picture' if not image else 'a comparison' if options.compare else 'one with labels'}.",
            next="give a clip or a folder of frames, and one mask; or name a picture: --output mask.png.",
        )
    check_folder(options.output)
    mask = resolve_mask(options.masks[0]) if options.masks else None
    data = open_pictures(image, bands=options.bands)
    see, stored, source = _open(options, pictures_of(data), step)
    data, rows = data.read_for(source), []
    mask = _with_weights(mask or stored or resolve_mask(DEFAULT_MASK), stored)
    with write_clip(options.output, _SHOWN) as add:
        for at in counted(range(len(data)), step, "frame", "drawing"):
            picture = resized(sample_of(data, at)[0], options.size)
            stride, _, look, _ = see(picture)
            lattice, _ = look(mask)
            rows.append(_row(mask.spec(), mask.spec(), lattice, {}))
            add(figure_picture(mask_figure(picture, lattice, stride, title=mask.spec())))
    means = {
        name: sum(row.values[name] for row in rows) / len(rows)
        for name in ("active_fraction", "elements", "share_of_elements")
    }
    row = Row(rows[0].label, {**rows[0].values, **means, "frames": len(rows)})
    return MaskReport((row,), str(options.output), compared=False)


_SHOWN = Fraction(4)  # frames in a second of a clip that is drawn


def _existing(image: str) -> Path | None:
    """Return the path of an image, None for the generated scene.

    Raises:
        FileError: there is no such file.
    """
    refuse_stream(image)
    if image and not files.exists(split_page(image)[0]):
        refusal = files.absent(image, "image")
        raise FileError(
            refusal.what, next=f"{refusal.next} A network is named by -m: cadsurgery mask -m {image}."
        )
    return Path(image) if image else None


def _labels(
    path: Path | None,
    image: str,
    whole: Callable[[], Tensor],
    size: tuple[int, int] | None,
    picture: Tensor,
) -> Tensor | None:
    """Return labels (1, H, W) from the file or of the generated scene; None for an image without labels.

    Args:
        path: file of the labels.
        image: name of the image, empty for the generated scene.
        whole: reads the image without resizing it.
        size: what both are resized to.
        picture: the image.

    Raises:
        InvalidInput: labels and image differ in size.
    """
    height, width = picture.shape[1:]
    if path is None:
        return labelled_scene(height, width)[1].unsqueeze(0) if not image else None
    stored = tuple(read_labels(path).shape)
    own: tuple[int, ...] = (height, width)
    if image and size is not None:
        own = tuple(whole().shape[1:])
        if own != stored[::-1]:  # labels of any size are resized, unless they are turned
            own = stored
    if image or size is None:
        next = f"give labels of the image, or resize both: --size {height}x{width}."
        check_labels_fit(image or "the generated scene", own, stored, next)
    return read_labels(path, size).unsqueeze(0)


def _look_bare(
    picture: Tensor, *, output_stride: tuple[int, int] | None, patch: str, normalisation: object = None
) -> Seen:
    """Evaluate masks without a network: the image stands for the entering features, and MACs are not counted.

    Masks see the picture after the normalisation, in the unit of masks: as they do in a network that takes it so.
    """
    high, low = output_stride or (8, 32)
    geometry = Geometry(_halvings(high, low), patch=patch)  # type: ignore[arg-type]
    chosen = "imagenet" if normalisation is None else normalisation
    source = normalised_by(Source("", channels=len(picture)), chosen)
    batch = read_normalisation(chosen, len(picture)).in_unit(normalise(picture, source).unsqueeze(0))
    features = batch[:, :, ::high, ::high]
    grid = FineMapSpec.of(geometry, 1, (features.shape[2], features.shape[3]), high)

    def look(mask: MaskProvider) -> tuple[Lattice, dict[str, Any]]:
        if mask.looks_ahead:
            raise InvalidInput(
                f"mask {mask.spec()} uses outputs of a network.",
                where="cadsurgery mask",
                why="there is no network.",
                next="name one: --model NAME, or the file that cadsurgery convert wrote.",
            )
        return geometry.lattice(check_levels(mask(batch, features, grid), grid, mask.name)), {}

    return high, geometry.max_level, look, [_NO_NETWORK]


def _look_in(net: AdaptiveModel, model: str, is_compared: bool, picture: Tensor) -> Seen:
    """Evaluate masks in a network; if they are compared, with the quality of its prediction and its MACs."""
    source = pictures_for(net)
    batch = normalise(picture, source).unsqueeze(0)
    stride, max_level = net.plan.strides[0], net.geometry.max_level

    def look(mask: MaskProvider) -> tuple[Lattice, dict[str, Any]]:
        with torch.inference_mode():
            output = net(batch, mask=mask)
        lattice = net.lattice
        if not is_compared:
            return lattice, {}
        report = net.macs(batch, mask=lattice.pyramid.levels)  # exactly this map, whatever its mask
        macs = net.macs(batch, mask=mask).of_mask + report.mask
        cost: dict[str, int | None] = {"mask": macs, "high": report.high, "low": report.low}
        cost["given"] = report.given
        shares = {f"of_{name}": macs / whole if (whole := cost[name]) else None for name in ("given", "high")}
        figures = {} if dense is None else compare(output, dense, size)
        return lattice, {**{name: figures.get(name) for name in QUALITIES}, "macs": cost, **shares}

    if not is_compared:
        return stride, max_level, look, []
    with torch.inference_mode():
        dense = net(batch, mask="all")
    size = (picture.shape[1], picture.shape[2])
    notes = [_ONE_IMAGE.format(model=model)]
    refusal = _HOST if net.hosts_part else ""
    try:
        if not refusal:
            compare(dense, dense, size)
    except InvalidInput as error:
        refusal = f"{error.what} {error.why}"
    if refusal:
        dense, notes = None, [f"quality is not compared: {refusal}"]
    if source.weights == "random" and not is_file(model):
        notes.append(_RANDOM)
    return stride, max_level, look, notes


_ONE_IMAGE = (
    "one image: quality is relative to the same network with everything kept high, not to labels, and quality and cost "
    "vary from image to image; cadsurgery eval {model} --data images:FOLDER measures them on many."
)
_NO_NETWORK = (
    "elements are not yet the cost of a network, nor do they show what a mask loses: --model adds both."
)
_RANDOM = "the weights are random: these qualities say nothing about the trained network."
_HOST = "the network around the adaptive part returns no maps."


def _open(
    options: MaskOptions, pictures: Callable[[Source | None], Iterable[Tensor]], step: Step
) -> tuple[Callable[[Tensor], Seen], MaskProvider | None, Source | None]:
    """Return what evaluates masks on a picture, in a network that reads the pictures as the options say or without
    one, the mask of its file, and its source."""
    model, conversion = options.model, options.conversion
    if not model:
        stated = with_statistics(conversion, Source(""), lambda _: pictures(None))
        return partial(_look_bare, **stated), None, None
    step(f"building {model}")
    stored = is_file(model) and read_metadata(model).get("mask") is not None
    if is_file(model):
        conversion = {"normalisation": conversion.get("normalisation")}
    how: dict[str, Any] = {"weights": options.weights, "bands": options.bands, "trust": options.trust}
    net = open_converted(model, None if stored else "none", conversion, pictures=pictures, **how)
    return partial(_look_in, net, model, options.compare), net.mask if stored else None, pictures_for(net)


def _halvings(high: int, low: int) -> tuple[int, ...]:
    ratio = low // max(high, 1)
    if high < 1 or high * ratio != low or ratio < 2 or ratio & (ratio - 1):
        raise InvalidInput(f"output stride {high} to {low} is no sequence of halvings.", next="e.g. 8,32.")
    return (2,) * (ratio.bit_length() - 1)
