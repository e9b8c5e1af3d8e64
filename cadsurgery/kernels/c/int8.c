/* Int8 convolutions: unsigned 8-bit activations times signed weights, with exact 32-bit sums. */
#include "int8.h"

#ifdef LIMITED
#define NAME(name) SUFFIX(name##_limited)
#else
#define NAME(name) SUFFIX(name)
#endif

/* 24 of 32 registers hold sums, or 12 of 16. */
#if REGISTERS == 32
enum { COLUMNS = 4 };
#else
enum { COLUMNS = 2 };
#endif
#ifdef QUADS
enum { SIDE = 4 };
typedef int8_t weight;
#else
enum { SIDE = 2 };
typedef int16_t weight;
#endif
enum { ROWS = 6, CHUNK = COLUMNS * LANES, BLOCK = 32 * ROWS };

#ifdef SIGNED
enum { SHIFT = 128 };
#else
enum { SHIFT = 0 };
#endif

#define GIVEN int8_t
#define PACKED weight
#include "pack.h"

#ifdef LIMITED
/* True if no two adjacent channels can saturate 16 bits: their weights of equal sign sum to at most 128. */
static int is_limited(const unpacked *w) {
    const int8_t *weights = w->data;
    for (long group = 0; group < w->groups; group++)
        for (long output = 0; output < w->outputs; output++)
            for (long c = 0; c + 1 < w->channels; c += 2)
                for (long tap = 0; tap < w->taps; tap++) {
                    const int first = weights[index_of(w, group, output, c, tap)];
                    const int second = weights[index_of(w, group, output, c + 1, tap)];
                    if (first * second > 0 && (first + second > 128 || first + second < -128)) return 0;
                }
    return 1;
}
#endif

long NAME(pack_convolve)(const unpacked *from, const void *const *constants, char *to, long *bytes) {
#ifdef LIMITED
    CHECK_UNPACKED(from, sizeof(int8_t), to ? CONSTANTS : 0, sizeof(float));
    if (!is_limited(from)) return NOT_TAKEN;
#endif
    const long first = pack_chunks(from, CHUNK, SIDE, 1, constants, CONSTANTS, sizeof(float), to, bytes);
#ifdef SIGNED
    if (first < 0) return first;
    int32_t *offset = (int32_t *)(to + first);
    for (long group = 0; to && group < from->groups; group++, offset += rounded_up(from->outputs, CHUNK))
        for (long output = 0; output < from->outputs; output++)
            for (long c = 0; c < from->channels; c++)
                for (long tap = 0; tap < from->taps; tap++)
                    offset[output] += SHIFT * ((const int8_t *)from->data)[index_of(from, group, output, c, tap)];
#endif
    return first;
}

typedef struct {
    const reading *in;
    const result *r;
    const weight *weight;
    long groups;
    long is_done;
} convolution;

#if VECTOR >= 32
/* `finish` for CHUNK outputs of a row. */
INLINE void finish_chunk(const result *r, const whole *sums, long at, long first, const int has_more) {
    const uint8_t *more = r->more + at * r->outputs + first;
    uint8_t *out = r->out + at * r->outputs + first;
    whole part[COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; j++) {
        const long place = first + j * LANES;
        lane value = __builtin_convertvector(sums[j], lane);
        value = multiply_add(value, load_some_sums(r->scale + place, LANES), load_some_sums(r->bias + place, LANES));
        if (has_more) value = multiply_add(load_some(more + j * LANES, LANES), all_lanes(r->more_scale), value);
        part[j] = to_whole(clamp(value, all_lanes(r->low), all_lanes(r->high)));
    }
#if VECTOR == 64
    __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32((__m512i)part[0], (__m512i)part[1]),
                                        _mm512_packs_epi32((__m512i)part[2], (__m512i)part[3]));
    bytes = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
    _mm512_storeu_si512(out, bytes);
#else
    const __m256i pairs = _mm256_packs_epi32((__m256i)part[0], (__m256i)part[1]);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(pairs, pairs), _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
    _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(bytes));
#endif
}
#endif

