"""Which of several processes this is, as `torchrun`, `accelerate launch` or MPI say by environment variables.

Nothing here imports torch, so that commands that need no network can tell who prints.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from cadsurgery.support.errors import InvalidInput

# Set by torchrun (which `accelerate launch` uses on several GPUs) and by MPI (which it uses on several CPU machines).
_VARIABLES = (
    (("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"), 0),
    (("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"), 1),
)


class World(NamedTuple):
    """This process among all: its rank, and the number of processes."""

    rank: int
    size: int


def world() -> World:
    """Return rank and size from the environment variables of torchrun or MPI; (0, 1) without a launcher.

    Raises:
        InvalidInput: `accelerate launch --cpu` was asked for several processes, but it starts only one without MPI.
    """
    rank, size = (
        next((int(os.environ[name]) for name in names if os.environ.get(name)), number)
        for names, number in _VARIABLES
    )
    of_accelerate = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    if of_accelerate and size == 1 and not os.environ.get("WORLD_SIZE"):
        raise InvalidInput(
            "several processes were asked for, but one was started.",
            why="accelerate launch --cpu starts the others through MPI only.",
            next="start them by torchrun --nproc_per_node N, with --device cpu at the end of a command.",
        )
    return World(rank, size) if size > 1 else World(0, 1)
