"""Batches of a training run: samples are read, augmented and normalised by position, not by order of arrival."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cadsurgery.data.datasets import IGNORED
from cadsurgery.data.images import normalise
from cadsurgery.data.samples import Samples, check_form, for_network, is_labelled, place_of, sample_of
from cadsurgery.finetune.learning_rates import SampleOrder, derive_seed
from cadsurgery.network.model import pictures_for
from cadsurgery.support.errors import CadError, InvalidInput
from cadsurgery.tasks.task_options import Settings

Augmentation = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Batch:
    """The samples of one forward pass of one process.

    Attributes:
        inputs: arguments of the network, each (B, ...).
        labels: (B, H, W) int64; None for data without labels.
        positions: positions in the sequence of samples.
        indices: indices in the dataset.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None
    positions: tuple[int, ...]
    indices: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        inputs = tuple(value.to(device, non_blocking=True) for value in self.inputs)
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return Batch(inputs, labels, self.positions, self.indices)

    def first(self, count: int) -> Batch:
        """Return the first samples of the batch."""
        inputs = tuple(value[:count] for value in self.inputs)
        labels = None if self.labels is None else self.labels[:count]
        return Batch(inputs, labels, self.positions[:count], self.indices[:count])

    def check_labels(self, classes: int) -> None:
        """Check that the network has an output for every label.

        Raises:
            InvalidInput: a label has no output; the message names the sample, the value and its position.
        """
        if self.labels is None:
            return
        wrong = ((self.labels < 0) | (self.labels >= classes)) & (self.labels != IGNORED)
        if wrong.any():
            image, row, column = (int(value) for value in wrong.nonzero()[0])
            raise InvalidInput(
                f"a label is {int(self.labels[image, row, column])}, but the network has {classes} outputs.",
                where=f"sample {self.indices[image]} of the data, row {row}, column {column} of its crop",
                why=f"labels are 0..{classes - 1}, or {IGNORED} for pixels to ignore.",
                next="map the labels to these, or build the network with more classes.",
            )


def batches(
    data: Samples,
    sampling: SampleOrder,
    augment: Augmentation | None,
    source: Any,
    *,
    steps: range,
    process: int,
    workers: int,
) -> Iterator[Batch]:
    """Yield the batches of one process: `accumulate` for each step.

    Raises:
        InvalidInput: a sample has the wrong form, or samples cannot form a batch.
        CadError: an error of the dataset itself.
    """
    order = [
        list(sampling.positions(step, part, process)) for step in steps for part in range(sampling.accumulate)
    ]
    if not order:
        return
    has_labels = is_labelled(data)
    loader = DataLoader(
        cast(Dataset[Any], _Positions(data, sampling, augment, source)),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=list,
    )
    for positions, samples in zip(order, loader, strict=True):
        indices = tuple(sampling.index(position) for position in positions)
        for sample in samples:
            if isinstance(sample, CadError):
                raise sample
        columns = list(zip(*(inputs for inputs, _ in samples), strict=True))
        stacked = tuple(_stack(column, indices) for column in columns)
        labels = _stack([labels for _, labels in samples], indices) if has_labels else None
        yield Batch(stacked, labels, tuple(positions), indices)


class _Positions:
    """The dataset by position; errors are returned as values, since workers would lose part of them."""

    def __init__(
        self, data: Samples, sampling: SampleOrder, augment: Augmentation | None, source: Any
    ) -> None:
        self.data, self.sampling = for_network(data, source), sampling
        self.augment, self.source = augment, source

    def __getitem__(self, position: int) -> tuple[tuple[Tensor, ...], Tensor] | CadError:
        index = self.sampling.index(position)
        try:
            inputs, labels = sample_of(self.data, index)
            if isinstance(inputs, Tensor) and self.augment is not None:
                inputs, labels = self.augment(inputs, labels, derive_seed(self.sampling.seed, position, 3))
            return prepare(inputs, labels, self.source, place_of(self.data, index))
        except CadError as error:
            return error


def prepare(inputs: Any, labels: Any, source: Any, place: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """Prepare a sample for the network: an image is normalised, a tuple of inputs stays unchanged.

    Raises:
        InvalidInput: the sample has another form, or its image a wrong number of channels; `place` names it.
    """
    check_form(inputs, labels, place)  # an augmentation may have changed it
    if isinstance(inputs, tuple):
        return inputs, labels
    try:
        return (normalise(inputs, source),), labels
    except InvalidInput as error:
        raise InvalidInput(error.what, where=place, why=error.why, next=error.next) from None


def inputs_of(net: nn.Module, data: Samples, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the inputs of a network for a sample, batches of one on its device; and the sample's labels (H, W).

    Raises:
        InvalidInput: as `prepare`.
    """
    source = pictures_for(net)
    inputs, labels = prepare(*sample_of(for_network(data, source), index), source, place_of(data, index))
    device = next(net.parameters()).device
    return tuple(value.unsqueeze(0).to(device) for value in inputs), labels


def _stack(tensors: Any, indices: tuple[int, ...]) -> Tensor:
    sizes = {tuple(tensor.shape) for tensor in tensors}
    if len(sizes) > 1:
        raise InvalidInput(
            f"samples of a batch have different sizes: {', '.join(map(str, sorted(sizes)))}.",
            where=f"samples {', '.join(map(str, indices))} of the data",
            next="train on crops of one size (crop above 0), or with batch 1.",
        )
    return torch.stack(list(tensors))


def augmentation(settings: Settings) -> Augmentation:
    """Return the augmentation of the settings, for `fit`: crop, flip, jitter and scale."""
    from cadsurgery.data import Augment

    augment: Augmentation = Augment(
        crop=settings.crop or None,
        flip=0.5 if settings.flip else 0.0,
        jitter=settings.jitter,
        scale=settings.scale if settings.scale != (1.0, 1.0) else None,
    )
    return augment
