"""Cropping and padding at the lower and right border of a map, which leave all anchors in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cadsurgery.elements.backends.works import select_rows
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.operations import operation
from cadsurgery.elements.sizes import is_at_most, is_statically_true, least, most
from cadsurgery.support.errors import InvalidInput


@operation(reads="element")
def crop(x: Elements, starts: Sequence[int | None], stops: Sequence[int | None], spacing: int) -> Elements:
    """Crop a map to its first rows and columns, like `x[:, :, :height, :width]`.

    Args:
        x: elements.
        starts: starts of the two slices (vertical, horizontal), in samples of the network's own grid: 0 or None.
        stops: stops of the two slices, with the meaning they have in Python.
        spacing: fine pixels between these samples.

    Raises:
        InvalidInput: the crop does not start at 0, or its result is empty.
    """
    counts = x.lattice.samples(spacing)
    for start, count in zip(starts, counts, strict=True):
        if slice(start, None).indices(count)[0]:
            raise _shifts(f"a crop from sample {start} on")
    remaining = [
        count
        if stop is None
        else most(count + stop, 0)
        if is_statically_true(stop < 0)
        else least(count, stop)
        for count, stop in zip(counts, stops, strict=True)
    ]
    return _with_border(x, remaining, spacing, 0.0)


@operation(reads="element")
def pad(x: Elements, pads: Sequence[int], spacing: int, value: float | None = 0.0) -> Elements:
    """Pad a map below and to the right; negative padding crops.

    Args:
        x: elements.
        pads: (left, right, top, bottom) in samples of the network's own grid, as torch.nn.functional.pad takes them;
            left and top are 0.
        spacing: fine pixels between these samples.
        value: value of the padding. None repeats the last sample of each row and column; finer cells form several
            interleaved grids, and each grid repeats its own last sample.

    Raises:
        InvalidInput: there is padding on the left or top, or the result is empty or larger than the network's maps.
    """
    # In a file for any size the amounts are symbols; to ask for their values would fix those of the example.
    left, right, top, bottom = (
        amount if isinstance(amount, torch.SymInt) else int(amount) for amount in pads
    )
    if is_statically_true(left != 0) or is_statically_true(top != 0):
        raise _shifts(f"padding by {left} on the left and {top} at the top")
    height, width = x.lattice.samples(spacing)
    return _with_border(x, (height + bottom, width + right), spacing, value)


@operation(reads="element")
def check_same_padding(x: Elements, pads: Sequence[int], reader: Window, spacing: int) -> Elements:
    """Return the elements unchanged after checking that padding computed by the network is "same" padding: the next
    window pads by the same amount itself, so that n samples give ceil(n / stride) outputs.

    Args:
        x: elements.
        pads: (left, right, top, bottom) in samples of the network's own grid.
        reader: window of the operation that reads the padded map; not this operation's own, which reads elements.
        spacing: fine pixels between these samples.

    Raises:
        InvalidInput: the padding is not "same" padding.
    """
    top, bottom, left, right = reader._replace(spacing=spacing).fit(x.lattice.size).padding
    if tuple(pads) != (left, right, top, bottom):
        raise InvalidInput(
            f"the network pads by {tuple(pads)} here, where {(left, right, top, bottom)} keep its map in place.",
            why="for the image it was converted on it was what a stride asks for.",
            next="pad or resize the image to a multiple of the lowest output stride.",
        )
    return x


def _with_border(x: Elements, counts: Sequence[int], spacing: int, value: float | None) -> Elements:
    """Crop or pad a map at its border to `counts` samples of the network's own grid. New elements get `value` or, if
    it is None, a copy of the last sample."""
    lattice = x.lattice
    fine = lattice.holding(counts, spacing)
    beyond = any(
        is_statically_true(length > room) for length, room in zip(fine, lattice.most_size, strict=True)
    )
    if beyond or any(is_statically_true(count < 1) for count in counts):
        raise InvalidInput(
            f"a map of {counts[0]}x{counts[1]} samples is {'larger than its image' if beyond else 'empty'}.",
            why=f"it was {'x'.join(map(str, x.lattice.samples(spacing)))} before it was cropped or padded.",
            next="pad or resize the image to a multiple of the lowest output stride.",
        )
    if all(is_statically_true(one == two) for one, two in zip(counts, lattice.samples(spacing), strict=True)):
        return x
    target = lattice.resample(lattice.stage, fine)
    if all(is_at_most(length, before) for length, before in zip(fine, lattice.size, strict=True)):
        return Elements(select_rows(x.rows, lattice, target), target)
    return onto_border(x, target, spacing, value)


def onto_border(x: Elements, target: Lattice, spacing: int, value: float | None) -> Elements:
    """Return a map on a lattice of the same level map that begins where its own does and ends elsewhere.

    Args:
        x: elements.
        target: the lattice.
        spacing: fine pixels between the samples of the network's own grid.
        value: of the elements beyond the map; None for a copy of its last sample.
    """
    lattice = x.lattice
    key = ("border", target.key, spacing)

    def build() -> tuple[torch.Tensor, torch.Tensor]:
        image, y, column = target.coordinates
        height, width = lattice.size
        inside = (y < height) & (column < width)
        # A position beyond the border moves back by whole samples to the last sample inside.
        y = y - (y - height + spacing).clamp(min=0) // spacing * spacing
        column = column - (column - width + spacing).clamp(min=0) // spacing * spacing
        return lattice.index[lattice.pixels(image, y, column)].long(), inside

    places, inside = lattice.derive(key, build)
    rows = x.rows.index_select(0, places.to(x.rows.device))
    if value is None:
        return Elements(rows, target)
    shown = inside.to(x.rows.device).view(-1, *(1,) * (rows.dim() - 1))
    return Elements(
        torch.where(shown, rows, torch.as_tensor(value, dtype=rows.dtype, device=rows.device)), target
    )


def _shifts(what: str) -> InvalidInput:
    return InvalidInput(
        f"{what} moves the map against its lattice.",
        why="elements lie on one grid throughout; when the network was converted nothing was moved here.",
        next="pad or resize the image to a multiple of the lowest output stride.",
    )
