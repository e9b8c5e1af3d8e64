"""The processor of this machine and the instruction sets in use, for reports.

The instruction sets of our own compiled code are known to the room `kernels`, which says them here when it is imported
(`register_kernels`): this room imports none.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

CAPS = ("CADSURGERY_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
WITHOUT_KERNELS = "none"
_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_KERNELS: list[Callable[[], str]] = []


class Processor(NamedTuple):
    """A processor as the system describes it; a text is empty where the system does not tell.

    Attributes:
        model: its name, such as "Intel(R) Xeon(R) Processor @ 2.80GHz".
        family: vendor, family and model as numbers, which tell apart processors of one name.
        caches: of one core, such as "L1d 48 KiB, L2 1.25 MiB, L3 48 MiB".
    """

    model: str
    family: str
    caches: str


@cache
def processor() -> Processor:
    """The processor of this machine."""
    if platform.system() == "Darwin":
        sizes = ((name, _sysctl(key)) for name, key in _DARWIN_CACHES.items())
        caches = ", ".join(f"{name} {_size(int(size))}" for name, size in sizes if size.isdigit())
        return Processor(_sysctl("machdep.cpu.brand_string"), "", caches)
    told = _cpuinfo()
    vendor = told.get("vendor_id") or told.get("CPU implementer", "")
    family, number = told.get("cpu family", ""), told.get("model") or told.get("CPU part", "")
    parts = (vendor, family and f"family {family}", number and f"model {number}")
    model = told.get("model name", "") or platform.processor()
    return Processor(model, " ".join(part for part in parts if part), ", ".join(_linux_caches()))


def processor_in_words() -> str:
    """The processor in one line, without the cache of the first level."""
    model, family, caches = processor()
    outer = ", ".join(cache for cache in caches.split(", ") if cache and not cache.startswith("L1"))
    named = f"{model} ({platform.machine()} CPU)" if model else f"{platform.machine()} CPU"
    return ", ".join(part for part in (named, family, outer) if part)


def register_kernels(used: Callable[[], str]) -> None:
    """Let the room of compiled code say which instruction set it uses; "" where it runs no code of its own."""
    _KERNELS[:] = [used]


def instruction_sets() -> dict[str, str]:
    """The instruction sets in use, of our compiled code (`kernels`) and of `torch`, and the variables that cap them."""
    import torch  # this module is read by programs that do not wait for it

    kernels = _KERNELS[0]() if _KERNELS else ""
    caps = {name: os.environ[name] for name in CAPS if os.environ.get(name)}
    return {"kernels": kernels or WITHOUT_KERNELS, "torch": torch.backends.cpu.get_cpu_capability(), **caps}


def in_words(sets: dict[str, str]) -> str:
    """Instruction sets in one line: "kernels avx2, torch AVX2, CADSURGERY_ISA=avx2"."""
    return ", ".join(f"{name}={used}" if name in CAPS else f"{name} {used}" for name, used in sets.items())


# -- what the systems tell -----------------------------------------------------------------------------

_DARWIN_CACHES = {
    "L1d": "hw.perflevel0.l1dcachesize",
    "L2": "hw.perflevel0.l2cachesize",
    "L3": "hw.l3cachesize",
}


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo."""
    told: dict[str, str] = {}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            told.setdefault(name.strip(), value.strip())
    return told


def _linux_caches() -> Iterator[str]:
    """Data caches of the first core, each a name and a size."""
    for folder in sorted(_CACHES.glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                yield f"L{level}{'d' if kind == 'Data' else ''} {_size(int(size.removesuffix('K')) << 10)}"


def _size(count: int) -> str:
    """A number of bytes in KiB or MiB."""
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count / 2**10:g} KiB"


def _sysctl(name: str) -> str:
    """A value that macOS keeps under a name; empty if it keeps none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ("sysctl", "-n", name)
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return ""
