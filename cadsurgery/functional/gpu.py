"""Convolution on elements for CUDA, in Triton: gathering and multiplying in one kernel.

    out[n] = act(scale * sum_t W_t rows[table[n, t]] + bias + residual[n])                     (*)

An implicit matrix product, one program per tile of outputs: gathered rows go straight to the tensor cores and
never exist in memory. Nothing is added atomically, so forward and backward give the same bits every time
(for the same tile sizes, which are tuned once per shape and machine and kept on disk).

Triton is optional. With TRITON_INTERPRET=1 set before its import the kernels run on CPU tensors, for tests.
The first call of a shape tunes and compiles: make it before a CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without CUDA
    triton = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "sigmoid": F.sigmoid,
}
# Their derivative follows from the output alone, so they stay fused when gradients are needed.
_INVERTIBLE = ("none", "relu", "relu6")
# Backward of the weight: enough programs for any GPU, few enough that their partial sums take about 16 MB.
_PROGRAMS = 1024


class ReversedMap(NamedTuple):
    """A kernel map read backwards: for every row the outputs that read it, at most one per tap in a row.

    Where a tap of several outputs reads the same row (a coarse cell beside fine ones, the padding row), that
    row continues in extra rows of the table. So the gradient of the rows is (*) itself, and then a short sum.

    Attributes:
        table: (R + M, taps) int32, the output that reads by this tap or -1. Row r < R belongs to row r.
        extras: (M,) int64, 0..M-1 + R: the further rows, those of one owner side by side.
        owners: (K,) int64, the rows that have extras, each once.
        offsets: (K,) int64, where the extras of each owner start.
    """

    table: Tensor
    extras: Tensor
    owners: Tensor
    offsets: Tensor


def available(device: torch.device) -> bool:
    """Whether the kernels run on this device: NVIDIA from Ampere on (bfloat16, tf32, asynchronous copies)."""
    if triton is None or INTERPRETED:
        return INTERPRETED and device.type == "cpu"
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def supports(rows: Tensor, weight: Tensor, groups: int = 1) -> bool:
    """Whether `gather_conv` takes these operands: one of the three types, ungrouped or depthwise."""
    grouping = groups == 1 or groups == rows.shape[1] == weight.shape[0]
    return grouping and rows.dtype == weight.dtype and rows.dtype in DTYPES and available(rows.device)


def reversed_map(table: Tensor, rows: int) -> ReversedMap:
    """The kernel map `table` (N, taps) into `rows` rows, read backwards; negative entries are left out.

    One stable integer sort; waits for the device, so keep the result as long as the table.
    """
    taps = table.shape[1]
    entry = table.flatten().ge(0).nonzero().squeeze(1)
    output, tap = entry // taps, entry % taps
    key, order = torch.sort(table.flatten()[entry].long() * taps + tap, stable=True)
    output, tap, row = output[order], tap[order], key // taps
    position = torch.arange(len(key), device=table.device)
    # The first slot of each (row, tap) is in the row itself, the next ones in its extras.
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
    table: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    groups: int = 1,
    reverse: Callable[[], ReversedMap] | None = None,
) -> Tensor:
    """The convolution (*), (N, O), for operands that `supports` accepts; differentiable in all but the table.

    Args:
        rows: (R, C) float32, float16 or bfloat16; sums are float32.
        weight: (O, taps C), taps outermost; depthwise (C, taps).
        table: (N, taps) int32 into the rows; a negative entry reads zero.
        bias: (O,).
        scale: (O,).
        residual: (N, O).
        activation: none, relu, relu6, silu, hardswish, gelu, sigmoid or `leaky_relu:<slope>`.
        groups: 1, or C for a depthwise convolution.
        reverse: gives the reversed map of the table, kept by the caller; made anew if missing.
    """
    name, slope = _parsed(activation)
    if groups > 1 and not groups == rows.shape[1] == weight.shape[0]:
        raise ValueError(f"{groups} groups of {rows.shape[1]} channels are neither ungrouped nor depthwise.")
    if weight.shape[1] != table.shape[1] * (rows.shape[1] if groups == 1 else 1):
        shapes = f"{tuple(weight.shape)}, rows {tuple(rows.shape)} and table {tuple(table.shape)}"
        raise ValueError(f"weight {shapes} do not fit together.")
    operands = (rows, weight, bias, scale, residual)
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in operands):
        return _forward(rows, weight, table, bias, scale, residual, name, slope, groups)
    if scale is not None:
        weight = weight * scale.to(weight).unsqueeze(1)
    if name in _INVERTIBLE:
        return GatherConv.apply(rows, weight, bias, residual, table, name, groups, reverse)
    out = GatherConv.apply(rows, weight, bias, residual, table, "none", groups, reverse)
    return F.leaky_relu(out, slope) if name == "leaky_relu" else _ACTIVATIONS[name](out)


class GatherConv(torch.autograd.Function):
    """(*) with gradients; saves its inputs and, behind an activation, its output."""

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
    ) -> Tensor:
        """See `gather_conv`."""
        out = _forward(rows, weight, table, bias, None, residual, activation, 0.0, groups)
        ctx.save_for_backward(rows, weight, table, None if activation == "none" else out)
        ctx.activation, ctx.groups, ctx.reverse = activation, groups, reverse
        ctx.dtypes = [x.dtype if x is not None else None for x in (bias, residual)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows, weight, bias and residual."""
        rows, weight, table, out = ctx.saved_tensors
        bias_dtype, residual_dtype = ctx.dtypes
        needs = ctx.needs_input_grad
        if out is not None:
            open_above = out < 6 if ctx.activation == "relu6" else True
            grad = grad * ((out > 0) & open_above)
        grad = grad.contiguous()
        grad_rows = grad_weight = None
        if needs[0]:
            reverse = ctx.reverse() if ctx.reverse is not None else reversed_map(table, rows.shape[0])
            grad_rows = _grad_rows(grad, weight, reverse, table.shape[1], rows.shape[0], ctx.groups)
        if needs[1]:
            grad_weight = _grad_weight(rows, grad, table, ctx.groups).to(weight.dtype)
        return (
            grad_rows,
            grad_weight,
            grad.sum(0, dtype=torch.float32).to(bias_dtype) if needs[2] else None,
            grad.to(residual_dtype) if needs[3] else None,
            *(None,) * 4,
        )


