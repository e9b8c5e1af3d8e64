"""Graphs for engines other than torch: gathers and products of rows in the few operations that every engine has.

oneDNN's convolutions, which torch multiplies rows with on a CPU, would be transposed there and back; and a sum over
bags of rows is a loop in ONNX.
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
    """Graphs made within are for engines other than torch."""
    token = _IS_PORTABLE.set(True)
    try:
        yield
    finally:
        _IS_PORTABLE.reset(token)


class Portable(Backend):
    """In a graph for another engine."""

    name = "portable"

    def applies(self, work: Work) -> bool:
        """While such a graph is made."""
        return _IS_PORTABLE.get()

    def convolve(self, work: Convolution) -> Tensor:
        """Rows (N, ..., O)."""
        weights = work.weights
        groups, bias = weights.groups, weights.bias
        if work.is_product:
            return weights.finish(F.linear(work.of_target, weights.weight.flatten(1), bias), work.residual)
        reading = work.reading
        rows, table = extend(work.rows, reading, work.outside), reading.table
        outputs, inputs = weights.weight.shape[:2]
        if groups == 1:  # taps outermost, as rows that are gathered one after another lie
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
        """Rows (N, C)."""
        reading = work.reading
        gathered = _gather(extend(work.rows, reading, work.outside), reading.table)
        return gathered.amax(1) if work.largest else gathered.sum(1)

    def mix(self, work: Mixing) -> Tensor:
        """Rows (M, C)."""
        shares = work.shares.to(work.rows).unsqueeze(1)  # products write less than sums of products
        return (shares @ _gather(work.rows, work.sources)).squeeze(1)


def _gather(rows: Tensor, table: Tensor) -> Tensor:
    """Rows (n, C) by a table (N, taps), to (N, taps, C)."""
    return rows.index_select(0, table.flatten()).view(-1, table.shape[1], rows.shape[1])
