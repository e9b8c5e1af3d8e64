"""How well a network segments a dataset, and whether it has a class for every label."""

from __future__ import annotations

import torch
from torch import nn

from cadsurgery.finetune.batches import Batch, Samples, check_data, prepare
from cadsurgery.finetune.objectives import logits_of, resize_logits
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.support.errors import InvalidInput
from cadsurgery.surgery.trace import evaluating


def evaluate(net: nn.Module, data: Samples) -> dict[str, float]:
    """Metrics on whole images, one by one, under the network's own mask.

    Returns:
        `miou` and the other shares `cadsurgery.metrics` gives, and the mean `active_fraction`.

    Raises:
        InvalidInput: no data, samples that are none, or more classes than the network outputs.
    """
    from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics

    check_data(data, "validation")
    device, metrics, active = next(net.parameters()).device, None, 0.0
    with torch.inference_mode(), evaluating(net):
        source = pictures_for(net)
        for index in range(len(data)):
            inputs, labels = prepare(*data[index], source, index)
            output = net(*(value.unsqueeze(0).to(device) for value in inputs))
            logits = logits_of(output)
            if metrics is None:
                check_classes(data, logits.shape[1])
                metrics = SegmentationMetrics(logits.shape[1])
            prediction = resize_logits(logits, labels.shape).argmax(1)
            metrics.update(prediction.cpu(), labels.unsqueeze(0))
            active += net.active_fraction if isinstance(net, AdaptiveModel) else 0.0
    assert metrics is not None
    figures = {name: value for name, value in metrics.compute().items() if isinstance(value, float)}
    if isinstance(net, AdaptiveModel):
        figures["active_fraction"] = active / len(data)
    return figures


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
    """The number of classes a network gives, once the data is known to have no others.

    Raises:
        InvalidInput: it has, by its names or in the labels of the batch; or the network gives no logits.
    """
    first = batch.first(1).to(next(net.parameters()).device)
    with torch.no_grad(), evaluating(net):
        outputs = logits_of(net(*first.inputs)).shape[1]
    check_classes(data, outputs)
    batch.check_labels(outputs)
    return outputs
