/* Operations on rows of elements that torch has no fast form of: gathering with a halo, grouped convolution, pooling.
 *
 * Compiled once per element type with -DSUFFIX(name)=... and either -DELEMENT=float, -DELEMENT=double, -DBF16 (bfloat16
 * kept as its 16 bits, summed in float) or -DBYTES (whole numbers of 0..255, summed in float, rounded to even). `rows`
 * are (count, channels); an entry r of the kernel map `table` (n, taps) reads row r, for r == count the row `outside`,
 * above that row r - count - 1 of `halo`.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__ /* of narrow values compilers make other vectors in pieces */
#include <immintrin.h>
#endif

#ifdef BF16
typedef uint16_t element;
typedef float sum;
#elif defined(BYTES)
typedef uint8_t element;
typedef float sum;
#else
typedef ELEMENT element;
typedef ELEMENT sum;
#endif

#if defined(BF16) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PAIRS /* sums of products of two values side by side in one instruction */
#endif

enum { LANES = 64 / sizeof(sum), TILE = 4, TAPS = 128 };
typedef sum lane __attribute__((vector_size(64)));
#ifndef WIDE
typedef int32_t mask __attribute__((vector_size(64)));
#else
typedef int64_t mask __attribute__((vector_size(64)));
#endif

typedef struct {
    const element *rows, *halo, *outside;
    const int32_t *table;
    long count, n, taps, channels;
} reading;

static inline lane load(const element *from) {
    lane value;
#ifdef BF16
    typedef uint16_t narrow __attribute__((vector_size(32)));
    narrow bits;
    memcpy(&bits, from, sizeof bits);
#ifdef __AVX512F__
    value = (lane)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#else
    typedef uint32_t wide __attribute__((vector_size(64)));
    value = (lane)(__builtin_convertvector(bits, wide) << 16);
#endif
#elif defined(BYTES)
    typedef uint8_t narrow __attribute__((vector_size(16)));
    narrow bytes;
    memcpy(&bytes, from, sizeof bytes);
#ifdef __AVX512F__
    value = (lane)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)bytes));
#else
    value = __builtin_convertvector(__builtin_convertvector(bytes, mask), lane);
#endif
#else
    memcpy(&value, from, sizeof value);
#endif
    return value;
}

/* The first `some` channels, zeros behind them: a row's end may be the end of the memory. */
static inline lane load_some(const element *from, long some) {
    if (some >= LANES) return load(from);
#ifdef PAIRS
    return (lane)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((1 << some) - 1, from)), 16);
#else
    element part[LANES] = {0};
    memcpy(part, from, some * sizeof(element));
    return load(part);
#endif
}

static inline void store_some(element *to, lane value, long some) {
#ifdef PAIRS
    __m256i part = (__m256i)_mm512_cvtneps_pbh((__m512)value); /* below the least normal number: 0 */
    if (some < LANES) {
        _mm256_mask_storeu_epi16(to, (1 << some) - 1, part);
        return;
    }
#elif defined(BF16)
    typedef uint32_t wide __attribute__((vector_size(64)));
    typedef uint16_t narrow __attribute__((vector_size(32)));
    wide bits = (wide)value;
    wide rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
    wide is_nan = (wide)(value != value);
    narrow part = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), narrow);
#elif defined(BYTES)
    typedef uint8_t narrow __attribute__((vector_size(16)));
#ifdef __AVX512F__
    narrow part = (narrow)_mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)value));
#else
    narrow part = __builtin_convertvector((mask)(value + 12582912.0f) & 255, narrow); /* 1.5 2^23: no bits behind it */
#endif
#else
    lane part = value;
#endif
    if (some >= LANES) memcpy(to, &part, sizeof part);
    else memcpy(to, &part, some * sizeof(element));
}

static inline lane choose(mask which, lane yes, lane no) {
    return (lane)((which & (mask)yes) | (~which & (mask)no));
}

/* NaN stays NaN. */
static inline lane clamp(lane value, lane least, lane most) {
#if defined(__AVX512F__) && !defined(WIDE)
    return (lane)_mm512_min_ps((__m512)most, _mm512_max_ps((__m512)least, (__m512)value));
#else
    value = choose(value < least, least, value);
    return choose(value > most, most, value);
#endif
}

static inline lane load_some_sums(const sum *from, long some) {
    lane value = {};
    memcpy(&value, from, (some < LANES ? some : LANES) * sizeof(sum));
    return value;
}

/* The row an entry of the table reads. */
static inline const element *row(const reading *in, int32_t entry) {
    if (entry < in->count) return in->rows + (long)entry * in->channels;
    return entry == in->count ? in->outside : in->halo + (entry - in->count - 1) * in->channels;
}

