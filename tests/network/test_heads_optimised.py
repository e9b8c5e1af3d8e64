"""Optimised copies of networks with the heads of `encoder_heads`, under the default mask."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error, slow
from encoder_heads import HEADS, network
from networks import unverified
from torch import nn

import cadsurgery as cs
from cadsurgery.elements import functional


@pytest.mark.parametrize("head", [slow(head) if at % 3 else head for at, head in enumerate(HEADS)])
def test_no_norm_is_left_in_an_optimised_copy(head: str) -> None:
    """Norms are folded into convolutions, or are one factor and shift per channel with the activation behind them."""
    net = unverified(network(head), example_input=torch.rand(1, 3, 64, 64))
    copy, image = net.optimize(), torch.rand(2, 3, 80, 72)
    assert relative_error(copy(image), net(image)) < 1e-5
    targets = [node.target for node in copy.program.graph.nodes]
    assert functional.batch_norm not in targets
    assert not any(isinstance(module, nn.BatchNorm2d) for module in called(copy))


def called(net: cs.AdaptiveModel) -> list[nn.Module]:
    nodes = (node for node in net.program.graph.nodes if node.op == "call_module")
    return [net.get_submodule(str(node.target)) for node in nodes]
