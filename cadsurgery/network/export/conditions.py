"""Conditions on sizes in files for images of any size: one operation of the traced program for each of them.

ONNX has no assertions. A condition that does not hold fails in an engine, because maps of its two sizes do not fit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cadsurgery.elements.backends.graph_sizes import Condition
from cadsurgery.elements.backends.operators import define

define(
    "require_equal(Tensor map, SymInt one, SymInt other, str reason) -> Tensor",
    lambda map, one, other, reason: torch.empty_like(map),
)


def require(map: Tensor, conditions: Iterable[Condition]) -> Tensor:
    """Return a map, such as the image or the level map, that engines compute only where all conditions hold."""
    different = {str(condition): condition for condition in conditions}  # symbols have no hash
    for one, other, reason in different.values():
        map = torch.ops.cadsurgery.require_equal(map, one, other, reason)
    return map