/* The row that a tap of row `at` of the result reads; itself where there is no table. */
static inline const element *row_of_tap(const reading *in, long at, long tap) {
    return in->table ? row(in, in->table[at * in->taps + tap]) : in->rows + at * in->channels;
}

/* Rows of all taps side by side: out is (n, taps, channels). */
void SUFFIX(gather)(const reading *in, element *out) {
    long entries = in->n * in->taps, bytes = in->channels * sizeof(element);
#pragma omp parallel for schedule(static)
    for (long i = 0; i < entries; i++) memcpy(out + i * in->channels, row(in, in->table[i]), bytes);
}

/* What is done to the sums of a row of out before anything else: times scale, plus shift, both (levels, outputs), of
 * the row's level, or without levels of all. Nothing if there is no scale. */
typedef struct {
    const int32_t *levels;
    const sum *scale, *shift;
} by_level;

typedef struct {
    const sum *weight, *bias; /* (taps, group, padded) and (padded), padded = channels up to a whole vector */
    by_level by;
    const element *more;
    element *out;
    sum low, high;
} product;

/* What follows the sums of some channels of element `at`, those from `start`. */
static inline __attribute__((always_inline)) lane follow(
    const product *p, lane value, long at, long start, long channels, long some) {
    lane least = (lane){} + p->low, most = (lane){} + p->high;
    if (p->by.scale) {
        long own = (p->by.levels ? p->by.levels[at] * channels : 0) + start;
        value = value * load_some_sums(p->by.scale + own, some) + load_some_sums(p->by.shift + own, some);
    }
    if (p->more) value += load_some(p->more + at * channels + start, some);
    return clamp(value, least, most);
}

/* One tile of elements, `wide` vectors of channels from `start`. `group` (channels of a group), `wide` and `whole` (no
 * vector reaches beyond the last channel) are constants where this is inlined, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void convolve(
    const reading *in, const product *p, const mask *spread, const element *const (*from)[TAPS], long tile, long start,
    const long group, const int wide, const int whole) {
    long channels = in->channels, padded = (channels + LANES - 1) / LANES * LANES;
    lane result[TILE][2];
#pragma GCC unroll 4
    for (int i = 0; i < TILE; i++)
#pragma GCC unroll 2
        for (int v = 0; v < wide; v++) memcpy(&result[i][v], p->bias + start + v * LANES, sizeof(lane));
    for (long tap = 0; tap < in->taps; tap++) {
        const sum *w = p->weight + tap * group * padded + start;
        lane read[TILE][2];
#pragma GCC unroll 4
        for (int i = 0; i < TILE; i++)
#pragma GCC unroll 2
            for (int v = 0; v < wide; v++) {
                const element *source = from[i][tap] + start + v * LANES;
                read[i][v] = whole ? load(source) : load_some(source, channels - start);
            }
        for (long input = 0; input < group; input++) {
#pragma GCC unroll 2
            for (int v = 0; v < wide; v++) {
                lane by;
                memcpy(&by, w + input * padded + v * LANES, sizeof by);
#pragma GCC unroll 4
                for (int i = 0; i < TILE; i++)
                    result[i][v] += by * (group == 1 ? read[i][v] : __builtin_shuffle(read[i][v], spread[input]));
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < TILE; i++)
#pragma GCC unroll 2
        for (int v = 0; v < wide; v++) {
            long at = tile + i, first = start + v * LANES, some = whole ? LANES : channels - start;
            if (at < in->n)
                store_some(p->out + at * channels + first, follow(p, result[i][v], at, first, channels, some), some);
        }
}

static inline __attribute__((always_inline)) void convolve_all(const reading *in, const product *p, const long group) {
    long channels = in->channels;
    mask spread[LANES]; /* lane l takes this input of its own group */
    for (long input = 0; input < LANES; input++)
        for (long l = 0; l < LANES; l++) spread[input][l] = l / group * group + input;
#pragma omp parallel for schedule(static)
    for (long tile = 0; tile < in->n; tile += TILE) {
        const element *from[TILE][TAPS];
        for (int i = 0; i < TILE; i++) {
            const int32_t *entries = in->table + (tile + i < in->n ? tile + i : in->n - 1) * in->taps;
            for (long tap = 0; tap < in->taps; tap++) from[i][tap] = row(in, entries[tap]);
        }
        long start = 0;
        /* two vectors at once where nothing is shuffled: enough independent sums to hide the latency */
        if (group == 1)
            for (; start + 2 * LANES <= channels; start += 2 * LANES)
                convolve(in, p, spread, from, tile, start, group, 2, 1);
        for (; start + LANES <= channels; start += LANES) convolve(in, p, spread, from, tile, start, group, 1, 1);
        if (start < channels) convolve(in, p, spread, from, tile, start, group, 1, 0);
    }
}

