"""`native.c`: convolutions, pooling, interpolation and gathering on rows in compiled code.

Where there is none, see `library`, the callers use torch operations, slower for grouped convolutions and pooling.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cadsurgery.elements.backends.choose import (
    Backend,
    Between,
    Convolution,
    Filling,
    Gathering,
    Mixing,
    MixingLines,
    Picking,
    Pooling,
    Work,
    mix,
    outside_of,
)
from cadsurgery.elements.backends.library import ELEMENTS, has_pairs, is_observed, library
from cadsurgery.elements.kernel_map import Reading
from cadsurgery.elements.lattice import Lattice
from cadsurgery.support.pages import new_memory

if TYPE_CHECKING:
    from cadsurgery.elements.backends.weights import Pair, Weights

LANE_BYTES, PRODUCT_LANES, PRODUCT_ROWS, MOST_TAPS, GROUPS = 64, 4, 6, 128, (1, 2, 4, 8, 16)


class Rows(NamedTuple):
    """Rows that a kernel map's table points into, without ever being put into one tensor.

    Attributes:
        rows: (N, C), the elements.
        halo: (M, C), interpolated rows, or None; entry N + 1 + i reads row i.
        outside: what entry N reads, everywhere the same.
    """

    rows: Tensor
    halo: Tensor | None = None
    outside: float = 0.0

    @classmethod
    def of(cls, work: Convolution | Pooling | Gathering) -> Rows:
        """What a work reads."""
        reading = work.reading
        return cls(work.rows, halo_of(work.rows, reading), work.outside)


def halo_of(rows: Tensor, reading: Reading) -> Tensor | None:
    """The interpolated rows of a reading, if it has any."""
    return mix(rows, reading.sources, reading.mix) if reading.sources.shape[0] else None


class Native(Backend):
    """Compiled code that reads rows where they lie; `native.c` says what each function does."""

    name = "native"

    def applies(self, work: Work) -> bool:
        """Values alone, of rows that it has a form for."""
        if not work.is_inference or not supports(work.rows):
            return False
        if isinstance(work, Filling):
            return work.rows.dtype != torch.uint8 and _of_one_resolution(work.source, work.target)
        return not isinstance(work, Convolution) or self._has_form(work)

    def _has_form(self, work: Convolution) -> bool:
        weights, reads = work.weights, work.reads
        if weights.groups > 1:
            return has_grouped_form(weights.weight, weights.groups)
        # Its weight has to be packed: worth it where that is kept. In float32 oneDNN is a little faster, but makes code
        # for each number of rows, which takes a millisecond and half a megabyte that stays in its caches: it gets the
        # maps of the first few sizes where that number follows from the size of the image alone.
        same_type = work.rows.dtype == weights.weight.dtype
        if weights.forms is None or not same_type or not has_product(weights.weight):
            return False
        if work.rows.dtype == torch.bfloat16:
            return True
        uniform = work.is_product and isinstance(reads, Between) and reads.target.uniform_level is not None
        return not (uniform and weights.is_among_first(reads.target.count))  # type: ignore[union-attr]

    def convolve(self, work: Convolution) -> Tensor:
        """Rows (N, ..., O) = clamp((sum + bias) scale + shift + residual); scale and shift by level, if any."""
        weights, outputs = work.weights, work.weights.weight.shape[0]
        table: Tensor | None
        if work.is_product:
            rows = work.of_target
            shape = (*rows.shape[:-1], outputs)
            source, table = Rows(rows.reshape(-1, rows.shape[-1])), None
        else:
            reading = work.reading
            source, table = Rows(work.rows, halo_of(work.rows, reading), work.outside), reading.table
            shape = (len(table), outputs)
        dtype, act, size = work.rows.dtype, weights.activation, weights.weight.shape[1]
        pack: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
        sizes: tuple[int, ...]
        if weights.groups == 1:
            name, pack, sizes = "product", product_weight, (outputs,)
        elif size == 1 and has_pairs(dtype):
            name, pack, sizes = "depthwise", pair_weight, ()
        else:
            name, pack, sizes = "grouped", group_weight, (size,)
        packed = weights.form(("native", dtype), lambda: pack(weights.weight.to(dtype), weights.bias))
        bounds = act.bounds if act is not None else None
        more = work.residual.contiguous() if work.residual is not None else None
        out = new_memory(work.rows, *shape)
        limits = map(float, bounds or (-math.inf, math.inf))
        levels: tuple[Tensor | None, ...] = (None, None, None)
        if weights.levels is not None:
            assert isinstance(work.reads, Between)
            factors = (value.to(packed[1].dtype).contiguous() for value in weights.levels)
            levels = (work.reads.target.level_of_rows, *factors)
        call(name, source, table, *packed, *levels, more, out, *sizes, *limits)
        return out if bounds or act is None else act.apply_(out)

    def pool(self, work: Pooling) -> Tensor:
        """Rows (N, C)."""
        table = work.reading.table
        out = new_memory(work.rows, table.shape[0], work.rows.shape[1])
        call("pool", Rows.of(work), table, out, int(work.largest))
        return out

    def mix(self, work: Mixing) -> Tensor:
        """Rows (M, C)."""
        out = new_memory(work.rows, work.sources.shape[0], work.rows.shape[1])
        shares = work.shares.to(_sum_type(work.rows.dtype)).contiguous()
        call("mix", Rows(work.rows), work.sources.contiguous(), shares, out)
        return out

    def mix_lines(self, work: MixingLines) -> Tensor:
        """(L, M, C)."""
        lines, width, channels = work.rows.shape
        out = new_memory(work.rows, lines, len(work.share), channels)
        sources = torch.stack((work.first, work.second), 1).int()
        shares = torch.stack((1 - work.share, work.share), 1).to(_sum_type(out.dtype))
        rows = Rows(work.rows.reshape(lines * width, channels))
        call("mix_lines", rows, sources, shares, lines, out, count=width)
        return out

    def pick(self, work: Picking) -> Tensor:
        """(entries, C); each row of the halo is mixed where it is read."""
        table, sources = work.reading.table.reshape(-1, 1), work.reading.sources.contiguous()
        shares = work.reading.mix.to(_sum_type(work.rows.dtype)).contiguous()
        out = new_memory(work.rows, len(table), work.rows.shape[1])
        call("gather_mixing", Rows(work.rows), table, sources, shares, sources.shape[1], out)
        return out

    def fill(self, work: Filling) -> Tensor:
        """(T, C)."""
        rows, source, act, whole = work.rows, work.source, work.activation, work.source.part is None
        dtype, (height, width) = _sum_type(rows.dtype), source.size
        out = new_memory(rows, work.target.count, rows.shape[1])
        there, index = (None, None) if whole else (source.part.pixels, source.index)  # type: ignore[union-attr]
        shares = work.shares.to(dtype).contiguous() if work.shares is not None else None
        floor = work.floor.to(rows).contiguous() if work.floor is not None else None
        more = work.residual.to(rows).contiguous() if work.residual is not None else None
        side, bounds = work.weights.shape[0], act.bounds if act is not None else None
        table = work.target.anchors.int().unsqueeze(1)
        numbers = (side, height, width, work.least)
        limits = map(float, bounds or (-math.inf, math.inf))
        weights = work.weights.to(dtype).contiguous()
        call("fill", Rows(rows), table, there, index, shares, weights, *numbers, floor, more, out, *limits)
        return out if bounds or act is None else act.apply_(out)

    def gather(self, work: Gathering) -> Callable[[Tensor, Tensor], None]:
        """The function of entries (n, taps) and memory (n * taps, C)."""
        source = Rows.of(work)

        def fill(entries: Tensor, out: Tensor) -> None:
            call("gather", source, entries, out)

        return fill


def _of_one_resolution(*lattices: Lattice) -> bool:
    """Whether every position of lattices is a cell of its own, of as many as there are known."""
    return all(not one.geometry.strides and one.has_known_counts for one in lattices)


class _Reading(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "halo", "outside", "table")),
        *((name, ctypes.c_long) for name in ("count", "n", "taps", "channels")),
    )


def supports(rows: Tensor) -> bool:
    """Whether there is compiled code for these rows; not while torch observes what is called."""
    return (
        not is_observed() and rows.device.type == "cpu" and rows.dtype in ELEMENTS and library() is not None
    )


def has_product(weight: Tensor) -> bool:
    """Whether `product` has a form for a kernel (O, C, kh, kw); without `has_pairs` oneDNN's in bfloat16 is faster."""
    return weight.dtype in (torch.float32, torch.float64) or has_pairs(weight.dtype)