/* Requantise and store the sums of up to ROWS rows. */
INLINE void finish_tile(const result *r, whole sums[ROWS][COLUMNS], long at, long many, long first, long last, const int wide) {
#if VECTOR >= 32
    if (wide == COLUMNS && last - first >= CHUNK) {
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++)
            if (i < many) {
                if (r->more) finish_chunk(r, sums[i], at + i, first, 1);
                else finish_chunk(r, sums[i], at + i, first, 0);
            }
        return;
    }
#endif
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++)
            if (i < many) finish(r, sums[i][j], at + i, first + j * LANES, last - first - j * LANES);
}

INLINE void begin_tile(const result *r, whole sums[ROWS][COLUMNS], long first, const int wide) {
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) memcpy(&sums[i][j], r->offset + first + j * LANES, sizeof(whole));
}

#ifdef QUADS
INLINE whole add_products(whole sums, int32_t four, const int8_t *weights) {
#if defined(LIMITED)
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(four), _mm256_loadu_si256((const __m256i *)weights));
    return (whole)_mm256_add_epi32((__m256i)sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif VECTOR == 64
    return (whole)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(four), _mm512_loadu_si512(weights));
#elif VECTOR == 32
    return (whole)_mm256_dpbusd_avx_epi32((__m256i)sums, _mm256_set1_epi32(four), _mm256_loadu_si256((const __m256i *)weights));
#else
    const int8x16_t value = vreinterpretq_s8_u32(vdupq_n_u32((uint32_t)four ^ 0x80808080u));
    return (whole)vdotq_s32((int32x4_t)sums, value, vld1q_s8(weights));
#endif
}

INLINE int32_t four(const uint8_t *from) {
    int32_t value;
    memcpy(&value, from, 4);
    return value;
}

/* Compute ROWS result rows from row `at` on, for `wide` vectors of outputs from `first` on (outputs end before `last`),
 * with all sums in registers. `wide` is a constant after inlining. b is (taps, quads, CHUNK, 4) from these outputs on;
 * channels are read from `shift` on. */
INLINE void multiply(const reading *in, const result *r, const int8_t *b, long shift, long at, long many, long first, long last,
                     const int wide) {
    whole sums[ROWS][COLUMNS];
    const long whole_quads = in->channels / 4, rest = in->channels % 4;
    begin_tile(r, sums, first, wide);
    for (long tap = 0; tap < in->taps; tap++) {
        const uint8_t *a[ROWS];
        for (int i = 0; i < ROWS; i++) a[i] = row_of_tap(in, at + (i < many ? i : many - 1), tap) + shift;
        if (!first && in->channels >= 64 && tap + 1 < in->taps) /* prefetch: hardware cannot predict the rows of elements */
            for (int i = 0; i < ROWS; i++) {
                const uint8_t *next = row_of_tap(in, at + (i < many ? i : many - 1), tap + 1) + shift;
                for (long line = 0; line < in->channels; line += 64) __builtin_prefetch(next + line);
            }
        const uint8_t *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
        for (long q = 0; q < whole_quads; q++, b += 4 * CHUNK) {
            const int32_t values[ROWS] = {four(a0 + 4 * q), four(a1 + 4 * q), four(a2 + 4 * q),
                                          four(a3 + 4 * q), four(a4 + 4 * q), four(a5 + 4 * q)};
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
                for (int j = 0; j < wide; j++) sums[i][j] = add_products(sums[i][j], values[i], b + j * 4 * LANES);
        }
        if (rest) {
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i++) {
                const int32_t value = (int32_t)some_of_eight(a[i] + 4 * whole_quads, rest);
#pragma GCC unroll 4
                for (int j = 0; j < wide; j++) sums[i][j] = add_products(sums[i][j], value, b + j * 4 * LANES);
            }
            b += 4 * CHUNK;
        }
    }
    finish_tile(r, sums, at, many, first, last, wide);
}

