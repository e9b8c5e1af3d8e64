"""Convolution on elements for CUDA, in Triton: gathering and multiplying in one kernel.

    out[n] = act(sum_t W_t rows[table[n, t]] + bias + residual[n])                             (*)

The kernel is an implicit matrix product with one program per tile of outputs: gathered rows go straight to the
tensor cores and never exist in memory. Under floors the table is a map of samples (`gpu_maps.SampleMap`). Halo rows
stand in memory of their own, and only those that are read are computed. There are no atomic additions, and tiles are
chosen by rule (`gpu_tiles.py`), so forward and backward give the same bits every time.

Triton is optional. With TRITON_INTERPRET=1 set before its import the kernels run on CPU tensors, for tests.
The first call with a shape compiles; make this call before a CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from cadsurgery.elements.backends import gpu_tiles, triton_kernels
from cadsurgery.elements.backends.gpu_maps import SampleMap, available
from cadsurgery.elements.backends.weights import Activation
from cadsurgery.elements.sizes import divide_up

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Activations that the kernels support, by name, scalars and algorithm. Leaky ReLU is supported with any slope.
_FUSED = {
    ("relu", (), ""): "relu",
    ("hardtanh", (0.0, 6.0), ""): "relu6",
    ("swish", (), ""): "silu",
    ("hardswish", (), ""): "hardswish",
    ("gelu", (), "none"): "gelu",
    ("sigmoid", (), ""): "sigmoid",
}
# The derivatives of these follow from the output alone, so they stay fused when gradients are needed.
_INVERTIBLE = ("none", "relu", "relu6")
# Number of programs in the weight's backward: enough for any GPU, with partial sums of only about 16 MB.
PROGRAMS = 1024


class Halo(NamedTuple):
    """The halo rows of a convolution, as the weighted sums of `blend`."""

    sources: Tensor
    shares: Tensor
    used: Tensor | None = None


class ReversedMap(NamedTuple):
    """The inverse of a kernel map: for every row the outputs that read it, at most one per tap in a table row.

    If the same tap of several outputs reads one row (a coarse cell beside fine cells, the padding row), that
    row continues in extra table rows. The gradient of the rows is then (*) itself, followed by a short sum.

    Attributes:
        table: (R + M, taps) int32, the output that reads by this tap, or -1. Table row r < R belongs to row r.
        extras: (M,) int64, R..R+M-1: the extra table rows, grouped by owner.
        owners: (K,) int64, the rows that have extras, each once.
        offsets: (K,) int64, start of each owner's extras.
    """

    table: Tensor
    extras: Tensor
    owners: Tensor
    offsets: Tensor


def supports(rows: Tensor, weight: Tensor) -> bool:
    """Return True if `gather_conv` accepts these operands: both of one of the three dtypes, on a supported GPU."""
    return rows.dtype == weight.dtype and rows.dtype in DTYPES and available(rows.device)


def _name_activation(activation: Activation | None) -> tuple[str, float] | None:
    """Return name and slope of an activation in the kernels; None if they do not support it."""
    if activation is None:
        return "none", 0.0
    if activation.name == "leaky_relu":
        return "leaky_relu", activation.scalars[0]
    name = _FUSED.get((activation.name, activation.scalars, activation.algorithm))
    return (name, 0.0) if name is not None else None


def reverse_map(table: Tensor, rows: int) -> ReversedMap:
    """Invert the kernel map `table` (N, taps) into `rows` rows; negative entries are ignored.

    This is one stable integer sort. It synchronises with the device, so keep the result as long as the table.
    """
    taps = table.shape[1]
    entry = table.flatten().ge(0).nonzero().squeeze(1)
    output, tap = entry // taps, entry % taps
    key, order = torch.sort(table.flatten()[entry].long() * taps + tap, stable=True)
    output, tap, row = output[order], tap[order], key // taps
    position = torch.arange(len(key), device=table.device)
    # The first slot of each (row, tap) is in the row itself, further slots are in its extras.
    slot = position - torch.searchsorted(key, key)
    needed = torch.zeros(rows, dtype=torch.int64, device=table.device)
    needed.scatter_reduce_(0, row, slot, "amax")
    ends = needed.cumsum(0)
    place = torch.where(slot == 0, row, rows + (ends - needed)[row] + slot - 1)
    count = int(needed.sum())
    readers = torch.full((rows + count, taps), -1, dtype=torch.int32, device=table.device)
    readers[place, tap] = output.to(torch.int32)
    owners = needed.nonzero().squeeze(1)
    extras = torch.arange(rows, rows + count, device=table.device)
    return ReversedMap(readers, extras, owners, (ends - needed)[owners])


def gather_conv(
    rows: Tensor,
    weight: Tensor,
    table: Tensor | SampleMap | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    groups: int = 1,
    reverse: Callable[[], ReversedMap] | None = None,
    halo: Halo | None = None,
    outside: int = -1,
) -> Tensor:
    """Compute the convolution (*), (N, O), for operands that `supports` accepts; tables and shares have no gradient.

    Args:
        rows: (R, C) float32, float16 or bfloat16; sums are float32.
        weight: (O, taps C / groups), taps outermost.
        table: (N, taps) int32 into the rows; a negative entry reads zero. A map of samples, or None, where each output
            reads its own row alone, is without gradients.
        bias: (O,).
        residual: (N, O).
        activation: applied last, inside the kernel if it supports the function.
        groups: channel groups.
        reverse: returns the inverse of the table, cached by the caller; if None, the inverse is computed.
        halo: M sums of rows, read by entries behind `outside`.
        outside: an entry that reads zero, like those that are negative.
    """
    channels, outputs = rows.shape[1], weight.shape[0]
    count, taps = _entries(rows, table).shape
    if channels % groups or outputs % groups:
        raise ValueError(f"{channels} and {outputs} channels are not {groups} groups.")
    expected = {
        "weight": (weight, (outputs, taps * (channels // groups))),
        "bias": (bias, (outputs,)),
        "residual": (residual, (count, outputs)),
    }
    for label, (value, shape) in expected.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{label} is {tuple(value.shape)} where {shape} is needed.")
    fused = _name_activation(activation)
    operands = (rows, weight, bias, residual)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
        assert isinstance(table, Tensor)
        fused = fused if fused is not None and fused[0] in _INVERTIBLE else None
        name = fused[0] if fused is not None else "none"
        out = GatherConv.apply(rows, weight, bias, residual, table, name, groups, reverse, halo, outside)
    else:
        out = _forward(rows, weight, table, bias, residual, *(fused or ("none", 0.0)), groups, halo, outside)
    return out if fused is not None or activation is None else activation.apply_(out)


def blend(rows: Tensor, sources: Tensor, shares: Tensor, used: Tensor | None = None) -> Tensor:
    """Compute weighted sums (M, C) of rows (R, C): `sources` (M, k) int32 and their `shares` (M, k), summed in float32.

    `used` is the number of sums that are computed, counted from the first, as a tensor without dimensions; None for
    all. The others are not initialised.
    """
    (count, read), channels = sources.shape, rows.shape[1]
    out = rows.new_empty(count, channels)
    if not count or not channels:
        return out
    given = operand(rows)
    tile = gpu_tiles.elementwise_tile(channels)
    if triton_kernels.INTERPRETED:
        shares = shares.float()
    sizes = {"C": channels, "READ": read, "WIDE": is_wide(given, out), "BLOCK_N": tile.n, "BLOCK_C": tile.c}
    with torch.cuda.device_of(rows):
        triton_kernels.blend[(divide_up(count, tile.n), divide_up(channels, tile.c))](
            given, sources.contiguous(), shares.contiguous(), used, out, count, **sizes, num_warps=tile.warps
        )
    return out


def weigh(shares: Tensor, rows: Tensor) -> Tensor:
    """Compute `shares @ rows`, (B, C) float32, for (B, N) weights and (N, C) rows, which are read as they are."""
    (lines, count), channels = shares.shape, rows.shape[1]
    tile = gpu_tiles.elementwise_tile(channels)
    programs = max(1, min(PROGRAMS // max(1, lines * divide_up(channels, tile.c)), divide_up(count, tile.n)))
    partial = torch.empty(programs, lines, channels, dtype=torch.float32, device=rows.device)
    if not count or not channels:
        return partial.zero_().sum(0)
    with torch.cuda.device_of(rows):
        triton_kernels.weigh[(programs, divide_up(channels, tile.c), lines)](
            *(operand(rows), shares.contiguous(), partial, count, divide_up(count, programs)),
            **{"C": channels, "BLOCK_N": tile.n, "BLOCK_C": tile.c},
            num_warps=tile.warps,
        )
    return partial.sum(0)


class BlendWithGradient(torch.autograd.Function):
    """`blend` with a gradient of the rows, summed in a fixed order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sources: Tensor, shares: Tensor) -> Tensor:
        """See `blend`."""
        ctx.save_for_backward(sources, shares)
        ctx.count = rows.shape[0]
        return blend(rows, sources, shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the rows."""
        sources, shares = ctx.saved_tensors
        out = grad.new_zeros(ctx.count, grad.shape[1])
        return _spread_back(grad, sources, shares, out), None, None


def _spread_back(grad: Tensor, sources: Tensor, shares: Tensor, out: Tensor) -> Tensor:
    """Add to each row of `out` (R, C) what the gradient (M, C) of `blend` owes it, in a fixed order; return `out`."""
    count, channels = out.shape
    if out.numel() and grad.numel():
        readers, starts = _readers(sources, shares, count)
        block = min(1024, max(16, 1 << (channels - 1).bit_length()))
        with torch.cuda.device_of(grad):
            triton_kernels.spread_back[(count, divide_up(channels, block))](
                *(operand(grad), readers, starts, shares.contiguous().float(), operand(out), out),
                **{"C": channels, "READ": sources.shape[1], "BLOCK_C": block},
            )
    return out


# Of the weights of each halo: which of its sums read each row. Tables live as long as the lattices of a forward pass.
_READERS = WeakTensorKeyDictionary()


def _readers(sources: Tensor, shares: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the entries of `sources` (M, k) sorted by the row they read, and where each row's begin (count + 1,).

    Entries without weight stand behind those of the last row."""
    found: tuple[Tensor, Tensor] | None = _READERS.get(shares)
    if found is None or found[1].shape[0] != count + 1:
        rows, readers = torch.where(shares != 0, sources, count).flatten().sort(stable=True)
        every = torch.arange(count + 1, dtype=rows.dtype, device=rows.device)
        found = _READERS[shares] = readers, torch.searchsorted(rows, every)
    return found


def finish(
    sums: Tensor, bias: Tensor | None, residual: Tensor | None, activation: Activation | None
) -> Tensor:
    """Apply bias (C,), residual (N, C) and activation to contiguous rows (N, C) in place, and return them."""
    fused, (count, channels) = _name_activation(activation), sums.shape
    name, slope = fused or ("none", 0.0)
    nothing = bias is None and residual is None and name == "none"
    if sums.numel() and not nothing:
        tile = gpu_tiles.elementwise_tile(channels)
        sizes = {"C": channels, "ACTIVATION": name, "SLOPE": slope, "WIDE": is_wide(sums)}
        with torch.cuda.device_of(sums):
            triton_kernels.finish[(divide_up(count, tile.n), divide_up(channels, tile.c))](
                *(sums, bias, residual if residual is None else residual.contiguous(), count),
                **sizes,
                BLOCK_N=tile.n,
                BLOCK_C=tile.c,
                num_warps=tile.warps,
            )
    return sums if fused is not None or activation is None else activation.apply_(sums)


class GatherConv(torch.autograd.Function):
    """The convolution (*) with gradients; saves its inputs and, if there is an activation, its output."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        table: Tensor,
        activation: str,
        groups: int,
        reverse: Callable[[], ReversedMap] | None,
        halo: Halo | None,
        outside: int,
    ) -> Tensor:
        """See `gather_conv`."""
        out = _forward(rows, weight, table, bias, residual, activation, 0.0, groups, halo, outside)
        ctx.save_for_backward(rows, weight, table, None if activation == "none" else out)
        ctx.activation, ctx.groups, ctx.reverse = activation, groups, reverse
        ctx.halo, ctx.outside = halo, outside
        ctx.dtypes = [x.dtype if x is not None else None for x in (bias, residual)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of rows, weight, bias and residual."""
        rows, weight, table, out = ctx.saved_tensors
        bias_dtype, residual_dtype = ctx.dtypes
        needs = ctx.needs_input_grad
        if out is not None:
            open_above = out < 6 if ctx.activation == "relu6" else True
            grad = grad * ((out > 0) & open_above)
        grad = grad.contiguous()
        grad_rows = grad_weight = None
        halo, count = ctx.halo, rows.shape[0]
        if needs[0]:
            read = count + (1 + halo.sources.shape[0] if halo is not None else 0)
            reverse = ctx.reverse() if ctx.reverse is not None else reverse_map(table, read)
            parts = _grad_rows(grad, weight, reverse, table.shape[1], read, ctx.groups)
            grad_rows = parts[:count]
            if halo is not None:
                grad_rows = _spread_back(parts[count + 1 :], halo.sources, halo.shares, grad_rows)
        if needs[1]:
            # Halo rows are computed again: less memory, for little time.
            grad_weight = _grad_weight(rows, grad, table, ctx.groups, halo, ctx.outside).to(weight.dtype)
        grad_bias = grad.sum(0, dtype=torch.float32).to(bias_dtype) if needs[2] else None
        grad_residual = grad.to(residual_dtype) if needs[3] else None
        return grad_rows, grad_weight, grad_bias, grad_residual, *(None,) * 6


def _grad_rows(
    grad: Tensor, weight: Tensor, reverse: ReversedMap, taps: int, count: int, groups: int
) -> Tensor:
    """Compute the gradient of the rows (count, C): (*) over the inverse map, then extras are added to their owners."""
    by_group = weight.unflatten(0, (groups, -1)).unflatten(
        2, (taps, -1)
    )  # (groups, O / groups, taps, C / groups)
    weight = by_group.permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
    parts = _forward(grad, weight, reverse.table, None, None, "none", 0.0, groups)
    of_rows = parts[:count]
    if len(reverse.owners):
        sums = F.embedding_bag(reverse.extras, parts, reverse.offsets, mode="sum")
        of_rows[reverse.owners] += sums  # owners are distinct, so this is a plain write in a fixed order
    return of_rows


def _forward(
    rows: Tensor,
    weight: Tensor,
    table: Tensor | SampleMap | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    slope: float,
    groups: int,
    halo: Halo | None = None,
    outside: int = -1,
) -> Tensor:
    reads, outputs, channels = _entries(rows, table), weight.shape[0], rows.shape[1]
    count, taps = reads.shape
    out = rows.new_empty(count, outputs)
    if not count:
        return out
    weight, bias, residual = map(operand, (weight, bias, residual))
    rows, mixed, shift = _join(rows, halo, outside)
    sizes: dict[str, Any] = {"C": channels, "TAPS": taps, "ACROSS": reads.width, "HALO": halo is not None}
    sizes |= {"ACTIVATION": activation, "SLOPE": slope, "WIDE": is_wide(rows, out, reads.table, mixed)}
    arguments = (
        *(rows, shift, weight, reads.table, reads.places, bias, residual, out),
        *(count, outside, reads.down, reads.across),
    )
    with torch.cuda.device_of(rows):
        if table is not None and groups == channels == outputs:
            tile = gpu_tiles.depthwise_tile(channels)
            triton_kernels.depthwise[(divide_up(count, tile.n), divide_up(channels, tile.c))](
                *arguments, **sizes, BLOCK_N=tile.n, BLOCK_C=tile.c, num_warps=tile.warps
            )
            return out
        width, depth, precision = outputs // groups, channels // groups, _precision(rows.dtype)
        kind = gpu_tiles.kind_of(precision == "ieee", residual is not None)
        device = gpu_tiles.device_of(rows.device)
        tile = gpu_tiles.tile_of(count, width, groups, depth, taps, rows.element_size(), kind, device)
        triton_kernels.product[(divide_up(count, tile.n) * groups * divide_up(width, tile.o),)](
            *arguments,
            **sizes,
            **{"C_OUT": outputs, "GROUPS": groups, "PRECISION": precision},
            **{"BLOCK_N": tile.n, "BLOCK_O": tile.o, "BLOCK_C": tile.c},
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def pool_samples(
    rows: Tensor, samples: SampleMap, halo: Halo | None, outside: float, largest: bool
) -> Tensor:
    """Compute the largest value or the sum over the taps of each output, (N, C); `outside` is read outside the map."""
    reads, channels = _entries(rows, samples), rows.shape[1]
    out = rows.new_empty(reads.shape[0], channels)
    if not out.numel():
        return out
    number = rows.shape[0]
    rows, mixed, shift = _join(rows, halo, number)
    tile = gpu_tiles.depthwise_tile(channels)
    sizes: dict[str, Any] = {"C": channels, "TAPS": reads.shape[1], "ACROSS": reads.width}
    sizes |= {"HALO": halo is not None, "BLOCK_N": tile.n, "BLOCK_C": tile.c}
    sizes |= {"LARGEST": largest, "OUTSIDE": outside, "WIDE": is_wide(rows, out, mixed)}
    with torch.cuda.device_of(rows):
        triton_kernels.pool[(divide_up(len(out), tile.n), divide_up(channels, tile.c))](
            *(rows, shift, reads.table, reads.places, out, len(out), number, reads.down, reads.across),
            **sizes,
            num_warps=tile.warps,
        )
    return out


class _Entries(NamedTuple):
    """A table as the kernels take it: outputs and taps; entries; and for a map of samples where each output's begin,
    the entries from line to line and tap to tap, and the taps of a line."""

    shape: tuple[int, int]
    table: Tensor | None
    places: Tensor | None = None
    down: int = 0
    across: int = 0
    width: int = 1


def _entries(rows: Tensor, table: Tensor | SampleMap | None) -> _Entries:
    if isinstance(table, SampleMap):
        places = (table.places, table.down, table.across, table.width)
        return _Entries((table.places.shape[0], table.taps), table.samples, *places)
    if table is None:
        return _Entries((rows.shape[0], 1), None)
    return _Entries((table.shape[0], table.shape[1]), table.contiguous())


def _join(rows: Tensor, halo: Halo | None, outside: int) -> tuple[Tensor, Tensor | None, int]:
    """Return operands of the kernels: rows, halo rows, and how many values the latter lie behind the place that entries
    name; of rows that are a view that begins at an odd place a copy, because the kernels copy 16 bytes."""
    given = operand(rows)
    if halo is None:
        return given, None, 0
    mixed, channels = operand(blend(rows, *halo)), rows.shape[1]
    shift, rest = divmod(mixed.data_ptr() - given.data_ptr(), given.element_size())
    if rest or (shift % 16 and not channels % 16):
        return _join(rows.clone(), halo, outside)
    return given, mixed, shift - (outside + 1) * channels


def _grad_weight(
    rows: Tensor, grad: Tensor, table: Tensor, groups: int, halo: Halo | None, outside: int
) -> Tensor:
    """Compute the float32 gradient of the weight: each program sums a share of the outputs; the shares are added."""
    (count, taps), channels, outputs = table.shape, rows.shape[1], grad.shape[1]
    width, depth, size = outputs // groups, channels // groups, rows.element_size()
    grad, table = operand(grad), table.contiguous()
    rows, _, shift = _join(rows, halo, outside)
    if not count:
        return rows.new_zeros(outputs, taps * depth, dtype=torch.float32)
    is_depthwise = groups == channels == outputs
    precision = _precision(rows.dtype)
    if is_depthwise:
        tile = gpu_tiles.depthwise_tile(channels)
        tiles = taps * divide_up(channels, tile.c)
    else:
        device = gpu_tiles.device_of(rows.device)
        tile = gpu_tiles.weight_tile(width, depth, size, precision == "ieee", device)
        tiles = taps * groups * divide_up(width, tile.o) * divide_up(depth, tile.c)
    shares = max(1, min(PROGRAMS // tiles, divide_up(count, 256)))
    partial = rows.new_empty(shares, outputs, taps * depth, dtype=torch.float32)
    sizes = {"C": channels, "TAPS": taps, "BLOCK_N": tile.n, "BLOCK_C": tile.c, "num_warps": tile.warps}
    sizes["HALO"] = halo is not None
    arguments = (rows, shift, grad, table, partial, count, outside, divide_up(count, shares))
    with torch.cuda.device_of(rows):
        if is_depthwise:
            triton_kernels.depthwise_weight[(tiles, shares)](*arguments, **sizes)
        else:
            more = {"C_OUT": outputs, "GROUPS": groups, "PRECISION": precision, "BLOCK_O": tile.o}
            triton_kernels.product_weight[(tiles, shares)](
                *arguments, **sizes, **more, num_stages=tile.stages
            )
    return partial.sum(0)


def is_wide(*tensors: Tensor | None) -> bool:
    """Return True if places in a tensor exceed 32 bits."""
    return any(x is not None and x.numel() >= 1 << 31 for x in tensors)


def operand(x: Any) -> Any:
    """Prepare a tensor or None for the kernels; Triton 3.9's interpreter cannot multiply bfloat16."""
    if x is None:
        return None
    wide = triton_kernels.INTERPRETED and x.dtype == torch.bfloat16
    return x.contiguous().float() if wide else x.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """Return the precision of products: for float32 by torch's setting for convolutions, which is TF32 by default."""
    return "tf32" if dtype != torch.float32 or torch.backends.cudnn.allow_tf32 else "ieee"
