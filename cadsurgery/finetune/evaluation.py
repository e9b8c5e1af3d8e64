"""How well a network segments a dataset, or keeps to its dense twin, and whether it has a class for every label."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.data.datasets import is_labelled, sample_of
from cadsurgery.finetune.batches import Batch, Samples, check_data, prepare
from cadsurgery.finetune.objectives import dense_high, logits_of
from cadsurgery.masks import labelled
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.support.divergence import resize
from cadsurgery.support.errors import InvalidInput
from cadsurgery.surgery.trace import evaluating


def evaluate(net: nn.Module, data: Samples, dense: nn.Module | None = None) -> dict[str, float]:
    """Metrics on whole images, one by one, under the network's own mask.

    Args:
        net: to measure.
        data: with labels, or without.
        dense: without labels, the network whose output with everything kept high stands for them; default: `net`.

    Returns:
        `miou` and the other shares `cadsurgery.metrics` gives, and the mean `active_fraction`; of a network with exits
        those of the last, and `miou_exit_1`... of the others. Without labels these are agreements, `divergence` is
        among them, and of maps that are no class scores `relative_error` is in the place of shares; see
        `FidelityMetrics`.

    Raises:
        InvalidInput: no data, samples that are none, or more classes than the network outputs; without labels, a
            network that is not adaptive.
    """
    from cadsurgery.tasks.segmentation.fidelity import FidelityMetrics
    from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics

    check_data(data, "validation")
    has_labels = is_labelled(data)
    if not has_labels and not isinstance(net, AdaptiveModel):
        raise InvalidInput(
            f"{type(net).__name__} cannot be measured without labels.",
            why="only an adaptive network has a dense one beside it to be compared with.",
            next="give labelled data, or convert the network first with cs.adaptify.",
        )
    device, active = next(net.parameters()).device, 0.0
    metrics: SegmentationMetrics | FidelityMetrics | None = None if has_labels else FidelityMetrics()
    of_exits: list[SegmentationMetrics] = []  # of a network with exits those before the last
    with torch.inference_mode(), evaluating(net):
        source = pictures_for(net)
        for index in range(len(data)):
            inputs, labels = prepare(*sample_of(data, index), source, index)
            batch = tuple(value.unsqueeze(0).to(device) for value in inputs)
            with labelled(labels.unsqueeze(0)) if has_labels else contextlib.nullcontext():
                output = net(*batch)
            active += net.active_fraction if isinstance(net, AdaptiveModel) else 0.0
            if isinstance(metrics, FidelityMetrics):
                metrics.update(output, dense_high(dense or net, batch), (labels.shape[0], labels.shape[1]))
                continue
            logits = logits_of(output).float()
            if metrics is None:
                check_classes(data, logits.shape[1])
                metrics = SegmentationMetrics(logits.shape[1])
                of_exits = [SegmentationMetrics(logits.shape[1]) for _ in _earlier(output)]
            metrics.update(resize(logits, labels.shape).argmax(1).cpu(), labels.unsqueeze(0))
            for one, early in zip(of_exits, _earlier(output), strict=True):
                one.update(resize(early.float(), labels.shape).argmax(1).cpu(), labels.unsqueeze(0))
    assert metrics is not None
    figures = {name: value for name, value in metrics.compute().items() if isinstance(value, float)}
    if isinstance(net, AdaptiveModel):
        figures["active_fraction"] = active / len(data)
    return figures | {f"miou_exit_{number}": one.compute()["miou"] for number, one in enumerate(of_exits, 1)}


def _earlier(output: Any) -> tuple[Tensor, ...]:
    """The predictions of a network with exits before the last."""
    return output[:-1] if isinstance(output, tuple) else ()


def check_classes(data: object, outputs: int) -> None:
    """Refuse data with more classes, if it names them, than a network has outputs.

    Raises:
        InvalidInput: the data has more classes than the network outputs.
    """
    names = getattr(data, "classes", ())
    if len(names) > outputs:
        raise InvalidInput(
            f"the data has {len(names)} classes, but the network has {outputs} outputs.",
            where=str(getattr(data, "name", type(data).__name__)),
            next=f"build the network with num_classes={len(names)}.",
        )


def count_outputs(net: nn.Module, data: Samples, batch: Batch) -> int:
    """The number of classes a network gives, once the data is known to have no others; 0 where there are no labels.

    Raises:
        InvalidInput: it has, by its names or in the labels of the batch; or the network gives no logits.
    """
    if batch.labels is None:
        return 0
    first = batch.first(1).to(next(net.parameters()).device)
    assert first.labels is not None
    with torch.no_grad(), evaluating(net), labelled(first.labels):
        outputs = logits_of(net(*first.inputs)).shape[1]
    check_classes(data, outputs)
    batch.check_labels(outputs)
    return outputs
