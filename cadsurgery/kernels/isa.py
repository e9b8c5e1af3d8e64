"""The instruction sets that the kernels may use on this processor.

CADSURGERY_ISA caps them, as ONEDNN_MAX_CPU_ISA caps oneDNN's: no form that needs more than the named set is chosen.
"""

from __future__ import annotations

import os
from functools import cache

from cadsurgery.kernels import build
from cadsurgery.kernels.library import library
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.processor import (
    Processor,
    instruction_sets,
    processor,
    register_kernels,
    sets_in_words,
)

__all__ = ["ISAS", "VARIABLE", "Processor", "allowed", "here", "in_words", "processor", "used"]

VARIABLE = "CADSURGERY_ISA"
ISAS: tuple[str, ...] = tuple(one.name for one in build.instruction_sets())


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
    """The instruction sets in use, for reports: "kernels avx2, torch AVX2, capped by CADSURGERY_ISA=avx2".

    Raises:
        InvalidInput: see `allowed`.
    """
    return sets_in_words(instruction_sets())


register_kernels(used)
