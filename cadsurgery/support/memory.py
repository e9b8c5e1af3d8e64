"""Measure the peak memory of one call: the growth of the resident set in a process that does nothing else.

Linux only: its kernel records the peak of each process and resets it on request.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

from cadsurgery.support import alone

PROCESS = Path("/proc/self")
# Allocations from this many bytes on are mapped by glibc and returned to the system when freed. Its default threshold
# grows up to 32 MiB; smaller allocations leave holes in the heap, which can double the peak by a different amount in
# every run.
_MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def is_measurable() -> bool:
    """True if the system reports the peak memory of a process (Linux)."""
    return (PROCESS / "status").exists()


def peak_raised_by(run: Callable[[], object]) -> float:
    """Return by how many MiB a call raises the peak of the resident set above its size before the call."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not every C library can return freed memory
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # if the peak cannot be reset, the peak so far is the base
        (PROCESS / "clear_refs").write_text("5")
    before = _peak_mib()
    run()
    return _peak_mib() - before


def run_alone(module: str, function: str, argument: str) -> str:
    """Call a function with a string in a new process and return the last line that it prints.

    The process returns freed memory to the system at once, so that its peak counts only memory in use.

    Raises:
        CadError: the process failed.
    """
    advice = "give a smaller size, or leave out memory."
    return alone.run_alone(module, function, argument, _MAPPED, task="measure memory", next=advice)


def _peak_mib() -> float:
    """Return the peak of this process alone; `getrusage` would include the peak of its parent."""
    lines = (PROCESS / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
