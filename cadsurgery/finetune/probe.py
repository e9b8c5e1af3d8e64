"""A look at the first batch before training: the network's outputs, and what the objective uses."""

from __future__ import annotations

import torch
from torch import nn

from cadsurgery.finetune.batches import Batch, Samples
from cadsurgery.finetune.evaluation import check_classes
from cadsurgery.finetune.objectives import Objective, logits_of
from cadsurgery.finetune.schedule import Draw, derive_seed
from cadsurgery.support.errors import InvalidInput, first_line
from cadsurgery.surgery.trace import evaluating


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


def freeze_unused(objective: Objective, batch: Batch, seed: int) -> None:
    """Freeze the parameters that get no gradient, found by asking for it on two images; nothing else changes.

    So every trained parameter takes part in every step, as distributed training needs it.

    Raises:
        InvalidInput: batch norm gets a single value per channel.
    """
    parameters = list(objective.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        return
    batch = batch.first(2).to(parameters[0].device)
    torch.manual_seed(derive_seed(seed, 5))
    statistics = [(buffer, buffer.clone()) for buffer in objective.buffers()]
    try:
        objective(batch.inputs, batch.labels, Draw(seed, 0, batch.positions))["loss"].backward()
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InvalidInput(
            "batch norm cannot be trained on one value per channel.",
            why=first_line(error),
            next='set batch to 2 or more, or batch_norm="frozen".',
        ) from error
    finally:
        for buffer, before in statistics:
            buffer.copy_(before)
    for parameter in parameters:
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
