"""The result of a training run, and its network file."""

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

TRAINED = "fine-tuned"  # description of the weights in a trained network's source


@dataclass(frozen=True)
class Outcome(Plain):
    """Result of a training run.

    Attributes:
        steps: total number of completed steps.
        resumed: step at which this call began.
        before: metrics on the validation data before the first step; empty without validation.
        after: metrics after the last step.
        best_step: step of the best validation; 0 if there was none.
        best: its mIoU, or its relative error if the metrics have no mIoU.
        network: file of the final network.
        best_network: file of the best network, if there was a validation.
        checkpoint: file of the last checkpoint.
        groups: trained parameters and their rates; see `Group.describe`.
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
    """Write the network: a converted network for `cadsurgery.load`, any other as a state dict."""
    if isinstance(net, (AdaptiveModel, AnytimeModel, ResampledModel, SampledModel)):
        # Reports must not call the weights random, even if they were at first.
        if isinstance(net.source, Source):
            net.source = replace(net.source, weights=TRAINED)
        save(net, path)
        return
    write_tensors(path, net.state_dict())
