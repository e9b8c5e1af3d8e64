"""Layouts: the meaning of each axis of a dense tensor, so that its operations can be carried out on rows.

A layout is a string with one letter per axis: `b` is the batch, `h` the height, `w` the width, `p` the height and
width flattened into one axis, and `c` a channel axis. `bchw` is the feature map of a convolution, `bhwc` a
channels-last map, `bcchw` a map whose channels are split into groups, and `bpc` a sequence of tokens. On a lattice
the same value has rows of shape (N, *channel axes), with the channel axes in the order of the layout. The row number
replaces the batch and image axes, so a permutation that moves only image axes costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NCHW = "bchw"
_IMAGE = "hwp"
_MANY_VALUES = 1 << 16  # from so many on, a copy in blocks saves more than its calls take


def row_dim(layout: str, dim: int) -> int | None:
    """Return the dimension of the rows that corresponds to a channel axis; None for any other axis."""
    dim = dim % len(layout)
    return 1 + layout[:dim].count("c") if layout[dim] == "c" else None


def image_dims(layout: str) -> tuple[int, ...]:
    """Return the image axes (height, width or both flattened)."""
    return tuple(dim for dim, axis in enumerate(layout) if axis in _IMAGE)


def channel_dims(layout: str) -> tuple[int, ...]:
    """Return the channel axes."""
    return tuple(dim for dim, axis in enumerate(layout) if axis == "c")


def channel_sizes(layout: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of the channel axes, in order: the shape of a row."""
    return tuple(size for axis, size in zip(layout, shape, strict=True) if axis == "c")


