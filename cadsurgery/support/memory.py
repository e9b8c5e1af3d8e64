"""Amounts of memory: from what users write, and in words."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cadsurgery.support.errors import InvalidInput

_MOST_DIGITS = 6  # behind the point of MiB: one byte
_UNITS = ("", "K", "M", "G", "T")


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors of Python and torch for memory that the system does not give; on the CPU torch has no class
    of its own for it."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


AUTO = "auto"
# Of free memory so many bytes, or one of so many parts, are left to others.
_MARGIN, _MARGIN_SHARE = 2**28, 4


def bytes_of(memory: int | str) -> int:
    """Return a number of bytes, given as such or as a text, such as `1.5GiB`, `800 MiB` or `2GB` (2 * 10^9); of `auto`
    what is free, less a quarter of it, at least 256 MiB, but never less than half.

    Raises:
        InvalidInput: it is no amount of memory, or the system does not tell what is free.
    """
    if isinstance(memory, str) and memory.strip().lower() == AUTO:
        free = free_memory()
        if free is None:
            raise InvalidInput(
                "the system does not tell how much memory is free.",
                where=f"memory={AUTO}",
                next='give an amount, such as "1.5GiB".',
            )
        return max(free - max(free // _MARGIN_SHARE, _MARGIN), free // 2, 1)
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)\s*", str(memory), re.IGNORECASE)
    if not isinstance(memory, str) or found is None or not float(found[1]):
        raise InvalidInput(
            f"memory={memory!r} is no amount of memory.",
            next='give bytes, a text such as "1.5GiB", "800MiB" or "2GB", or "auto" for what is free.',
        )
    base = 1000 if found[4] and not found[3] else 1024
    return int(float(found[1]) * base ** _UNITS.index(found[2].upper()))


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process can still get: what the machine has free, or less where its control
    groups (of a container or a batch system) have less; None where the system does not tell.

    Args:
        root: where the file systems of the kernel are.
    """
    found = list[int]()
    with suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                found += _free_in_groups(root / "sys/fs/cgroup", path, _NAMES)
            elif "memory" in controllers.split(","):
                found += _free_in_groups(root / "sys/fs/cgroup/memory", path, _NAMES_OF_VERSION_1)
    return min(found, default=None)


# Files of a control group: limits, what is taken, and what of it is files that the kernel can drop.
_NAMES = (("memory.max", "memory.high"), "memory.current", "inactive_file")
_NAMES_OF_VERSION_1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def _free_in_groups(root: Path, path: str, names: tuple[tuple[str, ...], str, str]) -> Iterator[int]:
    """Yield what is free in a control group and those around it, each of which may have a limit. In a container the
    path may be that of its host: then its own group is at the root."""
    limits, taken, droppable = names
    inside = root / path.strip("/")
    groups = [inside, *inside.parents]
    for group in groups[: groups.index(root) + 1]:
        for limit in limits:
            with suppress(OSError, ValueError):  # no such group, or no limit: max
                most = int((group / limit).read_text(encoding="ascii"))
                used = int((group / taken).read_text(encoding="ascii"))
                stated = (group / "memory.stat").read_text(encoding="ascii").splitlines()
                files = sum(int(line.split()[1]) for line in stated if line.split()[:1] == [droppable])
                yield max(most - used + min(files, used), 0)


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
