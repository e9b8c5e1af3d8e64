"""Level adapters without training: what is made of a mean over an image gets the mean it has at full resolution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from cadsurgery.data.datasets import sample_of
from cadsurgery.elements import functional
from cadsurgery.finetune.batches import Samples, check_data, prepare
from cadsurgery.network.model import AdaptiveModel, pictures_for, whole_program
from cadsurgery.network.program import GraphInterpreter, Program, clone_values
from cadsurgery.surgery.trace import evaluating

ROUNDS = 2  # what is shifted first changes what comes later


def calibrate_adapters(net: AdaptiveModel, images: Samples, most: int = 32) -> int:
    """Shift what layers make of means over an image, at each level, by how far on average that is from full resolution.

    Features at anchors are those of full resolution, as long as convolutions alone come between; a mean over fewer
    samples is not. No gradients and no labels; adapters are added if there are none.

    Args:
        net: an adaptive network.
        images: as in training.
        most: of them that are looked at, evenly spread.

    Returns:
        How many layers were calibrated; 0 if none reads a mean.

    Raises:
        InvalidInput: a network that is not adaptive as a whole or an optimised one, or no images.
    """
    whole_program(net, "has no level adapters that could be calibrated")
    check_data(images, "unlabelled")
    net.add_adapters()
    program = net.program
    nodes = [node for node in program.halves.after.nodes if node.target is functional.adapt_vector]
    device, step = next(net.parameters()).device, -(-len(images) // most)
    for _ in range(ROUNDS if nodes else 0):
        sums: dict[tuple[fx.Node, int], Tensor] = {}
        count = 0
        for index in range(0, len(images), step):
            inputs, _ = prepare(*sample_of(images, index), pictures_for(net), index)
            for node, level, apart in _differences(net, program, [one[None].to(device) for one in inputs]):
                sums[node, level] = sums.get((node, level), 0) + apart
            count += 1
        with torch.no_grad():
            for (node, level), total in sums.items():
                adapter: Any = program.net.get_submodule(str(node.args[2].target))  # type: ignore[union-attr]
                adapter.shift[level - 1] += (total / count).to(adapter.shift)
    return len(nodes)


@torch.no_grad()
def _differences(
    net: AdaptiveModel, program: Program, inputs: list[Tensor]
) -> Iterator[tuple[fx.Node, int, Tensor]]:
    """By node and level: how far a vector (C,) of an image is apart from that at level 0, as adapted so far."""
    with evaluating(net):
        values = program.before(program.bind(*inputs))
        high: dict[fx.Node, Tensor] = {}
        for level in range(program.geometry.max_level + 1):
            noted: dict[fx.Node, Tensor] = {}
            _Vectors(program, noted).run(program.uniform(level), *clone_values(values))
            high = high or noted
            for node, vector in noted.items() if level else ():
                yield node, level, (high[node] - vector).double().mean(0).flatten()


class _Vectors(GraphInterpreter):
    """Notes what adapters of vectors give."""

    def __init__(self, program: Program, noted: dict[fx.Node, Tensor]) -> None:
        super().__init__(program, program.halves.after)
        self._noted = noted

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, noted."""
        value = super().run_node(n)
        if n.target is functional.adapt_vector:
            self._noted[n] = value
        return value