def _parsed(activation: str) -> tuple[str, float]:
    """Name and slope."""
    name, _, slope = activation.partition(":")
    if name == "leaky_relu" and slope:
        return name, float(slope)
    if activation not in _ACTIVATIONS:
        known = ", ".join([*_ACTIVATIONS, "leaky_relu:<slope>"])
        raise ValueError(f"there is no fused activation {activation!r}; known: {known}.")
    return activation, 0.0


def _grad_rows(
    grad: Tensor, weight: Tensor, reverse: ReversedMap, taps: int, count: int, groups: int
) -> Tensor:
    """Gradient of the rows (count, C): (*) over the reversed map, then the extras added to their owners."""
    if groups == 1:
        weight = weight.view(weight.shape[0], taps, -1).permute(2, 1, 0).flatten(1)
    parts = _forward(grad, weight, reverse.table, None, None, None, "none", 0.0, groups)
    found = parts[:count]
    if len(reverse.owners):
        sums = F.embedding_bag(reverse.extras, parts, reverse.offsets, mode="sum")
        found[reverse.owners] += sums  # owners are distinct: a plain write, in a fixed order
    return found


# Custom operators, so that a compiled graph holds one opaque node: tuning and launching stay outside of it.


@torch.library.custom_op("cadsurgery::gather_conv", mutates_args=())
def _forward(
    rows: Tensor,
    weight: Tensor,
    table: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    slope: float,
    groups: int,
) -> Tensor:
    count, outputs = table.shape[0], weight.shape[0]
    out = rows.new_empty(count, outputs)
    if not count:
        return out
    rows, weight, bias, scale, residual = map(_operand, (rows, weight, bias, scale, residual))
    table = table.contiguous()
    sizes = {"C": rows.shape[1], "TAPS": table.shape[1], "ACTIVATION": activation, "SLOPE": slope}
    arguments = (rows, weight, table, bias, scale, residual, out, count, count.bit_length())
    with torch.cuda.device_of(rows):
        if groups > 1:
            _depthwise[lambda meta: (_cdiv(count, meta["BLOCK_N"]), _cdiv(outputs, meta["BLOCK_C"]))](
                *arguments, **sizes
            )
        else:
            _product[lambda meta: (_cdiv(count, meta["BLOCK_N"]) * _cdiv(outputs, meta["BLOCK_O"]),)](
                *arguments, O=outputs, PRECISION=_precision(), **sizes
            )
    return out


@_forward.register_fake
def _(rows: Tensor, weight: Tensor, table: Tensor, *_: Tensor | str | float | None) -> Tensor:
    return rows.new_empty(table.shape[0], weight.shape[0])


