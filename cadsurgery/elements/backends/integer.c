/* Convolution on rows of 8-bit values: unsigned features times signed weights, summed exactly in 32 bits.
 *
 * Compiled once per set of instructions with -DSUFFIX(name)=... and -DVNNI (AVX512-VNNI) or without it (AVX2). An entry r
 * of the kernel map `table` (n, taps; if there is none each row reads itself) reads row r, for r == count the row `outside`, above that row r - count - 1 of
 * `halo`; rows begin `stride` bytes after each other and are read as `channels` bytes.
 *
 * Sums are exact in both forms: AVX2's product of bytes, which saturates at 16 bits, is not used. What follows is done in
 * single precision without contraction, one rounding per operation, so that torch can be asked for the same bits.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifdef VNNI
enum { LANES = 16, ROWS = 6, WIDE = 4 };
#else
enum { LANES = 8, ROWS = 4, WIDE = 1 };
#endif
enum { CHUNK = 64, BLOCK = 32 * ROWS };
typedef float lane __attribute__((vector_size(4 * LANES)));
typedef int32_t whole __attribute__((vector_size(4 * LANES)));

typedef struct {
    const uint8_t *rows, *halo, *outside;
    const int32_t *table;
    long count, n, taps, channels, stride;
} reading;

/* What becomes of the sums of an output: sum scale + bias, plus more by more_scale, the activation, clamped; in 8 bits
 * rounded to nearest, ties to even. low and high are whole numbers of 0..255 then. */
typedef struct {
    const int32_t *offset; /* what sums begin with: the zero point of the rows times the weights, taken off */
    const float *scale, *bias;
    const void *more;
    void *out;
    long outputs, more_is_8_bits, out_is_8_bits, is_hardswish;
    float more_scale, factor, zero, low, high;
} result;

/* The row that a tap of row `at` of the result reads. */
static inline const uint8_t *row(const reading *in, long at, long tap) {
    if (!in->table) return in->rows + at * in->stride;
    int32_t entry = in->table[at * in->taps + tap];
    if (entry < in->count) return in->rows + (long)entry * in->stride;
    return entry == in->count ? in->outside : in->halo + (entry - in->count - 1) * in->stride;
}

