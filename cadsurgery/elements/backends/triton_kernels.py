"""Triton kernels of `backends/gpu.py`, which documents the formula and the arguments, and chooses their tiles.

Without Triton the module still imports, and its kernels are plain functions that are never called.
Sizes of layers are compile-time constants: a network has few of them, and loops and masks simplify.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without CUDA
    triton = None

INSTALLED = triton is not None
# Decided when the kernels are defined: TRITON_INTERPRET=1 runs them on CPU tensors, for tests.
INTERPRETED = INSTALLED and triton.knobs.runtime.interpret
# Numbers that differ from image to image; a kernel is not compiled again for 1 or for multiples of 16.
_VARYING = ["count", "first_halo", "length"]

_jit: Callable[[Any], Any] = triton.jit if triton is not None else lambda kernel: kernel


def _kernel(function: Any) -> Any:
    return triton.jit(function, do_not_specialize=_VARYING) if triton is not None else function


@_jit
def _add(total, n, o, mask, bias, residual, C_OUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add bias and residual of (*) to a tile of float32 sums."""
    if residual is not None:
        total += tl.load(residual + n[:, None] * C_OUT + o[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + o, mask=o < C_OUT, other=0.0).to(tl.float32)[None, :]
    return total


@_jit
def _activate(total, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Apply the activation of (*) to a tile of float32 sums, while they are in registers."""
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


@_jit
def _starts(rows, halo, source, first_halo, C: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the rows of table entries begin: behind the elements and the padding row stand the halo rows."""
    if WIDE:  # rows may have more than 2^31 values
        source = source.to(tl.int64)
    starts = rows + source * C
    if halo is not None:
        starts = tl.where(source >= first_halo, halo + (source - first_halo) * C, starts)
    return starts


@_kernel
def product(  # type: ignore[no-untyped-def]
    rows,
    halo,
    weight,
    table,
    bias,
    residual,
    out,
    count,
    first_halo,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    GROUPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute one (BLOCK_N, BLOCK_O) tile of (*) in one group. Without a table every output reads its own row."""
    # Tiles are ordered in bands of eight along n, each band through all output channels: concurrent programs share
    # weights and gathered rows in the L2 cache. Elements are in raster order, so a tile's taps are close in memory.
    band: tl.constexpr = 8
    depth: tl.constexpr = C // GROUPS
    width: tl.constexpr = C_OUT // GROUPS
    tiles_of_group: tl.constexpr = (width + BLOCK_O - 1) // BLOCK_O
    tiles_o: tl.constexpr = GROUPS * tiles_of_group
    program = tl.program_id(0)
    first = program // (band * tiles_o) * band
    height = tl.minimum(tl.cdiv(count, BLOCK_N) - first, band)
    within = program % (band * tiles_o)
    n = (first + within % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    of_group = within // height % tiles_of_group * BLOCK_O + tl.arange(0, BLOCK_O)
    group = within // height // tiles_of_group
    o = group * width + of_group
    place = n.to(tl.int64) if WIDE else n
    mask = (n < count)[:, None] & (of_group < width)[None, :]
    # The sums begin with bias and residual: added at the end, they would take more registers than there are.
    total = _add(tl.zeros((BLOCK_N, BLOCK_O), tl.float32), place, o, mask, bias, residual, C_OUT)
    # One loop over taps and channels rather than two nested loops, so that loads run ahead of the products across
    # taps. The table is read one step ahead: then no load waits for another load in the same step, which would take
    # stages of the compiler's pipeline. Reading it again for each block of channels costs 4 bytes from L1.
    blocks: tl.constexpr = (depth + BLOCK_C - 1) // BLOCK_C
    # Numbers of table entries may exceed 2^31 only where those of values do, too.
    entry = n.to(tl.int64) * TAPS if WIDE else n * TAPS
    if table is not None:
        source = tl.load(table + entry, mask=n < count, other=-1)
    else:
        source = tl.where(n < count, n, -1)
    taps_of = weight + o[:, None] * (TAPS * depth)
    for step in range(TAPS * blocks):
        c = step % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        # Channels are contiguous, so a gathered row consists of whole cache lines wherever it is.
        starts = _starts(rows, halo, source, first_halo, C, WIDE) + group * depth
        is_read = (source >= 0)[:, None]
        is_weight = (of_group < width)[:, None]
        if depth % BLOCK_C != 0:
            is_read = is_read & (c < depth)[None, :]
            is_weight = is_weight & (c < depth)[None, :]
        gathered = tl.load(starts[:, None] + c[None, :], mask=is_read, other=0.0)
        kernel = tl.load(taps_of + (step // blocks * depth + c)[None, :], mask=is_weight, other=0.0)
        total = tl.dot(gathered, kernel.T, total, input_precision=PRECISION)
        if table is not None:
            following = tl.minimum((step + 1) // blocks, TAPS - 1)
            source = tl.load(table + entry + following, mask=n < count, other=-1)
    tl.store(out + place[:, None] * C_OUT + o[None, :], _activate(total, ACTIVATION, SLOPE), mask=mask)


@_kernel
def depthwise(  # type: ignore[no-untyped-def]
    rows,
    halo,
    weight,
    table,
    bias,
    residual,
    out,
    count,
    first_halo,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute one (BLOCK_N, BLOCK_C) depthwise tile of (*). Memory-bound: plain products and many loads in flight."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    place = n.to(tl.int64) if WIDE else n
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for tap in tl.range(TAPS, loop_unroll_factor=8):
        source = tl.load(table + place * TAPS + tap, mask=n < count, other=-1)
        starts = _starts(rows, halo, source, first_halo, C, WIDE)
        mask = (source >= 0)[:, None] & (c < C)[None, :]
        gathered = tl.load(starts[:, None] + c[None, :], mask=mask, other=0.0)
        kernel = tl.load(weight + c * TAPS + tap, mask=c < C, other=0.0)
        total += gathered.to(tl.float32) * kernel.to(tl.float32)[None, :]
    mask = (n < count)[:, None] & (c < C)[None, :]
    total = _activate(_add(total, place, c, mask, bias, residual, C), ACTIVATION, SLOPE)
    tl.store(out + place[:, None] * C + c[None, :], total, mask=mask)


@_kernel
def blend(  # type: ignore[no-untyped-def]
    rows,
    sources,
    shares,
    used,
    out,
    count,
    C: tl.constexpr,
    READ: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute a (BLOCK_N, BLOCK_C) tile of weighted sums of READ rows each; only the first `used` sums, if given."""
    if used is not None:
        count = tl.minimum(count, tl.load(used).to(tl.int32))
    if tl.program_id(0) * BLOCK_N < count:
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (n < count)[:, None] & (c < C)[None, :]
        place = n.to(tl.int64) if WIDE else n
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for at in tl.static_range(READ):
            source = tl.load(sources + place * READ + at, mask=n < count, other=0)
            share = tl.load(shares + place * READ + at, mask=n < count, other=0.0).to(tl.float32)
            starts = _starts(rows, None, source, 0, C, WIDE)
            total += tl.load(starts[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32) * share[:, None]
        tl.store(out + place[:, None] * C + c[None, :], total, mask=mask)


@_kernel
def finish(  # type: ignore[no-untyped-def]
    sums,
    bias,
    residual,
    count,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Apply bias, residual and activation to rows in place: one pass where torch makes one for each."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (n < count)[:, None] & (c < C)[None, :]
    place = n.to(tl.int64) if WIDE else n
    target = sums + place[:, None] * C + c[None, :]
    total = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    total = _add(total, place, c, mask, bias, residual, C)
    tl.store(target, _activate(total, ACTIVATION, SLOPE), mask=mask)


@_kernel
def product_weight(  # type: ignore[no-untyped-def]
    rows,
    grad,
    table,
    partial,
    count,
    length,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute one (BLOCK_O, BLOCK_C) tile of one tap of the weight's gradient, summed over one share of the outputs."""
    depth: tl.constexpr = C // GROUPS
    width: tl.constexpr = C_OUT // GROUPS
    tiles_c: tl.constexpr = (depth + BLOCK_C - 1) // BLOCK_C
    tiles_o: tl.constexpr = (width + BLOCK_O - 1) // BLOCK_O
    program, share = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = program % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    of_group = program // tiles_c % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    group = program // (tiles_c * tiles_o) % GROUPS
    tap = program // (tiles_c * tiles_o * GROUPS)
    o = group * width + of_group
    end = tl.minimum((share + 1) * length, count)
    total = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    # As in `product`, the table is read one step ahead.
    n = share * length + tl.arange(0, BLOCK_N)
    source = tl.load(table + n * TAPS + tap, mask=n < end, other=-1)
    for _ in range(tl.cdiv(length, BLOCK_N)):
        starts = _starts(rows, None, source, 0, C, True) + group * depth
        gathered = tl.load(
            starts[:, None] + c[None, :], mask=(source >= 0)[:, None] & (c < depth)[None, :], other=0.0
        )
        above = tl.load(
            grad + n[:, None] * C_OUT + o[None, :], mask=(n < end)[:, None] & (of_group < width)[None, :], other=0.0
        )
        total = tl.dot(above.T, gathered, total, input_precision=PRECISION)
        n += BLOCK_N
        source = tl.load(table + n * TAPS + tap, mask=n < end, other=-1)
    place = partial + (share * C_OUT + o[:, None]) * (TAPS * depth) + tap * depth + c[None, :]
    tl.store(place, total, mask=(of_group < width)[:, None] & (c < depth)[None, :])


@_kernel
def depthwise_weight(  # type: ignore[no-untyped-def]
    rows,
    grad,
    table,
    partial,
    count,
    length,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute `product_weight` for a depthwise convolution: BLOCK_C channels of one tap."""
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
