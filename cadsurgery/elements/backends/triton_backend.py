"""The backends of GPUs: what Triton's kernels compute, and when."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.axes import as_rows
from cadsurgery.elements.backends import gpu_maps, gpu_norm
from cadsurgery.elements.backends.choose import Backend
from cadsurgery.elements.backends.gpu import (
    BlendWithGradient,
    Halo,
    blend,
    finish,
    gather_conv,
    pool_samples,
    reverse_map,
    supports,
    weigh,
)
from cadsurgery.elements.backends.gpu_maps import SampleMap
from cadsurgery.elements.backends.weights import Activation, FusedConv
from cadsurgery.elements.backends.works import (
    Convolution,
    MapConvolution,
    Mixing,
    Normalising,
    Picking,
    Pooling,
    Weighing,
    WindowRead,
    extend,
)
from cadsurgery.elements.kernel_map import Reading, TapSearch, Window, has_halo
from cadsurgery.elements.lattice import CellSearch, Lattice
from cadsurgery.support.running import running
from cadsurgery.support.torch_internals import add_and_activate

# Channels above which cuBLAS multiplies rows faster than the kernel: measured on an H100.
_DEEP = 1024


class Triton(Backend):
    """One kernel that gathers and multiplies, forward and backward; tables derived from the kernel map are cached."""

    name = "triton"

    def applies(self, work: Convolution | Mixing | Picking) -> bool:
        """Return True for rows on supported GPUs; torch multiplies rows that are no taps where gradients are needed,
        and picks rows where none are."""
        if work.graph or running.is_observed:
            return False
        if isinstance(work, CellSearch):
            return not work.is_counted and gpu_maps.available(work.rows.device)
        if isinstance(work, TapSearch):
            return work.source.capacity is not None and gpu_maps.available(work.rows.device)
        if isinstance(work, MapConvolution):  # what follows the convolution, in one pass
            return not (work.gradient or work.is_product) and supports(work.rows, work.rows)
        if isinstance(work, Weighing):
            is_plain = not work.gradient and work.shares.dtype == torch.float32
            return is_plain and supports(work.rows, work.rows)
        if isinstance(work, Normalising):
            is_some = work.rows.dim() == 2 and work.rows.numel() > 0
            return is_some and supports(work.rows, work.rows)
        if isinstance(work, Picking):
            return work.gradient and supports(work.rows, work.rows)
        if isinstance(work, Mixing):
            return not work.shares.requires_grad and supports(work.rows, work.rows)
        if work.is_product and work.gradient:
            return False
        return supports(work.rows, work.weights.weight)

    def find_cells(self, work: CellSearch) -> tuple[Tensor, Tensor, Tensor]:
        """Find cells, as many rows as there may be."""
        assert work.lattice.capacity is not None
        return gpu_maps.find_cells(work.rows, work.lattice.geometry.sides, work.lattice.capacity[1])

    def find_taps(self, work: TapSearch) -> Reading:
        """Find taps, with as many halo rows as may be read."""
        source = work.source
        assert source.capacity is not None
        entries = work.pixels.numel() * len(work.steps[0]) * len(work.steps[1])
        halo = max(min(source.index.numel() - source.capacity[0], entries), 0) if has_halo(source) else 0
        cells, sizes = (source.index, source.anchors, work.rows), (source.size, work.size)
        table, sources, mix, used = gpu_maps.shift_taps(
            cells, source.geometry.sides, work.pixels, sizes, work.steps, halo
        )
        if used is not None and torch.is_grad_enabled():  # less to mix, forward and backward, is worth a wait
            sources, mix, used = sources[: int(used)], mix[: int(used)], None
        return Reading(work.shaped(table), sources, mix, work.has_outside, used)

    def convolve_map(self, work: MapConvolution) -> Tensor:
        """Convolve by torch, and apply bias, residual and activation in one pass."""
        weights, residual = work.weights, work.residual
        weight = weights.weight.to(work.rows.dtype)
        sums = F.conv2d(work.rows, weight, None, *work.window, weights.groups)
        sums = sums.contiguous(memory_format=torch.channels_last)
        more = as_rows(residual) if residual is not None else None
        rows = sums.permute(0, 2, 3, 1).view(-1, sums.shape[1])
        finish(rows, weights.bias_as(sums.dtype), more, weights.activation)
        return sums

    def weigh(self, work: Weighing) -> Tensor:
        """Compute sums (B, C)."""
        return weigh(work.shares, work.rows)

    def normalise(self, work: Normalising) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise rows by two reads of them."""
        return gpu_norm.normalise(work.rows, work.shares, work.weight, work.bias, work.eps)

    def convolve(self, work: Convolution) -> Tensor:
        """Compute rows (N, O)."""
        weight = matrix_of(work.weights)
        if work.is_product:
            return self._multiply(work, weight)
        if work.gradient or work.outside or not isinstance(work.reads, WindowRead):
            return self._by_table(work, weight)
        more = (work.weights.bias, work.residual, work.weights.activation, work.weights.groups)
        return gather_conv(work.rows, weight, work.reading.table, *more, None, *_behind(work))

    def _multiply(self, work: Convolution, weight: Tensor) -> Tensor:
        """Compute rows (N, ..., O) of one tap at the element itself."""
        rows, weights = work.of_target, work.weights
        flat, outputs = rows.reshape(-1, rows.shape[-1]), weight.shape[0]
        residual = work.residual.reshape(-1, outputs) if work.residual is not None else None
        is_linear = work.reads is None and not weights.dense
        if is_linear and rows.dtype == torch.float32:  # its precision is not that of convolutions
            out = finish(F.linear(flat, weight), weights.bias, residual, weights.activation)
        elif residual is None and flat.shape[1] > _DEEP and rows.dtype != torch.float32:
            out = _multiply_deep(flat, weight, weights.bias, weights.activation)
        else:
            more = (weights.bias, residual, weights.activation)
            out = gather_conv(flat, weight, None, *more)
        return out.view(*rows.shape[:-1], outputs)

    def _by_table(self, work: Convolution, weight: Tensor) -> Tensor:
        """Compute rows (N, O) with gradients, or with another value than zero outside the map."""
        reading, reads = work.reading, work.reads
        more = (work.weights.bias, work.residual, work.weights.activation, work.weights.groups)
        behind: tuple[Halo | None, int] = (None, -1)
        if work.outside:
            rows, table = extend(work.rows, reading, work.outside), reading.table
        else:
            rows, table, behind = work.rows, self._signed(work, reading), _behind(work)
        if not isinstance(reads, WindowRead):
            return gather_conv(rows, weight, table, *more, None, *behind)
        count = rows.shape[0] + (1 + reading.sources.shape[0] if behind[0] is not None else 0)
        # Computed when a gradient is first needed.
        key = ("reversed", reads.target.key, reads.window, reads.drop, not work.outside)
        reverse = reads.source.derive(key, lambda: cache(lambda: reverse_map(table, count)))
        return gather_conv(rows, weight, table, *more, reverse, *behind)

    def _signed(self, work: Convolution, reading: Reading) -> Tensor:
        """Return the table with -1 for what lies outside and in outputs that are padding: one row that all of them
        read would owe its gradient to so many outputs that one program would sum for longer than all others."""
        table, reads = reading.table, work.reads
        real = reads.target.real if isinstance(reads, WindowRead) else None
        if not reading.has_outside and real is None:
            return table

        def sign() -> Tensor:
            reads_none = table == work.rows.shape[0]
            return table.masked_fill(reads_none if real is None else reads_none | ~real.unsqueeze(1), -1)

        if not isinstance(reads, WindowRead):
            return sign()
        return reads.source.derive(("signed", reads.target.key, reads.window, reads.drop), sign)

    def mix(self, work: Mixing) -> Tensor:
        """Compute rows (M, C)."""
        if not work.gradient:
            return blend(work.rows, work.sources, work.shares)
        mixed: Tensor = BlendWithGradient.apply(work.rows, work.sources, work.shares)
        return mixed

    def pick(self, work: Picking) -> Tensor:
        """Compute rows (entries, C), each the sum of one: torch's gradient would add atomically, in any order."""
        rows, table = extend(work.rows, work.reading, 0.0), work.reading.table.reshape(-1, 1).int()
        picked: Tensor = BlendWithGradient.apply(rows, table, torch.ones_like(table, dtype=torch.float32))
        return picked


