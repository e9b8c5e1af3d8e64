"""Convolutions, pooling and interpolation on rows by the compiled kernels (`kernels/c`).

Without kernels (see `kernels.dispatch`) callers use torch operations, slower for grouped convolutions and pooling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cadsurgery.elements.axes import as_map, as_rows, in_order
from cadsurgery.elements.backends import maps
from cadsurgery.elements.backends.choose import Backend, Work, choose_after, compute
from cadsurgery.elements.backends.weights import FusedConv
from cadsurgery.elements.backends.works import (
    Convolution,
    Filling,
    MapConvolution,
    MapResizing,
    Mixing,
    MixingLines,
    Picking,
    PixelReading,
    Pooling,
    mix,
)
from cadsurgery.elements.kernel_map import Reading, TapSearch, has_halo, read_rows
from cadsurgery.elements.lattice import CellSearch, Lattice
from cadsurgery.kernels import dispatch, isa
from cadsurgery.kernels.dispatch import function, has_bf16_dot, isa_of
from cadsurgery.kernels.packing import pack, takes
from cadsurgery.support.pages import new_memory
from cadsurgery.support.running import running

# The dtypes that kernels are compiled for.
ELEMENTS = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
}
_UNBOUNDED = (-math.inf, math.inf)
# Groups with at least this many input and output channels are computed as separate products.
_LEAST_GROUP = 4


class RowSource(NamedTuple):
    """The rows that a kernel map's table indexes, without concatenating them into one tensor.

    Attributes:
        rows: (N, C), the elements.
        halo: (M, C), interpolated rows, or None; entry N + 1 + i reads row i.
        outside: value of all channels that entry N reads.
    """

    rows: Tensor
    halo: Tensor | None = None
    outside: float = 0.0

    @classmethod
    def of(cls, work: Convolution | Pooling) -> RowSource:
        """Return the rows that a work reads."""
        reading = work.reading
        return cls(work.rows, halo_of(work.rows, reading), work.outside)


def halo_of(rows: Tensor, reading: Reading) -> Tensor | None:
    """Return the interpolated rows of a reading, or None if it has none."""
    return mix(rows, reading.sources, reading.mix) if reading.sources.shape[0] else None


class _FastGrouped(NamedTuple):
    """What oneDNN, or torch in its place, has fast code for among grouped convolutions of dense maps.

    Attributes:
        dtype: type of the map.
        isa: instruction set that the processor has.
        padding: widest padding of a depthwise convolution with fast code; beyond, the kernel for elements is faster.
        group: most channels of a group, of more than one, for which the kernel for elements is faster.
    """

    dtype: torch.dtype
    isa: str
    padding: int
    group: int


# The first row of a type counts whose instruction set the processor has. Where the kernels are chosen, they took a
# tenth less time at least, and for depthwise convolutions a third to a ninetieth (docs/data/notes.md, "Dense maps or
# elements"), with the table of what each position reads.
_FAST = (
    _FastGrouped(torch.float32, "avx512", 6, 2),
    _FastGrouped(torch.float32, "avx2", 4, 4),
    _FastGrouped(torch.float32, "sse4", 3, 32),
    _FastGrouped(torch.bfloat16, "avx512bf16", 6, 2),
    _FastGrouped(torch.bfloat16, "avx512", 4, 32),
    _FastGrouped(torch.bfloat16, "sse4", -1, 32),
    _FastGrouped(torch.float64, "avx2", -1, 32),
    _FastGrouped(torch.float64, "sse4", -1, 4),
)


def has_fast_code(dtype: torch.dtype, group: int, padding: int) -> bool:
    """Return False for grouped convolutions of dense maps that a kernel for elements computes faster."""
    row = next((row for row in _FAST if row.dtype == dtype and row.isa in isa.allowed()), None)
    return row is None or (padding <= row.padding if group == 1 else group > row.group)


class Native(Backend):
    """Compiled kernels that read rows in place; the C files describe each function."""

    name = "native"

    def applies(self, work: Work) -> bool:
        """Return True in inference, without gradients or graphs, for rows that a kernel supports."""
        if isinstance(work, (CellSearch, TapSearch)):
            is_here = work.rows.device.type == "cpu" and not running.is_observed
            return is_here and work.is_counted and function("find_cells") is not None
        if not work.is_inference or not supports(work.rows):
            return False
        if isinstance(work, MapConvolution):
            return self._is_faster(work)
        if isinstance(work, MapResizing):
            return work.rows.dtype == torch.float32 and work.rows.numel() > 0
        if isinstance(work, PixelReading):
            return work.lattice.is_counted_on_cpu and work.lattice.part is None
        if isinstance(work, Filling):
            return _of_one_resolution(work.source, work.target)
        return not isinstance(work, Convolution) or self._has_form(work)

    def _has_form(self, work: Convolution) -> bool:
        weights = work.weights
        if weights.groups > 1:
            return has_grouped_form(weights.weight, weights.groups)
        # Packing the weight pays off only if the packed form is kept.
        if (
            weights.packed_cache is None
            or work.rows.dtype != weights.weight.dtype
            or not isa_of("product", ELEMENTS[work.rows.dtype])
        ):
            return False
        # Of products in float64 torch is up to 1.6 times as fast.
        return not (work.rows.dtype == torch.float64 and work.is_product)

    def _is_faster(self, work: MapConvolution) -> bool:
        """True for grouped convolutions of dense maps that oneDNN has no fast code for."""
        weights, padding = work.weights, max(work.window[1])
        if weights.groups == 1 or not weights.dense or not work.rows.numel():
            return False
        if has_fast_code(work.rows.dtype, weights.weight.shape[1], padding):
            return False
        return self._has_form(Convolution(as_rows(work.rows), weights, None))

    def prepare(self, work: Work) -> Callable[[Any], Any]:
        """Return a function that computes works of this case."""
        return self._prepare_convolution(work) if isinstance(work, Convolution) else super().prepare(work)

    def find_cells(self, work: CellSearch) -> tuple[Tensor, Tensor, Tensor]:
        """Find cells in one pass over the pixels."""
        return maps.find_cells(work.rows, work.lattice.geometry.sides)

    def find_taps(self, work: TapSearch) -> Reading:
        """Find taps in two passes over the entries of the table."""
        source = work.source
        # Rows that are pixels need no table, and their anchors are not read.
        rows, anchors = (None, work.pixels) if source.has_all_pixels else (source.index, source.anchors)
        cells, sizes = (rows, anchors, work.rows), (source.size, work.size)
        table, sources, mix = maps.shift_taps(
            cells, source.geometry.sides, work.pixels, sizes, work.steps, has_halo(source)
        )
        return Reading(work.shaped(table), sources, mix, work.has_outside)

    def convolve(self, work: Convolution) -> Tensor:
        """Compute rows (N, ..., O)."""
        out: Tensor = self._prepare_convolution(work)(work)
        return out

    def _prepare_convolution(self, work: Convolution) -> Callable[[Convolution], Tensor]:
        """Return a function that computes rows (N, ..., O) = clamp(sum + bias + residual)."""
        weights, dtype, is_product = work.weights, work.rows.dtype, work.is_product
        outputs, size = weights.weight.shape[:2]
        sizes: tuple[int, ...]
        groups = 1
        if not _takes_grouped(weights.weight, weights.groups):
            groups = weights.groups
            name, sizes = "product", (groups, outputs // groups)
        elif size == 1 and has_bf16_dot(dtype):
            name, sizes = "depthwise", ()
        else:
            name, sizes = "grouped", (size,)
        factors = (None, None) if name == "grouped" else ()  # which only sums of 8 bits have
        kernel, form = function(name, ELEMENTS[dtype]), _form(name, dtype)

        def packed(weights: FusedConv) -> tuple[Tensor, ...]:
            bias = weights.bias.to(_sum_type(dtype)) if weights.bias is not None else None
            return pack(form, weights.weight.to(dtype), weights.groups, bias)

        def run(work: Convolution) -> Tensor:
            weights, more = work.weights, work.residual
            if is_product:
                rows, table = work.of_target, None
                out = new_memory(rows, *rows.shape[:-1], outputs)
                source = RowSource(rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1]))
            else:
                reading = work.reading
                source, table = RowSource(work.rows, halo_of(work.rows, reading), work.outside), reading.table
                out = new_memory(work.rows, len(table), outputs)
            memory = weights.form(form, lambda: packed(weights))
            act = weights.activation
            bounds = act.bounds if act is not None else None
            low, high = bounds or _UNBOUNDED
            more = more.contiguous() if more is not None else None
            arguments = (*memory, *factors, more, out, *sizes, low, high)
            call(kernel, source, table, *arguments, groups=groups)
            return out if bounds or act is None else act.apply_(out)

        return run

    def convolve_map(self, work: MapConvolution) -> Tensor:
        """Compute a map, channels_last, from the rows of its positions."""
        image, weights, (batch, _, *size) = work.rows, work.weights, work.shape
        if min(size) < 1:  # torch says what is wrong
            out: Tensor = compute(work, choose_after(work, self))
            return out
        shape = (batch, *image.shape[2:])
        table = maps.read_map(shape, (size[0], size[1]), weights.weight.shape[2:], *work.window)
        more = as_rows(work.residual) if work.residual is not None else None
        out = self.convolve(Convolution(as_rows(image), weights, read_rows(table, True), residual=more))
        return as_map(out, batch, (size[0], size[1]))

    def resize_map(self, work: MapResizing) -> Tensor:
        """Compute a map in contiguous memory, which is mapped at once."""
        image, (height, width) = in_order(work.rows), work.size
        batch, channels, *own = image.shape
        out = new_memory(image, batch, channels, height, width)
        axes = [
            part
            for axis, (have, want) in enumerate(zip(own, work.size, strict=True))
            for part in (*_places(have, want, work.factors and work.factors[axis], work.aligned), want)
        ]
        dispatch.call(function("resize"), (image, out, batch * channels, *own, *axes))
        return out

    def pool(self, work: Pooling) -> Tensor:
        """Compute rows (N, C)."""
        table = work.reading.table
        out = new_memory(work.rows, table.shape[0], work.rows.shape[1])
        call(kernel_for("pool", work.rows), RowSource.of(work), table, out, int(work.largest))
        return out

    def mix(self, work: Mixing) -> Tensor:
        """Compute rows (M, C)."""
        out = new_memory(work.rows, work.sources.shape[0], work.rows.shape[1])
        shares = work.shares.to(_sum_type(work.rows.dtype)).contiguous()
        call(kernel_for("mix", work.rows), RowSource(work.rows), work.sources.contiguous(), shares, out)
        return out

    def mix_lines(self, work: MixingLines) -> Tensor:
        """Compute the interpolated lines (L, M, C)."""
        lines, width, channels = work.rows.shape
        out = new_memory(work.rows, lines, len(work.share), channels)
        sources = torch.stack((work.first, work.second), 1).int()
        shares = torch.stack((1 - work.share, work.share), 1).to(_sum_type(out.dtype))
        rows = RowSource(work.rows.reshape(lines * width, channels))
        call(kernel_for("mix_lines", out), rows, sources, shares, lines, out, count=width)
        return out

    def pick(self, work: Picking) -> Tensor:
        """Compute the selected rows (entries, C); each halo row is interpolated when it is read."""
        table, sources = work.reading.table.reshape(-1, 1), work.reading.sources.contiguous()
        shares = work.reading.mix.to(_sum_type(work.rows.dtype)).contiguous()
        out = new_memory(work.rows, len(table), work.rows.shape[1])
        arguments = (sources, shares, sources.shape[1], out)
        call(kernel_for("gather_mixing", work.rows), RowSource(work.rows), table, *arguments)
        return out

    def read_pixels(self, work: PixelReading) -> Tensor:
        """Compute pixels (B, h, w, C) without a table of what they read."""
        lattice, rows = work.lattice, work.rows.contiguous()
        out = new_memory(rows, math.prod(work.shape[:3]), rows.shape[1]).view(work.shape)
        if out.numel():
            sides = torch.tensor(lattice.geometry.sides, device="cpu")
            cells = (lattice.index.contiguous(), lattice.levels.contiguous(), sides)
            numbers = (len(rows), lattice.batch, *lattice.size, rows.shape[1], work.spacing)
            values = (rows, *cells, out, *numbers, int(has_halo(lattice)))
            dispatch.call(kernel_for("read_pixels", rows), values)
        return out

    def fill(self, work: Filling) -> Tensor:
        """Compute the filled rows (T, C)."""
        rows, source, act, whole = work.rows, work.source, work.activation, work.source.part is None
        dtype, (height, width) = _sum_type(rows.dtype), source.size
        out = new_memory(rows, work.target.count, rows.shape[1])
        there, index = (None, None) if whole else (source.part.rows, source.index)  # type: ignore[union-attr]
        shares = work.shares.to(dtype).contiguous() if work.shares is not None else None
        baseline = work.baseline.to(rows).contiguous() if work.baseline is not None else None
        more = work.residual.to(rows).contiguous() if work.residual is not None else None
        side, bounds = work.weights.shape[0], act.bounds if act is not None else None
        table = work.target.anchors.int().unsqueeze(1)
        numbers = (side, height, width, work.least)
        limits = bounds or _UNBOUNDED
        weights = work.weights.to(dtype).contiguous()
        arguments = (there, index, shares, weights, *numbers, baseline, more, out, *limits)
        call(kernel_for("fill", rows), RowSource(rows), table, *arguments)
        return out if bounds or act is None else act.apply_(out)


def _of_one_resolution(*lattices: Lattice) -> bool:
    """Return True if every position of the lattices is a cell and the number of cells is known."""
    return all(not lattice.geometry.strides and lattice.has_known_counts for lattice in lattices)


def supports(rows: Tensor) -> bool:
    """Return True if there are kernels for these rows and torch does not trace or count operations."""
    return (
        not running.is_observed
        and rows.device.type == "cpu"
        and rows.dtype in ELEMENTS
        and function("mix", ELEMENTS[rows.dtype]) is not None
    )


def has_grouped_form(weight: Tensor, groups: int) -> bool:
    """Return True if there is a kernel for a grouped convolution (O, C / groups, kh, kw)."""
    out, group, *taps = weight.shape
    if weight.dtype not in ELEMENTS or 0 in taps:
        return False
    if _takes_grouped(weight, groups):
        return True
    return min(group, out // groups) >= _LEAST_GROUP and bool(isa_of("product", ELEMENTS[weight.dtype]))


def _takes_grouped(weight: Tensor, groups: int) -> bool:
    """Return True if `grouped` rather than `product` computes a convolution (O, C / groups, kh, kw): small groups."""
    return groups > 1 and takes(_form("grouped", weight.dtype), weight, groups)


def _form(name: str, dtype: torch.dtype) -> str:
    """Return the name of the form of a kernel that is chosen for a type."""
    return "_".join((name, ELEMENTS[dtype], isa_of(name, ELEMENTS[dtype])))


def call(
    kernel: Any,
    source: RowSource,
    table: Tensor | None,
    *arguments: Any,
    count: int | None = None,
    groups: int = 1,
) -> None:
    """Call a kernel: tensors are passed as pointers, None as a null pointer. Without a table each row reads itself.

    Raises:
        CadError: a tensor holds less than the kernel reads or writes.
    """
    rows, halo = source.rows.contiguous(), source.halo
    total, channels = rows.shape
    beyond = _row_outside(channels, rows.dtype, source.outside)
    if table is not None:
        assert table.dim() == 2 and table.is_contiguous() and table.dtype == torch.int32
    n, taps = (total, 1) if table is None else table.shape
    if not n:
        return
    sizes = (total if count is None else count, n, taps, channels // groups, channels)
    dispatch.call(kernel, (rows, halo, beyond, table, *sizes), *arguments)


def kernel_for(name: str, rows: Tensor) -> Any:
    """Return the form of a kernel for the type of rows."""
    return function(name, ELEMENTS[rows.dtype])


@lru_cache(maxsize=64)
def _places(have: int, want: int, factor: float | None, aligned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return between which samples of an axis those of the result lie, and how near to the second one (torch's
    `area_pixel_compute_source_index`, rounded as there)."""
    numbers = torch.arange(want, dtype=torch.float32, device="cpu")
    if aligned:
        at = numbers * (torch.tensor(have - 1.0) / (want - 1) if want > 1 else 0.0)
    else:
        step = torch.tensor(float(have)) / want if factor is None else torch.tensor(1 / factor)
        at = ((numbers.double() + 0.5) * step - 0.5).clamp(min=0).float()  # rounded once
    first = at.int().clamp(max=have - 1)
    return first, (first + 1).clamp(max=have - 1), (at - first).clamp(max=1)


@lru_cache(maxsize=64)
def _row_outside(channels: int, dtype: torch.dtype, outside: float) -> Tensor:
    return torch.full((channels,), outside, dtype=dtype, device="cpu")


def _sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype
