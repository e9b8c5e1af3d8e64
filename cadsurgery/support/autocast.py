"""torch.autocast: operands in its type, and blocks without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Devices that support torch.autocast. Queried at import, because torch.compile before 2.15 cannot trace the query.
_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)
)


def autocast(*values: Any) -> tuple[Any, ...]:
    """Cast the operands to the dtype of torch.autocast if it is enabled, as F.conv2d does."""
    device = values[0].device.type
    if device not in _AUTOCAST or not torch.is_autocast_enabled(device):
        return values
    dtype = torch.get_autocast_dtype(device)
    return tuple(value.to(dtype) if value is not None else None for value in values)


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Return a context without torch.autocast: matrix products keep the dtype of their operands, for precise sums."""
    device = like.device.type
    if device not in _AUTOCAST or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