def permute_axes(layout: str, dims: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Return the layout after a permutation of all axes, and the corresponding permutation of the rows."""
    dims = [dim % len(layout) for dim in dims]
    rows = [row for dim in dims if (row := row_dim(layout, dim)) is not None]
    return "".join(layout[dim] for dim in dims), (0, *rows)


def regroup_axes(
    layout: str, shape: Sequence[int], new: Sequence[int], image: tuple[int, int]
) -> tuple[str | None, str]:
    """Return the layout after a reshape from `shape` to `new`, or None and the reason why there is no such layout.

    Axes are grouped from the left until both sides have the same number of values. A group may regroup channels,
    flatten height and width, or unflatten them, but it may not mix channels with image axes.

    Args:
        layout: layout before the reshape.
        shape: shape before the reshape, on an example.
        new: shape after the reshape.
        image: height and width of the map on the example.
    """
    result, i, j = "", 0, 0
    while i < len(shape) or j < len(new):
        if j < len(new) and new[j] == 1 and (i == len(shape) or shape[i] != 1):
            result, j = result + "c", j + 1
            continue
        if i < len(shape) and shape[i] == 1 and layout[i] == "c" and (j == len(new) or new[j] != 1):
            i += 1
            continue
        if i == len(shape) or j == len(new):
            return None, "the number of values differs"
        start, first, before, after = i, j, shape[i], new[j]
        i, j = i + 1, j + 1
        while before != after:
            if before < after and i < len(shape):
                before, i = before * shape[i], i + 1
            elif before > after and j < len(new):
                after, j = after * new[j], j + 1
            else:
                return None, "the number of values differs"
        axes, sizes = layout[start:i], tuple(new[first:j])
        if set(axes) == {"c"}:
            result += "c" * len(sizes)
        elif len(axes) == 1 and len(sizes) == 1:
            result += axes
        elif axes == "hw" and len(sizes) == 1:
            result += "p"
        elif axes == "p" and sizes == image:
            result += "hw"
        else:
            return None, f"it reshapes {_words(axes)} together, which only a dense map has"
    return result, ""


def is_flat(shape: Sequence[int], layout: str) -> bool:
    """Return True if a tensor of `shape`, broadcast against a map of `layout`, has image axes of size 1 only."""
    if len(shape) > len(layout):
        return False
    return all(size == 1 for size, axis in zip(shape[::-1], layout[::-1], strict=False) if axis in _IMAGE)


_WORDS = {"b": "batch", "c": "channels", "h": "height", "w": "width", "p": "positions"}


def axis_word(axis: str) -> str:
    """Return the name of an axis for messages, e.g. "the height"."""
    return f"the {_WORDS[axis]}"


def _words(axes: str) -> str:
    return " and ".join(_WORDS[axis] for axis in dict.fromkeys(axes))


def shuffle_channels(rows: Tensor, groups: int) -> Tensor:
    """Apply `torch.channel_shuffle` to rows (N, C)."""
    return rows.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1)


def roll_channels(rows: Tensor, shifts: int | Sequence[int], dims: int | Sequence[int]) -> Tensor:
    """Apply `torch.roll` to the channel axes of rows (N, *channels).

    Slices are joined, because `torch.roll` tests whether the tensor is empty, and torch.export cannot know that of
    rows: their number depends on the mask.
    """
    shifts, dims = ((value,) if isinstance(value, int) else value for value in (shifts, dims))
    for shift, dim in zip(shifts, dims, strict=True):
        if by := shift % rows.shape[dim]:
            rest = rows.shape[dim] - by
            rows = torch.cat((rows.narrow(dim, rest, by), rows.narrow(dim, 0, rest)), dim)
    return rows


def normalise_neighbours(rows: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Apply `F.local_response_norm`, which is over neighbouring channels, to rows (N, C).

    Written out, because that function tests whether the tensor is empty; see `roll_channels`.
    """
    squares = F.pad(rows.square()[:, None, :, None], (0, 0, size // 2, (size - 1) // 2))
    mean = F.avg_pool2d(squares, (size, 1), stride=1)[:, 0, :, 0]
    return rows / (mean * alpha + k) ** beta


def fast_layout(image: Tensor) -> Tensor:
    """Return a dense map in the memory layout in which torch reads it faster: on a GPU, channels_last takes three
    times as long to resize where the number of channels is no multiple of eight."""
    return image.contiguous() if image.device.type == "cuda" and image.shape[1] % 8 else image


def in_order(image: Tensor) -> Tensor:
    """Return a dense map (B, C, H, W) in contiguous memory.

    torch copies a channels_last map value by value; as a matrix of positions and channels it copies blocks, which takes
    a third of the time from 16 channels on.
    """
    is_turned = image.dim() == 4 and image.is_contiguous(memory_format=torch.channels_last)
    is_large = image.numel() >= _MANY_VALUES and image.dim() == 4 and image.shape[1] >= 16
    if not (is_turned and is_large) or image.device.type != "cpu" or image.requires_grad:
        return image.contiguous()
    out = image.new_empty(image.shape)
    for channels, source in zip(out, image, strict=True):
        channels.flatten(1).copy_(source.flatten(1))
    return out


# -- maps as rows of all positions -----------------------------------------------------------------------


def by_position(value: Tensor, channels_last: bool = False) -> Tensor:
    """View a map (B, C, H, W), or (B, H, W, C) if it is channels-last, as (B, H, W, C)."""
    return value if channels_last else value.permute(0, 2, 3, 1)


def as_rows(value: Tensor, channels_last: bool = False) -> Tensor:
    """Convert a map to rows (B*H*W, C); a view if the memory layout allows."""
    return by_position(value, channels_last).flatten(0, 2)


def as_map(rows: Tensor, batch: int, size: tuple[int, int], channels_last: bool = False) -> Tensor:
    """Convert the rows of all positions to a map."""
    value = rows.reshape(batch, *size, rows.shape[1])
    return value if channels_last else value.permute(0, 3, 1, 2)


def as_column(rows: Tensor, channels_last: bool = False) -> Tensor:
    """View rows (N, C) as a map of one column, for operations that act on each position alone."""
    return as_map(rows, 1, (rows.shape[0], 1), channels_last)
