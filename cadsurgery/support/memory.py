"""Amounts of memory: from what users write, and in words."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cadsurgery.support.errors import InvalidInput

_MOST_DIGITS = 6  # behind the point of MiB: one byte
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors of Python and torch for memory that the system does not give; on the CPU torch has no class
    of its own for it."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def bytes_of(memory: int | str) -> int:
    """Return a number of bytes, given as such or as a text, such as `1.5GiB`, `800 MiB` or `2GB` (2 * 10^9).

    Raises:
        InvalidInput: it is no amount of memory.
    """
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)\s*", str(memory), re.IGNORECASE)
    if not isinstance(memory, str) or found is None or not float(found[1]):
        raise InvalidInput(
            f"memory={memory!r} is no amount of memory.",
            next='give bytes, or a text such as "1.5GiB", "800MiB" or "2GB".',
        )
    unit = found[2].upper()
    is_decimal = bool(unit and found[4] and not found[3])
    return int(float(found[1]) * (_DECIMAL[f"{unit}B"] if is_decimal else _UNITS[unit]))


def free_memory() -> int | None:
    """Return the bytes of memory that processes can still get; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def peak_memory() -> int:
    """Return the largest number of bytes of memory that this process has taken; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_mebibytes(amount: float, *others: float) -> str:
    """Return an amount of memory in MiB, or in KiB where it is less than one, rounded up, with the digits that tell it
    from other amounts."""
    unit, name = (2**20, "MiB") if amount >= 2**20 else (2**10, "KiB")
    digits = 0
    while digits < _MOST_DIGITS and any(
        _rounded_up(amount, unit, digits) == _rounded_up(other, unit, digits)
        for other in others
        if int(other) != int(amount)
    ):
        digits += 1
    return f"{_rounded_up(amount, unit, digits):.{digits}f} {name}"


def _rounded_up(amount: float, unit: int, digits: int) -> float:
    return -(-int(amount) * 10**digits // unit) / 10**digits
