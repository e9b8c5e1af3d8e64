"""Read data of any kind by one protocol, `Samples`; each sample is checked as it is read, and errors name it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from cadsurgery.data.datasets import IGNORED, SegmentationData, identity_table
from cadsurgery.data.images import check_labels_fit
from cadsurgery.data.labels import as_classes
from cadsurgery.data.networks import Source
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import CadError, FileError, InvalidInput, as_refusal, describe_error

FORM = "give (image (C, H, W) float in 0..1, labels (H, W)), only the image, or (a tuple of tensors, labels)."
# Filters that sharpen or resize go a little beyond 0..1.
_LEAST, _MOST = -0.25, 1.25
_BYTE = 255.0
# Largest value of pictures after mean and deviation; and the least of what can be 0..255.
_NORMALISED, _OF_BYTES = 10.0, 16.0


class Samples(Protocol):
    """Data of your own, for training, validation, evaluation and `recommend`: a length and items.

    An item is (image, labels): float32 (C, H, W) in 0..1, which is augmented and normalised, and int64 (H, W), 255
    where ignored. C is the number of channels that the network reads; colour becomes grey, and grey becomes colour.
    In training it may be (inputs, labels) with a tuple of tensors, which are passed to the network unchanged. Without
    labels, an item is an image, or a pair whose labels are unused.

    Attributes of the object, none of which is needed:
        is_labelled: False if the labels of the pairs are unused.
        classes: names of the classes in the order of their labels; default: one for each output of the network.
        name: name of the data, for reports; default: the name of the type.
        names: a name for each item, for messages and reports, e.g. its path.
        any_range: True if values of images outside 0..1 are meant.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def check_data(data: object, what: str) -> None:
    """Refuse data without length, items or samples; `what` describes the data.

    Raises:
        InvalidInput: see above.
    """
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, (str, dict)):
        raise InvalidInput(
            f"the {what} data is {describe(data)}.",
            why="data of your own has a length and items (image, labels): len(data) and data[0].",
            next="of a DataLoader give its data set, loader.dataset; of anything else a list of its items.",
        )
    if len(data) == 0:
        raise InvalidInput(
            f"the {what} data is empty.", next="check the path, the split and the endings of the files."
        )


def is_labelled(data: Any) -> bool:
    """True if a dataset has labels: by its attribute `is_labelled`, else if its first sample is not just an image."""
    stated = getattr(data, "is_labelled", None)
    return bool(stated) if stated is not None else not isinstance(_item_of(data, 0), Tensor)


def sample_of(data: Any, index: int) -> tuple[Any, Any]:
    """Return inputs and labels (H, W) int64 of a sample; for an image (C, H, W) without labels all pixels are ignored.

    Raises:
        FileError: the data set raises an error of its own.
        InvalidInput: the sample has another form, its labels another size than its image or values that are
            no whole numbers, or its image values that are not finite or, unless they are meant, cannot be in 0..1.
    """
    inputs, labels = _pair_of(data, index)
    if isinstance(inputs, Tensor) and getattr(data, "is_labelled", None) is False:
        labels = _ignored(inputs)
    place = place_of(data, index)
    check_form(inputs, labels, place)
    labels = as_classes(labels, place)
    _check_finite(inputs, place)
    _check_range(data, inputs, place)
    return inputs, labels


def check_form(inputs: Any, labels: Any, place: str) -> None:
    """Refuse a sample that is neither an image with labels of its size nor a tuple of tensors with labels.

    Raises:
        InvalidInput: see above; the message names the sample by `place`.
    """
    is_image = isinstance(inputs, Tensor) and inputs.dim() == 3 and inputs.is_floating_point()
    has_tensors = isinstance(inputs, tuple) and all(isinstance(value, Tensor) for value in inputs)
    if not (is_image or has_tensors) or not isinstance(labels, Tensor) or labels.dim() != 2:
        is_bytes = isinstance(inputs, Tensor) and inputs.dtype == torch.uint8
        hint = "divide the values of the image by 255: image.float() / 255. Or " if is_bytes else ""
        raise InvalidInput(
            f"a sample is {describe(inputs)} with labels {describe(labels)}.",
            where=place,
            next=f"{hint}{FORM}",
        )
    if is_image:
        next = "resize the labels (nearest neighbour), or replace the pair."
        check_labels_fit(place, inputs.shape[1:], labels.shape, next)


