"""Share work among the processes of `torchrun` or `accelerate launch`; the first process reports.

Without a launcher there is one process, and Accelerate is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from cadsurgery.support.errors import import_optional
from cadsurgery.support.launcher import world
from cadsurgery.support.provenance import find_device

T = TypeVar("T")
_PATIENCE = timedelta(days=1)  # processes may finish their shares of a large folder hours apart


def shard(items: Sequence[T]) -> list[tuple[int, T]]:
    """Return this process's items with their positions: every `size`-th item, starting at its rank."""
    here = world()
    return list(islice(enumerate(items), here.rank, None, here.size))


def gather(share: T, device: torch.device) -> list[T]:
    """Return the values of all processes in order of rank; every process must call this function.

    Args:
        share: the value of this process; any picklable object.
        device: the device this process computes on; it decides the communication backend.
    """
    here = world()
    if here.size == 1:
        return [share]
    join(device)
    shares: list[Any] = [None] * here.size
    torch.distributed.all_gather_object(shares, share)
    return shares


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


def in_order(shares: Sequence[Sequence[tuple[int, T]]]) -> list[T]:
    """Return the items of gathered shares, sorted by position."""
    return [
        item for _, item in sorted((pair for share in shares for pair in share), key=lambda pair: pair[0])
    ]


def own_device(name: str) -> torch.device:
    """Return the device of this process: for `cuda` without an index, the GPU of its local rank.

    Raises:
        InvalidInput: no such device.
    """
    device, here = find_device(name), world()
    if device.type == "cuda" and device.index is None and here.size > 1:
        return find_device(f"cuda:{here.local_rank}")
    return device


def join(device: torch.device) -> None:
    """Initialise the communication between the processes, if it is not initialised yet.

    Raises:
        NotInstalled: Accelerate is missing.
    """
    what = f"{world().size} processes were launched, which needs Accelerate to merge their results."
    accelerate = import_optional("accelerate", what, "pip install 'cadsurgery[train]'")
    if not torch.distributed.is_initialized():
        accelerate.PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