/* Convolution in groups of `group` channels in and out, clamped to low..high; out is (n, channels) and `more`, if any,
 * is added before clamping. See `by_level`. taps <= TAPS, group is 1, 2, 4, 8, or 16 where a vector has as many. */
void SUFFIX(grouped)(const reading *in, const sum *weight, const sum *bias, const int32_t *levels, const sum *scale,
                     const sum *shift, const element *more, element *out, long group, double low, double high) {
    product p = {weight, bias, {levels, scale, shift}, more, out, low, high};
    if (group == 1) convolve_all(in, &p, 1);
    else if (group == 2) convolve_all(in, &p, 2);
    else if (group == 4) convolve_all(in, &p, 4);
    else if (group == 8) convolve_all(in, &p, 8);
    else if (LANES == 16) convolve_all(in, &p, 16);
}

#ifdef PAIRS
enum { MANY = 2 * LANES, NEAR = 1152 };

static inline __m512i load_many(const element *from, __mmask32 which, const int whole) {
    return whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(which, from);
}

/* MANY channels from `start`, or as many as there are before `channels`, of `many` elements from `first`. `from` are the
 * rows that the taps of the first read; those of the next are `next` pointers behind them or, if none, `step` values.
 * `taps`, `next`, `whole` (there are so many channels) and `plain` (nothing but clamping follows) may be constants where
 * this is inlined. Sums are those of the first half of each quarter of the channels, and those of the second. */
static inline __attribute__((always_inline)) void convolve_pairs(
    const product p, const element *weight, const element *const *from, long first, long many, long channels, long pitch,
    long start, const long taps, const long next, const long step, const int whole, const int plain) {
    const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    const lane least = (lane){} + p.low, most = (lane){} + p.high;
    const lane offset[2] = {load_some_sums(p.bias + start, LANES), load_some_sums(p.bias + start + LANES, LANES)};
    const __mmask32 which = whole ? ~0u : (1u << (channels - start)) - 1;
    for (long i = 0, shift = start; i < many; i++, from += next, shift += step) {
        __m512 near = _mm512_setzero_ps(), far = near;
#pragma GCC unroll 8
        for (long tap = 0; tap < taps; tap += 2) {
            const element *w = weight + tap * MANY;
            __m512i a = load_many(from[tap] + shift, which, whole), b = _mm512_setzero_si512();
            if (tap + 1 < taps) b = load_many(from[tap + 1] + shift, which, whole);
            near = _mm512_dpbf16_ps(near, (__m512bh)_mm512_unpacklo_epi16(a, b), (__m512bh)_mm512_loadu_si512(w));
            far = _mm512_dpbf16_ps(far, (__m512bh)_mm512_unpackhi_epi16(a, b), (__m512bh)_mm512_loadu_si512(w + MANY));
        }
        lane value[2] = {offset[0] + (lane)_mm512_permutex2var_ps(near, lower, far),
                         offset[1] + (lane)_mm512_permutex2var_ps(near, upper, far)};
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            long begin = start + v * LANES;
            if (plain) value[v] = clamp(value[v], least, most);
            else if (begin < channels) value[v] = follow(&p, value[v], first + i, begin, channels, channels - begin);
        }
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)value[1], (__m512)value[0]);
        element *to = p.out + (first + i) * pitch + start;
        if (whole) _mm512_storeu_si512(to, both);
        else _mm512_mask_storeu_epi16(to, which, both);
    }
}

/* `grouped` of groups of one channel, two taps of MANY channels at once. weight is (chunks of channels, pairs of taps, 2,
 * MANY / 2, 2) in the order of `convolve_pairs`, zeros behind the last tap and channel; bias is (chunks * MANY).
 *
 * Of a few elements a chunk of channels is finished before the next is begun: what several of them read of it stays in
 * the first cache. */
void SUFFIX(depthwise)(const reading *in, const element *weight, const sum *bias, const int32_t *levels,
                       const sum *scale, const sum *shift, const element *more, element *out, double low, double high) {
    const product p = {0, bias, {levels, scale, shift}, more, out, low, high};
    const long channels = in->channels, taps = in->taps, block = NEAR / taps, step = (taps + 1) / 2 * 2 * MANY;
    const int plain = !scale && !more;
#pragma omp parallel for schedule(static)
    for (long begin = 0; begin < in->n; begin += block) {
        const element *from[NEAR];
        const int32_t *entries = in->table + begin * taps;
        long many = in->n - begin < block ? in->n - begin : block;
        for (long i = 0; i < many * taps; i++) from[i] = row(in, entries[i]);
        for (long start = 0; start < channels; start += MANY) {
            const element *w = weight + start / MANY * step;
            const int whole = channels - start >= MANY;
            if (whole && plain && taps == 9) convolve_pairs(p, w, from, begin, many, channels, channels, start, 9, 9, 0, 1, 1);
            else if (whole && plain) convolve_pairs(p, w, from, begin, many, channels, channels, start, taps, taps, 0, 1, 1);
            else if (whole) convolve_pairs(p, w, from, begin, many, channels, channels, start, taps, taps, 0, 1, 0);
            else convolve_pairs(p, w, from, begin, many, channels, channels, start, taps, taps, 0, 0, 0);
        }
    }
}
#endif

