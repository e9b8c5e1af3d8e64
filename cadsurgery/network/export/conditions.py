"""Conditions on sizes in files for images of any size: one operation of the traced program for each of them.

ONNX has no assertions. A condition that does not hold fails in an engine, because maps of its two sizes do not fit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cadsurgery.elements.backends.target import Condition

_LIBRARY = torch.library.Library("cadsurgery", "FRAGMENT")
_LIBRARY.define("require_equal(Tensor levels, SymInt one, SymInt other, str reason) -> Tensor")


@torch.library.register_fake("cadsurgery::require_equal")
def _same(levels: Tensor, one: int, other: int, reason: str) -> Tensor:
    return torch.empty_like(levels)


def require(levels: Tensor, conditions: Iterable[Condition]) -> Tensor:
    """Return a level map that engines compute only where all conditions hold."""
    different = {str(condition): condition for condition in conditions}  # symbols have no hash
    for one, other, reason in different.values():
        levels = torch.ops.cadsurgery.require_equal(levels, one, other, reason)
    return levels