#ifdef VNNI
static inline __mmask16 first(long some) { return some >= LANES ? 0xffff : (1 << some) - 1; }
static inline lane load(const float *from, long some) { return (lane)_mm512_maskz_loadu_ps(first(some), from); }
static inline void store(float *to, lane value, long some) { _mm512_mask_storeu_ps(to, first(some), (__m512)value); }
static inline lane load_bytes(const uint8_t *from, long some) {
    return (lane)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(some), from)));
}
static inline lane multiply_add(lane a, lane b, lane c) { return (lane)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline lane clamp(lane value, lane least, lane most) {
    return (lane)_mm512_min_ps(_mm512_max_ps((__m512)value, (__m512)least), (__m512)most);
}
static inline void store_bytes(uint8_t *to, lane value, long some) { /* of 0..255 */
    _mm_mask_storeu_epi8(to, first(some), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)value)));
}
#else
typedef uint8_t narrow __attribute__((vector_size(LANES)));
static inline lane load(const float *from, long some) {
    lane value = {};
    memcpy(&value, from, (some < LANES ? some : LANES) * sizeof(float));
    return value;
}
static inline void store(float *to, lane value, long some) {
    memcpy(to, &value, (some < LANES ? some : LANES) * sizeof(float));
}
static inline lane load_bytes(const uint8_t *from, long some) {
    narrow bytes = {};
    memcpy(&bytes, from, some < LANES ? some : LANES);
    return __builtin_convertvector(__builtin_convertvector(bytes, whole), lane);
}
static inline lane multiply_add(lane a, lane b, lane c) { return (lane)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline lane clamp(lane value, lane least, lane most) {
    return (lane)_mm256_min_ps(_mm256_max_ps((__m256)value, (__m256)least), (__m256)most);
}
static inline void store_bytes(uint8_t *to, lane value, long some) {
    narrow bytes = __builtin_convertvector((whole)_mm256_cvtps_epi32((__m256)value), narrow);
    memcpy(to, &bytes, some < LANES ? some : LANES);
}
#endif

static inline lane all(float value) { return (lane){} + value; }

/* The activation that no clamping is, and the next grid. */
static inline lane hardswish(const result *r, lane value) {
    value = value * clamp(value + 3.0f, all(0), all(6)) * (1.0f / 6.0f);
    return multiply_add(value, all(r->factor), all(r->zero));
}

/* `some` outputs of row `at` from output `first`, of their sums. */
static inline __attribute__((always_inline)) void finish(const result *r, whole sums, long at, long first, long some) {
    lane value = multiply_add(__builtin_convertvector(sums, lane), load(r->scale + first, LANES), load(r->bias + first, LANES));
    long place = at * r->outputs + first;
    if (r->more) {
        lane more = r->more_is_8_bits ? load_bytes((const uint8_t *)r->more + place, some)
                                      : load((const float *)r->more + place, some);
        value = multiply_add(more, all(r->more_scale), value);
    }
    if (r->is_hardswish) value = hardswish(r, value);
    value = clamp(value, all(r->low), all(r->high));
    if (r->out_is_8_bits) store_bytes((uint8_t *)r->out + place, value, some);
    else store((float *)r->out + place, value, some);
}

static inline int32_t four(const uint8_t *from) {
    int32_t value;
    memcpy(&value, from, 4);
    return value;
}

/* Fewer than four bytes, zeros behind them: a row's end may be the end of the memory. */
static inline int32_t some_of_four(const uint8_t *from, long some) {
    int32_t value = 0;
    memcpy(&value, from, some);
    return value;
}

#ifdef VNNI
typedef struct { __m512i part; } total;
typedef __m512i factors;
static inline factors load_weights(const int8_t *from) { return _mm512_loadu_si512(from); }
static inline total add_products(total t, int32_t four, factors w) {
    t.part = _mm512_dpbusd_epi32(t.part, _mm512_set1_epi32(four), w);
    return t;
}
static inline total begin(const int32_t *offset) { return (total){_mm512_loadu_si512(offset)}; }
static inline whole sum_of(total t) { return (whole)t.part; }

/* `finish` of CHUNK outputs of a row where all is in 8 bits: packing clamps to 0..255. */
static inline __attribute__((always_inline)) void finish_chunk(const result *r, const total *sums, long at, long first, const int has_more) {
    __m512i part[4];
    const uint8_t *more = (const uint8_t *)r->more + at * r->outputs + first;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        long place = first + j * LANES;
        __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[j].part), _mm512_loadu_ps(r->scale + place), _mm512_loadu_ps(r->bias + place));
        if (has_more) value = _mm512_fmadd_ps((__m512)load_bytes(more + j * LANES, LANES), _mm512_set1_ps(r->more_scale), value);
        part[j] = _mm512_cvtps_epi32(value);
    }
    __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(part[0], part[1]), _mm512_packs_epi32(part[2], part[3]));
    bytes = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
    bytes = _mm512_max_epu8(bytes, _mm512_set1_epi8((char)(int)r->low));
    bytes = _mm512_min_epu8(bytes, _mm512_set1_epi8((char)(int)r->high));
    _mm512_storeu_si512((uint8_t *)r->out + at * r->outputs + first, bytes);
}
#else
/* Two sums of products for each output, of four outputs each. */
typedef struct { __m256i low, high; } total;
typedef struct { __m256i low, high; } factors;
static inline factors load_weights(const int8_t *from) {
    return (factors){_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)),
                     _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(from + 16)))};
}
static inline total add_products(total t, int32_t four, factors w) {
    __m256i value = _mm256_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(four)));
    t.low = _mm256_add_epi32(t.low, _mm256_madd_epi16(value, w.low));
    t.high = _mm256_add_epi32(t.high, _mm256_madd_epi16(value, w.high));
    return t;
}
static inline total begin(const int32_t *offset) { /* hadd adds what is beside it: 0 */
    __m256i part = _mm256_loadu_si256((const __m256i *)offset), none = _mm256_setzero_si256();
    part = _mm256_permute4x64_epi64(part, 0xd8);
    return (total){_mm256_unpacklo_epi32(part, none), _mm256_unpackhi_epi32(part, none)};
}
static inline whole sum_of(total t) {
    return (whole)_mm256_permute4x64_epi64(_mm256_hadd_epi32(t.low, t.high), 0xd8);
}
#endif

/* ROWS rows of the result from row `at`, `wide` vectors of outputs from `first` on, of which the last whose values exist is
 * before `last`: all there is to sum, in registers. `wide` is a constant where this is inlined. b is (taps, quads, CHUNK, 4)
 * from those outputs on; channels are read from `shift` on. */