#if defined(PAIRS) || !defined(BF16) && !defined(BYTES) /* what has no such instruction is left to oneDNN, bytes to integer.c */
#ifdef PAIRS
enum { SIDE = 2 }; /* channels of an output side by side */
#else
enum { SIDE = 1 };
#endif
enum { ROWS = 6, BLOCK = 16 * ROWS, WIDE_PRODUCT = 4, CHUNK = WIDE_PRODUCT * LANES, DEPTH = 512 * SIDE };

/* total[i] += a[i] B for ROWS rows of `channels` values and the first `wide` vectors of B (channels, CHUNK), or of pairs
 * of channels (channels / 2, CHUNK, 2): up to 24 sums stay in registers. `wide` is a constant where this is inlined. */
static inline __attribute__((always_inline)) void accumulate(
    lane total[ROWS][WIDE_PRODUCT], const element *const *a, long channels, const element *b, const int wide) {
    const element *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
#ifdef PAIRS
    long c = 0;
    for (; c + 1 < channels; c += 2) {
        __m512bh by[WIDE_PRODUCT];
        int32_t value[ROWS];
        memcpy(value, a0 + c, 4), memcpy(value + 1, a1 + c, 4), memcpy(value + 2, a2 + c, 4);
        memcpy(value + 3, a3 + c, 4), memcpy(value + 4, a4 + c, 4), memcpy(value + 5, a5 + c, 4);
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) by[j] = (__m512bh)_mm512_loadu_si512(b + c * CHUNK + 2 * j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < wide; j++)
                total[i][j] = (lane)_mm512_dpbf16_ps((__m512)total[i][j], (__m512bh)_mm512_set1_epi32(value[i]), by[j]);
    }
    if (c < channels)
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < wide; j++)
                total[i][j] = (lane)_mm512_dpbf16_ps((__m512)total[i][j], (__m512bh)_mm512_set1_epi32(a[i][c]),
                                                     (__m512bh)_mm512_loadu_si512(b + c * CHUNK + 2 * j * LANES));
#else
    for (long c = 0; c < channels; c++) {
        lane by[WIDE_PRODUCT];
        element value[ROWS] = {a0[c], a1[c], a2[c], a3[c], a4[c], a5[c]};
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) by[j] = load(b + c * CHUNK + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < wide; j++) total[i][j] += value[i] * by[j];
    }
#endif
}

/* Sums that lie in memory, (ROWS, CHUNK). */
static inline __attribute__((always_inline)) void multiply(
    const element *const *a, long channels, const element *b, sum *sums, const int wide) {
    lane total[ROWS][WIDE_PRODUCT];
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

/* `multiply` of all there is to sum, whose sums start at the bias: they leave for `out` from the registers. For ROWS rows
 * side by side in `out`, `some` outputs of each. */
static inline __attribute__((always_inline)) void multiply_to(
    const element *const *a, long channels, const element *b, const sum *bias, by_level by, const element *more,
    element *out, long outputs, const lane *limits, long some, const int wide) {
    lane total[ROWS][WIDE_PRODUCT];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) total[i][j] = load_some_sums(bias + j * LANES, LANES);
    accumulate(total, a, channels, b, wide);
    lane least = limits[0], most = limits[1]; /* in no register until here */
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) {
            lane value = total[i][j];
            if (by.levels) {
                long own = by.levels[i] * outputs + j * LANES;
                value = value * load_some_sums(by.scale + own, some - j * LANES) +
                        load_some_sums(by.shift + own, some - j * LANES);
            }
            if (more) value += load_some(more + i * outputs + j * LANES, some - j * LANES);
            store_some(out + i * outputs + j * LANES, clamp(value, least, most), some - j * LANES);
        }
}

static inline __attribute__((always_inline)) void multiply_once(
    const element *const *a, long channels, const element *b, const sum *bias, by_level by, const element *more,
    element *out, long outputs, const lane *limits, long some) {
    if (some >= CHUNK) multiply_to(a, channels, b, bias, by, more, out, outputs, limits, CHUNK, 4);
    else if (some > 3 * LANES) multiply_to(a, channels, b, bias, by, more, out, outputs, limits, some, 4);
    else if (some > 2 * LANES) multiply_to(a, channels, b, bias, by, more, out, outputs, limits, some, 3);
    else if (some == 2 * LANES) multiply_to(a, channels, b, bias, by, more, out, outputs, limits, 2 * LANES, 2);
    else if (some > LANES) multiply_to(a, channels, b, bias, by, more, out, outputs, limits, some, 2);
    else multiply_to(a, channels, b, bias, by, more, out, outputs, limits, some, 1);
}

