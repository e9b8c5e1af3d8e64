"""Choose the backend of each work: the first in the table that applies.

A work is a value that describes a computation: the operands, where they are read, and the requested result. A backend
has one method for each task that it supports, and a method that says if it applies to a work. The table (`table.py`)
is tried in order. Torch is last, supports every work, and is the reference (`tests/laws/test_backend_laws.py`).

The choice is made once for each layer and each kind of lattice that it reads (see `Work.case`), and is stored with
the layer's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from cadsurgery.kernels.dispatch import setting
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.running import running


class Misfit(InvalidInput):
    """A layer is given other channels, or another number of values, than it reads: a backend that reads memory in place
    would read beyond it."""


def check_channels(given: int, taken: int) -> None:
    """Refuse values of another number of channels than a layer takes.

    Raises:
        Misfit: the numbers differ.
    """
    if given != taken:
        raise Misfit(
            f"a layer is given {given} channel{'s' * (given != 1)} and takes {taken}.",
            why="its weights are for so many.",
            next="give the network an image of the kind that it was converted with.",
        )


@dataclass(frozen=True, eq=False)
class Work:
    """A computation on rows (N, C); `task` names the backend method that carries it out."""

    rows: Tensor
    task: ClassVar[str]

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """Tensors that a gradient may be asked for."""
        return (self.rows,)

    @property
    def gradient(self) -> bool:
        """True if a gradient with respect to an operand will be asked for."""
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.operands)

    @property
    def graph(self) -> Literal["", "compiled", "exported"]:
        """The kind of graph that torch is tracing now: none, one to compile, or one to export."""
        if not running.in_graph:
            return ""
        return "exported" if running.is_exported else "compiled"

    @property
    def is_inference(self) -> bool:
        """True if neither gradients are needed nor a graph is traced."""
        return not (self.gradient or self.graph)

    def check(self) -> None:
        """Refuse operands that do not fit; the one place where layers are compared with what they are given.

        Raises:
            Misfit: see above.
        """

    @property
    def case(self) -> tuple[Hashable, ...]:
        """Everything the choice of a backend may depend on."""
        return self.task, self.rows.dtype, self.rows.device.type

    @property
    def choices(self) -> dict[Hashable, Choice]:
        """The dictionary in which the choice is stored."""
        return CHOICES

    def on_shapes(self) -> Tensor | None:
        """Return the result of rows on the meta device, which have no values, so that no table of positions is made
        for them; None if the backends compute it."""
        return None


class Backend:
    """An implementation of works, with one method per supported task, named like the task."""

    name: str

    def applies(self, work: Any) -> bool:
        """Return True if the backend supports works of this case (`Work.case`); called only for tasks it has.

        The answer may depend on device, dtype, groups, gradient, graph and kind of lattices; it is cached per case.
        """
        raise NotImplementedError

    def prepare(self, work: Any) -> Callable[[Any], Any]:
        """Return a function that computes works of this case; preparations that depend on the case alone go here."""
        run: Callable[[Any], Any] = getattr(self, work.task)
        return run


class Choice(NamedTuple):
    """A backend for works of a case, and what computes these."""

    backend: Backend
    run: Callable[[Any], Any]


# The table, see `table.py`. Users insert their own backends as into any list.
BACKENDS: list[Backend] = []

# Choices for works whose layer does not store them.
CHOICES: dict[Hashable, Choice] = {}
_MOST_CHOICES = 1024


def choose(work: Work) -> Choice:
    """Return the choice for a work: the first backend that applies."""
    return _choose_among(BACKENDS, work) if running.in_graph else _choose_once(work)


def _choose_once(work: Work) -> Choice:
    """Return the choice that is stored for the case of a work, or store it."""
    gradient = torch.is_grad_enabled() and work.gradient
    key = (work.case, gradient, running.is_observed, running.target, setting(), *BACKENDS)
    choices = work.choices
    found = choices.get(key)
    if found is None:
        if len(choices) >= _MOST_CHOICES:
            choices.clear()
        found = choices[key] = _choose_among(BACKENDS, work)
    return found


def choose_after(work: Work, backend: Backend) -> Choice:
    """Return the choice for a work among the backends after `backend` in the table."""
    return _choose_among(BACKENDS[BACKENDS.index(backend) + 1 :], work)


def _choose_among(backends: list[Backend], work: Work) -> Choice:
    for backend in backends:
        if hasattr(backend, work.task) and backend.applies(work):
            return Choice(backend, backend.prepare(work))
    raise AssertionError("torch, the last of the table, takes every work")


def compute(work: Work, choice: Choice | None = None) -> Any:
    """Compute a work with the given choice, or with the chosen backend; profiles show the backend's name.

    Raises:
        Misfit: its operands do not fit.
    """
    if running.in_graph:  # it is checked by torch, and compiled again for other shapes
        return (choice or _choose_among(BACKENDS, work)).run(work)
    work.check()
    if work.rows.is_meta and (result := work.on_shapes()) is not None:
        return result
    chosen = choice or _choose_once(work)
    if running.is_profiled:
        with torch.profiler.record_function(f"{work.task} ({chosen.backend.name})"):
            return chosen.run(work)
    return chosen.run(work)
