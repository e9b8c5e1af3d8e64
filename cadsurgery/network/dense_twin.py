"""Dense twins: the best ordinary dense networks at the output strides of a converted network, for comparison."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from cadsurgery.elements.lattice import Lattice
from cadsurgery.network.model import AdaptiveModel


def dense_twin(net: AdaptiveModel, level: int, image: Tensor) -> Callable[[Tensor], Any]:
    """Return the dense network at a uniform level in torch's fastest form: batch norm folded, channels_last.

    The torch operations of a call are recorded and then run without this package, so that the twin's time includes no
    mask, lattice, or fused or compiled kernel of ours. A network that hosts its adaptive part runs its own code, which
    cannot be recorded; it is called with a uniform mask instead.

    Args:
        net: a converted network.
        level: the level of all cells.
        image: batch (B, C, H, W) of the twin's image size.

    Returns:
        A function of such a batch.
    """
    if net.hosts_part:
        return partial(net.optimize(fuse=False), mask="all" if level == 0 else "none")
    return record(net, level, image)


def record(net: AdaptiveModel, level: int, image: Tensor, in_place: bool = True) -> GraphModule:
    """Record the graph of a twin, with or without in-place operations."""
    folded = net.optimize(fuse=False)
    program, cached = folded.program, list[Lattice]()

    def uniform(_: Tensor, features: Tensor) -> Lattice:
        if not cached:  # the recording run reuses the lattice of the first run, whose tables have values
            cached.append(program.geometry.uniform_like(features, level))
        return cached[0]

    def run(batch: Tensor) -> Any:
        return program(uniform, program.bind(batch))[0]

    with torch.no_grad():
        folded.run(uniform, image)  # refuses an invalid image
        recorded = make_fx(run if in_place else torch.func.functionalize(run))(image)
    recorded.graph.eliminate_dead_code()
    recorded.recompile()
    return recorded
