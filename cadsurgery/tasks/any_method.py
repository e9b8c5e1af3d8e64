"""A network that a method made, whichever it was."""

from __future__ import annotations

from cadsurgery.methods.anytime import AnytimeModel
from cadsurgery.methods.resampling import ResampledModel
from cadsurgery.methods.sampling import SampledModel
from cadsurgery.tasks.exits import open_exits
from cadsurgery.tasks.gates import open_gates
from cadsurgery.tasks.samples import open_resampled

Made = AnytimeModel | ResampledModel | SampledModel


def open_any(network: object, trust: bool = False) -> Made | None:
    """A network that any method made, or that of a file; None if it is no such.

    Args:
        network: anything that names a network, or one.
        trust: see `cadsurgery.load`.
    """
    return open_exits(network, trust) or open_gates(network, trust) or open_resampled(network, trust)
