"""The processes that train together under `torchrun` or `accelerate launch`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mean_everywhere(value: Tensor) -> Tensor:
    """Return the mean of a scalar over all training processes, without gradient; every process must call this."""
    mean = value.detach().clone()
    if (together := count_together()) > 1:
        torch.distributed.all_reduce(mean)
        mean = mean / together
    return mean


def count_together(group: Any = None) -> int:
    """Return the number of processes that train together, in a group or in all."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size(group) if joined else 1