/* Ungrouped convolution without gathering: rows are read where they lie. out (n, outputs) is clamped to low..high after
 * `more`, if any, is added; see `by_level`. weight is (chunks, taps, channels, CHUNK), or of pairs of channels (chunks, taps,
 * channels / 2, CHUNK, 2), a zero beside an odd one, and bias (chunks * CHUNK), outputs padded.
 *
 * A block of rows is finished before the next is begun, so that what its taps read stays in the cache beside one tap's
 * weights for one chunk of outputs and DEPTH channels. Without a table each row reads itself, with one tap. */
void SUFFIX(product)(const reading *in, const element *weight, const sum *bias, const int32_t *levels, const sum *scale,
                     const sum *shift, const element *more, element *out, long outputs, double low, double high) {
    long channels = in->channels, chunks = (outputs + CHUNK - 1) / CHUNK, padded = (channels + SIDE - 1) / SIDE * SIDE;
    const lane limits[2] = {(lane){} + (sum)low, (lane){} + (sum)high};
#pragma omp parallel for schedule(dynamic)
    for (long first = 0; first < in->n; first += BLOCK) {
        long count = in->n - first < BLOCK ? in->n - first : BLOCK;
        sum sums[BLOCK * CHUNK] __attribute__((aligned(64)));
        for (long chunk = 0; chunk < chunks; chunk++) {
            long some = outputs - chunk * CHUNK < CHUNK ? outputs - chunk * CHUNK : CHUNK;
            int wide = (some + LANES - 1) / LANES;
            long done = 0; /* rows of the block */
            if (in->taps == 1 && channels <= DEPTH)
                for (; done + ROWS <= count; done += ROWS) {
                    const element *a[ROWS], *b = weight + chunk * padded * CHUNK;
                    const sum *own = bias + chunk * CHUNK;
                    for (int i = 0; i < ROWS; i++) a[i] = row_of_tap(in, first + done + i, 0);
                    long at = (first + done) * outputs + chunk * CHUNK;
                    const element *add = more ? more + at : 0;
                    by_level by = {0};
                    if (levels) by = (by_level){levels + first + done, scale + chunk * CHUNK, shift + chunk * CHUNK};
                    multiply_once(a, channels, b, own, by, add, out + at, outputs, limits, some);
                }
            for (long i = done; i < (count + ROWS - 1) / ROWS * ROWS; i++)
                memcpy(sums + i * CHUNK, bias + chunk * CHUNK, CHUNK * sizeof(sum));
            for (long part = 0; part < channels; part += DEPTH)
                for (long tap = 0; tap < in->taps; tap++) {
                    long depth = channels - part < DEPTH ? channels - part : DEPTH;
                    const element *b = weight + ((chunk * in->taps + tap) * padded + part) * CHUNK;
                    for (long tile = done; tile < count; tile += ROWS) {
                        const element *a[ROWS];
                        for (int i = 0; i < ROWS; i++) {
                            long e = first + (tile + i < count ? tile + i : count - 1);
                            a[i] = row_of_tap(in, e, tap) + part;
                        }
                        sum *to = sums + tile * CHUNK;
                        if (wide == 4) multiply(a, depth, b, to, 4);
                        else if (wide == 3) multiply(a, depth, b, to, 3);
                        else if (wide == 2) multiply(a, depth, b, to, 2);
                        else multiply(a, depth, b, to, 1);
                    }
                }
            for (long i = done; i < count; i++) {
                long at = (first + i) * outputs + chunk * CHUNK;
                long factors = levels ? levels[first + i] * outputs + chunk * CHUNK : 0;
                for (long j = 0; j < some; j += LANES) {
                    lane value = load_some_sums(sums + i * CHUNK + j, LANES);
                    if (levels)
                        value = value * load_some_sums(scale + factors + j, some - j) +
                                load_some_sums(shift + factors + j, some - j);
                    if (more) value += load_some(more + at + j, some - j);
                    store_some(out + at + j, clamp(value, limits[0], limits[1]), some - j);
                }
            }
        }
    }
}
#endif

#ifdef PAIRS
void *calloc(size_t, size_t);
void free(void *);

typedef struct {
    const element *image;               /* (batch, height, width, channels) */
    const element *weight, *then, *last; /* of 1x1 convolutions as `product` reads them, between as `depthwise` does */
    const sum *bias, *then_bias, *last_bias;
    const element *more;                /* of the result's shape, or none */
    element *out;                       /* (batch, lines, columns, outputs; without a last convolution middle) */
    long batch, height, width, channels, middle, outputs, lines, columns, tall, wide, stride, top, left;
    double low, high, then_low, then_high, last_low, last_high;
} expansion;

