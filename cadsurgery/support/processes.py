"""Several processes under `accelerate launch` or `torchrun`: each takes its share, the first one tells.

Without a launcher it is one process, and nothing here needs Accelerate. `accelerate launch --cpu` starts one process of
those it was asked for, and leaves the others to MPI; `start_others` starts them, as Lightning's launcher does.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from cadsurgery.support.errors import CadError, InvalidInput
from cadsurgery.support.provenance import device_named

T = TypeVar("T")
_PATIENCE = timedelta(days=1)  # shares of a large folder may differ by hours
_GRACE = 15.0  # seconds in which processes end on their own once one of them has


class World(NamedTuple):
    """This process among all: its number, of how many, and its number on this machine."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0


def world() -> World:
    """What the launcher says, by the environment variables of torchrun or MPI; (0, 1, 0) without one."""
    rank, size, local = (
        next((int(os.environ[name]) for name in names if os.environ.get(name)), number)
        for names, number in _VARIABLES
    )
    return World(rank, size, local) if size > 1 else World(0, 1, 0)


def shard(items: Sequence[T]) -> list[tuple[int, T]]:
    """The share of this process, each item with its position among all: every `size`-th, from its rank on."""
    here = world()
    return list(enumerate(items))[here.rank :: here.size]


def gathered(share: T, device: torch.device) -> list[T]:
    """What every process has, in order of rank, in every process; all must call it.

    Args:
        share: of this process; anything that can be pickled.
        device: this process computes on; it decides how they talk.
    """
    here = world()
    if here.size == 1:
        return [share]
    join(device)
    shares: list[Any] = [None] * here.size
    torch.distributed.all_gather_object(shares, share)
    return shares


def mean_everywhere(value: Tensor) -> Tensor:
    """The mean of a scalar over the processes that train together, without gradient; all must call it."""
    mean = value.detach().clone()
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if together and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(mean)
        mean = mean / torch.distributed.get_world_size()
    return mean


def in_order(shares: Sequence[Sequence[tuple[int, T]]]) -> list[T]:
    """The items of gathered shares, by their position among all."""
    return [
        item for _, item in sorted((pair for share in shares for pair in share), key=lambda pair: pair[0])
    ]


def own_device(name: str) -> torch.device:
    """The device of this process: on CUDA without a number, the one of its number on this machine.

    Raises:
        InvalidInput: no such device.
    """
    device, here = device_named(name), world()
    if device.type == "cuda" and device.index is None and here.size > 1:
        return device_named(f"cuda:{here.local_rank}")
    return device


def join(device: torch.device) -> None:
    """Make the processes able to talk, if they are not yet.

    Raises:
        CadError: Accelerate is missing.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise CadError(
            f"{world().size} processes were launched, which needs Accelerate to merge their results.",
            next="pip install 'cadsurgery[train]'",
        ) from error
    if not torch.distributed.is_initialized():
        PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)


def start_others() -> None:
    """Start the processes that `accelerate launch --cpu --num_processes N` was asked for and did not start; nothing
    in any other case.

    They run the command of this process, which becomes the first of them. It ends when one of them fails, and waits
    for them, or stops them, when it ends. Call it before anything looks at `world`.

    Raises:
        InvalidInput: the launcher does not say how many, asks for several machines, or this process has begun alone.
    """
    environment = os.environ
    if environment.get("ACCELERATE_USE_CPU", "").lower() != "true" or "MASTER_ADDR" not in environment:
        return
    if world().size > 1 or environment.get("WORLD_SIZE"):
        return
    count, port = _asked_for()
    here = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port or _free_port()}
    environment.update({name: str(value) for name, value in here.items()}, RANK="0", LOCAL_RANK="0")
    command = [sys.executable, *sys.orig_argv[1:]]
    others = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(1, count)
    ]
    atexit.register(_see_off, others)
    for rank, other in enumerate(others, 1):
        threading.Thread(target=_watch, args=(rank, other, others), daemon=True).start()


def _asked_for() -> tuple[int, int | None]:
    """How many processes the launcher that started this one was asked for, and on which port they meet, if it says.

    Raises:
        InvalidInput: it is no launcher, says it nowhere, or asks for several machines; or Accelerate runs already.
    """
    refusal = InvalidInput(
        "several processes were asked for, but one was started.",
        why="accelerate launch --cpu starts the others through MPI only, and does not say how many.",
        next="start it by torchrun --nproc_per_node N, or by accelerate launch --cpu --num_processes N itself.",
    )
    try:
        import psutil
        from accelerate.commands.config.config_args import load_config_from_file
        from accelerate.commands.launch import launch_command_parser
        from accelerate.state import PartialState

        words = psutil.Process().parent().cmdline()
    except (ImportError, AttributeError, OSError, psutil.Error):
        raise refusal from None
    start = next(
        (at for at, word in enumerate(words) if os.path.basename(word).startswith("accelerate")), None
    )
    if start is None:
        raise refusal
    # What follows `accelerate launch`, `accelerate-launch` or `-m accelerate.commands.launch`.
    rest = words[start + 1 :]
    options, _ = launch_command_parser().parse_known_args(rest[1:] if rest[:1] == ["launch"] else rest)
    config: Any = None
    with contextlib.suppress(OSError):
        config = load_config_from_file(options.config_file)
    count = options.num_processes or getattr(config, "num_processes", None)
    machines = options.num_machines or getattr(config, "num_machines", None) or 1
    if not count or count < 2 or machines > 1:
        raise refusal
    if PartialState._shared_state:
        raise InvalidInput(
            f"{count} processes were asked for, but this one has begun alone.",
            why="it used Accelerate before it came here.",
            next="start it by torchrun, or make your Accelerator after calling fit or evaluate.",
        )
    return count, options.main_process_port


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _watch(rank: int, other: subprocess.Popen[bytes], others: Sequence[subprocess.Popen[bytes]]) -> None:
    """End this process, soon, if another one has failed: it would wait for it forever."""
    code = other.wait()
    if code and not _leaving.wait(_GRACE):  # its own error says more
        _stop(others)
        _fail(rank, code)


def _see_off(others: Sequence[subprocess.Popen[bytes]]) -> None:
    """At the end of this process: the others should end too, or are stopped; if one failed, this one fails."""
    _leaving.set()
    for other in others:
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.wait(_GRACE)
    failed = [(rank, other.returncode) for rank, other in enumerate(others, 1) if other.poll()]
    _stop(others)
    if failed:
        _fail(*failed[0])


def _stop(others: Sequence[subprocess.Popen[bytes]]) -> None:
    for other in others:
        if other.poll() is None:
            other.terminate()


def _fail(rank: int, code: int) -> None:
    """End this process at once because another one has failed."""
    sys.stdout.flush()
    sys.stderr.write(f"process {rank} failed with exit code {code}.\n")
    sys.stderr.flush()
    os._exit(max(code, 1))


_leaving = threading.Event()

# By torchrun (which `accelerate launch` uses on several GPUs), and by the MPI that it uses on several machines of CPUs.
_VARIABLES = (
    (("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"), 0),
    (("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"), 1),
    (("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"), 0),
)
