"""Pictures of masks: one with its map and lattice, or several side by side with their cost."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor

from cadsurgery.data.images import check_picture, labelled_scene, normalise, read_labels, write_picture
from cadsurgery.elements.lattice import Geometry, Lattice
from cadsurgery.masks import FineMapSpec, MaskProvider, labelled, resolve_mask
from cadsurgery.masks.provider import check_levels
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.network.storage import load, read_metadata
from cadsurgery.support.errors import InvalidInput
from cadsurgery.tasks.figures import comparison_figure, mask_figure
from cadsurgery.tasks.for_each import Step
from cadsurgery.tasks.open import example_image, is_file, open_converted
from cadsurgery.tasks.report import Column, Report, Row, figure_picture, plain, table

COMPARED = (
    "edges",
    "edges:threshold=0.95/0.1,dilation=5/15",
    "gradient:threshold=0.5,dilation=7,sigma=1",
    "saliency",
    "edges | budget:fraction=0.3",
)
COMPARED_WITH_LABELS = ("trimap:width=9/25",)
# MACs with the mask, with everything high, with everything low, and of the network as given (None if unknown).
Macs = tuple[int, int, int, int | None]
# Returns the lattice of a mask, and the MACs if they are counted.
Look = Callable[[MaskProvider], tuple[Lattice, Macs | None]]


def _row(asked: str, mask: str, lattice: Lattice, macs: Macs | None) -> Row:
    """Create the row of one mask on one image, labelled as the user wrote the mask.

    It has the elements after the last stage and the fine pixels, which are the elements with everything high; in a
    network also the MACs with this mask, with everything high and low, and of the network as given.
    """
    fine = lattice.size[0] * lattice.size[1]
    values = {"mask": mask, "active_fraction": lattice.active_fraction, "elements": lattice.count}
    values |= {"fine_pixels": fine, "share_of_elements": lattice.count / fine}
    if macs is not None:
        values["macs"] = dict(zip(("mask", "high", "low", "given"), macs, strict=True))
        values["of_given"] = macs[0] / macs[3] if macs[3] else None
        values["of_high"] = macs[0] / macs[1] if macs[1] else None
    return Row(asked, values)


def _title(row: Row, width: int = 52) -> str:
    """Return a short title: the mask, its active fraction and its cost."""
    cost = "" if row.get("of_given") is None else f", {row.of_given:.2f} of the work as given"
    name = textwrap.fill(row.label, width, break_on_hyphens=False)
    return f"{name}\nactive {row.active_fraction:.2f}, elements {row.share_of_elements:.2f}{cost}"


@dataclass(frozen=True)
class MaskReport(Report):
    """The report of `cadsurgery mask`: a row for each mask, and the picture."""

    rows: tuple[Row, ...]
    file: str
    compared: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `--json`: for one mask its row, for several a list."""
        rows = [plain(row.values) for row in self.rows]
        return {"masks": rows, "file": self.file} if self.compared else {**rows[0], "file": self.file}

    def parts(self) -> Iterator[RenderableType]:
        """Yield one mask as a line, several as a table."""
        row = self.rows[0]
        if not self.compared:
            elements = f"{row.elements} elements for {row.fine_pixels} fine pixels"
            yield Text(f"active fraction {row.active_fraction:.3f}, {elements}; wrote {self.file}")
            return
        columns: list[Column[Row]] = [
            Column("mask", lambda row: Text(row.label), False),
            Column("active fraction", "active_fraction", form=".3f"),
            Column("elements", "elements"),
            Column("of all high", "share_of_elements", form=".2f"),
        ]
        if row.get("macs"):
            columns.append(Column("MACs", lambda row: f"{row.macs['mask']:.3e}"))
            columns.append(Column("of given", "of_given", form=".2f"))
            columns.append(Column("of all high", "of_high", form=".2f"))
        yield table(self.rows, columns, f"masks on {row.fine_pixels} fine pixels")
        yield Text(f"wrote {self.file}", style="bold green")