/* Channels first..last of a line of the map between the two, `pitch` to a pixel, and behind it zeros. */
static void expand_line(const expansion *e, const element *image, long first, long last, element *to, long pitch) {
    const lane limits[2] = {(lane){} + (sum)e->low, (lane){} + (sum)e->high};
    const by_level none = {0};
    for (long chunk = first; chunk < last; chunk += CHUNK) {
        const element *weight = e->weight + chunk * ((e->channels + 1) / 2 * 2);
        const sum *bias = e->bias + chunk;
        for (long x = 0; x < e->width; x += ROWS) {
            const element *a[ROWS];
            for (int i = 0; i < ROWS; i++) a[i] = image + (x + i < e->width ? x + i : e->width - 1) * e->channels;
            element *out = to + x * pitch + chunk - first;
            multiply_once(a, e->channels, weight, bias, none, 0, out, pitch, limits, last - chunk);
        }
    }
    memset(to + e->width * pitch, 0, (e->wide + ROWS) * pitch * sizeof(element)); /* what was written too much, too */
}

/* The last convolution of a line of the map before it. */
static void project_line(const expansion *e, const element *line, long at) {
    const lane limits[2] = {(lane){} + (sum)e->last_low, (lane){} + (sum)e->last_high};
    const by_level none = {0};
    for (long chunk = 0; chunk < e->outputs; chunk += CHUNK)
        for (long x = 0; x < e->columns; x += ROWS) {
            const element *a[ROWS], *weight = e->last + chunk * ((e->middle + 1) / 2 * 2);
            const long begin = x + ROWS <= e->columns ? x : e->columns - ROWS; /* some once more */
            const long place = (at + begin) * e->outputs + chunk;
            for (int i = 0; i < ROWS; i++) a[i] = line + (begin + i) * e->middle;
            multiply_once(a, e->middle, weight, e->last_bias + chunk, none, e->more ? e->more + place : 0, e->out + place,
                          e->outputs, limits, e->outputs - chunk);
        }
}

/* A 1x1 convolution of a dense map, a depthwise one of its result and, if there is one, another 1x1 convolution, to which
 * `more` is added. What is between them is never in memory as a whole: there is a ring of as many lines as a window is
 * tall, without a last convolution of as many channels as fit into the second cache. Returns 0 if there is no memory for
 * those, else 1. With a last convolution there are at least ROWS columns. */
long SUFFIX(expand_depthwise)(const expansion *e) {
    enum { BAND = 32, CACHE = 1 << 18 };
    const long bands = (e->lines + BAND - 1) / BAND, taps = e->tall * e->wide, all = (e->middle + CHUNK - 1) / CHUNK;
    const long pixels = e->left + e->width + e->wide + ROWS, fit = CACHE / (e->tall * pixels * CHUNK);
    const long pitch = (e->last || fit > all ? all : fit < 1 ? 1 : fit) * CHUNK, length = pixels * pitch;
    long is_done = 1;
#pragma omp parallel for schedule(dynamic)
    for (long job = 0; job < e->batch * bands; job++) {
        const long zeros = e->tall * length, spare = zeros + length; /* a line of zeros, and one of the second map */
        element *ring = calloc(spare + (e->last ? e->columns * e->middle : 0), sizeof(element));
        if (!ring) {
            is_done = 0;
            continue;
        }
        const element *image = e->image + job / bands * e->height * e->width * e->channels;
        const long top = job % bands * BAND, bottom = top + BAND < e->lines ? top + BAND : e->lines;
        for (long first = 0; first < e->middle; first += pitch) {
            const long some = e->middle - first < pitch ? e->middle - first : pitch;
            element *to = (e->last ? ring + spare : e->out) + first;
            const product p = {0, e->then_bias + first, {0}, 0, to, e->then_low, e->then_high};
            long next = 0; /* of the lines to compute */
            for (long y = top; y < bottom; y++) {
                const element *from[TAPS];
                for (long v = 0; v < e->tall; v++) {
                    const long line = y * e->stride - e->top + v;
                    const int inside = line >= 0 && line < e->height;
                    element *at = ring + (inside ? line % e->tall * length : zeros);
                    if (inside && line >= next) {
                        const element *read = image + line * e->width * e->channels;
                        expand_line(e, read, first, first + some, at + e->left * pitch, pitch);
                        next = line + 1;
                    }
                    for (long h = 0; h < e->wide; h++) from[v * e->wide + h] = at + h * pitch;
                }
                const long place = (job / bands * e->lines + y) * e->columns, step = e->stride * pitch;
                const long at = e->last ? 0 : place;
                for (long start = 0; start < some; start += MANY) {
                    const element *w = e->then + (first + start) * ((taps + 1) / 2 * 2);
                    if (some - start >= MANY && taps == 9)
                        convolve_pairs(p, w, from, at, e->columns, some, e->middle, start, 9, 0, step, 1, 1);
                    else if (some - start >= MANY)
                        convolve_pairs(p, w, from, at, e->columns, some, e->middle, start, taps, 0, step, 1, 1);
                    else convolve_pairs(p, w, from, at, e->columns, some, e->middle, start, taps, 0, step, 0, 1);
                }
                if (e->last) project_line(e, ring + spare, place);
            }
        }
        free(ring);
    }
    return is_done;
}
#endif