def _behind(work: Convolution) -> tuple[Halo | None, int]:
    """Return the halo rows that a work's table names behind the padding row, if there are any, and the padding row."""
    reading = work.reading
    has_halo = reading.sources.shape[0] > 0
    # Halo rows behind the last that is read are not computed.
    return Halo(reading.sources, reading.mix, reading.used) if has_halo else None, work.rows.shape[0]


class TritonSamples(Backend):
    """Windows under floors in inference: an implicit dense convolution of the network's own grid, in which the kernels
    find the taps of an element beside those of its neighbours."""

    name = "triton samples"

    def applies(self, work: Convolution | Pooling) -> bool:
        """Return True for windows on supported GPUs whose taps lie on the source's own grid."""
        reads = work.reads
        if (
            work.graph
            or running.is_observed
            or work.gradient
            or not isinstance(reads, WindowRead)
            or reads.drop
        ):
            return False
        if not has_samples(reads.source, reads.target, reads.window):
            return False
        if isinstance(work, Pooling):
            return work.rows.dim() == 2 and supports(work.rows, work.rows)
        return not work.outside and supports(work.rows, work.weights.weight)

    def convolve(self, work: Convolution) -> Tensor:
        """Compute rows (N, O)."""
        samples, halo = self._read(work)
        weights, outside = work.weights, work.rows.shape[0]
        more = (weights.bias, work.residual, weights.activation, weights.groups)
        return gather_conv(work.rows, matrix_of(weights), samples, *more, halo=halo, outside=outside)

    def pool(self, work: Pooling) -> Tensor:
        """Compute rows (N, C)."""
        samples, halo = self._read(work)
        return pool_samples(work.rows, samples, halo, work.outside, work.largest)

    def _read(self, work: Convolution | Pooling) -> tuple[SampleMap, Halo | None]:
        """Return where taps are read, and the halo rows among them."""
        assert isinstance(work.reads, WindowRead)
        samples = sample_map(work.reads.source, work.reads.target, work.reads.window)
        if samples.used is None:
            return samples, None
        return samples, Halo(samples.sources, samples.mix, samples.used)