def product_weight(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution as `product` reads them: chunks of outputs outermost, each tap in one piece; of
    bfloat16 two channels side by side."""
    outputs, channels, height, width = weight.shape
    dtype = _sum_type(weight.dtype)
    chunk, side = PRODUCT_LANES * LANE_BYTES // dtype.itemsize, dtype.itemsize // weight.dtype.itemsize
    padded = -(-outputs // chunk) * chunk
    kernel = weight.new_zeros(padded, height * width, -(-channels // side) * side)
    kernel[:outputs, :, :channels] = weight.detach().flatten(2).transpose(1, 2)
    offset = kernel.new_zeros(padded, dtype=dtype)
    if bias is not None:
        offset[:outputs] = bias.detach()
    parts = kernel.view(-1, chunk, height * width, kernel.shape[2] // side, side)
    return parts.permute(0, 2, 3, 1, 4).contiguous(), offset


def has_grouped_form(weight: Tensor, groups: int) -> bool:
    """Whether `grouped` has a form for a kernel (O, C / groups, kh, kw)."""
    out, group, height, width = weight.shape
    lanes = LANE_BYTES // _sum_type(weight.dtype).itemsize
    return out == group * groups and group in GROUPS and group <= lanes and 0 < height * width <= MOST_TAPS


def group_weight(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a grouped convolution as `grouped` reads them: taps outermost, channels padded."""
    out, group = weight.shape[:2]
    dtype = _sum_type(weight.dtype)
    lanes = LANE_BYTES // dtype.itemsize
    padded = -(-out // lanes) * lanes
    kernel = weight.new_zeros(weight[0, 0].numel(), group, padded, dtype=dtype)
    kernel[:, :, :out] = weight.detach().flatten(2).permute(2, 1, 0)
    offset = kernel.new_zeros(padded)
    if bias is not None:
        offset[:out] = bias.detach()
    return kernel, offset


def pair_weight(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a depthwise convolution as `depthwise` reads them: two taps side by side, channels padded."""
    channels, taps = weight.shape[0], weight[0, 0].numel()
    many = LANE_BYTES // weight.dtype.itemsize
    chunks, pairs = -(-channels // many), -(-taps // 2)
    kernel = weight.new_zeros(chunks * many, 2 * pairs)
    kernel[:channels, :taps] = weight.detach().flatten(1)
    offset = kernel.new_zeros(chunks * many, dtype=_sum_type(weight.dtype))
    if bias is not None:
        offset[:channels] = bias.detach()
    quarters = kernel.view(chunks, 4, 2, many // 8, pairs, 2)
    return quarters.permute(0, 4, 2, 1, 3, 5).contiguous(), offset


class _Expansion(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("image", "weight", "then", "last")),
        *((name, ctypes.c_void_p) for name in ("bias", "then_bias", "last_bias", "more", "out")),
        *((name, ctypes.c_long) for name in ("batch", "height", "width", "channels", "middle", "outputs")),
        *((name, ctypes.c_long) for name in ("lines", "columns", "tall", "wide", "stride", "top", "left")),
        *((name, ctypes.c_double) for name in ("low", "high", "then_low", "then_high")),
        *((name, ctypes.c_double) for name in ("last_low", "last_high")),
    )


def is_point(weights: Weights) -> bool:
    """Whether `expand_depthwise` has a form for a 1x1 convolution."""
    plain = weights.activation is None or weights.activation.bounds is not None
    return plain and weights.groups == 1 and weights.weight.shape[2:] == (1, 1) and weights.levels is None


def can_expand(first: Weights, then: Weights, stride: Pair, dilation: Pair) -> bool:
    """Whether `expand_depthwise` has a form for a 1x1 convolution and the depthwise one that follows, of dense maps."""
    outputs, group = then.weight.shape[:2]
    is_depthwise = then.groups == outputs == first.weight.shape[0] and group == 1 and then.levels is None
    is_plain = then.activation is None or then.activation.bounds is not None
    fits = then.weight[0, 0].numel() <= MOST_TAPS and stride[0] == stride[1] and dilation == (1, 1)
    return is_point(first) and is_depthwise and is_plain and fits


def expand_depthwise(
    image: Tensor,
    first: Weights,
    then: Weights,
    stride: Pair,
    padding: Pair,
    last: Weights | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A depthwise convolution of the result of a 1x1 convolution, see `can_expand`: (B, O, H', W') from (B, C, H, W) in
    bfloat16, for which the processor `has_pairs`; with a last 1x1 convolution and a residual of its result that of
    those. What is between them stays in the cache.

    Raises:
        MemoryError: there is none for a few lines of what is between them.
    """
    image, dtype = image.contiguous(memory_format=torch.channels_last), image.dtype
    kernel = tall, wide = then.weight.shape[2], then.weight.shape[3]
    batch, channels, height, width = image.shape
    lines, columns = map_size((height, width), kernel, stride, padding)
    middle = then.weight.shape[0]
    outputs = middle if last is None else last.weight.shape[0]
    out = new_memory(image, batch, lines, columns, outputs)
    more = residual.contiguous(memory_format=torch.channels_last) if residual is not None else None
    packed: list[tuple[Tensor | None, Tensor | None]] = []
    for one, pack in ((first, product_weight), (then, pair_weight), (last, product_weight)):
        if one is None:
            packed.append((None, None))
        else:
            make = partial(pack, one.weight.to(dtype), one.bias)
            packed.append(one.form(("native", dtype), make))
    bounds = [
        one.activation.bounds if one is not None and one.activation is not None else None
        for one in (first, then, last)
    ]
    weights, biases = zip(*packed, strict=True)
    work = _Expansion(
        *map(_for_c, (image, *weights, *biases, more, out)),
        *(batch, height, width, channels, middle, outputs, lines, columns, tall, wide, stride[0], *padding),
        *(end for pair in bounds for end in pair or (-math.inf, math.inf)),
    )
    function = library().expand_depthwise_bfloat16
    function.restype = ctypes.c_long
    if not function(ctypes.byref(work)):
        raise MemoryError("no memory for a few lines of a map between two convolutions.")
    return out.permute(0, 3, 1, 2)


def map_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    """Height and width of what a window without dilation makes of a map."""
    lines, columns = (
        (length + 2 * pad - side) // step + 1
        for length, side, step, pad in zip(size, kernel, stride, padding, strict=True)
    )
    return lines, columns


def call(name: str, source: Rows, table: Tensor | None, *arguments: Any, count: int | None = None) -> None:
    """A function of the library: tensors go as pointers, None as none. Without a table each row reads itself."""
    rows, halo = source.rows.contiguous(), source.halo
    beyond = _row_outside(rows.shape[1], rows.dtype, outside_of(rows, source.outside))
    if table is not None:
        assert table.dim() == 2 and table.is_contiguous() and table.dtype == torch.int32
    n, taps = (rows.shape[0], 1) if table is None else table.shape
    reading = _Reading(
        *(_for_c(one) for one in (rows, halo, beyond, table)),
        *(rows.shape[0] if count is None else count, n, taps, rows.shape[1]),
    )
    _function(f"{name}_{ELEMENTS[rows.dtype][0]}", arguments)(
        ctypes.addressof(reading), *map(_for_c, arguments)
    )


_FUNCTIONS: dict[str, Any] = {}


def _function(name: str, arguments: tuple[Any, ...]) -> Any:
    """A function of the library, of arguments of these types."""
    function = _FUNCTIONS.get(name)
    if function is None:
        kinds = {int: ctypes.c_long, float: ctypes.c_double}
        function = getattr(library(), name)
        function.argtypes = (ctypes.c_void_p, *(kinds.get(type(one), ctypes.c_void_p) for one in arguments))
        _FUNCTIONS[name] = function
    return function


@lru_cache(maxsize=64)
def _row_outside(channels: int, dtype: torch.dtype, value: float) -> Tensor:
    return torch.full((channels,), value, dtype=dtype)


def _for_c(value: Tensor | float | None) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


def _sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.uint8) else dtype
