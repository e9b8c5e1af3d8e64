"""The processor of this machine and the instruction sets in use, for reports.

The room of compiled code, which this one does not import, says here which instruction set it uses: `register_kernels`.
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

# Variables that cap instruction sets: ours, torch's, oneDNN's (also of OpenVINO) and MKL's.
CAPS = ("CADSURGERY_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_KERNELS: list[Callable[[], str]] = []


class Processor(NamedTuple):
    """A processor in words; empty strings where the operating system does not tell.

    Attributes:
        model: its name, as "Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz".
        family: its maker, family and model, as "GenuineIntel family 6 model 106".
        caches: the sizes of the caches of a core, as "L1d 48 KiB, L2 1.25 MiB, L3 48 MiB".
    """

    model: str
    family: str
    caches: str


@cache
def processor() -> Processor:
    """The processor of this machine."""
    if sys.platform == "darwin":
        return _of_macos()
    said = _cpuinfo()
    return Processor(
        said.get("model name") or said.get("Hardware") or platform.processor(), _family(said), _caches()
    )


def processor_in_words() -> str:
    """The processor in one line, with all caches but those of the first level."""
    model, family, caches = processor()
    outer = [cache for cache in caches.split(", ") if not cache.startswith("L1")]
    named = f"{model} ({platform.machine()} CPU)" if model else f"{platform.machine()} CPU"
    return ", ".join(part for part in (named, family, *outer) if part)


def register_kernels(used: Callable[[], str]) -> None:
    """Take the function that names the instruction set of the compiled kernels; it gives "" if none run here."""
    _KERNELS[:] = [used]


def instruction_sets() -> dict[str, str]:
    """The instruction sets of the compiled `kernels` and of `torch`, and the variables that cap them, if they are set.

    Raises:
        InvalidInput: CADSURGERY_ISA names an instruction set that there is not, or that the processor lacks.
    """
    import torch  # which programs that read this module need not wait for

    kernels = _KERNELS[0]() if _KERNELS else ""
    caps = {name: os.environ[name] for name in CAPS if os.environ.get(name)}
    return {
        "kernels": kernels or "none (torch operations)",
        "torch": torch.backends.cpu.get_cpu_capability(),
        **caps,
    }


def sets_in_words(sets: Mapping[str, str]) -> str:
    """Instruction sets in a line: "kernels avx2, torch AVX2, capped by CADSURGERY_ISA=avx2"."""
    used = [f"{name} {value}" for name, value in sets.items() if name not in CAPS]
    caps = [f"{name}={value}" for name, value in sets.items() if name in CAPS]
    return ", ".join([*used, f"capped by {' '.join(caps)}"] if caps else used)


# -- what the operating systems tell -------------------------------------------------------------------


def _cpuinfo() -> dict[str, str]:
    """The lines of /proc/cpuinfo about the first processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _family(said: dict[str, str]) -> str:
    if "vendor_id" in said:
        return f"{said['vendor_id']} family {said.get('cpu family', '?')} model {said.get('model', '?')}"
    if "CPU implementer" in said:
        return f"implementer {said['CPU implementer']} part {said.get('CPU part', '?')}"
    return ""


def _caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> str:
    """The caches of the first core that hold data, by their level."""
    found = []
    for index in sorted(folder.glob("index[0-9]*")):
        with contextlib.suppress(OSError, ValueError):
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
                scale = units.get(size[-1:], 1)
                bytes_ = int(size[:-1] if size[-1:] in units else size) * scale
                found.append(f"L{level}{'d' if kind == 'Data' else ''} {_size(bytes_)}")
    return ", ".join(found)


def _size(count: int) -> str:
    return f"{count / (1 << 20):g} MiB" if count >= 1 << 20 else f"{count / (1 << 10):g} KiB"


def _of_macos() -> Processor:
    asked = (
        "machdep.cpu.brand_string",
        "hw.cpufamily",
        "hw.l1dcachesize",
        "hw.l2cachesize",
        "hw.l3cachesize",
    )
    said = dict.fromkeys(asked, "")
    for name in asked:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=10
            )
            said[name] = done.stdout.strip()
    sizes = {"L1d": said[asked[2]], "L2": said[asked[3]], "L3": said[asked[4]]}
    caches = ", ".join(f"{name} {_size(int(size))}" for name, size in sizes.items() if size.isdigit())
    family = f"family {int(said[asked[1]]):#x}" if said[asked[1]].lstrip("-").isdigit() else ""
    return Processor(said[asked[0]] or platform.processor(), family, caches)
