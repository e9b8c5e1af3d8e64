"""Determine the instruction sets that the kernels may use on this processor.

The variable CADSURGERY_ISA caps them, like ONEDNN_MAX_CPU_ISA for oneDNN: only forms within the named set are chosen.
"""

from __future__ import annotations

import os
from functools import cache

from cadsurgery.kernels import build
from cadsurgery.kernels.load import library
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
ISAS: tuple[str, ...] = tuple(isa.name for isa in build.instruction_sets())


def here() -> tuple[str, ...]:
    """Return the instruction sets that this processor has, narrowest first; empty without a compiled library."""
    compiled = library()
    return () if compiled is None else _names(int(compiled.processor_features()))


def _names(features: int) -> tuple[str, ...]:
    available = {name for bit, name in enumerate(build.FEATURES) if features >> bit & 1}
    return tuple(isa.name for isa in build.instruction_sets() if available.issuperset(isa.needs))


@cache
def cap() -> str:
    """Return the value of CADSURGERY_ISA in lower case; it is read once, and again after `dispatch.forget`."""
    return os.environ.get(VARIABLE, "").strip().lower()


def allowed() -> tuple[str, ...]:
    """Return the instruction sets of `here()` that the variable CADSURGERY_ISA allows, narrowest first.

    The cap allows every set whose features it includes: avx2 allows scalar, sse4 and avx2; avx512 allows these and
    avx512, but not avxvnni.

    Raises:
        InvalidInput: the variable names an unknown instruction set, or one that this processor lacks.
    """
    return _allowed(cap(), here())


@cache
def _allowed(name: str, available: tuple[str, ...]) -> tuple[str, ...]:
    if not name:
        return available
    needs = {isa.name: set(isa.needs) for isa in build.instruction_sets()}
    if name not in needs:
        raise InvalidInput(
            f"there is no instruction set named {name!r}.",
            where=f"the environment variable {VARIABLE}",
            why=f"the kernels are compiled for {', '.join(ISAS)}.",
            next=f"set it to one of {', '.join(available or ISAS)}, or unset it.",
        )
    if available and name not in available:
        raise InvalidInput(
            f"this processor does not have the instruction set {name}.",
            where=f"the environment variable {VARIABLE}",
            why=f"{processor().model or 'it'} has {', '.join(available)}.",
            next=f"set it to one of {', '.join(available)}, or unset it.",
        )
    return tuple(isa for isa in available if needs[isa] <= needs[name])


def used() -> str:
    """Return the widest allowed instruction set; empty without a compiled library, when torch's operations run.

    Raises:
        InvalidInput: see `allowed`.
    """
    return next(reversed(allowed()), "")


def in_words() -> str:
    """Describe the instruction sets in use, for reports: "kernels avx2, torch AVX2, capped by CADSURGERY_ISA=avx2".

    Raises:
        InvalidInput: see `allowed`.
    """
    return sets_in_words(instruction_sets())


register_kernels(used)