static void convolve_blocks(long from, long to, void *work) {
    convolution *c = work;
    const reading *in = c->in;
    const long quads = (in->channels + 3) / 4, outputs = c->r->outputs / c->groups, chunks = (outputs + CHUNK - 1) / CHUNK;
    for (long begin = from * BLOCK; begin < to * BLOCK && begin < in->n; begin += BLOCK) {
        const long end = begin + BLOCK < in->n ? begin + BLOCK : in->n;
        for (long part = 0; part < c->groups * chunks; part++) {
            const int8_t *b = c->weight + part * in->taps * quads * 4 * CHUNK;
            const long group = part / chunks, first = part % chunks * CHUNK, shift = group * in->channels;
            const result own = of_group(c->r, group, outputs, chunks * CHUNK);
            const long wide = (outputs - first + LANES - 1) / LANES;
            for (long at = begin; at < end; at += ROWS) {
                const long many = end - at;
#if REGISTERS == 32
                if (wide >= 4) multiply(in, &own, b, shift, at, many, first, outputs, 4);
                else if (wide == 3) multiply(in, &own, b, shift, at, many, first, outputs, 3);
                else
#endif
                if (wide >= 2) multiply(in, &own, b, shift, at, many, first, outputs, 2);
                else multiply(in, &own, b, shift, at, many, first, outputs, 1);
            }
        }
    }
}
#else
void *malloc(size_t);
void free(void *);

/* Weights of two channels for every output of a vector, and their products with two channels of a row. */
#if VECTOR == 32
typedef __m256i factors;
INLINE factors load_weights(const int16_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE whole add_products(whole sums, int32_t two, factors by) {
    return (whole)_mm256_add_epi32((__m256i)sums, _mm256_madd_epi16(_mm256_set1_epi32(two), by));
}
#elif defined(SSE4)
typedef __m128i factors;
INLINE factors load_weights(const int16_t *from) { return _mm_loadu_si128((const __m128i *)from); }
INLINE whole add_products(whole sums, int32_t two, factors by) {
    return (whole)_mm_add_epi32((__m128i)sums, _mm_madd_epi16(_mm_set1_epi32(two), by));
}
#elif defined(NEON)
typedef int16x8_t factors;
INLINE factors load_weights(const int16_t *from) { return vld1q_s16(from); }
INLINE whole add_products(whole sums, int32_t two, factors by) {
    const int16x8_t value = vreinterpretq_s16_s32(vdupq_n_s32(two));
    const int32x4_t low = vmull_s16(vget_low_s16(value), vget_low_s16(by)), high = vmull_high_s16(value, by);
    return (whole)vaddq_s32((int32x4_t)sums, vpaddq_s32(low, high));
}
#else
typedef whole factors;
INLINE factors load_weights(const int16_t *from) {
    whole by;
    memcpy(&by, from, sizeof by);
    return by;
}
INLINE whole add_products(whole sums, int32_t two, factors by) {
    return sums + (int32_t)(int16_t)two * ((by << 16) >> 16) + (two >> 16) * (by >> 16);
}
#endif

/* Widen bytes to 16 bits, padded to an even number. */
static inline void widen(const uint8_t *from, int16_t *to, long many) {
    long i = 0;
    for (; i + 8 <= many; i += 8) {
        uint64_t eight;
        memcpy(&eight, from + i, 8);
#if VECTOR >= 32 || defined(SSE4)
        _mm_storeu_si128((__m128i *)(to + i), _mm_cvtepu8_epi16(_mm_cvtsi64_si128((long long)eight)));
#else
        for (int k = 0; k < 8; k++) to[i + k] = eight >> 8 * k & 255;
#endif
    }
    for (; i < many; i++) to[i] = from[i];
    if (many % 2) to[many] = 0;
}

/* Compute ROWS result rows from row `at` on: values a (rows, pairs, 2) times b (pairs, CHUNK, 2). */
INLINE void multiply(const result *r, const int16_t *a, const int16_t *b, long pairs, long at, long many, long first, long last,
                     const int wide) {
    whole sums[ROWS][COLUMNS];
    const int16_t *a0 = a, *a1 = a0 + 2 * pairs, *a2 = a1 + 2 * pairs, *a3 = a2 + 2 * pairs, *a4 = a3 + 2 * pairs,
                  *a5 = a4 + 2 * pairs;
    begin_tile(r, sums, first, wide);
    for (long q = 0; q < pairs; q++, b += 2 * CHUNK) {
        int32_t values[ROWS];
        memcpy(values, a0 + 2 * q, 4), memcpy(values + 1, a1 + 2 * q, 4), memcpy(values + 2, a2 + 2 * q, 4);
        memcpy(values + 3, a3 + 2 * q, 4), memcpy(values + 4, a4 + 2 * q, 4), memcpy(values + 5, a5 + 2 * q, 4);
        factors by[COLUMNS];
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) by[j] = load_weights(b + j * 2 * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < wide; j++) sums[i][j] = add_products(sums[i][j], values[i], by[j]);
    }
    finish_tile(r, sums, at, many, first, last, wide);
}

