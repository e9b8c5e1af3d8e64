"""Products of rows with packed weights: of the elements themselves, or of their gathered taps block by block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cadsurgery.elements.backends.choose import Backend, Convolution, Gathering, compute
from cadsurgery.elements.backends.onednn import multiply, multiply_elements
from cadsurgery.elements.backends.reference import block_length


class Products(Backend):
    """Matrix products by torch and oneDNN."""

    name = "products"

    def applies(self, work: Convolution) -> bool:
        """Return True for one tap at the element itself and, in inference, for any ungrouped convolution."""
        return work.is_product or (work.is_inference and work.weights.groups == 1)

    def convolve(self, work: Convolution) -> Tensor:
        """Compute rows (N, ..., O)."""
        weights, residual = work.weights, work.residual
        if work.is_product:
            rows, outputs = work.of_target, weights.weight.shape[0]
            more = residual.reshape(-1, outputs) if residual is not None else None
            # The number of rows is that of every image of this size in dense maps only; elsewhere neither generated
            # code nor the bits of a row may depend on it.
            product = multiply if work.reads is None or work.is_recurring else multiply_elements
            out = product(weights, rows.reshape(-1, rows.shape[-1]), more)
            return out.view(*rows.shape[:-1], outputs)
        reading, rows = work.reading, work.rows
        table = reading.table.to(rows.device)
        count, taps = table.shape
        block = min(block_length(table, rows), max(count, 1))
        fill = compute(Gathering(rows, reading, work.outside))
        out = rows.new_empty(count, weights.weight.shape[0])
        with _workspace(block * taps, rows.shape[1], rows) as memory:
            for start in range(0, count, block):
                entries = table[start : start + block]
                gathered = memory[: entries.numel()]
                fill(entries, gathered)
                more = residual[start : start + block] if residual is not None else None
                out[start : start + block] = multiply_elements(weights, gathered.view(len(entries), -1), more)
        return out


_LOCAL = threading.local()


@contextmanager
def _workspace(count: int, channels: int, like: Tensor) -> Iterator[Tensor]:
    """Lend memory (count, channels) to gather into. It is reused across calls, because new memory costs as much as
    filling it. Each thread has its own memory, and nested calls use separate memory.
    """
    free = _LOCAL.__dict__.setdefault("free", {})
    memory = free.pop(key := (like.device, like.dtype), None)
    if memory is None or memory.numel() < count * channels:
        with torch.inference_mode(False):  # the memory is also used outside this call's inference mode
            memory = like.new_empty(count * channels)
    try:
        yield memory[: count * channels].view(count, channels)
    finally:
        free[key] = memory
