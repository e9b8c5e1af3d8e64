"""Graphs for engines other than torch: gathers and products of rows in the few operations that every engine has.

Torch's own choices are slow in other engines: convolutions used as products of rows on the CPU need transpositions
before and after, and `embedding_bag` is a loop in ONNX. What is done for each convolution is one operation of the
traced graph, because torch takes milliseconds to trace one; `export.translate` writes it as standard operations. For
engines that load this package's kernels, the convolution as a whole is one, `cadsurgery::convolve_rows`.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.backends.choose import Backend, Work
from cadsurgery.elements.backends.operators import define
from cadsurgery.elements.backends.reference import Torch, gather
from cadsurgery.elements.backends.works import Convolution, Mixing, Picking, PixelReading, Pooling, extend
from cadsurgery.elements.kernel_map import Reading, TapSearch, has_halo
from cadsurgery.elements.lattice import CellSearch
from cadsurgery.elements.sizes import as_numbers, is_statically_true
from cadsurgery.support.running import Target, running

_LIKE = torch.empty(0, dtype=torch.int32, device="cpu")


class Portable(Backend):
    """Operations in a graph for another engine."""

    name = "portable"

    def applies(self, work: Work) -> bool:
        """Return True while such a graph is traced, without gradients."""
        if isinstance(work, (CellSearch, TapSearch)):  # operations of engines with this package's kernels
            return running.target is not None and running.target.has_kernels and work.is_counted
        if isinstance(work, PixelReading):
            is_counted = work.lattice.capacity is None
            return _has_pick(work.rows) and is_counted and has_halo(work.lattice) and not work.gradient
        return running.target is not None and not work.gradient

    def find_cells(self, work: CellSearch) -> tuple[Tensor, Tensor, Tensor]:
        """Find cells by one operation."""
        levels = work.rows
        sides = as_numbers(work.lattice.geometry.sides, _LIKE)
        found: tuple[Tensor, Tensor] = torch.ops.cadsurgery.find_cells(levels.int(), sides)
        cells = found[0].long()
        images = torch.arange(levels.shape[0], device=levels.device).unsqueeze(1)
        return cells, found[1], (cells // levels[0].numel() == images).sum(1)

    def find_taps(self, work: TapSearch) -> Reading:
        """Find taps by one operation; weights of the halo are float32."""
        source = work.source
        inputs = (
            work.rows.int(),
            as_numbers(source.geometry.sides, _LIKE),
            source.anchors.int(),
            source.index,
            work.pixels.int(),
            *(as_numbers(values, _LIKE) for values in (work.size, *work.steps)),
        )
        found: tuple[Tensor, Tensor, Tensor]
        if has_halo(source):
            found = torch.ops.cadsurgery.read_taps(*inputs)
        else:
            none = torch.empty(0, 4, dtype=torch.int32), torch.empty(0, 4)
            found = torch.ops.cadsurgery.read_near_taps(*inputs), *none
        return Reading(work.shaped(found[0]), found[1], found[2], work.has_outside)

    def convolve(self, work: Convolution) -> Tensor:
        """Compute rows (N, ..., O)."""
        weights, target = work.weights, running.target or Target()
        groups, bias = weights.groups, weights.bias
        # Engines multiply rows of floats as fast as this package, and rows of bytes slower: docs/data/deploy.md.
        if target.has_kernels and (not work.is_product or (target.in_8_bits and work.rows.dim() == 2)):
            return _as_one_operation(work)
        if work.is_product:
            return weights.finish(F.linear(work.of_target, weights.weight.flatten(1), bias), work.residual)
        outputs, inputs = weights.weight.shape[:2]
        is_depthwise = inputs == 1 and outputs == groups
        reading = work.reading
        rows, table = extend(work.rows, reading, work.outside), reading.table
        if groups == 1:
            sums = torch.ops.cadsurgery.product_of_taps(rows, table, weights.weight.flatten(2), bias)
            return weights.finish(sums, work.residual)
        if not is_depthwise or (target.in_8_bits and target.has_8_bit_depthwise):
            image = gather(rows, table).unsqueeze(0).permute(0, 3, 1, 2)  # (1, C, N, taps)
            sums = F.conv2d(image, weights.weight.flatten(2).unsqueeze(2), bias, groups=groups)
            return weights.finish(sums[0, :, :, 0].t(), work.residual)
        sums = torch.ops.cadsurgery.sum_of_taps(rows, table, weights.weight.flatten(1))
        return weights.finish(sums if bias is None else sums + bias, work.residual)

    def pool(self, work: Pooling) -> Tensor:
        """Compute rows (N, C)."""
        reading = work.reading
        gathered = gather(extend(work.rows, reading, work.outside), reading.table)
        return gathered.amax(1) if work.largest else gathered.sum(1)

    def mix(self, work: Mixing) -> Tensor:
        """Compute rows (M, C)."""
        if _has_pick(work.rows):
            first = work.rows.shape[0] + 1  # behind the rows, and one that lies outside
            table = torch.arange(work.sources.shape[0], dtype=torch.int32, device=work.rows.device) + first
            return _pick_rows(work.rows, Reading(table, work.sources, work.shares, False))
        out: Tensor = torch.ops.cadsurgery.mix_rows(work.rows, work.sources, work.shares)
        return out

    def read_pixels(self, work: PixelReading) -> Tensor:
        """Compute pixels (B, h, w, C) by one operation."""
        lattice = work.lattice
        sides = as_numbers(lattice.geometry.sides, _LIKE)
        out: Tensor = torch.ops.cadsurgery.read_pixels(
            work.rows, lattice.levels.int(), sides, lattice.index, work.spacing
        )
        return out

    def pick(self, work: Picking) -> Tensor:
        """Compute rows (entries, C)."""
        rows, reading = work.rows, work.reading
        has_halo = not is_statically_true(reading.sources.shape[0] == 0)
        if has_halo and _has_pick(rows):
            return _pick_rows(rows, reading)
        return Torch().pick(work)


def _product_of_taps(rows: Tensor, table: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply gathered rows by weights (O, C, taps), with the taps outermost, which is the order of gathered rows."""
    return F.linear(gather(rows, table).flatten(1), weight.permute(0, 2, 1).flatten(1), bias)


