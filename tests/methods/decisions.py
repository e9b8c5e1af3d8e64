"""Exits and gates with random weights that decide one way here and the other way there."""

from __future__ import annotations

from typing import Any

import torch
from conftest import images

import cadsurgery as cs


def decide(net: cs.AnytimeModel, classifiers: list[Any]) -> None:
    """Class scores of one size, so that some positions are confident and others are not."""
    (name,), like = net.program.signature.parameters, classifiers[0].weight
    with torch.no_grad():
        everything = 0.0 if net.confidence == "entropy" else 1.0
        scores = net.logits(**{name: images(1, 64, 64).to(like)}, threshold=everything)
        for classifier, found in zip(classifiers, scores, strict=True):
            std, mean = torch.std_mean(found, (0, 2, 3))
            classifier.weight *= (1.5 / std)[:, None, None, None]
            classifier.bias.copy_(-1.5 * mean / std)


@torch.no_grad()
def half_open(net: cs.SampledModel, bias: float = 0.0) -> cs.SampledModel:
    """Gates that are open here and closed there, with some doubt."""
    for gate in net.gates:
        gate.weight.normal_(0, 1.5 / gate.weight[0].numel() ** 0.5)
        gate.bias.fill_(bias)
    return net
