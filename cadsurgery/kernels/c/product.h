/* One tile of a matrix product of scattered rows with packed weights; the sums of a tile stay in registers. */
#ifndef CADSURGERY_PRODUCT_H
#define CADSURGERY_PRODUCT_H

#include "finish.h"

#ifdef PAIRS
enum { SIDE = 2 }; /* adjacent input channels of one output */

#if VECTOR == 64
typedef __m512bh pairs;
INLINE pairs load_pairs(const element *from) { return (pairs)_mm512_loadu_si512(from); }
INLINE pairs all_pairs(int32_t two) { return (pairs)_mm512_set1_epi32(two); }
INLINE lane add_products(lane total, pairs a, pairs b) { return (lane)_mm512_dpbf16_ps((__m512)total, a, b); }
#else
typedef bfloat16x8_t pairs;
INLINE pairs load_pairs(const element *from) { return vreinterpretq_bf16_u16(vld1q_u16(from)); }
INLINE pairs all_pairs(int32_t two) { return vreinterpretq_bf16_s32(vdupq_n_s32(two)); }
INLINE lane add_products(lane total, pairs a, pairs b) { return (lane)vbfdotq_f32((float32x4_t)total, a, b); }
#endif
#else
enum { SIDE = 1 };
#endif

/* 24 of 32 registers hold sums, or 12 of 16; the weights of a channel and one value of a row fill the others. */
#if REGISTERS == 32
#define COLUMNS 4
#define BY_WIDTH(wide, run)          \
    do {                             \
        if ((wide) == 4) run(4);     \
        else if ((wide) == 3) run(3);\
        else if ((wide) == 2) run(2);\
        else run(1);                 \
    } while (0)
#else
#define COLUMNS 2
#define BY_WIDTH(wide, run)          \
    do {                             \
        if ((wide) == 2) run(2);     \
        else run(1);                 \
    } while (0)
#endif
enum { ROWS = 6, CHUNK = COLUMNS * LANES };

#if (defined(BF16) && !defined(PAIRS)) || defined(BYTES)
#define WIDENED /* values are stored narrower than the sums and are widened before a tile is multiplied */
enum { PART = 128 };
typedef sum factor;
#else
typedef element factor;
#endif

/* total[i] += a[i] B for ROWS rows of `channels` values, with the first `wide` vectors of B (channels, CHUNK). */
#define PRODUCTS(a0, a1, a2, a3, a4, a5, channels, b)                                         \
    for (long c = 0; c < (channels); c++) {                                                   \
        lane by[COLUMNS];                                                                     \
        const factor value[ROWS] = {a0[c], a1[c], a2[c], a3[c], a4[c], a5[c]};                \
        _Pragma("GCC unroll 4") for (int j = 0; j < wide; j++) by[j] = load((b) + c * CHUNK + j * LANES); \
        _Pragma("GCC unroll 6") for (int i = 0; i < ROWS; i++)                                \
            _Pragma("GCC unroll 4") for (int j = 0; j < wide; j++) total[i][j] += value[i] * by[j]; \
    }

/* total[i] += a[i] B for ROWS rows of `channels` values, with the first `wide` vectors of B (channels, CHUNK), or
 * (channels / 2, CHUNK, 2) for pairs of channels. `wide` is a constant after inlining. */
INLINE void accumulate(lane total[ROWS][COLUMNS], const element *const *a, long channels, const element *b, const int wide) {
#ifdef PAIRS
    const element *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
    long c = 0;
    for (; c + 1 < channels; c += 2) {
        pairs by[COLUMNS];
        int32_t value[ROWS];
        memcpy(value, a0 + c, 4), memcpy(value + 1, a1 + c, 4), memcpy(value + 2, a2 + c, 4);
        memcpy(value + 3, a3 + c, 4), memcpy(value + 4, a4 + c, 4), memcpy(value + 5, a5 + c, 4);
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) by[j] = load_pairs(b + c * CHUNK + 2 * j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < wide; j++) total[i][j] = add_products(total[i][j], all_pairs(value[i]), by[j]);
    }
    if (c < channels)
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < wide; j++)
                total[i][j] =
                    add_products(total[i][j], all_pairs(a[i][c]), load_pairs(b + c * CHUNK + 2 * j * LANES));
#elif defined(WIDENED)
    sum part[ROWS][PART];
    for (long start = 0; start < channels; start += PART) {
        const long some = channels - start < PART ? channels - start : PART;
        for (int i = 0; i < ROWS; i++)
            for (long c = 0; c < some; c += LANES) {
                lane value = load_some(a[i] + start + c, some - c);
                memcpy(part[i] + c, &value, sizeof value);
            }
        PRODUCTS(part[0], part[1], part[2], part[3], part[4], part[5], some, b + start * CHUNK)
    }
#else
    const element *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
    PRODUCTS(a0, a1, a2, a3, a4, a5, channels, b)
#endif
}

/* Add the products to sums in memory, (ROWS, CHUNK). */
INLINE void multiply_known(const element *const *a, long channels, const element *b, sum *sums, const int wide) {
    lane total[ROWS][COLUMNS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) memcpy(&total[i][j], sums + i * CHUNK + j * LANES, sizeof(lane));
    accumulate(total, a, channels, b, wide);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) memcpy(sums + i * CHUNK + j * LANES, &total[i][j], sizeof(lane));
}

static __attribute__((unused)) void multiply(const element *const *a, long channels, const element *b, sum *sums, long wide) {
#define MULTIPLY(wide) multiply_known(a, channels, b, sums, wide)
    BY_WIDTH(wide, MULTIPLY);
#undef MULTIPLY
}

/* Rows and weights of a tile: pointers to the rows that the taps of ROWS result rows read, (taps, ROWS), and weights
 * (taps, depth, CHUNK), of which `channels` are read. */
typedef struct {
    const element *const *a;
    const element *b;
    long taps, channels, depth;
} factors;

/* Compute all sums of ROWS rows from row `at` on, starting with the bias, and store the results from the registers. */
INLINE void multiply_to(const factors *x, const sum *bias, const finish *f, long at, const int wide) {
    lane total[ROWS][COLUMNS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) total[i][j] = load_some_sums(bias + j * LANES, LANES);
    for (long tap = 0; tap < x->taps; tap++)
        accumulate(total, x->a + tap * ROWS, x->channels, x->b + tap * x->depth * CHUNK, wide);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) finish_some(f, total[i][j], at + i, j * LANES, LANES);
}

/* `multiply_to` for whole vectors; the sums of a last partial vector go through memory. */
static __attribute__((unused)) void multiply_once(const factors *x, const sum *bias, const finish *f, long at, long some) {
    const long wide = some >= CHUNK ? COLUMNS : (some + LANES - 1) / LANES;
    if (some >= wide * LANES) {
#define WHOLE(wide) multiply_to(x, bias, f, at, wide)
        BY_WIDTH(wide, WHOLE);
#undef WHOLE
        return;
    }
    sum sums[ROWS * CHUNK] __attribute__((aligned(64)));
    for (int i = 0; i < ROWS; i++) memcpy(sums + i * CHUNK, bias, CHUNK * sizeof(sum));
    for (long tap = 0; tap < x->taps; tap++)
        multiply(x->a + tap * ROWS, x->channels, x->b + tap * x->depth * CHUNK, sums, wide);
    for (int i = 0; i < ROWS; i++)
        for (long j = 0; j < some; j += LANES) finish_some(f, load_some_sums(sums + i * CHUNK + j, LANES), at + i, j, some - j);
}

#endif
