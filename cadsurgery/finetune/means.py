"""Calibrate means over the image, without training: shift what depends on one, at each level."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from cadsurgery.data.samples import Samples, check_data
from cadsurgery.elements import functional
from cadsurgery.finetune.batches import inputs_of
from cadsurgery.following.trace import evaluating
from cadsurgery.network.adapters import can_shift_means
from cadsurgery.network.model import AdaptiveModel, whole_program
from cadsurgery.network.program import GraphInterpreter, Program, clone_values

ROUNDS = 2  # a second round, because the first shifts change later layers


def calibrate_means(net: AdaptiveModel, images: Samples, most: int = 32) -> int:
    """Shift values computed from means over the image, at each level, to their average at full resolution.

    Features at anchors equal those of full resolution as long as only convolutions precede them; a mean over fewer
    samples does not. Needs no gradients and no labels; shifts are added if the network has none, see
    `AdaptiveModel.add_mean_shifts`.

    Args:
        net: an adaptive network.
        images: as in training.
        most: maximum number of images used, evenly spread.

    Returns:
        The number of calibrated layers; 0 if no layer reads a mean.

    Raises:
        InvalidInput: the network is not adaptive as a whole or is optimised, or there are no images.
    """
    whole_program(net, "has no means that could be calibrated")
    check_data(images, "unlabelled")
    if not can_shift_means(net.program):
        return 0
    net.add_mean_shifts()
    program = net.program
    chosen = range(0, len(images), -(-len(images) // most))
    for _ in range(ROUNDS):
        sums: dict[tuple[fx.Node, int], Tensor] = {}
        for index in chosen:
            inputs, _ = inputs_of(net, images, index)
            for node, level, apart in _differences(net, program, inputs):
                sums[node, level] = sums.get((node, level), 0) + apart
        with torch.no_grad():
            for (node, level), total in sums.items():
                by: Any = program.net.get_submodule(str(node.args[2].target))  # type: ignore[union-attr]
                by.shift[level - 1] += (total / len(chosen)).to(by.shift)
    return sum(node.target is functional.shift_vector for node in program.halves.after.nodes)


@torch.no_grad()
def _differences(
    net: AdaptiveModel, program: Program, inputs: tuple[Tensor, ...]
) -> Iterator[tuple[fx.Node, int, Tensor]]:
    """Yield, by node and level, how far an image's vector (C,) with the current shifts is from that at level 0."""
    with evaluating(net):
        values = program.before(program.bind(*inputs))
        high: dict[fx.Node, Tensor] = {}
        for level in range(program.geometry.max_level + 1):
            vectors: dict[fx.Node, Tensor] = {}

            def note(node: fx.Node, value: Any, _: Any, vectors: dict[fx.Node, Tensor] = vectors) -> None:
                if node.target is functional.shift_vector:
                    vectors[node] = value

            run = GraphInterpreter(program, program.halves.after, note=note).run
            run(program.uniform(level), *clone_values(values))
            high = high or vectors
            for node, vector in vectors.items() if level else ():
                yield node, level, (high[node] - vector).double().mean(0).flatten()
