"""Read the images that 8 bits are calibrated by, in any form that users have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cadsurgery.data import SegmentationData, open_pictures
from cadsurgery.data.images import normalise
from cadsurgery.data.networks import Source
from cadsurgery.data.samples import MOST, pictures_of
from cadsurgery.following.arguments import image_of
from cadsurgery.masks.unit import Normalisation
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput

_FORMS = (
    "give about 8 to 100 images as the network takes them: a batch (B, C, H, W), a list of batches or of images "
    "(C, H, W), or a DataLoader, also of pairs (images, labels); or a folder of photos or a clip. For a network that "
    "takes a dictionary, a list of such dictionaries."
)
# Values of a picture, undone from its normalisation, beyond which it is none in 0..1; noise is to pass.
_LEAST, _MOST = -3.0, 4.0


def images_to_calibrate(net: AdaptiveModel, images: Any) -> list[Any]:
    """Return image batches for a network from what a user gives, or dictionaries; see `read_calibration`."""
    return read_calibration(
        images,
        pictures_for(net),
        None if net.hosts_part else net.normalisation,
    )


def read_calibration(images: Any, source: Source, expected: Normalisation | None) -> list[Any]:
    """Return image batches (B, C, H, W) to calibrate by, or dictionaries that hold one.

    Args:
        images: a batch, or batches or images (C, H, W), alone or in pairs with labels, as the network takes them; or a
            folder of photos, a clip or data of `open_data`, which are prepared; or dictionaries as the network takes
            them. Of folders, data and loaders 100 images are taken, evenly spread, or the first of a loader.
        source: source of the network, for which pictures are read and normalised.
        expected: normalisation of the network's input, if it is known.

    Raises:
        InvalidInput: there are no images, another form, or values that the normalisation cannot give.
        FileError: an image of the folder cannot be read.
    """
    if isinstance(images, (str, Path)):
        images = open_pictures(images)
    if isinstance(images, SegmentationData):
        return [normalise(image, source)[None] for image in pictures_of(images)(source)]
    if not isinstance(images, Iterable):
        raise _no_images(describe(images))
    batches = list(_batches([images] if isinstance(images, (Tensor, dict)) else images))
    if not batches:
        raise _no_images("empty")
    if expected is not None:
        _check_range(batch_of(batches[0]), expected)
    return batches


def batch_of(call: Any) -> Tensor:
    """Return the image batch of what a network is called with to calibrate: the batch itself, or a dictionary."""
    batch: Tensor = image_of({"call": call})
    return batch


def _batches(items: Iterable[Any]) -> Iterator[Any]:
    count, is_list = 0, isinstance(items, Sequence)
    for item in items:
        if isinstance(item, dict) and getattr(batch_of(item), "ndim", 0) == 4:
            yield item
            continue
        image = item[0] if isinstance(item, (tuple, list)) and item else item
        if not isinstance(image, Tensor) or image.dim() not in (3, 4) or not image.is_floating_point():
            raise _no_images(f"{type(items).__name__} of {describe(image)}")
        batch = image if image.dim() == 4 else image.unsqueeze(0)
        yield batch
        count += len(batch)
        if count >= MOST and not is_list:
            return


def _no_images(given: str) -> InvalidInput:
    return InvalidInput(f"there are no images to calibrate by: what is given is {given}.", next=_FORMS)


def _check_range(batch: Tensor, expected: Normalisation) -> None:
    """Refuse images that the normalisation cannot give.

    Raises:
        InvalidInput: they look like 0..255, or like 0..1 where the network expects negative values too.
    """
    if not expected.mean or not batch.is_floating_point() or not batch.numel():
        return
    low, high = (float(value) for value in batch.detach().float().aminmax())
    mean, std = (sum(values) / len(values) for values in (expected.mean, expected.std))
    is_far = high * std + mean > _MOST or low * std + mean < _LEAST
    is_plain = low >= 0 and high <= 1 and mean / std > 1  # black would be below -1
    if is_far or is_plain:
        looks = "0..1, not normalised" if is_plain else "0..255" if low >= 0 else "another scale"
        raise InvalidInput(
            f"the images to calibrate by have values from {low:.3g} to {high:.3g}.",
            why=f"they look like {looks}; the network takes {expected}.",
            next="normalise pictures in 0..1: cadsurgery.images.normalise(image, net.source), or give their folder. If "
            'the network is meant for such values, say so: net.normalisation = "raw".',
        )
