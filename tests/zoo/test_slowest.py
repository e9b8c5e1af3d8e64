"""The operation that takes the time of a call: found by measuring, told by its name."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from networks import NamedParts
from torch import Tensor

import cadsurgery as cs
from benchmarks.slowest import find_slowest, interpreted_by
from cadsurgery.elements.backends import choose
from cadsurgery.elements.backends.reference import Torch
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.program import GraphInterpreter

IMAGE = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fast() -> AdaptiveModel:
    return cs.adaptify(NamedParts().eval(), "edges", output_stride=(4, 16), verify_laws=False).optimize()


class Sleepy(Torch):
    """Computes as torch does, but late where a convolution has so many channels in and out."""

    name = "sleepy"

    def __init__(self, channels: tuple[int, int]) -> None:
        self.channels = channels

    def applies(self, work: choose.Work) -> bool:
        weights = getattr(work, "weights", None)
        return weights is not None and tuple(weights.weight.shape[:2]) == self.channels[::-1]

    def is_measured(self, work: choose.Work) -> bool:
        return False

    def convolve(self, work: choose.Convolution) -> Tensor:
        time.sleep(0.2)
        return super().convolve(work)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "layer"), [((4, 8), "body.0"), ((8, 8), "body.3"), ((8, 5), "head")])
def test_the_slow_layer_is_named_with_its_operation(
    fast: AdaptiveModel, monkeypatch: pytest.MonkeyPatch, channels: tuple[int, int], layer: str
) -> None:
    """Whatever norms and activations the convolution has taken in."""
    monkeypatch.setattr(choose, "BACKENDS", [Sleepy(channels), *choose.BACKENDS])
    found = find_slowest(fast, partial(fast, IMAGE, mask="edges | budget:fraction=0.5"))
    assert (found.layer, found.operation) == (layer, "convolve (sleepy)") and 0.5 < found.share <= 1
    assert str(found) == f"{found.share:.0%} of the time is in {layer}, convolve (sleepy)"


@pytest.mark.slow
def test_a_slow_mask_is_named(fast: AdaptiveModel) -> None:
    def late(image: Tensor) -> Tensor:
        time.sleep(0.2)
        return image[:, 0, ::4, ::4] > 0

    found = find_slowest(fast, partial(fast, IMAGE, mask=late))
    assert found.layer == "the mask and its lattice" and found.share > 0.5


@pytest.mark.parametrize("mask", ["edges", "all", "none", "edges | budget:fraction=0.3"])
def test_node_by_node_it_gives_the_same_and_is_left_as_it_was(fast: AdaptiveModel, mask: str) -> None:
    program, expected = fast.program, fast(IMAGE, mask=mask)
    with interpreted_by(fast, GraphInterpreter):
        assert fast.program is not program
        assert torch.equal(fast(IMAGE, mask=mask), expected)
    assert fast.program is program
