"""Outcome, folder and network files of a training run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from cadsurgery.data.networks import Source
from cadsurgery.methods.anytime import AnytimeModel
from cadsurgery.methods.resampling import ResampledModel
from cadsurgery.methods.sampling import SampledModel
from cadsurgery.methods.storage import save
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.storage import write_tensors
from cadsurgery.tasks.report import Plain

TRAINED = "fine-tuned"  # what the source of a network says of its weights then


@dataclass(frozen=True)
class Outcome(Plain):
    """Result of a training run.

    Attributes:
        steps: done in all.
        resumed: the step this call began at.
        before: metrics on the validation data before the first step; empty without validation.
        after: after the last.
        best_step: step of the best validation; 0 if there was none.
        best: its mIoU, or relative error where the metrics have no mIoU.
        network: file of the finished network.
        best_network: file of the best one, if there was a validation.
        checkpoint: the last checkpoint.
        groups: what was trained at which rate; see `Group.describe`.
    """

    steps: int
    resumed: int
    before: dict[str, float]
    after: dict[str, float]
    best_step: int
    best: float | None
    network: Path
    best_network: Path | None
    checkpoint: Path
    groups: tuple[dict[str, object], ...]


def write_network(net: nn.Module, path: Path) -> None:
    """The network as a file: a converted one for `cadsurgery.load`, any other as a state dict."""
    if isinstance(net, (AdaptiveModel, AnytimeModel, ResampledModel, SampledModel)):
        # Whatever they were at first, a report should not call them random.
        if isinstance(net.source, Source):
            net.source = replace(net.source, weights=TRAINED)
        save(net, path)
        return
    write_tensors(path, net.state_dict())