@torch.library.custom_op("cadsurgery::gather_conv_grad_weight", mutates_args=())
def _grad_weight(rows: Tensor, grad: Tensor, table: Tensor, groups: int) -> Tensor:
    """Gradient of the weight, float32: every program sums a share of the outputs, then the shares are summed."""
    (count, taps), channels, outputs = table.shape, rows.shape[1], grad.shape[1]
    rows, grad, table = _operand(rows), _operand(grad), table.contiguous()
    tiles = taps * _cdiv(channels, 64) * (_cdiv(outputs, 64) if groups == 1 else 1)
    shares = max(1, min(_PROGRAMS // tiles, _cdiv(count, 256)))
    depth = channels if groups == 1 else 1
    partial = rows.new_zeros(shares, outputs, taps * depth, dtype=torch.float32)
    if not count:
        return partial.sum(0)
    sizes = {"C": channels, "TAPS": taps}
    arguments = (rows, grad, table, partial, count, _cdiv(count, shares), count.bit_length())
    with torch.cuda.device_of(rows):
        if groups > 1:
            _depthwise_weight[lambda meta: (taps * _cdiv(channels, meta["BLOCK_C"]), shares)](
                *arguments, **sizes
            )
        else:
            _product_weight[
                lambda meta: (
                    taps * _cdiv(outputs, meta["BLOCK_O"]) * _cdiv(channels, meta["BLOCK_C"]),
                    shares,
                )
            ](*arguments, O=outputs, PRECISION=_precision(), **sizes)
    return partial.sum(0)


@_grad_weight.register_fake
def _(rows: Tensor, grad: Tensor, table: Tensor, groups: int) -> Tensor:
    depth = rows.shape[1] if groups == 1 else 1
    return rows.new_empty(grad.shape[1], table.shape[1] * depth, dtype=torch.float32)


def _operand(x: Any) -> Any:
    """A tensor or None as the kernels take it; Triton 3.9's interpreter cannot multiply bfloat16."""
    if x is None:
        return None
    return x.contiguous().float() if INTERPRETED and x.dtype == torch.bfloat16 else x.contiguous()


def _cdiv(length: int, block: int) -> int:
    return -(-length // block)


def _precision() -> str:
    """How float32 is multiplied: as the user allows matrix products to be."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _tuned(configs: list[tuple[dict[str, int], int, int]], depth: str = "") -> Callable[[Any], Any]:
    """A kernel whose tiles are tuned per shape: a list of (block sizes, warps, stages), the first the smallest.

    `depth` names the block that a matrix product sums over.
    """

    def fitting(found: list[Any], arguments: dict[str, Any], **sizes: Any) -> list[Any]:
        """Without tiles wider than the operands or larger than shared memory: they would only cost time."""
        values = {**arguments, **sizes}
        limits = {"BLOCK_N": 1 << values["bucket"], "BLOCK_C": values["C"], "BLOCK_O": values.get("O", 0)}
        size = values["rows"].element_size()

        def fits(config: Any) -> bool:
            blocks = config.kwargs
            shared = size * config.num_stages * blocks.get(depth, 0)
            shared *= sum(block for name, block in blocks.items() if name != depth)
            return shared < 200 << 10 and all(block < 2 * limits[name] for name, block in blocks.items())

        return [config for config in found if fits(config)] or found[:1]

    def decorate(kernel: Any) -> Any:
        if triton is None:
            return kernel
        usable = configs[:1] if INTERPRETED else configs
        return triton.autotune(
            configs=[triton.Config(blocks, num_warps=w, num_stages=s) for blocks, w, s in usable],
            # The count changes from image to image: its power of two is enough to choose tiles by.
            key=[*("bucket", "C", "TAPS"), *(["O"] if depth else [])],
            prune_configs_by={"early_config_prune": fitting},
            cache_results=True,
        )(triton.jit(kernel, do_not_specialize=["count", "bucket", "length"]))

    return decorate


_jit: Callable[[Any], Any] = triton.jit if triton is not None else lambda kernel: kernel


@_jit
def _finished(  # type: ignore[no-untyped-def]
    total,
    n,
    o,
    bias,
    scale,
    residual,
    count,
    O: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """The tail of (*) on a tile of float32 sums, while they are in registers."""
    if scale is not None:
        total *= tl.load(scale + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        total += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        mask = (n < count)[:, None] & (o < O)[None, :]
        total += tl.load(residual + n[:, None] * O + o[None, :], mask=mask, other=0.0).to(tl.float32)
    # Comparisons are written so that NaN stays NaN.
    if ACTIVATION == "relu":
        total = tl.where(total < 0, 0.0, total)
    elif ACTIVATION == "relu6":
        total = tl.where(total < 0, 0.0, tl.where(total > 6, 6.0, total))
    elif ACTIVATION == "leaky_relu":
        total = tl.where(total < 0, total * SLOPE, total)
    elif ACTIVATION == "sigmoid":
        total = tl.sigmoid(total)
    elif ACTIVATION == "silu":
        total *= tl.sigmoid(total)
    elif ACTIVATION == "hardswish":
        gate = total / 6 + 0.5
        total *= tl.where(gate < 0, 0.0, tl.where(gate > 1, 1.0, gate))
    elif ACTIVATION == "gelu":
        total *= 0.5 * (1 + tl.erf(total * 0.7071067811865476))
    return total


@_tuned(
    [
        ({"BLOCK_N": 32, "BLOCK_O": 32, "BLOCK_C": 32}, 4, 4),
        ({"BLOCK_N": 32, "BLOCK_O": 128, "BLOCK_C": 64}, 4, 4),
        ({"BLOCK_N": 64, "BLOCK_O": 64, "BLOCK_C": 32}, 4, 4),
        ({"BLOCK_N": 64, "BLOCK_O": 64, "BLOCK_C": 64}, 4, 4),
        ({"BLOCK_N": 64, "BLOCK_O": 128, "BLOCK_C": 32}, 4, 4),
        ({"BLOCK_N": 64, "BLOCK_O": 128, "BLOCK_C": 64}, 4, 4),
        ({"BLOCK_N": 64, "BLOCK_O": 256, "BLOCK_C": 64}, 8, 3),
        ({"BLOCK_N": 128, "BLOCK_O": 64, "BLOCK_C": 64}, 4, 4),
        ({"BLOCK_N": 128, "BLOCK_O": 128, "BLOCK_C": 32}, 4, 4),
        ({"BLOCK_N": 128, "BLOCK_O": 128, "BLOCK_C": 64}, 4, 4),
        ({"BLOCK_N": 128, "BLOCK_O": 128, "BLOCK_C": 64}, 8, 5),
        ({"BLOCK_N": 128, "BLOCK_O": 256, "BLOCK_C": 64}, 8, 3),
        ({"BLOCK_N": 128, "BLOCK_O": 256, "BLOCK_C": 64}, 8, 4),
    ],
    depth="BLOCK_C",
)
def _product(  # type: ignore[no-untyped-def]
    rows,
    weight,
    table,
    bias,
    scale,
    residual,
    out,
    count,
    bucket,
    C: tl.constexpr,
    O: tl.constexpr,
    TAPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One (BLOCK_N, BLOCK_O) tile of (*), ungrouped."""
    # Tiles in groups of eight along n, each group through all of O: programs that run together share weights
    # and gathered rows in the L2 cache. Elements are in raster order, so a tile's taps lie close together.
    group: tl.constexpr = 8
    tiles_o: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O
    program = tl.program_id(0)
    first = program // (group * tiles_o) * group
    height = tl.minimum(tl.cdiv(count, BLOCK_N) - first, group)
    within = program % (group * tiles_o)
    # 64-bit: rows and outputs may be more than 2^31 values.
    n = ((first + within % height) * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)
    o = within // height * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    # One loop over taps and channels, not two nested: loads run ahead of the products across taps. The table
    # is read one step ahead and carried, so that the compiler sees no load that waits for another one in a
    # step: those would take stages of its pipeline. Re-reading it per block of channels is 4 bytes from L1.
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    source = tl.load(table + n * TAPS, mask=n < count, other=-1)
    for step in range(TAPS * blocks):
        c = step % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        # Channels are contiguous: a gathered row is whole cache lines wherever it lies.
        gathered = tl.load(
            rows + source.to(tl.int64)[:, None] * C + c[None, :],
            mask=(source >= 0)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        kernel = tl.load(
            weight + o[:, None] * (TAPS * C) + step // blocks * C + c[None, :],
            mask=(o < O)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        total = tl.dot(gathered, kernel.T, total, input_precision=PRECISION)
        following = tl.minimum((step + 1) // blocks, TAPS - 1)
        source = tl.load(table + n * TAPS + following, mask=n < count, other=-1)
    total = _finished(total, n, o, bias, scale, residual, count, O, ACTIVATION, SLOPE)
    tl.store(out + n[:, None] * O + o[None, :], total, mask=(n < count)[:, None] & (o < O)[None, :])


@_tuned(
    [
        ({"BLOCK_N": 16, "BLOCK_C": 32}, 4, 1),
        ({"BLOCK_N": 16, "BLOCK_C": 64}, 4, 1),
        ({"BLOCK_N": 32, "BLOCK_C": 64}, 4, 1),
        ({"BLOCK_N": 16, "BLOCK_C": 128}, 4, 1),
        ({"BLOCK_N": 32, "BLOCK_C": 128}, 8, 1),
    ]
)
def _depthwise(  # type: ignore[no-untyped-def]
    rows,
    weight,
    table,
    bias,
    scale,
    residual,
    out,
    count,
    bucket,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One (BLOCK_N, BLOCK_C) tile of (*), depthwise: bound by memory, so plain products, many loads in flight."""
    n = (tl.program_id(0) * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for tap in tl.range(TAPS, loop_unroll_factor=8):
        source = tl.load(table + n * TAPS + tap, mask=n < count, other=-1).to(tl.int64)
        mask = (source >= 0)[:, None] & (c < C)[None, :]
        gathered = tl.load(rows + source[:, None] * C + c[None, :], mask=mask, other=0.0)
        kernel = tl.load(weight + c * TAPS + tap, mask=c < C, other=0.0)
        total += gathered.to(tl.float32) * kernel.to(tl.float32)[None, :]
    total = _finished(total, n, c, bias, scale, residual, count, C, ACTIVATION, SLOPE)
    tl.store(out + n[:, None] * C + c[None, :], total, mask=(n < count)[:, None] & (c < C)[None, :])


@_tuned(
    [
        ({"BLOCK_N": 32, "BLOCK_O": 32, "BLOCK_C": 32}, 4, 3),
        ({"BLOCK_N": 32, "BLOCK_O": 64, "BLOCK_C": 64}, 4, 4),
        ({"BLOCK_N": 64, "BLOCK_O": 64, "BLOCK_C": 64}, 4, 4),
        ({"BLOCK_N": 64, "BLOCK_O": 128, "BLOCK_C": 64}, 4, 4),
        ({"BLOCK_N": 32, "BLOCK_O": 128, "BLOCK_C": 128}, 4, 4),
        ({"BLOCK_N": 64, "BLOCK_O": 128, "BLOCK_C": 128}, 8, 4),
    ],
    depth="BLOCK_N",
)
def _product_weight(  # type: ignore[no-untyped-def]
    rows,
    grad,
    table,
    partial,
    count,
    length,
    bucket,
    C: tl.constexpr,
    O: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One (BLOCK_O, BLOCK_C) tile of one tap of the weight's gradient, summed over one share of the outputs."""
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tiles_o: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O
    program, share = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = program % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o = program // tiles_c % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    tap = program // (tiles_c * tiles_o)
    end = tl.minimum((share + 1) * length, count)
    total = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    # As in `_product`, the table is read one step ahead.
    n = share * length + tl.arange(0, BLOCK_N)
    source = tl.load(table + n * TAPS + tap, mask=n < end, other=-1)
    for _ in range(tl.cdiv(length, BLOCK_N)):
        gathered = tl.load(
            rows + source.to(tl.int64)[:, None] * C + c[None, :],
            mask=(source >= 0)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        above = tl.load(
            grad + n[:, None] * O + o[None, :], mask=(n < end)[:, None] & (o < O)[None, :], other=0.0
        )
        total = tl.dot(above.T, gathered, total, input_precision=PRECISION)
        n += BLOCK_N
        source = tl.load(table + n * TAPS + tap, mask=n < end, other=-1)
    place = partial + (share * O + o[:, None]) * (TAPS * C) + tap * C + c[None, :]
    tl.store(place, total, mask=(o < O)[:, None] & (c < C)[None, :])


@_tuned(
    [
        ({"BLOCK_N": 16, "BLOCK_C": 32}, 4, 1),
        ({"BLOCK_N": 32, "BLOCK_C": 64}, 4, 1),
        ({"BLOCK_N": 32, "BLOCK_C": 128}, 8, 1),
    ]
)
def _depthwise_weight(  # type: ignore[no-untyped-def]
    rows,
    grad,
    table,
    partial,
    count,
    length,
    bucket,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`_product_weight` for a depthwise convolution: BLOCK_C channels of one tap."""
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program, share = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = program % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = program // tiles_c
    end = tl.minimum((share + 1) * length, count)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(share * length, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        source = tl.load(table + n * TAPS + tap, mask=n < end, other=-1).to(tl.int64)
        mask = (source >= 0)[:, None] & (c < C)[None, :]
        gathered = tl.load(rows + source[:, None] * C + c[None, :], mask=mask, other=0.0)
        above = tl.load(grad + n[:, None] * C + c[None, :], mask=mask, other=0.0)
        total += gathered.to(tl.float32) * above.to(tl.float32)
    place = partial + (share * C + c) * TAPS + tap
    tl.store(place, tl.sum(total, 0), mask=c < C)