/* `many` is a constant where this is inlined, so that places and shares stay in registers. */
static inline __attribute__((always_inline)) void mix_known(
    const element *const *from, const sum *share, long channels, element *out, const long many) {
    for (long start = 0; start < channels; start += LANES) {
        long some = channels - start;
        lane total = {};
        if (some >= LANES)
            for (long i = 0; i < many; i++) total += share[i] * load(from[i] + start);
        else
            for (long i = 0; i < many; i++) total += share[i] * load_some(from[i] + start, some);
        store_some(out + start, total, some);
    }
}

static inline void mix_row(const reading *in, const int32_t *entries, const sum *shares, long many, element *out) {
    const element *from[many];
    sum share[many];
    long kept = 0;
    for (long i = 0; i < many; i++)
        if (shares[i] != 0) from[kept] = row(in, entries[i]), share[kept++] = shares[i];
    if (kept == 4) mix_known(from, share, in->channels, out, 4);
    else if (kept == 2) mix_known(from, share, in->channels, out, 2);
    else mix_known(from, share, in->channels, out, kept);
}

/* Weighted sums of rows: out[i] = sum over `taps` of mix[i] times the rows its table names; out is (n, channels). */
void SUFFIX(mix)(const reading *in, const sum *mix, element *out) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < in->n; i++)
        mix_row(in, in->table + i * in->taps, mix + i * in->taps, in->taps, out + i * in->channels);
}

/* `gather` of one tap without a halo in memory: its rows, `many` of `sources` weighted by `mix`, are summed where they
 * are read. Fewer passes over memory than with a halo, if each is read once. */
void SUFFIX(gather_mixing)(const reading *in, const int32_t *sources, const sum *mix, long many, element *out) {
    long bytes = in->channels * sizeof(element);
#pragma omp parallel for schedule(static)
    for (long i = 0; i < in->n; i++) {
        long halo = in->table[i] - in->count - 1;
        if (halo < 0) memcpy(out + i * in->channels, row(in, in->table[i]), bytes);
        else mix_row(in, sources + halo * many, mix + halo * many, many, out + i * in->channels);
    }
}

/* Maps of one resolution, of which some positions were computed, filled from those around: see gaps.py.
 *
 * `table` (n, 1) names the positions wanted among batch * height * width; `there` tells which have a row (null: all),
 * `index` which (null: its own number), `shares` how much of a row counts (null: all of it). weight is (side, side), the
 * sum of the weights of what is there plus `least` divides them if that is not 0. What is left to 1 is `floor`, if any.
 * out is (n, channels); `more`, if any, is added before clamping to low..high. */
