"""Convolutions in a graph compiled for the CPU: each is one custom operation that chooses its backend when it runs.

This package's kernels are faster than the code that compilers generate from the expression. The operations have no
gradient and do not appear in exported programs, which must run without this package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cadsurgery.elements.backends.choose import Backend, compute
from cadsurgery.elements.backends.onednn import product
from cadsurgery.elements.backends.operators import define
from cadsurgery.elements.backends.weights import FusedConv
from cadsurgery.elements.backends.works import Convolution
from cadsurgery.elements.kernel_map import Reading


class GraphOperation(Backend):
    """`cadsurgery::product_of_rows` and `cadsurgery::product_by_table`."""

    name = "graph"

    def applies(self, work: Convolution) -> bool:
        """Return True in a compiled graph for the CPU without gradients."""
        return work.graph == "compiled" and work.rows.device.type == "cpu" and not work.gradient

    def convolve(self, work: Convolution) -> Tensor:
        """Compute rows (N, O)."""
        weights = work.weights
        if work.is_product:
            out = torch.ops.cadsurgery.product_of_rows(
                work.of_target, weights.weight.flatten(1), weights.bias
            )
        else:
            reading = work.reading
            out = torch.ops.cadsurgery.product_by_table(
                *(work.rows, reading.table, reading.sources, reading.mix, reading.used, reading.has_outside),
                *(work.outside, weights.weight, weights.bias, weights.groups),
            )
        return weights.finish(out, work.residual)


def _product_by_table(
    rows: Tensor,
    table: Tensor,
    sources: Tensor,
    mix: Tensor,
    used: Tensor | None,
    has_outside: bool,
    outside: float,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
) -> Tensor:
    if used is not None:
        sources, mix = sources[: int(used)], mix[: int(used)]
    reading = Reading(table.contiguous(), sources, mix, has_outside)
    return compute(Convolution(rows, FusedConv(weight, bias, groups), reading, outside))


define(
    "product_of_rows(Tensor rows, Tensor weight, Tensor? bias) -> Tensor",
    lambda rows, weight, bias: rows.new_empty(rows.shape[0], weight.shape[0]),
    product,
    on="CPU",
)
define(
    "product_by_table(Tensor rows, Tensor table, Tensor sources, Tensor mix, Tensor? used, bool has_outside, "
    "float outside, Tensor weight, Tensor? bias, int groups) -> Tensor",
    lambda rows, table, *rest: rows.new_empty(table.shape[0], rest[5].shape[0]),
    _product_by_table,
    on="CPU",
)
