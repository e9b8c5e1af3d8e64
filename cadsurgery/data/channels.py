"""Channels of pictures: which bands of a file, in which order, become as many channels as a network reads.

`as_channels` is the one place that decides it:

- bands that are named, counted from 1, in their order; else all bands of the picture;
- as many bands as channels are taken as they are;
- transparency is left out if the picture says that it has one;
- colour becomes grey by the luma of ITU-R BT.601, with the weights of torchvision's `rgb_to_grayscale`;
- grey is repeated into red, green and blue;
- anything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cadsurgery.support.errors import InvalidInput

LUMA = (0.2989, 0.587, 0.114)
_COLOUR = len(LUMA)


def as_channels(
    image: Tensor,
    channels: int | None,
    bands: Sequence[int] = (),
    *,
    name: object = "an image",
    has_alpha: bool = False,
) -> Tensor:
    """Return a picture (..., C, H, W) with so many channels, by the rules above.

    Args:
        image: the picture, before mean and deviation.
        channels: number of channels; None to keep all bands but transparency.
        bands: numbers of the bands to take, counted from 1, in their order; empty for all.
        name: name of the picture, for messages.
        has_alpha: True if the last band is transparency.

    Raises:
        InvalidInput: there is no such band, or no rule leads from the bands to the channels.
    """
    stored = image.shape[-3]
    if bands:
        if wrong := [band for band in bands if not 1 <= band <= stored]:
            raise InvalidInput(
                f"{name} has no band {wrong[0]}: it has {_count(stored, 'band')}.",
                next=f"choose among 1 to {stored}: --bands {_example(stored, channels)} (in Python, bands=).",
            )
        image, has_alpha = image[..., [band - 1 for band in bands], :, :], False
    if has_alpha and image.shape[-3] != channels:
        image = image[..., :-1, :, :]
    count = image.shape[-3]
    if channels is None or count == channels:
        return image
    if (count, channels) == (_COLOUR, 1):
        weights = torch.tensor(LUMA, dtype=image.dtype, device=image.device)
        return (image * weights[:, None, None]).sum(-3, keepdim=True)
    if (count, channels) == (1, _COLOUR):
        return image.repeat_interleave(_COLOUR, -3)
    chosen = f"{len(bands)} bands are chosen of {name}" if bands else f"{name} has {_count(stored, 'band')}"
    raise InvalidInput(
        f"{chosen}, and the network reads {_count(channels, 'channel')}.",
        why="colour becomes grey, and grey becomes colour; there is no rule for other numbers.",
        next=f"say which bands it reads, in their order: --bands {_example(stored, channels)} (in Python, bands=)."
        if stored >= channels
        else f"give pictures of {_count(channels, 'band')}.",
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _example(stored: int, channels: int | None) -> str:
    """Return as many bands as a network reads, as they are typed."""
    return ",".join(map(str, range(1, min(stored, channels or stored) + 1)))


def check_bands(bands: object) -> tuple[int, ...]:
    """Return numbers of bands as a tuple.

    Raises:
        InvalidInput: these are no whole numbers from 1 on.
    """
    listed = tuple(bands) if isinstance(bands, Sequence) and not isinstance(bands, str) else (bands,)
    if not all(isinstance(band, int) and not isinstance(band, bool) and band >= 1 for band in listed):
        raise InvalidInput(
            f"bands {bands!r} are no numbers of bands.",
            next="count from 1 and name the order, e.g. (3, 2, 1).",
        )
    return listed


def per_channel(values: Sequence[float], channels: int) -> list[float]:
    """Return one value per channel: the values, or their mean if the number differs, e.g. for a grey network."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


def statistics_of(images: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel over all pixels of pictures (C, H, W), for `normalisation`.

    A channel that is constant has a deviation of 1.

    Raises:
        InvalidInput: there are no pictures, or they differ in their number of channels.
    """
    sums: Tensor | None = None
    for image in images:
        values = image.double().flatten(1)
        number = torch.full_like(values[:, 0], values.shape[1])
        added = torch.stack([number, values.sum(1), values.square().sum(1)])
        if sums is not None and sums.shape != added.shape:
            raise InvalidInput(
                f"pictures have {sums.shape[1]} and {added.shape[1]} channels.",
                next="choose the same bands of each.",
            )
        sums = added if sums is None else sums + added
    if sums is None:
        raise InvalidInput("there are no pictures to take mean and deviation of.", next="give some.")
    mean = sums[1] / sums[0]
    variance = (sums[2] / sums[0] - mean.square()).clamp(min=0).tolist()
    tiny = 1e-12
    deviations = (math.sqrt(value) if value > tiny else 1.0 for value in variance)
    return tuple(mean.tolist()), tuple(deviations)
