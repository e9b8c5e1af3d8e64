"""How well a network segments a dataset."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cadsurgery.errors import InvalidInput
from cadsurgery.finetune.batches import Samples, check_data, prepared, source_of
from cadsurgery.finetune.groups import evaluating
from cadsurgery.finetune.objectives import logits_of, resized
from cadsurgery.model import AdaptiveModel


def evaluate(net: nn.Module, data: Samples) -> dict[str, float]:
    """Metrics on whole images, one by one, under the network's own mask.

    Returns:
        `miou` and what else `cadsurgery.metrics` finds that is a number, and the mean `active_fraction`.
    """
    from cadsurgery.metrics import SegmentationMetrics

    check_data(data, "validation")
    device, metrics, active = next(net.parameters()).device, None, 0.0
    with torch.inference_mode(), evaluating(net):
        for index in range(len(data)):
            inputs, labels = prepared(*data[index], source_of(net), index)
            output = net(*(value.unsqueeze(0).to(device) for value in inputs))
            logits = logits_of(output)
            if metrics is None:
                metrics = SegmentationMetrics(classes_of(data, logits.shape[1]))
            prediction = resized(logits, labels.shape).argmax(1)
            metrics.update(prediction.cpu(), labels.unsqueeze(0))
            active += net.active_fraction if isinstance(net, AdaptiveModel) else 0.0
    assert metrics is not None
    found = {name: value for name, value in metrics.compute().items() if _is_number(value)}
    if isinstance(net, AdaptiveModel):
        found["active_fraction"] = active / len(data)
    return {name: float(value) for name, value in found.items()}


def classes_of(data: object, outputs: int) -> tuple[str, ...]:
    """Names of the network's outputs: those of the data, if it has names.

    Raises:
        InvalidInput: the data has more classes than the network outputs.
    """
    names = tuple(getattr(data, "classes", ()))
    if len(names) > outputs:
        raise InvalidInput(
            f"the data has {len(names)} classes, but the network has {outputs} outputs.",
            where=str(getattr(data, "name", type(data).__name__)),
            next=f"build the network with num_classes={len(names)}.",
        )
    return names + tuple(str(number) for number in range(len(names), outputs))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0)
