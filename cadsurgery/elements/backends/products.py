"""Products of rows with packed weights: of the elements themselves, or of their gathered taps block by block."""

from __future__ import annotations

from torch import Tensor

from cadsurgery.elements.backends.choose import Backend, Convolution, extend
from cadsurgery.elements.backends.onednn import multiply
from cadsurgery.elements.backends.reference import gather_blocks


class Products(Backend):
    """Matrix products by torch and oneDNN."""

    name = "products"

    def applies(self, work: Convolution) -> bool:
        """Return True for one tap at the element itself and, in inference, for any ungrouped convolution."""
        return work.is_product or (work.is_inference and work.weights.groups == 1)

    def convolve(self, work: Convolution) -> Tensor:
        """Compute rows (N, ..., O)."""
        weights, outputs, residual = work.weights, work.weights.weight.shape[0], work.residual
        if work.is_product:
            rows = work.of_target
            more = residual.reshape(-1, outputs) if residual is not None else None
            out = multiply(weights, rows.reshape(-1, rows.shape[-1]), more)
            return out.view(*rows.shape[:-1], outputs)
        rows, table = extend(work.rows, work.reading, work.outside), work.reading.table
        out, start = rows.new_empty(len(table), outputs), 0
        for block in gather_blocks(rows, table):
            end = start + len(block)
            more = residual[start:end] if residual is not None else None
            out[start:end] = multiply(weights, block.flatten(1), more)
            start = end
        return out
