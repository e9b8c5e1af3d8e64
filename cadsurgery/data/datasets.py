"""Datasets of images, with or without labels, as pairs of tensors; every item is checked when it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cadsurgery.data.channels import as_channels
from cadsurgery.data.images import check_labels_fit, from_picture, read_image, read_picture_for
from cadsurgery.data.labels import as_classes
from cadsurgery.support.errors import FileError, InvalidInput, as_refusal, first_line

if TYPE_CHECKING:
    from cadsurgery.data.networks import Source

IGNORED = 255  # the label of a pixel that counts neither in losses nor in metrics


# A picture that is read when it is known for a network of which source, in how many channels and from which bands:
# (channels, H, W), float32 and not normalised.
UnreadPicture = Callable[["Source | None", int, tuple[int, ...]], Tensor]


def read_file(path: Path, source: Source | None, channels: int, bands: tuple[int, ...]) -> Tensor:
    """Read the picture of a file; see `UnreadPicture`."""
    if source is not None:
        return read_picture_for(source, path, bands=bands)
    return read_image(path, channels=channels, bands=bands)


@dataclass(frozen=True)
class SegmentationData(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels of one split; `data[i]` is `(image, labels)`.

    `image` is float32 (3, H, W) in 0..1, not normalised, or has as many channels as the network reads, see `read_for`;
    `labels` int64 (H, W) in 0..len(classes)-1, or 255 where ignored.

    Attributes:
        name: the spec that the data was opened with, e.g. `voc:PATH`.
        split: name of the split, e.g. `train`.
        classes: names of the classes in order of their labels; empty if the images have no labels (all pixels ignored).
        names: names of the items for messages; paths if they are files.
        read: function from a position to an image (a picture, a tensor as above or an `UnreadPicture`) and its labels
            (a picture or array (H, W) of stored values, or None).
        table: pairs of a stored label value and its class; any other stored value is out of range. None: the labels
            are classes, but their number is not known, see `with_outputs`.
        any_range: True if values of images outside 0..1 are meant.
        remedy: what to do about labels out of range, for messages; `{labels}` stands for them.
        bands: which bands of the pictures are read, counted from 1, in their order; default: those of the network, or
            all.
        source: source of the network that pictures are read for, whose channels they get; None: colour.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    read: Callable[[int], tuple[Any, Any]]
    table: tuple[tuple[int, int], ...] | None
    any_range: bool = False
    remedy: str = "store 255 for such pixels, which is ignored, or leave the image out."
    bands: tuple[int, ...] = ()
    source: Source | None = None

    def __post_init__(self) -> None:
        """Refuse a dataset without images."""
        if not self.names:
            raise FileError(
                f"data {self.name} has no images in split {self.split!r}.",
                next="choose another split, or check the folder.",
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """Return image and labels at a position.

        Raises:
            FileError: a file cannot be read.
            InvalidInput: image and labels differ in size, the labels are a colour picture, or one is out of range.
        """
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        name = self.names[position]
        with as_refusal(
            lambda error: FileError(
                f"{name} or its labels cannot be read.",
                why=first_line(error),
                next="replace the file or take both out.",
            )
        ):
            image, stored = self.read(position)
            image = self._in_channels(image, name)
            if stored is None:
                stored = torch.full(image.shape[1:], IGNORED)
            values = stored.numpy() if isinstance(stored, Tensor) else np.array(stored)
        return image, self._labels(values, image, name)

    @property
    def is_labelled(self) -> bool:
        """True if the images have labels."""
        return bool(self.classes) or self.table is None

    def read_for(self, source: Source | None) -> SegmentationData:
        """Return the data whose pictures have the channels that a network of this source reads, from its bands; or
        colour, for None."""
        return replace(self, source=source)

    def first(self, count: int | None) -> SegmentationData:
        """Return the first `count` items; None for all."""
        return self if count is None else replace(self, names=self.names[:count])

    def at(self, places: Sequence[int]) -> SegmentationData:
        """Return the items at these places, in this order."""
        names = tuple(self.names[place] for place in places)
        return replace(self, names=names, read=partial(_read_at, self.read, tuple(places)))

    def unlabelled(self) -> SegmentationData:
        """Return the images without their labels."""
        return replace(self, classes=(), read=partial(_read_image, self.read), table=identity_table(0))

    def with_outputs(self, count: int) -> SegmentationData:
        """Return the data with as many classes as a network has outputs, if their number is not known."""
        if self.table is not None:
            return self
        return replace(self, classes=number_classes(count), table=identity_table(count))

    def _in_channels(self, image: Any, name: str) -> Tensor:
        """Return an image as `read` gives it in the channels of the network, or in colour."""
        source = self.source
        channels, bands = (3, self.bands) if source is None else (source.channels, self.bands or source.bands)
        if isinstance(image, Image.Image):
            return from_picture(image, channels, bands, name=name)
        if isinstance(image, Tensor):
            return as_channels(image, None if source is None else channels, bands, name=name)
        unread: UnreadPicture = image
        return unread(source, channels, bands)

    def _labels(self, values: np.ndarray[Any, Any], image: Tensor, name: str) -> Tensor:
        if values.ndim != 2:
            raise InvalidInput(
                f"the labels of {name} are a colour picture, {values.shape[0]}x{values.shape[1]}x{values.shape[2]}.",
                next="store the number of the class of each pixel in a PNG of one channel.",
            )
        check_labels_fit(name, image.shape[1:], values.shape)
        if values.dtype.kind != "u":  # torch has few of the unsigned types
            values = as_classes(torch.from_numpy(values), name).numpy()
        if self.table is None:
            return torch.from_numpy(values.astype(np.int64))
        class_of = dict(self.table)
        stored = np.unique(values)
        if strange := [int(value) for value in stored if int(value) not in class_of]:
            raise InvalidInput(
                f"{name} has label {', '.join(map(str, strange[:5]))}.",
                why=f"data {self.name} has {len(self.classes)} classes, labels {self._stored_in_words()}.",
                next=self.remedy.replace("{labels}", "/".join(map(str, strange[:5]))),
            )
        places = np.array([class_of[int(value)] for value in stored], dtype=np.int64)
        return torch.from_numpy(places[np.searchsorted(stored, values)])

    def _stored_in_words(self) -> str:
        """Return the stored values of the classes: a range, or all of them."""
        stored = [value for value, place in self.table or () if place != IGNORED]
        is_range = stored == [*range(len(stored))]
        return f"0..{len(stored) - 1}" if is_range else ", ".join(map(str, stored))


# Functions of the module, because data are sent to the processes of a loader.
def _read_at(read: Callable[[int], Any], places: Sequence[int], position: int) -> Any:
    return read(places[position])


def _read_image(read: Callable[[int], tuple[Any, Any]], position: int) -> tuple[Any, None]:
    return read(position)[0], None


def identity_table(classes: int, ignore: Iterable[int] = ()) -> tuple[tuple[int, int], ...]:
    """Return the label table in which each stored value is its class; 255 and the values of `ignore` are ignored."""
    return label_table(range(classes), (IGNORED, *ignore))


def label_table(values: Sequence[int], ignored: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return the label table of classes that are stored as these values, in the order of the classes.

    Values that are ignored, too, are ignored.
    """
    classes = {value: place for place, value in enumerate(values)}
    return tuple((classes | dict.fromkeys(ignored, IGNORED)).items())


def number_classes(count: int) -> tuple[str, ...]:
    """Return names for so many classes, which have none."""
    return tuple(f"class {index}" for index in range(count))