void SUFFIX(fill)(const reading *in, const uint8_t *there, const int32_t *index, const sum *shares, const sum *weight,
                  long side, long height, long width, double least, const element *floor, const element *more,
                  element *out, double low, double high) {
    long channels = in->channels, reach = side / 2;
    /* Shares that are left out: in float some may change the result in its sixth digit, in double none does. */
    const sum negligible = sizeof(sum) == 4 ? 2e-6 : 2.8e-17;
    lane bottom = (lane){} + (sum)low, top = (lane){} + (sum)high;
    sum heaviest[32] = {0}; /* weight of each ring */
    for (long v = -reach; v <= reach; v++)
        for (long u = -reach; u <= reach; u++) {
            sum m = weight[(v + reach) * side + u + reach];
            long ring = v < 0 ? -v : v;
            if (u > ring || -u > ring) ring = u < 0 ? -u : u;
            if (m > heaviest[ring]) heaviest[ring] = m;
        }
#pragma omp parallel for schedule(dynamic, 256)
    for (long i = 0; i < in->n; i++) {
        long at = in->table[i], line = at / width, x = at - line * width, y = line % height, many = 0;
        const element *from[64 + 1];
        sum mass[64 + 1], own = 0, total = 0, rest = 1;
        const element *self = 0;
        if (!there || there[at]) {
            long row_of = index ? index[at] : at;
            self = in->rows + row_of * channels;
            own = shares ? shares[row_of] : 1;
        }
        if (own < 1) {
            for (long ring = 0; ring <= reach; ring++) {
                if (heaviest[ring] < negligible * (least != 0 ? total + (sum)least : 1)) continue;
                for (long v = -ring; v <= ring; v++) {
                    if (y + v < 0 || y + v >= height) continue;
                    long step = v == -ring || v == ring || ring == 0 ? 1 : 2 * ring;
                    for (long u = -ring; u <= ring; u += step) {
                        long place = at + v * width + u;
                        if (x + u < 0 || x + u >= width || (there && !there[place])) continue;
                        long row_of = index ? index[place] : place;
                        sum m = weight[(v + reach) * side + u + reach] * (shares ? shares[row_of] : 1);
                        if (m == 0) continue;
                        from[many] = in->rows + row_of * channels;
                        mass[many++] = m;
                        total += m;
                    }
                }
            }
            sum scale = (1 - own) / (least != 0 ? total + (sum)least : 1), gone = 0;
            long kept = 0;
            for (long k = 0; k < many; k++) {
                sum m = mass[k] * scale;
                rest -= m;
                from[kept] = from[k];
                mass[kept] = m;
                if (m > negligible) kept++;
                else gone += m;
            }
            many = kept;
            if (!many) rest += gone;
            else if (gone > 0)
                for (long k = 0; k < many; k++) mass[k] *= (1 - rest) / (1 - rest - gone);
        }
        if (own > 0) {
            from[many] = self;
            mass[many++] = own;
            rest -= own;
        }
        for (long start = 0; start < channels; start += LANES) {
            long some = channels - start;
            lane value = {};
            if (own == 1) value = load_some(self + start, some);
            else {
                for (long k = 0; k < many; k++) value += mass[k] * load_some(from[k] + start, some);
                if (floor) value += rest * load_some(floor + start, some);
            }
            if (more) value += load_some(more + i * channels + start, some);
            store_some(out + i * channels + start, clamp(value, bottom, top), some);
        }
    }
}

/* `mix` of two rows, of every line of a map alike: the rows are the first of `lines` lines, of count rows each; out is
 * (lines, n, channels). Whole vectors are read and written wherever what lies behind a row belongs to the line: what is
 * written too much there is written again. */
void SUFFIX(mix_lines)(const reading *in, const sum *mix, long lines, element *out) {
    long channels = in->channels, behind = (LANES - 1) / channels + 1;
#pragma omp parallel for schedule(static)
    for (long line = 0; line < lines; line++) {
        const element *rows = in->rows + line * in->count * channels;
        for (long i = 0; i < in->n; i++) {
            int32_t first = in->table[2 * i], second = in->table[2 * i + 1];
            const element *a = rows + first * channels, *b = rows + second * channels;
            element *to = out + (line * in->n + i) * channels;
            sum near = mix[2 * i], far = mix[2 * i + 1];
            long last = first > second ? first : second;
            if (last + behind < in->count && i + behind < in->n)
                for (long c = 0; c < channels; c += LANES)
                    store_some(to + c, near * load(a + c) + far * load(b + c), LANES);
            else
                for (long c = 0; c < channels; c += LANES) {
                    long some = channels - c;
                    store_some(to + c, near * load_some(a + c, some) + far * load_some(b + c, some), some);
                }
        }
    }
}

#ifdef BYTES
/* `pool` of the largest, many at once. */
static void largest_bytes(const reading *in, const int32_t *entries, uint8_t *out) {
    typedef uint8_t many __attribute__((vector_size(64)));
    for (long start = 0; start < in->channels; start += sizeof(many)) {
        long some = in->channels - start < (long)sizeof(many) ? in->channels - start : (long)sizeof(many);
        many result = {};
        for (long tap = 0; tap < in->taps; tap++) {
            many value = {};
            const uint8_t *from = row(in, entries[tap]) + start;
            if (some == sizeof(many)) memcpy(&value, from, sizeof value);
            else memcpy(&value, from, some);
            many is_larger = (many)(value > result);
            result = (is_larger & value) | (~is_larger & result);
        }
        memcpy(out + start, &result, some);
    }
}
#endif

/* Largest value (largest != 0) or sum over the taps: out is (n, channels). */
void SUFFIX(pool)(const reading *in, element *out, long largest) {
#pragma omp parallel for schedule(static)
    for (long e = 0; e < in->n; e++) {
        const int32_t *entries = in->table + e * in->taps;
#ifdef BYTES
        if (largest) {
            largest_bytes(in, entries, out + e * in->channels);
            continue;
        }
#endif
        for (long start = 0; start < in->channels; start += LANES) {
            long some = in->channels - start;
            lane result = load_some(row(in, entries[0]) + start, some);
            for (long tap = 1; tap < in->taps; tap++) {
                lane value = load_some(row(in, entries[tap]) + start, some);
                if (largest) result = choose((value > result) | (value != value), value, result);
                else result += value;
            }
            store_some(out + e * in->channels + start, result, some);
        }
    }
}