static inline __attribute__((always_inline)) void multiply(
    const reading *in, const result *r, const int8_t *b, long shift, long at, long many, long first, long last,
    const int wide) {
    total sums[ROWS][WIDE];
    long whole_quads = in->channels / 4, rest = in->channels % 4;
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) sums[i][j] = begin(r->offset + first + j * LANES);
    for (long tap = 0; tap < in->taps; tap++) {
        const uint8_t *a[ROWS];
        for (int i = 0; i < ROWS; i++)
            a[i] = row(in, at + (i < many ? i : many - 1), tap) + shift;
        if (!first && in->channels >= 64 && tap + 1 < in->taps) /* rows of elements lie where no processor expects them */
            for (int i = 0; i < ROWS; i++) {
                const uint8_t *next = row(in, at + (i < many ? i : many - 1), tap + 1) + shift;
                for (long line = 0; line < in->channels; line += 64) __builtin_prefetch(next + line);
            }
        const uint8_t *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3];
#ifdef VNNI
        const uint8_t *a4 = a[4], *a5 = a[5];
#endif
        for (long q = 0; q < whole_quads; q++, b += 4 * CHUNK) {
            factors w[WIDE];
#pragma GCC unroll 4
            for (int j = 0; j < wide; j++) w[j] = load_weights(b + j * 4 * LANES);
#ifdef VNNI
            int32_t values[ROWS] = {four(a0 + 4 * q), four(a1 + 4 * q), four(a2 + 4 * q),
                                    four(a3 + 4 * q), four(a4 + 4 * q), four(a5 + 4 * q)};
#else
            int32_t values[ROWS] = {four(a0 + 4 * q), four(a1 + 4 * q), four(a2 + 4 * q), four(a3 + 4 * q)};
#endif
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
                for (int j = 0; j < wide; j++) sums[i][j] = add_products(sums[i][j], values[i], w[j]);
        }
        if (rest) {
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i++) {
                int32_t value = some_of_four(a[i] + 4 * whole_quads, rest);
#pragma GCC unroll 4
                for (int j = 0; j < wide; j++)
                    sums[i][j] = add_products(sums[i][j], value, load_weights(b + j * 4 * LANES));
            }
            b += 4 * CHUNK;
        }
    }
#ifdef VNNI
    if (wide == 4 && last - first >= CHUNK && r->out_is_8_bits && !r->is_hardswish && (!r->more || r->more_is_8_bits)) {
        if (r->more) {
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i++)
                if (i < many) finish_chunk(r, sums[i], at + i, first, 1);
        } else {
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i++)
                if (i < many) finish_chunk(r, sums[i], at + i, first, 0);
        }
        return;
    }
#endif
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++)
            if (i < many) finish(r, sum_of(sums[i][j]), at + i, first + j * LANES, last - first - j * LANES);
}

/* The result of a group of channels from the first on: what belongs to its outputs. */
static inline result of_group(const result *r, long group, long outputs, long padded) {
    result own = *r;
    long place = group * outputs;
    own.offset += group * padded, own.scale += group * padded, own.bias += group * padded;
    own.out = (char *)r->out + place * (r->out_is_8_bits ? 1 : sizeof(float));
    if (r->more) own.more = (const char *)r->more + place * (r->more_is_8_bits ? 1 : sizeof(float));
    return own;
}

/* Convolution in groups of `channels`. weight is (groups, chunks, taps, quads, CHUNK, 4): four channels of an output side
 * by side, zeros behind the last; offset, scale and bias are (groups, chunks * CHUNK). */
