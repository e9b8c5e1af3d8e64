"""Peak memory of one call: how far it raises the resident set, in a process that does nothing else.

Linux only: the kernel keeps the peak of each process, and forgets it on request.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

from cadsurgery.support import alone

PROCESS = Path("/proc/self")
# From this many bytes on, glibc maps memory and gives it back when it is freed. By default the limit grows to 32 MiB
# with what is freed, and below it the heap keeps holes that the next tensor does not fit: as much again, another amount
# in every run.
_MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def is_measurable() -> bool:
    """True if this system tells a process its own peak."""
    return (PROCESS / "status").exists()


def peak_raised_by(run: Callable[[], object]) -> float:
    """MiB by which a call raises the peak of the resident set above what is resident before it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not every C library can give freed memory back
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # where the peak cannot be forgotten, the one so far is the base
        (PROCESS / "clear_refs").write_text("5")
    before = _peak_mib()
    run()
    return _peak_mib() - before


def run_alone(module: str, function: str, argument: str) -> str:
    """The last line that a function of a string prints in a new process with this one's import path.

    The process gives freed memory back at once, so that a peak is what is in use then, not what the C library keeps.

    Raises:
        CadError: the process failed.
    """
    advice = "give a smaller size, or leave out memory."
    return alone.run_alone(module, function, argument, _MAPPED, task="measure memory", next=advice)


def _peak_mib() -> float:
    """Peak of this process alone; `getrusage` would start from that of its parent."""
    lines = (PROCESS / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
