"""Triton kernels of `backends/gpu.py`, which documents the formula and the arguments.

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


def _tune(configs: list[tuple[dict[str, int], int, int]], depth: str = "") -> Callable[[Any], Any]:
    """Decorate a kernel whose tiles are tuned per shape. Each config is (block sizes, warps, stages), smallest first.

    `depth` names the block that a matrix product sums over.
    """

    def fitting(configs: list[Any], arguments: dict[str, Any], **sizes: Any) -> list[Any]:
        """Drop tiles wider than the operands or larger than shared memory, which would only cost tuning time."""
        values = {**arguments, **sizes}
        limits = {"BLOCK_N": 1 << values["bucket"], "BLOCK_C": values["C"], "BLOCK_O": values.get("C_OUT", 0)}
        size = values["rows"].element_size()

        def fits(config: Any) -> bool:
            blocks = config.kwargs
            shared = size * config.num_stages * blocks.get(depth, 0)
            shared *= sum(block for name, block in blocks.items() if name != depth)
            return shared < 200 << 10 and all(block < 2 * limits[name] for name, block in blocks.items())

        return [config for config in configs if fits(config)] or configs[:1]

    def decorate(kernel: Any) -> Any:
        if triton is None:
            return kernel
        usable = configs[:1] if INTERPRETED else configs
        return triton.autotune(
            configs=[triton.Config(blocks, num_warps=w, num_stages=s) for blocks, w, s in usable],
            # The count changes from image to image; its power of two is enough to choose tiles.
            key=[*("bucket", "C", "TAPS"), *(["C_OUT"] if depth else [])],
            prune_configs_by={"early_config_prune": fitting},
            cache_results=True,
        )(triton.jit(kernel, do_not_specialize=["count", "bucket", "length"]))

    return decorate


_jit: Callable[[Any], Any] = triton.jit if triton is not None else lambda kernel: kernel


@_jit
def _finish(  # type: ignore[no-untyped-def]
    total,
    n,
    o,
    bias,
    residual,
    count,
    C_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Apply bias, residual and activation of (*) to a tile of float32 sums, while they are in registers."""
    if bias is not None:
        total += tl.load(bias + o, mask=o < C_OUT, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        mask = (n < count)[:, None] & (o < C_OUT)[None, :]
        total += tl.load(residual + n[:, None] * C_OUT + o[None, :], mask=mask, other=0.0).to(tl.float32)
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


@_tune(
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
def product(  # type: ignore[no-untyped-def]
    rows,
    weight,
    table,
    bias,
    residual,
    out,
    count,
    bucket,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute one (BLOCK_N, BLOCK_O) tile of (*), ungrouped."""
    # Tiles are ordered in groups of eight along n, each group through all output channels: concurrent programs share
    # weights and gathered rows in the L2 cache. Elements are in raster order, so a tile's taps are close in memory.
    group: tl.constexpr = 8
    tiles_o: tl.constexpr = (C_OUT + BLOCK_O - 1) // BLOCK_O
    program = tl.program_id(0)
    first = program // (group * tiles_o) * group
    height = tl.minimum(tl.cdiv(count, BLOCK_N) - first, group)
    within = program % (group * tiles_o)
    # 64-bit, because rows and outputs may have more than 2^31 values.
    n = ((first + within % height) * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)
    o = within // height * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    # One loop over taps and channels rather than two nested loops, so that loads run ahead of the products across
    # taps. The table is read one step ahead: then no load waits for another load in the same step, which would take
    # stages of the compiler's pipeline. Reading it again for each block of channels costs 4 bytes from L1.
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    source = tl.load(table + n * TAPS, mask=n < count, other=-1)
    for step in range(TAPS * blocks):
        c = step % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        # Channels are contiguous, so a gathered row consists of whole cache lines wherever it is.
        gathered = tl.load(
            rows + source.to(tl.int64)[:, None] * C + c[None, :],
            mask=(source >= 0)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        kernel = tl.load(
            weight + o[:, None] * (TAPS * C) + step // blocks * C + c[None, :],
            mask=(o < C_OUT)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        total = tl.dot(gathered, kernel.T, total, input_precision=PRECISION)
        following = tl.minimum((step + 1) // blocks, TAPS - 1)
        source = tl.load(table + n * TAPS + following, mask=n < count, other=-1)
    total = _finish(total, n, o, bias, residual, count, C_OUT, ACTIVATION, SLOPE)
    tl.store(out + n[:, None] * C_OUT + o[None, :], total, mask=(n < count)[:, None] & (o < C_OUT)[None, :])


@_tune(
    [
        ({"BLOCK_N": 16, "BLOCK_C": 32}, 4, 1),
        ({"BLOCK_N": 16, "BLOCK_C": 64}, 4, 1),
        ({"BLOCK_N": 32, "BLOCK_C": 64}, 4, 1),
        ({"BLOCK_N": 16, "BLOCK_C": 128}, 4, 1),
        ({"BLOCK_N": 32, "BLOCK_C": 128}, 8, 1),
    ]
)
def depthwise(  # type: ignore[no-untyped-def]
    rows,
    weight,
    table,
    bias,
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
    """Compute one (BLOCK_N, BLOCK_C) depthwise tile of (*). Memory-bound: plain products and many loads in flight."""
    n = (tl.program_id(0) * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for tap in tl.range(TAPS, loop_unroll_factor=8):
        source = tl.load(table + n * TAPS + tap, mask=n < count, other=-1).to(tl.int64)
        mask = (source >= 0)[:, None] & (c < C)[None, :]
        gathered = tl.load(rows + source[:, None] * C + c[None, :], mask=mask, other=0.0)
        kernel = tl.load(weight + c * TAPS + tap, mask=c < C, other=0.0)
        total += gathered.to(tl.float32) * kernel.to(tl.float32)[None, :]
    total = _finish(total, n, c, bias, residual, count, C, ACTIVATION, SLOPE)
    tl.store(out + n[:, None] * C + c[None, :], total, mask=(n < count)[:, None] & (c < C)[None, :])


@_tune(
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
def product_weight(  # type: ignore[no-untyped-def]
    rows,
    grad,
    table,
    partial,
    count,
    length,
    bucket,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute one (BLOCK_O, BLOCK_C) tile of one tap of the weight's gradient, summed over one share of the outputs."""
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tiles_o: tl.constexpr = (C_OUT + BLOCK_O - 1) // BLOCK_O
    program, share = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = program % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o = program // tiles_c % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    tap = program // (tiles_c * tiles_o)
    end = tl.minimum((share + 1) * length, count)
    total = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    # As in `product`, the table is read one step ahead.
    n = share * length + tl.arange(0, BLOCK_N)
    source = tl.load(table + n * TAPS + tap, mask=n < end, other=-1)
    for _ in range(tl.cdiv(length, BLOCK_N)):
        gathered = tl.load(
            rows + source.to(tl.int64)[:, None] * C + c[None, :],
            mask=(source >= 0)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        above = tl.load(
            grad + n[:, None] * C_OUT + o[None, :], mask=(n < end)[:, None] & (o < C_OUT)[None, :], other=0.0
        )
        total = tl.dot(above.T, gathered, total, input_precision=PRECISION)
        n += BLOCK_N
        source = tl.load(table + n * TAPS + tap, mask=n < end, other=-1)
    place = partial + (share * C_OUT + o[:, None]) * (TAPS * C) + tap * C + c[None, :]
    tl.store(place, total, mask=(o < C_OUT)[:, None] & (c < C)[None, :])


@_tune(
    [
        ({"BLOCK_N": 16, "BLOCK_C": 32}, 4, 1),
        ({"BLOCK_N": 32, "BLOCK_C": 64}, 4, 1),
        ({"BLOCK_N": 32, "BLOCK_C": 128}, 8, 1),
    ]
)
def depthwise_weight(  # type: ignore[no-untyped-def]
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
