"""Products of rows with packed weights: of the elements themselves, or of their gathered taps block by block."""

from __future__ import annotations

from torch import Tensor

from cadsurgery.elements.axes import as_map, as_rows, fast_layout
from cadsurgery.elements.backends.choose import Backend, compute
from cadsurgery.elements.backends.onednn import multiply
from cadsurgery.elements.backends.reference import gather_blocks
from cadsurgery.elements.backends.works import Convolution, MapConvolution, extend


class Products(Backend):
    """Matrix products by torch and oneDNN."""

    name = "products"

    def applies(self, work: Convolution | MapConvolution) -> bool:
        """Return True for one tap at the element itself and, in inference, for any ungrouped convolution."""
        if isinstance(work, MapConvolution):
            return work.is_product and not work.graph
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

    def convolve_map(self, work: MapConvolution) -> Tensor:
        """Multiply the positions of a map, viewed as rows."""
        image, residual = work.rows, work.residual
        more = as_rows(residual) if residual is not None else None
        out = compute(Convolution(as_rows(image), work.weights, None, residual=more))
        return fast_layout(as_map(out, image.shape[0], (image.shape[2], image.shape[3])))
