"""The processor: its name, its caches, and the instruction sets that the kernels may use on it.

CADSURGERY_ISA caps them, as ONEDNN_MAX_CPU_ISA caps oneDNN's: no form that needs more than the named set is chosen.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from cadsurgery.kernels import build
from cadsurgery.kernels.library import library
from cadsurgery.support.errors import InvalidInput

VARIABLE = "CADSURGERY_ISA"
ISAS: tuple[str, ...] = tuple(one.name for one in build.instruction_sets())
_CAPS = (VARIABLE, "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


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


def here() -> tuple[str, ...]:
    """The names of the instruction sets that this processor has, narrowest first; none without a library to ask."""
    compiled = library()
    return () if compiled is None else _names(int(compiled.processor_features()))


def _names(features: int) -> tuple[str, ...]:
    had = {name for bit, name in enumerate(build.FEATURES) if features >> bit & 1}
    return tuple(one.name for one in build.instruction_sets() if had.issuperset(one.needs))


def allowed() -> tuple[str, ...]:
    """The names of those of `here()` that the variable CADSURGERY_ISA allows, narrowest first.

    An instruction set is allowed if all that it needs is needed by the one that is named, too: avx2 allows scalar, sse4
    and avx2; avx512 allows avx512 besides, but not avxvnni.

    Raises:
        InvalidInput: the variable names an instruction set that there is not, or that this processor lacks.
    """
    return _allowed(os.environ.get(VARIABLE, "").strip().lower(), here())


@cache
def _allowed(cap: str, had: tuple[str, ...]) -> tuple[str, ...]:
    if not cap:
        return had
    needs = {one.name: set(one.needs) for one in build.instruction_sets()}
    if cap not in needs:
        raise InvalidInput(
            f"there is no instruction set named {cap!r}.",
            where=f"the environment variable {VARIABLE}",
            why=f"the kernels are compiled for {', '.join(ISAS)}.",
            next=f"set it to one of {', '.join(had or ISAS)}, or unset it.",
        )
    if had and cap not in had:
        raise InvalidInput(
            f"this processor does not have the instruction set {cap}.",
            where=f"the environment variable {VARIABLE}",
            why=f"{processor().model or 'it'} has {', '.join(had)}.",
            next=f"set it to one of {', '.join(had)}, or unset it.",
        )
    return tuple(name for name in had if needs[name] <= needs[cap])


def used() -> str:
    """The name of the widest instruction set that is allowed; empty without a library, where torch's operations run.

    Raises:
        InvalidInput: see `allowed`.
    """
    return next(reversed(allowed()), "")


def in_words() -> str:
    """The instruction sets in use, for reports: "kernels avx2; torch AVX2; caps: CADSURGERY_ISA=avx2".

    Raises:
        InvalidInput: see `allowed`.
    """
    parts = [
        f"kernels {used() or 'none (torch operations)'}",
        f"torch {torch.backends.cpu.get_cpu_capability()}",
    ]
    caps = [f"{name}={os.environ[name]}" for name in _CAPS if os.environ.get(name)]
    return "; ".join([*parts, f"caps: {', '.join(caps)}"] if caps else parts)