/* Return the number of rows of `pairs` pairs to widen at once: they fit into the L2 cache beside the weights. */
static inline long rows_of_panel(long pairs) {
    const long fit = (1 << 17) / (4 * pairs) / ROWS * ROWS;
    return fit < ROWS ? ROWS : fit > BLOCK ? BLOCK : fit;
}

static void convolve_blocks(long from, long to, void *work) {
    convolution *c = work;
    const reading *in = c->in;
    const long half = (in->channels + 1) / 2, pairs = in->taps * half, block = rows_of_panel(pairs);
    const long outputs = c->r->outputs / c->groups, chunks = (outputs + CHUNK - 1) / CHUNK;
    int16_t *panel = malloc((size_t)block * pairs * 4);
    if (!panel) {
        __atomic_store_n(&c->is_done, 0, __ATOMIC_RELAXED);
        return;
    }
    for (long begin = from * block; begin < to * block && begin < in->n; begin += block) {
        const long end = begin + block < in->n ? begin + block : in->n;
        for (long group = 0; group < c->groups; group++) {
            const result own = of_group(c->r, group, outputs, chunks * CHUNK);
            for (long at = begin; at < begin + (end - begin + ROWS - 1) / ROWS * ROWS; at++) /* the last row is repeated to fill the tile */
                for (long tap = 0; tap < in->taps; tap++)
                    widen(row_of_tap(in, at < end ? at : end - 1, tap) + group * in->channels,
                          panel + ((at - begin) * pairs + tap * half) * 2, in->channels);
            for (long chunk = 0; chunk < chunks; chunk++) {
                const int16_t *b = c->weight + (group * chunks + chunk) * pairs * 2 * CHUNK;
                const long first = chunk * CHUNK, wide = (outputs - first + LANES - 1) / LANES;
                for (long at = begin; at < end; at += ROWS) {
                    const int16_t *a = panel + (at - begin) * pairs * 2;
#if REGISTERS == 32
                    if (wide >= 4) multiply(&own, a, b, pairs, at, end - at, first, outputs, 4);
                    else if (wide == 3) multiply(&own, a, b, pairs, at, end - at, first, outputs, 3);
                    else
#endif
                    if (wide >= 2) multiply(&own, a, b, pairs, at, end - at, first, outputs, 2);
                    else multiply(&own, a, b, pairs, at, end - at, first, outputs, 1);
                }
            }
        }
    }
    free(panel);
}
#endif

/* Grouped convolution with `channels` input channels per group. weight is (groups, chunks, taps, channels / SIDE, CHUNK,
 * SIDE): SIDE channels of an output are adjacent, padded with zeros. offset, scale and bias are (groups, chunks * CHUNK).
 * Returns NO_MEMORY if there is none for a block of widened rows. */
long NAME(convolve)(const reading *in, const result *r, const weight *weights, long groups) {
    convolution c = {in, r, weights, groups, 1};
    RETURN_UNLESS_FITS(check_bytes(in, r, groups, CHUNK));
    const long depth = product_of(in->taps, padded_to(in->channels, SIDE));
    NEEDS(in->held, OWN, product_of(product_of(groups, padded_to(r->outputs / groups, CHUNK)), depth), weight);
#ifdef QUADS
    const long block = BLOCK;
#else
    const long block = rows_of_panel(in->taps * ((in->channels + 1) / 2));
#endif
    cadsurgery_share((in->n + block - 1) / block, 1, convolve_blocks, &c);
    return c.is_done ? FITS : NO_MEMORY;
}
