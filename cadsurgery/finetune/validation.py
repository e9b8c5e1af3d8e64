"""Validation: accuracy on labelled data, or fidelity to the dense network; and checks of the number of classes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from cadsurgery.data.samples import Samples, check_data, is_labelled
from cadsurgery.finetune.batches import Batch, inputs_of
from cadsurgery.finetune.objectives import dense_high
from cadsurgery.following.trace import evaluating
from cadsurgery.masks import labelled
from cadsurgery.methods.side import Side, once_per_batch
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.divergence import class_scores
from cadsurgery.support.errors import CadError, InvalidInput
from cadsurgery.tasks.measuring import PictureBatch, Quality, Tally, as_labels, measure


def evaluate(net: nn.Module, data: Samples, dense: nn.Module | None = None) -> dict[str, float]:
    """Compute metrics on whole images, one by one, under the network's own mask.

    Args:
        net: the network.
        data: data with labels, or without.
        dense: without labels, the network whose output with everything kept high stands for labels; default: `net`.

        Returns:
            `miou` and the other shares of `SegmentationMetrics`, the standard error over images of those that have
            one (`miou_error`), and the mean `active_fraction`. For a network with
            exits they refer to the last exit, and `miou_exit_1`... to the others. Without labels these are
            agreements, with `divergence`; for maps that are not class scores, `relative_error` replaces the shares,
            see `cadsurgery.tasks.measuring.Quality`.

    Raises:
        InvalidInput: there are no data, samples have the wrong form, or there are more classes than outputs; without
            labels, the network is not adaptive.
    """
    check_data(data, "validation")
    has_labels = is_labelled(data)
    if not has_labels and not isinstance(net, AdaptiveModel):
        raise InvalidInput(
            f"{type(net).__name__} cannot be measured without labels.",
            why="only an adaptive network has a dense one beside it to be compared with.",
            next="give labelled data, or convert the network first with cs.adaptify.",
        )

    def pictures() -> Iterator[PictureBatch]:
        for index in range(len(data)):
            batch, labels = inputs_of(net, data, index)
            yield PictureBatch(
                batch, (labels.shape[0], labels.shape[1]), labels[None] if has_labels else None
            )

    run = once_per_batch(lambda batch: net(*batch))

    def exit(place: int, batch: Any) -> Any:
        return run(batch)[place]

    def active(batch: Any) -> dict[str, float]:
        return {"active": net.active_fraction if isinstance(net, AdaptiveModel) else 0.0}

    sides = [Side("own", run, active)]
    if not has_labels:
        sides = [Side("dense", partial(dense_high, dense or net), is_target=True), *sides]
    with evaluating(net):
        if has_labels:
            with torch.inference_mode():
                first = next(pictures())
                with as_labels(first.labels):
                    output = run(first.images)
            check_classes(data, class_scores(output).shape[1])
            earlier = output[:-1] if isinstance(output, tuple) else ()
            sides += [Side(f"miou_exit_{n + 1}", partial(exit, n)) for n in range(len(earlier))]
        total: list[Tally] = []
        for _, tallies in measure(sides, pictures(), lambda: [Quality(of_labels=has_labels)]):
            if isinstance(tallies, CadError):
                raise tallies
            for whole, own in zip(total, tallies, strict=False):
                whole.merge(own)
            total = total or tallies
    found = {side.name: tally for side, tally in zip(sides, total, strict=True)}
    computed = {name: tally.metrics[0].compute() for name, tally in found.items()}
    of_own = computed["own"]
    figures = {name: value for name, value in of_own.items() if isinstance(value, float)}
    figures |= {f"{name}_error": error for name, error in of_own["errors"].items()}
    if isinstance(net, AdaptiveModel):
        figures["active_fraction"] = found["own"].counts["active"] / len(data)
    return figures | {name: exit["miou"] for name, exit in computed.items() if name.startswith("miou_exit")}


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
