"""Validation: accuracy on labelled data, or fidelity to the dense network; and checks of the number of classes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.data.samples import Samples, check_data, is_labelled
from cadsurgery.finetune.batches import Batch, inputs_of
from cadsurgery.finetune.objectives import dense_high
from cadsurgery.following.trace import evaluating
from cadsurgery.masks import labelled
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.divergence import class_scores, resize
from cadsurgery.support.errors import InvalidInput


def evaluate(net: nn.Module, data: Samples, dense: nn.Module | None = None) -> dict[str, float]:
    """Compute metrics on whole images, one by one, under the network's own mask.

    Args:
        net: the network.
        data: data with labels, or without.
        dense: without labels, the network whose output with everything kept high stands for labels; default: `net`.

        Returns:
            `miou` and the other shares of `SegmentationMetrics`, and the mean `active_fraction`. For a network with
            exits they refer to the last exit, and `miou_exit_1`... to the others. Without labels these are
            agreements, with `divergence`; for maps that are not class scores, `relative_error` replaces the shares,
            see `FidelityMetrics`.

    Raises:
        InvalidInput: there are no data, samples have the wrong form, or there are more classes than outputs; without
            labels, the network is not adaptive.
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
    active = 0.0
    metrics: SegmentationMetrics | FidelityMetrics | None = None if has_labels else FidelityMetrics()
    exit_metrics: list[SegmentationMetrics] = []  # of the exits before the last
    with torch.inference_mode(), evaluating(net):
        for index in range(len(data)):
            batch, labels = inputs_of(net, data, index)
            with labelled(labels.unsqueeze(0)) if has_labels else contextlib.nullcontext():
                output = net(*batch)
            active += net.active_fraction if isinstance(net, AdaptiveModel) else 0.0
            if isinstance(metrics, FidelityMetrics):
                metrics.update(output, dense_high(dense or net, batch), (labels.shape[0], labels.shape[1]))
                continue
            logits = class_scores(output).float()
            if metrics is None:
                check_classes(data, logits.shape[1])
                metrics = SegmentationMetrics(logits.shape[1])
                exit_metrics = [SegmentationMetrics(logits.shape[1]) for _ in _earlier(output)]
            metrics.update(resize(logits, labels.shape).argmax(1).cpu(), labels.unsqueeze(0))
            for metric, prediction in zip(exit_metrics, _earlier(output), strict=True):
                metric.update(resize(prediction.float(), labels.shape).argmax(1).cpu(), labels.unsqueeze(0))
    assert metrics is not None
    figures = {name: value for name, value in metrics.compute().items() if isinstance(value, float)}
    if isinstance(net, AdaptiveModel):
        figures["active_fraction"] = active / len(data)
    return figures | {
        f"miou_exit_{number}": exit.compute()["miou"] for number, exit in enumerate(exit_metrics, 1)
    }


def _earlier(output: Any) -> tuple[Tensor, ...]:
    """Return the predictions of all exits but the last."""
    return output[:-1] if isinstance(output, tuple) else ()


def check_classes(data: object, outputs: int) -> None:
    """Refuse data that name more classes than the network has outputs.

    Raises:
        InvalidInput: the data have more classes than the network has outputs.
    """
    names = getattr(data, "classes", ())
    if len(names) > outputs:
        raise InvalidInput(
            f"the data has {len(names)} classes, but the network has {outputs} outputs.",
            where=str(getattr(data, "name", type(data).__name__)),
            next=f"build the network with num_classes={len(names)}.",
        )


def count_outputs(net: nn.Module, data: Samples, batch: Batch) -> int:
    """Return the number of classes of a network, after a check that the data have no others; 0 without labels.

    Raises:
        InvalidInput: the data have more classes, by name or in the batch's labels; or the network returns no scores.
    """
    if batch.labels is None:
        return 0
    first = batch.first(1).to(next(net.parameters()).device)
    assert first.labels is not None
    with torch.no_grad(), evaluating(net), labelled(first.labels):
        outputs = class_scores(net(*first.inputs)).shape[1]
    check_classes(data, outputs)
    batch.check_labels(outputs)
    return outputs
