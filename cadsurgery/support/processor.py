"""Describe the processor of this machine and the instruction sets in use, for reports.

This package does not import the compiled kernels; they register a function that names their instruction set
(`register_kernels`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.memory import bytes_of

# Variables that cap instruction sets: ours, torch's, oneDNN's (also of OpenVINO) and MKL's.
CAPS = ("CADSURGERY_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_KERNELS: list[Callable[[], str]] = []


class Processor(NamedTuple):
    """Description of a processor; fields that the operating system does not report are empty.

    Attributes:
        model: its name, e.g. "Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz".
        family: its vendor, family and model number, e.g. "GenuineIntel family 6 model 106".
        caches: the sizes of a core's caches, e.g. "L1d 48 KiB, L2 1.25 MiB, L3 48 MiB".
    """

    model: str
    family: str
    caches: str


@cache
def processor() -> Processor:
    """Return the description of this machine's processor."""
    if sys.platform == "darwin":
        return _macos_processor()
    fields = _cpuinfo()
    model = fields.get("model name") or fields.get("Hardware") or platform.processor()
    return Processor(model, _family(fields), _caches())


def processor_in_words() -> str:
    """Describe the processor in one line, with all caches except those of the first level."""
    model, family, caches = processor()
    outer = [cache for cache in caches.split(", ") if not cache.startswith("L1")]
    named = f"{model} ({platform.machine()} CPU)" if model else f"{platform.machine()} CPU"
    return ", ".join(part for part in (named, family, *outer) if part)


def register_kernels(used: Callable[[], str]) -> None:
    """Register the function that names the kernels' instruction set; it returns "" if no kernels run here."""
    _KERNELS[:] = [used]


def instruction_sets() -> dict[str, str]:
    """Return the instruction sets of the compiled `kernels` and of `torch`, and the variables that cap them, if set.

    Raises:
        InvalidInput: CADSURGERY_ISA names an unknown instruction set, or one that the processor lacks.
    """
    import torch  # imported late: programs that only import this module need not wait for torch

    kernels = _KERNELS[0]() if _KERNELS else ""
    caps = {name: os.environ[name] for name in CAPS if os.environ.get(name)}
    return {
        "kernels": kernels or "none (torch operations)",
        "torch": torch.backends.cpu.get_cpu_capability(),
        **caps,
    }


def sets_in_words(sets: Mapping[str, str]) -> str:
    """Describe instruction sets in one line: "kernels avx2, torch AVX2, capped by CADSURGERY_ISA=avx2"."""
    used = [f"{name} {value}" for name, value in sets.items() if name not in CAPS]
    caps = [f"{name}={value}" for name, value in sets.items() if name in CAPS]
    return ", ".join([*used, f"capped by {' '.join(caps)}"] if caps else used)


# -- queries to the operating system -------------------------------------------------------------------


def _cpuinfo() -> dict[str, str]:
    """Return the fields of /proc/cpuinfo for the first processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _family(fields: dict[str, str]) -> str:
    if "vendor_id" in fields:
        family, model = fields.get("cpu family", "?"), fields.get("model", "?")
        return f"{fields['vendor_id']} family {family} model {model}"
    if "CPU implementer" in fields:
        return f"implementer {fields['CPU implementer']} part {fields.get('CPU part', '?')}"
    return ""


def _caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> str:
    """List the first core's data and unified caches by level."""
    caches = []
    for index in sorted(folder.glob("index[0-9]*")):
        with contextlib.suppress(OSError, InvalidInput):
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                caches.append(f"L{level}{'d' if kind == 'Data' else ''} {_size(bytes_of(size))}")
    return ", ".join(caches)


def _size(count: int) -> str:
    return f"{count / (1 << 20):g} MiB" if count >= 1 << 20 else f"{count / (1 << 10):g} KiB"


def _macos_processor() -> Processor:
    def told(name: str) -> str:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["/usr/sbin/sysctl", "-n", name]
            return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
        return ""

    sizes = {name: told(f"hw.{name.lower()}cachesize") for name in ("L1d", "L2", "L3")}
    caches = ", ".join(f"{name} {_size(int(size))}" for name, size in sizes.items() if size.isdigit())
    family = told("hw.cpufamily")
    family = f"family {int(family):#x}" if family.lstrip("-").isdigit() else ""
    return Processor(told("machdep.cpu.brand_string") or platform.processor(), family, caches)
