"""Graphs for engines other than torch: gathers and products of rows in the few operations that every engine has.

Torch's own choices are slow in other engines: convolutions used as products of rows on the CPU need transpositions
before and after, and `embedding_bag` is a loop in ONNX.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.backends.choose import (
    Backend,
    Convolution,
    Mixing,
    Pooling,
    Work,
    extend,
)

_IS_PORTABLE: ContextVar[bool] = ContextVar(
    "whether the graph that is made is for another engine", default=False
)


@contextmanager
def portable() -> Iterator[None]:
    """Enter a context in which graphs are traced for engines other than torch."""
    token = _IS_PORTABLE.set(True)
    try:
        yield
    finally:
        _IS_PORTABLE.reset(token)


class Portable(Backend):
    """Operations in a graph for another engine."""

    name = "portable"

    def applies(self, work: Work) -> bool:
        """Return True while such a graph is traced."""
        return _IS_PORTABLE.get()

    def convolve(self, work: Convolution) -> Tensor:
        """Compute rows (N, ..., O)."""
        weights = work.weights
        groups, bias = weights.groups, weights.bias
        if work.is_product:
            return weights.finish(F.linear(work.of_target, weights.weight.flatten(1), bias), work.residual)
        reading = work.reading
        rows, table = extend(work.rows, reading, work.outside), reading.table
        outputs, inputs = weights.weight.shape[:2]
        if groups == 1:  # taps outermost, which is the order of gathered rows
            matrix = weights.weight.flatten(2).permute(0, 2, 1).reshape(outputs, -1)
            gathered = _gather(rows, table).flatten(1)
            return weights.finish(F.linear(gathered, matrix, bias), work.residual)
        taps = weights.weight.flatten(2).unflatten(0, (groups, -1))  # (groups, O / groups, C / groups, taps)
        out: Tensor | None = None
        for tap, entries in enumerate(table.unbind(1)):
            part = rows.index_select(0, entries)
            if inputs == 1 and outputs == groups:
                part = part * taps[:, 0, 0, tap]
            else:
                part = (part.unflatten(1, (groups, 1, -1)) @ taps[..., tap].transpose(1, 2)).flatten(1)
            out = part if out is None else out + part
        assert out is not None
        return weights.finish(out if bias is None else out + bias, work.residual)

    def pool(self, work: Pooling) -> Tensor:
        """Compute rows (N, C)."""
        reading = work.reading
        gathered = _gather(extend(work.rows, reading, work.outside), reading.table)
        return gathered.amax(1) if work.largest else gathered.sum(1)

    def mix(self, work: Mixing) -> Tensor:
        """Compute rows (M, C)."""
        shares = work.shares.to(work.rows).unsqueeze(1)  # a matrix product writes less than multiply and sum
        return (shares @ _gather(work.rows, work.sources)).squeeze(1)


def _gather(rows: Tensor, table: Tensor) -> Tensor:
    """Gather rows (n, C) by a table (N, taps), giving (N, taps, C)."""
    return rows.index_select(0, table.flatten()).view(-1, table.shape[1], rows.shape[1])
