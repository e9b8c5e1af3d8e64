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
_VARYING = ["count", "length", "outside", "room", "first_down", "first_across", "step_down", "step_across"]
_VARYING += ["down", "across", "height", "width", "target_height", "target_width", "spacing"]
_VARYING += ["above", "before", "lines", "columns"]

_jit: Callable[[Any], Any] = triton.jit if triton is not None else lambda kernel: kernel


def _kernel(function: Any) -> Any:
    # Of 64 bits in every call, whatever its value: nothing is compiled again while a CUDA graph is captured.
    function.__annotations__["shift"] = "i64"
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
def _store(  # type: ignore[no-untyped-def]
    total,
    n,
    of_group,
    first,
    count,
    bias,
    residual,
    out,
    width: tl.constexpr,
    C_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Finish a tile of sums for outputs n and channels `of_group` of the group that begins at `first`, and write it."""
    o = first + of_group
    mask = (n < count)[:, None] & (of_group < width)[None, :]
    total = _activate(_add(total, n, o, mask, bias, residual, C_OUT), ACTIVATION, SLOPE)
    tl.store(out + n[:, None] * C_OUT + o[None, :], total, mask=mask)


@_jit
def _starts(rows, shift, source, outside, C: tl.constexpr, HALO: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the rows of table entries begin: those behind `outside` are halo rows, in memory of their own, which
    begins `shift` values behind the place that they would have in the rows'."""
    if WIDE:  # rows may have more than 2^31 values
        source = source.to(tl.int64)
    place = source * C
    if HALO:
        # A sum, because the compiler loses alignment, and with it asynchronous copies, where places are selected.
        place = place + (source > outside).to(tl.int64) * shift
    return rows + place


@_jit
def _first_entries(table, places, n, place, count, TAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the first taps of outputs n are in a table, with a row per output or, given `places`, of samples."""
    first = place * TAPS
    if places is not None:
        first = tl.load(places + n, mask=n < count, other=0)
    return table + first


@_jit
def _behind(tap, places, down, across, ACROSS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return how many entries behind its output's first tap a tap is; among samples the window has lines of ACROSS."""
    behind = tap
    if places is not None:
        behind = tap // ACROSS * down + tap % ACROSS * across
    return behind


@_jit
def _tile(count, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the numbers of this program's tile along outputs and among the TILES along channels of a group; the group.

    Tiles are ordered in bands of eight along outputs, each band through all channels: concurrent programs share weights
    and gathered rows in the L2 cache. Elements are in raster order, so a tile's taps are close in memory.
    """
    band: tl.constexpr = 8
    tiles_o: tl.constexpr = GROUPS * TILES
    program = tl.program_id(0)
    first = program // (band * tiles_o) * band
    height = tl.minimum(tl.cdiv(count, BLOCK_N) - first, band)
    within = program % (band * tiles_o)
    return first + within % height, within // height % TILES, within // height // TILES


@_kernel
def product(  # type: ignore[no-untyped-def]
    rows,
    shift,
    weight,
    table,
    places,
    bias,
    residual,
    out,
    count,
    outside,
    down,
    across,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    ACROSS: tl.constexpr,
    HALO: tl.constexpr,
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
    depth: tl.constexpr = C // GROUPS
    width: tl.constexpr = C_OUT // GROUPS
    tiles_of_group: tl.constexpr = (width + BLOCK_O - 1) // BLOCK_O
    tile_n, tile_o, group = _tile(count, BLOCK_N, GROUPS, tiles_of_group)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    of_group = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    place = n.to(tl.int64) if WIDE else n
    total = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    # One loop over taps and channels rather than two nested loops, so that loads run ahead of the products across
    # taps. The table is read one step ahead: then no load waits for another load in the same step, which would take
    # stages of the compiler's pipeline. Reading it again for each block of channels costs 4 bytes from L1.
    blocks: tl.constexpr = (depth + BLOCK_C - 1) // BLOCK_C
    # Numbers of table entries exceed 2^31 only where those of values do, too.
    source = tl.where(n < count, n, -1)
    if table is not None:
        entries = _first_entries(table, places, n, place, count, TAPS)
        source = tl.load(entries, mask=n < count, other=-1)
    taps_of = weight + (group * width + of_group)[:, None] * (TAPS * depth)
    for step in range(TAPS * blocks):
        c = step % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        # Channels are contiguous, so a gathered row consists of whole cache lines wherever it is.
        starts = _starts(rows, shift, source, outside, C, HALO, WIDE) + group * depth
        is_read = ((source >= 0) & (source != outside))[:, None]
        is_weight = (of_group < width)[:, None]
        if depth % BLOCK_C != 0:
            is_read = is_read & (c < depth)[None, :]
            is_weight = is_weight & (c < depth)[None, :]
        gathered = tl.load(starts[:, None] + c[None, :], mask=is_read, other=0.0)
        kernel = tl.load(taps_of + (step // blocks * depth + c)[None, :], mask=is_weight, other=0.0)
        total = tl.dot(gathered, kernel.T, total, input_precision=PRECISION)
        if table is not None:
            following = tl.minimum((step + 1) // blocks, TAPS - 1)
            behind = _behind(following, places, down, across, ACROSS)
            source = tl.load(entries + behind, mask=n < count, other=-1)
    first = group * width
    # Tiles with a residual are finished by halves, because whole ones would take more registers than there are.
    half: tl.constexpr = BLOCK_O // 2
    if residual is None or half < 16:
        _store(total, place, of_group, first, count, bias, residual, out, width, C_OUT, ACTIVATION, SLOPE)
    else:
        left, right = total.reshape(BLOCK_N, 2, half).permute(0, 2, 1).split()
        at = tile_o * BLOCK_O + tl.arange(0, half)
        _store(left, place, at, first, count, bias, residual, out, width, C_OUT, ACTIVATION, SLOPE)
        _store(right, place, at + half, first, count, bias, residual, out, width, C_OUT, ACTIVATION, SLOPE)


@_kernel
def depthwise(  # type: ignore[no-untyped-def]
    rows,
    shift,
    weight,
    table,
    places,
    bias,
    residual,
    out,
    count,
    outside,
    down,
    across,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    ACROSS: tl.constexpr,
    HALO: tl.constexpr,
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
    entries = _first_entries(table, places, n, place, count, TAPS)
    for tap in tl.range(TAPS, loop_unroll_factor=8):
        source = tl.load(entries + _behind(tap, places, down, across, ACROSS), mask=n < count, other=-1)
        starts = _starts(rows, shift, source, outside, C, HALO, WIDE)
        mask = ((source >= 0) & (source != outside))[:, None] & (c < C)[None, :]
        gathered = tl.load(starts[:, None] + c[None, :], mask=mask, other=0.0)
        kernel = tl.load(weight + c * TAPS + tap, mask=c < C, other=0.0)
        total += gathered.to(tl.float32) * kernel.to(tl.float32)[None, :]
    mask = (n < count)[:, None] & (c < C)[None, :]
    total = _activate(_add(total, place, c, mask, bias, residual, C), ACTIVATION, SLOPE)
    tl.store(out + place[:, None] * C + c[None, :], total, mask=mask)


@_kernel
def pool(  # type: ignore[no-untyped-def]
    rows,
    shift,
    table,
    places,
    out,
    count,
    outside,
    down,
    across,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    ACROSS: tl.constexpr,
    HALO: tl.constexpr,
    LARGEST: tl.constexpr,
    OUTSIDE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute a (BLOCK_N, BLOCK_C) tile of the largest value or the sum over taps; OUTSIDE is read outside the map."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (n < count)[:, None] & (c < C)[None, :]
    place = n.to(tl.int64) if WIDE else n
    total = tl.full((BLOCK_N, BLOCK_C), float("-inf") if LARGEST else 0.0, tl.float32)
    entries = _first_entries(table, places, n, place, count, TAPS)
    for tap in tl.range(TAPS, loop_unroll_factor=8):
        source = tl.load(entries + _behind(tap, places, down, across, ACROSS), mask=n < count, other=-1)
        starts = _starts(rows, shift, source, outside, C, HALO, WIDE)
        is_read = ((source >= 0) & (source != outside))[:, None] & (c < C)[None, :]
        value = tl.load(starts[:, None] + c[None, :], mask=is_read, other=OUTSIDE).to(tl.float32)
        if LARGEST:
            total = tl.maximum(total, value, propagate_nan=tl.PropagateNan.ALL)
        else:
            total += value
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
            starts = _starts(rows, 0, source, 0, C, False, WIDE)
            is_read = mask & (share != 0)[:, None]
            value = tl.load(starts[:, None] + c[None, :], mask=is_read, other=0.0).to(tl.float32)
            total += value * share[:, None]
        tl.store(out + place[:, None] * C + c[None, :], total, mask=mask)


@_kernel
def spread_back(  # type: ignore[no-untyped-def]
    grad,
    readers,
    starts,
    shares,
    own,
    out,
    C: tl.constexpr,
    READ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add what a row is owed by the sums of `blend` that read it, `readers` from `starts[row]` to `starts[row + 1]`."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.load(own + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    for at in range(tl.load(starts + row), tl.load(starts + row + 1)):
        reader = tl.load(readers + at).to(tl.int64)
        share = tl.load(shares + reader).to(tl.float32)
        total += tl.load(grad + reader // READ * C + c, mask=c < C, other=0.0).to(tl.float32) * share
    tl.store(out + row * C + c, total, mask=c < C)


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
def weigh(  # type: ignore[no-untyped-def]
    rows,
    shares,
    partial,
    count,
    length,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the weighted sum of a share of the rows, for BLOCK_C channels and one line of weights."""
    share, line = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = tl.minimum((share + 1) * length, count)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(share * length, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < end)[:, None] & (c < C)[None, :]
        weight = tl.load(shares + line * count + n, mask=n < end, other=0.0).to(tl.float32)
        # Rows without weight do not count, even if they are not numbers.
        mask = mask & (weight != 0)[:, None]
        total += (
            tl.load(rows + n[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32) * weight[:, None]
        )
    place = partial + (share * tl.num_programs(2) + line) * C + c
    tl.store(place, tl.sum(total, 0), mask=c < C)


@_jit
def _deviate(rows, shares, centre, n, place, c, end, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the weights of rows n, and how far these lie from `centre`; rows without weight count as zeros."""
    share = tl.load(shares + n, mask=n < end, other=0.0)
    mask = (share != 0)[:, None] & (c < C)[None, :]
    values = tl.load(rows + place[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    return share, values - tl.load(centre + c, mask=c < C, other=0.0)[None, :]


@_kernel
def norm_sums(  # type: ignore[no-untyped-def]
    rows,
    grad,
    shares,
    centre,
    partial,
    count,
    length,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum w d and w d^2, or dy and dy d if there is a gradient dy, over a share of the rows: see `gpu_norm.py`."""
    program = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = tl.minimum((program + 1) * length, count)
    first = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(program * length, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        share, off = _deviate(rows, shares, centre, n, n, c, end, C)
        if grad is None:
            each = share[:, None] * off
        else:
            mask = (n < end)[:, None] & (c < C)[None, :]
            each = tl.load(grad + n[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        first += each
        second += each * off
    place = partial + program * 2 * C + c
    tl.store(place, tl.sum(first, 0), mask=c < C)
    tl.store(place + C, tl.sum(second, 0), mask=c < C)


@_kernel
def norm_rows(  # type: ignore[no-untyped-def]
    rows,
    grad,
    shares,
    centre,
    scale,
    weight,
    bias,
    totals,
    out,
    count,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute a tile of normalised rows or, given a gradient and the `totals` of `norm_sums`, of the rows' gradient."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    place = n.to(tl.int64) if WIDE else n
    mask = (n < count)[:, None] & (c < C)[None, :]
    share, off = _deviate(rows, shares, centre, n, place, c, count, C)
    inverse = tl.load(scale + c, mask=c < C, other=0.0)
    factor = inverse
    if weight is not None:
        factor *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    if grad is None:
        result = off * factor[None, :]
        if bias is not None:
            result += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    else:
        above = tl.load(grad + place[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.load(totals + c, mask=c < C, other=0.0)
        slope = tl.load(totals + C + c, mask=c < C, other=0.0) * inverse * inverse
        result = factor[None, :] * (above - share[:, None] * (total[None, :] + off * slope[None, :]))
        result = tl.where((share != 0)[:, None], result, 0.0)
    tl.store(out + place[:, None] * C + c[None, :], result, mask=mask)


@_kernel
def product_weight(  # type: ignore[no-untyped-def]
    rows,
    shift,
    grad,
    table,
    partial,
    count,
    outside,
    length,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    HALO: tl.constexpr,
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
        starts = _starts(rows, shift, source, outside, C, HALO, True) + group * depth
        is_read = ((source >= 0) & (source != outside))[:, None] & (c < depth)[None, :]
        gathered = tl.load(starts[:, None] + c[None, :], mask=is_read, other=0.0)
        above = tl.load(
            grad + n[:, None] * C_OUT + o[None, :],
            mask=(n < end)[:, None] & (of_group < width)[None, :],
            other=0.0,
        )
        total = tl.dot(above.T, gathered, total, input_precision=PRECISION)
        n += BLOCK_N
        source = tl.load(table + n * TAPS + tap, mask=n < end, other=-1)
    place = partial + (share * C_OUT + o[:, None]) * (TAPS * depth) + tap * depth + c[None, :]
    tl.store(place, total, mask=(of_group < width)[:, None] & (c < depth)[None, :])


@_kernel
def depthwise_weight(  # type: ignore[no-untyped-def]
    rows,
    shift,
    grad,
    table,
    partial,
    count,
    outside,
    length,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    HALO: tl.constexpr,
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
        source = tl.load(table + n * TAPS + tap, mask=n < end, other=-1)
        starts = _starts(rows, shift, source, outside, C, HALO, True)
        mask = ((source >= 0) & (source != outside))[:, None] & (c < C)[None, :]
        gathered = tl.load(starts[:, None] + c[None, :], mask=mask, other=0.0)
        above = tl.load(grad + n[:, None] * C + c[None, :], mask=mask, other=0.0)
        total += gathered.to(tl.float32) * above.to(tl.float32)
    place = partial + (share * C + c) * TAPS + tap
    tl.store(place, tl.sum(total, 0), mask=c < C)


@_kernel
def find_anchors(  # type: ignore[no-untyped-def]
    levels, sides, flags, count, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Write 1 for each pixel that is the anchor of its cell, else 0, given `levels` and the `sides` of each level."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < count
    side = tl.load(sides + tl.load(levels + pixel, mask=mask, other=0).to(tl.int32), mask=mask, other=1)
    y, x = pixel // WIDTH % HEIGHT, pixel % WIDTH
    tl.store(flags + pixel, ((y % side == 0) & (x % side == 0)).to(tl.int32), mask=mask)


@_kernel
def place_cells(  # type: ignore[no-untyped-def]
    levels,
    sides,
    ranks,
    anchors,
    index,
    count,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each pixel's row and each row's anchor, given the number of anchors up to each pixel."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < count
    side = tl.load(sides + tl.load(levels + pixel, mask=mask, other=0).to(tl.int32), mask=mask, other=1)
    y, x = pixel // WIDTH % HEIGHT, pixel % WIDTH
    down, across = y % side, x % side
    row = tl.load(ranks + pixel - down * WIDTH - across, mask=mask, other=1) - 1
    tl.store(index + pixel, row, mask=mask)
    tl.store(anchors + row, pixel.to(tl.int64), mask=mask & (down + across == 0))


@_kernel
def read_taps(  # type: ignore[no-untyped-def]
    index,
    anchors,
    targets,
    table,
    wanted,
    count,
    outside,
    first_down,
    first_across,
    step_down,
    step_across,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TARGET_HEIGHT: tl.constexpr,
    TARGET_WIDTH: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the rows that taps read. A pixel between anchors gets -1 minus its number, and its flag in `wanted`."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = entry.to(tl.int64) if WIDE else entry
    n, tap = entry // (DOWN * ACROSS), entry % (DOWN * ACROSS)
    mask = n < count
    target = tl.load(targets + n, mask=mask, other=0).to(tl.int32)
    image = target // (TARGET_HEIGHT * TARGET_WIDTH)
    y = target // TARGET_WIDTH % TARGET_HEIGHT + first_down + tap // ACROSS * step_down
    x = target % TARGET_WIDTH + first_across + tap % ACROSS * step_across
    inside = mask & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    pixel = (image * HEIGHT + y) * WIDTH + x
    row = tl.load(index + pixel, mask=inside, other=0)
    if wanted is not None:
        between = inside & (tl.load(anchors + row, mask=inside, other=0) != pixel)
        tl.store(wanted + pixel, tl.full((BLOCK,), 1, tl.int32), mask=between)
        row = tl.where(between, -1 - pixel, row)
    tl.store(table + place, tl.where(inside, row, outside), mask=mask)


@_kernel
def read_halo(table, ranks, outside, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Replace pixels in a table (see `read_taps`) by their halo rows, given the number of wanted pixels up to each."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    place = place.to(tl.int64) if WIDE else place
    entry = tl.load(table + place, mask=mask, other=0)
    between = mask & (entry < 0)
    rank = tl.load(ranks - 1 - entry, mask=between, other=0)
    tl.store(table + place, outside + rank, mask=between)


@_jit
def _mix(levels, sides, index, pixel, mask, halo, sources, shares, height, width):  # type: ignore[no-untyped-def]
    """Write the rows and weights of the bilinear interpolation of pixels into halo rows, see
    `kernel_map.interpolation`."""
    side = tl.load(sides + tl.load(levels + pixel, mask=mask, other=0).to(tl.int32), mask=mask, other=1)
    y, x = pixel // width % height, pixel % width
    down, across = y % side, x % side
    low = tl.minimum(y - down + side, height - 1) - (y - down)
    right = tl.minimum(x - across + side, width - 1) - (x - across)
    first = pixel - down * width - across
    own = tl.load(index + first, mask=mask, other=0)
    beside = tl.load(index + first + right, mask=mask, other=0)
    below = tl.load(index + first + low * width, mask=mask, other=0)
    across_below = tl.load(index + first + low * width + right, mask=mask, other=0)
    # Between a row and itself lies the row, to the bit.
    down = tl.where((own == below) & (beside == across_below), 0, down)
    across = tl.where((own == beside) & ((down == 0) | (below == across_below)), 0, across)
    for at in tl.static_range(4):
        part_down = down if at >= 2 else side - down
        part_across = across if at % 2 == 1 else side - across
        share = part_down.to(tl.float32) / side * (part_across.to(tl.float32) / side)
        corner = own if at == 0 else beside if at == 1 else below if at == 2 else across_below
        # A corner of weight zero is replaced by the pixel's own cell, whose weight is never zero.
        tl.store(sources + halo * 4 + at, tl.where(share > 0, corner, own), mask=mask)
        tl.store(shares + halo * 4 + at, share, mask=mask)


@_kernel
def mix_between(  # type: ignore[no-untyped-def]
    levels,
    sides,
    index,
    wanted,
    ranks,
    sources,
    shares,
    count,
    room,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the four rows and weights of bilinear interpolation of each wanted pixel, see `kernel_map._interpolation`.
    Of `room` halo rows, those behind the last wanted pixel's get rows and weights of zero."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (pixel < count) & (tl.load(wanted + pixel, mask=pixel < count, other=0) != 0)
    halo = tl.load(ranks + pixel, mask=mask, other=1) - 1
    _mix(levels, sides, index, pixel, mask, halo, sources, shares, HEIGHT, WIDTH)
    for at in tl.static_range(4):
        is_free = (pixel >= tl.load(ranks + count - 1)) & (pixel < room)
        tl.store(sources + pixel * 4 + at, tl.zeros((BLOCK,), tl.int32), mask=is_free)
        tl.store(shares + pixel * 4 + at, tl.zeros((BLOCK,), tl.float32), mask=is_free)


@_kernel
def place_taps(  # type: ignore[no-untyped-def]
    index,
    anchors,
    targets,
    places,
    wanted,
    count,
    first_down,
    first_across,
    step_down,
    step_across,
    height,
    width,
    spacing,
    above,
    before,
    lines,
    columns,
    target_height,
    target_width,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write where each target's first tap is in a map of lines x columns samples, see `gpu_maps.SampleMap`; and the
    flags in `wanted` of the samples between anchors that a tap reads."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < count
    target = tl.load(targets + n, mask=mask, other=0).to(tl.int32)
    image = target // (target_height * target_width)
    line = target // target_width % target_height // spacing + first_down
    column = target % target_width // spacing + first_across
    place = (image * lines + line + above) * columns + column + before
    tl.store(places + n, place, mask=mask)
    if wanted is not None:
        for tap in range(DOWN * ACROSS):
            y = (line + tap // ACROSS * step_down) * spacing
            x = (column + tap % ACROSS * step_across) * spacing
            inside = mask & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            pixel = (image * height + y) * width + x
            row = tl.load(index + pixel, mask=inside, other=0)
            between = inside & (tl.load(anchors + row, mask=inside, other=0) != pixel)
            behind = tap // ACROSS * step_down * columns + tap % ACROSS * step_across
            tl.store(wanted + place + behind, tl.full((BLOCK,), 1, tl.int32), mask=between)


@_kernel
def read_samples(  # type: ignore[no-untyped-def]
    levels,
    sides,
    index,
    wanted,
    ranks,
    samples,
    sources,
    shares,
    count,
    outside,
    height,
    width,
    spacing,
    above,
    before,
    lines,
    columns,
    BLOCK: tl.constexpr,
):
    """Write the row of each of `count` samples, given the number of wanted ones up to each, and mix the wanted ones."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, x = (at // columns % lines - above) * spacing, (at % columns - before) * spacing
    inside = (at < count) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    pixel = (at // (lines * columns) * height + y) * width + x
    row = tl.load(index + pixel, mask=inside, other=0)
    if wanted is not None:
        between = inside & (tl.load(wanted + at, mask=inside, other=0) != 0)
        rank = tl.load(ranks + at, mask=between, other=1)
        row = tl.where(between, outside + rank, row)
        _mix(levels, sides, index, pixel, between, rank - 1, sources, shares, height, width)
    tl.store(samples + at, tl.where(inside, row, outside), mask=at < count)