void SUFFIX(convolve)(const reading *in, const result *r, const int8_t *weight, long groups) {
    long quads = (in->channels + 3) / 4, outputs = r->outputs / groups, chunks = (outputs + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(dynamic)
    for (long begin = 0; begin < in->n; begin += BLOCK) {
        long end = begin + BLOCK < in->n ? begin + BLOCK : in->n;
        for (long part = 0; part < groups * chunks; part++) {
            const int8_t *b = weight + part * in->taps * quads * 4 * CHUNK;
            long group = part / chunks, first = part % chunks * CHUNK, shift = group * in->channels;
            const result own = of_group(r, group, outputs, chunks * CHUNK);
            for (long at = begin; at < end; at += ROWS) {
                long many = end - at;
#ifdef VNNI
                long wide = (outputs - first + LANES - 1) / LANES;
                if (wide >= 4) multiply(in, &own, b, shift, at, many, first, outputs, 4);
                else if (wide == 3) multiply(in, &own, b, shift, at, many, first, outputs, 3);
                else if (wide == 2) multiply(in, &own, b, shift, at, many, first, outputs, 2);
                else multiply(in, &own, b, shift, at, many, first, outputs, 1);
#else
                for (long j = 0; j < CHUNK && first + j < outputs; j += LANES)
                    multiply(in, &own, b + 4 * j, shift, at, many, first + j, outputs, 1);
#endif
            }
        }
    }
}

#ifdef VNNI
enum { MOST_TAPS = 64, MANY = 64, HALF = 32, TOGETHER = 16 };

/* Bytes of a row, or, of no more than HALF channels, of two rows one behind the other. */
static inline __attribute__((always_inline)) __m512i load_rows(const uint8_t *one, const uint8_t *other, __mmask64 which, const int two) {
    if (!two) return _mm512_maskz_loadu_epi8(which, one);
    __m256i low = _mm256_maskz_loadu_epi8((__mmask32)which, one), high = _mm256_maskz_loadu_epi8((__mmask32)which, other);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* Where `number` entries of the table from one on point. */
static inline void find_rows(const reading *in, long first, long number, const uint8_t **found) {
    const __m512i stride = _mm512_set1_epi64(in->stride), rows = _mm512_set1_epi64((long)in->rows);
    const __m256i count = _mm256_set1_epi32((int)in->count);
    for (long i = 0; i < number; i += 8) {
        const __mmask8 which = number - i >= 8 ? 0xff : (1 << (number - i)) - 1;
        const __m256i entries = _mm256_maskz_loadu_epi32(which, in->table + first + i);
        _mm512_mask_storeu_epi64(found + i, which, _mm512_add_epi64(rows, _mm512_mul_epu32(_mm512_cvtepu32_epi64(entries), stride)));
        for (unsigned others = _mm256_mask_cmpge_epi32_mask(which, entries, count); others; others &= others - 1) {
            const long place = i + __builtin_ctz(others);
            found[place] = row(in, 0, first + place);
        }
    }
}

/* Depthwise convolution of `many` rows of the result from row `at`, up to 64 channels from `start` on. from[i * taps + tap]
 * is what a tap of row i reads. What four taps have of a channel is put side by side: part k has, in each quarter of 16
 * channels, those from 4 k on, and packing restores their order. `two` rows at a time; `nine` taps have their weights in
 * registers: both are constants where this is inlined. */
static inline __attribute__((always_inline)) void convolve_channels(
    const result *r, const int8_t *weight, const uint8_t *const *from, long taps, long at, long many, long channels,
    long start, const int two, const int nine) {
    const long left = channels - start;
    const __mmask64 which = left >= MANY ? ~0ull : (1ull << left) - 1;
    __m512i weights[12], offset[4];
    lane scale[4], bias[4];
    for (int k = 0; k < (nine ? 12 : 0); k++) weights[k] = _mm512_loadu_si512(weight + MANY * k);
    for (int k = 0; k < 4; k++) {
        offset[k] = _mm512_loadu_si512(r->offset + start + 16 * k);
        scale[k] = load(r->scale + start + 16 * k, LANES), bias[k] = load(r->bias + start + 16 * k, LANES);
    }
    const __m512i low = _mm512_set1_epi8((char)(int)r->low), high = _mm512_set1_epi8((char)(int)r->high);
    const long step = two ? 2 : 1;
    for (long i = 0; i < many; i += step) {
        const uint8_t *const *one = from + i * taps, *const *other = i + 1 < many ? one + taps : one;
        uint8_t *out = (uint8_t *)r->out + (at + i) * channels + start;
        __m512i sums[4] = {offset[0], offset[1], offset[2], offset[3]};
#pragma GCC unroll 3
        for (long tap = 0; tap < (nine ? 9 : taps); tap += 4) { /* behind the last tap are weights of zero */
            __m512i values[4];
#pragma GCC unroll 4
            for (long j = 0; j < 4; j++) {
                const long read = tap + j < (nine ? 9 : taps) ? tap + j : tap;
                values[j] = read == tap && j ? values[0] : load_rows(one[read] + start, other[read] + start, which, two);
            }
            const __m512i a = values[0], b = values[1], c = values[2], d = values[3];
            __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
            __m512i more_ab = _mm512_unpackhi_epi8(a, b), more_cd = _mm512_unpackhi_epi8(c, d);
            __m512i part[4] = {_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd),
                               _mm512_unpacklo_epi16(more_ab, more_cd), _mm512_unpackhi_epi16(more_ab, more_cd)};
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++)
                sums[k] = _mm512_dpbusd_epi32(sums[k], part[k], nine ? weights[tap + k] : _mm512_loadu_si512(weight + MANY * (tap + k)));
        }
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            lane value = multiply_add((lane)_mm512_cvtepi32_ps(sums[k]), scale[k], bias[k]);
            if (r->is_hardswish) value = hardswish(r, value);
            sums[k] = _mm512_cvtps_epi32((__m512)value);
        }
        __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(sums[0], sums[1]), _mm512_packs_epi32(sums[2], sums[3]));
        bytes = _mm512_min_epu8(_mm512_max_epu8(bytes, low), high);
        if (!two) _mm512_mask_storeu_epi8(out, which, bytes);
        else {
            _mm256_mask_storeu_epi8(out, (__mmask32)which, _mm512_castsi512_si256(bytes));
            if (i + 1 < many) _mm256_mask_storeu_epi8(out + channels, (__mmask32)which, _mm512_extracti64x4_epi64(bytes, 1));
        }
    }
}