def as_data(samples: Samples) -> SegmentationData:
    """Return data of one's own as `SegmentationData`; without names of classes, labels are checked once their number is
    known, see `SegmentationData.with_outputs`.

    Raises:
        InvalidInput: see `check_data`; or the first image cannot be in 0..1.
    """
    check_data(samples, "given")
    try:
        first, _ = _pair_of(samples, 0)
    except CadError:  # refused, or reported, where the sample is used
        pass
    else:
        _check_range(samples, first, place_of(samples, 0))
    if isinstance(samples, SegmentationData):
        return samples
    has_labels, classes = is_labelled(samples), _texts(getattr(samples, "classes", ()))
    names = _texts(getattr(samples, "names", ()))
    return SegmentationData(
        name=str(getattr(samples, "name", type(samples).__name__)),
        split=str(getattr(samples, "split", "all")),
        classes=classes if has_labels else (),
        names=names if len(names) == len(samples) else tuple(map("sample {}".format, range(len(samples)))),
        read=partial(sample_of, samples),
        table=identity_table(len(classes)) if classes or not has_labels else None,
        any_range=bool(getattr(samples, "any_range", False)),
    )


MOST = 100  # pictures of data that stand for all of them, e.g. to calibrate by


def pictures_of(data: SegmentationData, most: int = MOST) -> Callable[[Source | None], Iterator[Tensor]]:
    """Return a function that yields pictures of data (C, H, W) as a network of a source reads them, or in colour: all
    if there are no more than `most`, else so many, evenly spread."""

    def read(source: Source | None) -> Iterator[Tensor]:
        count, shown = min(most, len(data)), data.read_for(source)
        return (sample_of(shown, place * len(data) // count)[0] for place in range(count))

    return read


def for_network(data: Samples, source: Source) -> Samples:
    """Return data whose pictures are read for a network of this source; data of one's own as they are."""
    return data.read_for(source) if isinstance(data, SegmentationData) else data


def place_of(data: Any, index: int) -> str:
    """Return the words that name a sample: its position and, where the data has names, its name."""
    names = _texts(getattr(data, "names", ()))
    name = f" ({names[index]})" if -len(names) <= index < len(names) else ""
    return f"sample {index} of the data{name}"


def _texts(values: Any) -> tuple[str, ...]:
    """Return names, or an empty tuple for anything else that a data set may keep under this attribute."""
    listed = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else ()
    return listed if all(isinstance(value, str) for value in listed) else ()


def _ignored(image: Tensor) -> Tensor:
    return torch.full(image.shape[-2:], IGNORED)


def _item_of(data: Any, index: int) -> Any:
    with as_refusal(
        lambda error: FileError(
            f"{place_of(data, index)} cannot be read.",
            why=describe_error(error),
            next="mend the data set or the file, or leave this sample out.",
        )
    ):
        return data[index]


def _pair_of(data: Any, index: int) -> tuple[Any, Any]:
    """Return inputs and labels as the data gives them; of an image alone all pixels are ignored."""
    sample = _item_of(data, index)
    if isinstance(sample, Tensor):
        return sample, _ignored(sample)
    if isinstance(sample, (tuple, list)) and len(sample) == 2:
        return sample[0], sample[1]
    parts = f"{type(sample).__name__} of {len(sample)}" if isinstance(sample, (tuple, list)) else ""
    raise InvalidInput(
        f"a sample is {f'a {parts}' if parts else describe(sample)}.", where=place_of(data, index), next=FORM
    )


def _check_finite(image: Any, place: str) -> None:
    """Refuse an image with NaN or infinite values."""
    if not isinstance(image, Tensor) or bool(image.isfinite().all()):
        return
    first = (~image.isfinite()).nonzero()[0].tolist()
    raise InvalidInput(
        f"an image holds {float(image[tuple(first)])} in channel {first[0]}, row {first[1]}, column {first[2]}.",
        where=place,
        why="one such value makes the loss, and all weights after it, NaN.",
        next="replace the value, or leave this sample out.",
    )


def _check_range(data: Any, image: Any, place: str) -> None:
    """Refuse an image whose values cannot be in 0..1."""
    is_image = isinstance(image, Tensor) and image.is_floating_point() and image.numel()
    if not is_image or getattr(data, "any_range", False):
        return
    low, high = (float(value) for value in image.detach().float().aminmax())
    if not math.isfinite(low + high) or (low >= _LEAST and high <= _MOST):
        return
    why = "it is neither a picture in 0..1, nor one after mean and deviation, nor one in 0..255."
    remedy = "scale it to 0..1."
    if -_NORMALISED <= low < _LEAST and high <= _NORMALISED:
        why = "it looks normalised already; it is normalised here, by the mean and deviation of the network."
        remedy = "leave the normalisation out of the data set."
    elif low >= _LEAST and _OF_BYTES <= high <= _BYTE + 1:
        why, remedy = "it looks like 0..255 in floating-point numbers.", "divide by 255: image / 255."
    raise InvalidInput(
        f"an image has values from {low:.3g} to {high:.3g}, where 0..1 is expected.",
        where=place,
        why=why,
        next=f"{remedy} If its values are meant so, give the data set an attribute any_range = True.",
    )