def _multiply_deep(
    rows: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None
) -> Tensor:
    """Compute rows (N, O) by cuBLAS, which is faster than the kernel where it sums over many channels."""
    if bias is not None and activation is not None and activation.name == "relu":
        return add_and_activate(bias, rows, weight.T)
    return finish(F.linear(rows, weight), bias, None, activation)


def matrix_of(weights: FusedConv) -> Tensor:
    """Return the weight (O, taps * C / groups), taps outermost, which is the order of gathered values."""

    def make() -> Tensor:
        return weights.weight.permute(0, 2, 3, 1).flatten(1).contiguous()

    return weights.form(("triton", weights.weight.dtype), make)


def has_samples(source: Lattice, target: Lattice, window: Window) -> bool:
    """Return True if `sample_map` applies: kernels on a GPU find the taps, level maps are floors, and all anchors and
    taps lie on the source's own grid."""
    geometry = source.geometry
    if not geometry.floors or source.part is not None or target.part is not None or window.taps == 1:
        return False
    is_plain = window.mode == "zeros" and window.finer == 1 and target.stage >= source.stage
    is_bounded = source.capacity is not None and gpu_maps.available(source.levels.device)
    return is_plain and is_bounded and window.spacing % _own_grid(source) == 0


def sample_map(source: Lattice, target: Lattice, window: Window) -> SampleMap:
    """Return where the taps of a window are read under floors, computed once per pair of lattices and window.

    Unlike `kernel_map` it has one entry per sample of the own grid and one per element, and as many halo rows as the
    own grid has samples between anchors, not as there are fine pixels between them.
    """

    def build() -> SampleMap:
        assert source.capacity is not None
        grid, taps = _own_grid(source), window.taps
        between = source.batch * math.prod(source.samples(grid)) - source.capacity[0]
        halo = max(min(between, target.count * taps), 0) if has_halo(source) else 0
        cells = (source.index, source.anchors, source.levels)
        down, across = ([step // grid for step in steps] for steps in window.offsets)
        sizes = (source.size, target.size)
        return gpu_maps.map_samples(
            cells, source.geometry.sides, target.anchors, sizes, (down, across), grid, halo
        )

    return source.derive(("sample_map", target.key, window), build)


def _own_grid(lattice: Lattice) -> int:
    """Return the fine pixels between the samples of a map's own grid, where level maps are floors."""
    return lattice.geometry.sides[max(lattice.stage - 1, 0)]