/* Depthwise convolution of up to MOST_TAPS taps, in 8 bits. weight is (chunks, taps / 4, 4, 16, 4): parts as above;
 * offset, scale and bias are (chunks, 4, 16), in their order. A last chunk of no more than HALF channels has them twice. */
void SUFFIX(depthwise)(const reading *in, const result *r, const int8_t *weight) {
    const long span = (in->taps + 3) / 4 * 4, channels = in->channels;
    const result known = *r;
#pragma omp parallel for schedule(static)
    for (long at = 0; at < in->n; at += TOGETHER) {
        const uint8_t *from[TOGETHER * MOST_TAPS];
        const long many = in->n - at < TOGETHER ? in->n - at : TOGETHER;
        find_rows(in, at * in->taps, many * in->taps, from);
        for (long start = 0; start < channels; start += MANY) {
            const int8_t *w = weight + start * span;
            const int two = channels - start <= HALF, nine = in->taps == 9;
            if (two && nine) convolve_channels(&known, w, from, in->taps, at, many, channels, start, 1, 1);
            else if (two) convolve_channels(&known, w, from, in->taps, at, many, channels, start, 1, 0);
            else if (nine) convolve_channels(&known, w, from, in->taps, at, many, channels, start, 0, 1);
            else convolve_channels(&known, w, from, in->taps, at, many, channels, start, 0, 0);
        }
    }
}
#endif

/* `length` values in 8 bits: round(value factor + zero), and back: (value - zero) factor. */
void SUFFIX(quantise)(const float *values, uint8_t *out, long length, double factor, double zero) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < length; i += LANES) {
        lane value = multiply_add(load(values + i, length - i), all(factor), all(zero));
        store_bytes(out + i, clamp(value, all(0), all(255)), length - i);
    }
}
void SUFFIX(dequantise)(const uint8_t *values, float *out, long length, double factor, double zero) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < length; i += LANES)
        store(out + i, (load_bytes(values + i, length - i) - all(zero)) * all(factor), length - i);
}

/* Maps of up to four channels into the middle of pixels of four bytes side by side: out is (batch, height + 2 down,
 * width + 2 across, 4), zeros beside the channels. Those of a pixel lie `apart` bytes from each other, and pixels `step`:
 * in maps one after the other (1), or side by side (their number). */
void SUFFIX(lines)(const uint8_t *image, uint8_t *out, long batch, long channels, long height, long width, long apart,
                   long step, long down, long across) {
    const uint32_t used[4] = {0xff, channels > 1 ? 0xff : 0, channels > 2 ? 0xff : 0, channels > 3 ? 0xff : 0};
#pragma omp parallel for schedule(static)
    for (long line = 0; line < batch * height; line++) {
        const long which = line / height, y = line % height;
        const uint8_t *first = image + which * channels * height * width + y * width * step;
        const uint8_t *second = first + (channels > 1) * apart, *third = first + 2 * (channels > 2) * apart;
        const uint8_t *fourth = first + 3 * (channels > 3) * apart;
        uint8_t *to = out + 4 * ((which * (height + 2 * down) + y + down) * (width + 2 * across) + across);
        for (long x = 0; x < width; x++) {
            long at = step == 1 ? x : step == 3 ? 3 * x : step * x; /* a loop of its own for each */
            uint32_t pixel = first[at] | (second[at] & used[1]) << 8 | (third[at] & used[2]) << 16 | (fourth[at] & used[3]) << 24;
            memcpy(to + 4 * x, &pixel, 4);
        }
    }
}