def _sum_of_taps(rows: Tensor, table: Tensor, weight: Tensor) -> Tensor:
    """Sum gathered rows, each multiplied by the weights (C, taps) of its tap."""
    entries = zip(table.unbind(1), weight.unbind(1), strict=True)
    return reduce(torch.add, (rows.index_select(0, places) * tap for places, tap in entries))


def _mix_rows(rows: Tensor, sources: Tensor, shares: Tensor) -> Tensor:
    """Average gathered rows; a matrix product writes less than multiply and sum."""
    return (shares.to(rows).unsqueeze(1) @ gather(rows, sources)).squeeze(1)


def _rows_of_table(rows: Tensor, table: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(table.shape[0], rows.shape[1])


define(
    "product_of_taps(Tensor rows, Tensor table, Tensor weight, Tensor? bias) -> Tensor",
    lambda rows, table, weight, bias: rows.new_empty(table.shape[0], weight.shape[0]),
    _product_of_taps,
)
define("sum_of_taps(Tensor rows, Tensor table, Tensor weight) -> Tensor", _rows_of_table, _sum_of_taps)
define("mix_rows(Tensor rows, Tensor sources, Tensor shares) -> Tensor", _rows_of_table, _mix_rows)


def _has_pick(rows: Tensor) -> bool:
    """Return True if engines have a kernel that picks these rows."""
    return (running.target or Target()).has_kernels and rows.dtype == torch.float32


def _pick_rows(rows: Tensor, reading: Reading) -> Tensor:
    """Pick rows (entries, C) by `cadsurgery::pick_rows`, which exists in exported programs alone."""
    table = reading.table.reshape(-1, 1).int()
    out: Tensor = torch.ops.cadsurgery.pick_rows(rows, table, reading.sources.int(), reading.mix.to(rows))
    return out


def _as_one_operation(work: Convolution) -> Tensor:
    """Compute rows (N, O) by `cadsurgery::convolve_rows`, which exists in exported programs alone.

    The weight is (taps, C) of a depthwise convolution, (taps, C, O) of an ungrouped one, else (taps, groups,
    C / groups, O / groups). A residual of one number, 0, adds nothing. The result is clamped to low..high.
    """
    weights, reading, act = work.weights, work.reading, work.weights.activation
    groups, (outputs, inputs) = weights.groups, weights.weight.shape[:2]
    weight = weights.weight.flatten(2).permute(2, 1, 0)  # (taps, C / groups, O)
    if groups == outputs and inputs == 1:
        weight = weight.squeeze(1)
    elif groups > 1:
        weight = weight.unflatten(2, (groups, -1)).transpose(1, 2)
    bounds = act.bounds if act is not None else None
    low, high = bounds or (-math.inf, math.inf)
    rows, residual = work.rows, work.residual
    fits = residual is not None and residual.dim() == 2 and bool(residual.shape[1] == outputs)
    sources, mix = reading.sources, reading.mix
    if is_statically_true(
        sources.shape[0] == 0
    ):  # OpenVINO (2026.4) drops a dimension of constants without numbers
        sources, mix = sources.new_zeros(1, 1), mix.new_zeros(1, 1)
    out: Tensor = torch.ops.cadsurgery.convolve_rows(
        rows,
        reading.table.int(),
        sources.int(),
        mix.to(rows),
        weight.contiguous(),
        weights.bias if weights.bias is not None else rows.new_zeros(outputs),
        residual if fits else rows.new_zeros(1),
        work.outside,
        *((low, high) if residual is None or fits else (-math.inf, math.inf)),
    )
    if residual is not None and not fits:
        return weights.finish(out, residual)
    return out if bounds or act is None else act.apply_(out)
