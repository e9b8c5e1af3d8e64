"""The best ordinary dense networks at a converted network's highest and lowest output stride."""

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
    """The dense network that a uniform level map is, as torch runs it best: batch norm folded, channels_last.

    The operations of torch that a call makes are recorded and then run alone, so that nothing of this package is in
    the twin's time: no mask, no lattice, no fused or compiled operation. A network that hosts its adaptive part is run
    by its own code, cannot be recorded, and is called with a uniform mask.

    Args:
        net: converted.
        level: everywhere.
        image: batch (B, C, H, W) of the size it is for.

    Returns:
        A function of such a batch.
    """
    if net.hosts_part:
        return partial(net.optimize(fuse=False), mask="all" if level == 0 else "none")
    return record(net, level, image)


def record(net: AdaptiveModel, level: int, image: Tensor, in_place: bool = True) -> GraphModule:
    """The recorded graph of a twin; without operations in place if asked."""
    folded = net.optimize(fuse=False)
    program, known = folded.program, list[Lattice]()

    def uniform(_: Tensor, features: Tensor) -> Lattice:
        if not known:  # the recording run reads the values of the first run's tables
            known.append(program.geometry.uniform_like(features, level))
        return known[0]

    def run(batch: Tensor) -> Any:
        return program(uniform, program.bind(batch))[0]

    with torch.no_grad():
        folded.run(uniform, image)  # an image that does not fit is refused here
        recorded = make_fx(run if in_place else torch.func.functionalize(run))(image)
    recorded.graph.eliminate_dead_code()
    recorded.recompile()
    return recorded
