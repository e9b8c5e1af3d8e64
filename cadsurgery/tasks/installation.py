"""`cadsurgery --version`: versions, processor, instruction sets, and the state of the compiled kernels."""

from __future__ import annotations

from cadsurgery.kernels import isa
from cadsurgery.kernels.load import open_kernels
from cadsurgery.support.processor import processor_in_words
from cadsurgery.support.provenance import commit, versions


def describe_installation() -> str:
    """Describe the installation in a few lines, for reports about speed.

    Raises:
        InvalidInput: CADSURGERY_ISA names an unknown instruction set, or one that the processor lacks.
    """
    ours, *others = (f"{name} {number}" for name, number in versions().items())
    at = f" (commit {commit()})" if commit() else ""
    kernels = open_kernels()
    state = f"none: {kernels.reason}; torch's operations take their place"
    available = f"; the processor has {', '.join(isa.here())}" if kernels.library is not None else ""
    return "\n".join(
        (
            f"{ours}{at}",
            ", ".join(others),
            f"processor: {processor_in_words()}",
            f"instruction sets: {isa.in_words()}{available}",
            f"compiled kernels: {state if kernels.library is None else 'in the package'}",
        )
    )