def draw_masks(
    masks: Sequence[str],
    *,
    compare: bool,
    image: Path | None,
    labels: Path | None,
    size: tuple[int, int] | None,
    model: str,
    options: Mapping[str, Any],
    output: Path,
    step: Step,
    trust: bool = False,
) -> MaskReport:
    """Draw masks on an image, for a network or for given strides; see `cadsurgery mask --help`.

    Raises:
        InvalidInput: several masks without `compare`, or labels of another size than the image.
    """
    if len(masks) > 1 and not compare:
        raise InvalidInput(
            f"{len(masks)} masks for one picture.", next="add --compare to draw them side by side."
        )
    check_picture(output)
    step("drawing")
    picture = example_image(image, size)
    known = _labels(labels, image, size, picture)
    asked = [(text, resolve_mask(text)) for text in masks]
    stored_mask = None
    if model:
        net, stored_mask = _open(model, options, trust)
        stride, look = _look_in(net, picture, count=compare)
    else:
        stride, look = _look_bare(picture, **options)
    if not asked:
        examples = (*COMPARED, *(COMPARED_WITH_LABELS if known is not None else ())) if compare else ()
        asked = [(text, resolve_mask(text)) for text in examples]
        if stored_mask is not None or not compare:
            first = stored_mask or resolve_mask("edges")
            asked = [(first.spec(), first), *(entry for entry in asked if entry[1].spec() != first.spec())]
    rows, lattices = [], []
    with labelled(known) if known is not None else nullcontext():
        for text, mask in asked:
            # The mask of a file comes with its learned weights.
            provider = stored_mask if stored_mask is not None and stored_mask.spec() == mask.spec() else mask
            lattice, macs = look(provider)
            rows.append(_row(text, provider.spec(), lattice, macs))
            lattices.append(lattice)
    if compare:
        figure = comparison_figure(picture, lattices, [_title(row) for row in rows], stride, model)
    else:
        figure = mask_figure(picture, lattices[0], stride, title=rows[0].mask)
    write_picture(figure_picture(figure), output)
    return MaskReport(tuple(rows), str(output), compare)


def _labels(
    path: Path | None, image: Path | None, size: tuple[int, int] | None, picture: Tensor
) -> Tensor | None:
    """Return labels (1, H, W) from the file or of the generated scene; None for an image without labels."""
    height, width = picture.shape[1:]
    if path is None:
        return labelled_scene(height, width)[1].unsqueeze(0) if image is None else None
    labels = read_labels(path, size)
    if tuple(labels.shape) != (height, width):
        raise InvalidInput(
            f"the labels in {path} are {labels.shape[0]}x{labels.shape[1]}, the image is {height}x{width}.",
            next=f"give labels of the image, or resize both: --size {height}x{width}.",
        )
    return labels.unsqueeze(0)


def _look_bare(picture: Tensor, output_stride: tuple[int, int] | None, patch: str) -> tuple[int, Look]:
    """Evaluate masks without a network: the image stands for the entering features, and MACs are not counted."""
    high, low = output_stride or (8, 32)
    geometry = Geometry(_halvings(high, low), patch=patch)  # type: ignore[arg-type]
    batch = normalise(picture, None).unsqueeze(0)
    features = batch[:, :, ::high, ::high]
    grid = FineMapSpec.of(geometry, 1, (features.shape[2], features.shape[3]), high)

    def look(mask: MaskProvider) -> tuple[Lattice, None]:
        if mask.looks_ahead:
            raise InvalidInput(
                f"mask {mask.spec()} uses outputs of a network.",
                where="cadsurgery mask",
                why="there is no network.",
                next="name one: --model NAME, or the file that cadsurgery convert wrote.",
            )
        return geometry.lattice(check_levels(mask(batch, features, grid), grid, mask.name)), None

    return high, look


def _look_in(net: AdaptiveModel, picture: Tensor, count: bool) -> tuple[int, Look]:
    """Evaluate masks in a network; MACs are counted with the mask, as given, and with everything high and low."""
    batch = normalise(picture, pictures_for(net)).unsqueeze(0)

    def look(mask: MaskProvider) -> tuple[Lattice, Macs | None]:
        with torch.inference_mode():
            net(batch, mask=mask)
        lattice = net.lattice
        if not count:
            return lattice, None
        report = net.macs(batch, mask=lattice.pyramid.levels)  # exactly this map, whatever its mask
        of_mask = net.macs(batch, mask=mask).of_mask
        return lattice, (of_mask + report.mask, report.high, report.low, report.given)

    return net.plan.strides[0], look


def _open(model: str, options: Mapping[str, Any], trust: bool) -> tuple[AdaptiveModel, MaskProvider | None]:
    """Return a network, and the mask of its file."""
    if not is_file(model):
        return open_converted(model, "none", options), None
    stored = read_metadata(model).get("mask") is not None
    net = load(model, mask=None if stored else "none", trust=trust)
    return net, net.mask if stored else None


def _halvings(high: int, low: int) -> tuple[int, ...]:
    ratio = low // max(high, 1)
    if high < 1 or high * ratio != low or ratio < 2 or ratio & (ratio - 1):
        raise InvalidInput(f"output stride {high} to {low} is no sequence of halvings.", next="e.g. 8,32.")
    return (2,) * (ratio.bit_length() - 1)
