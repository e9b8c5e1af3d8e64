/* Int8 depthwise convolutions: four taps of a channel are placed side by side for the byte dot product instructions. */
#include "int8.h"

#if defined(SSE4) || (VECTOR >= 32)

#include "pack.h"

enum { MOST_TAPS = 64, MANY = VECTOR, HALF = VECTOR >= 32 ? VECTOR / 2 : 0, TOGETHER = 16 };

#if VECTOR == 64
typedef __m512i bytes;
#define OP(name) _mm512_##name
#define AND _mm512_and_si512
#define LOAD(from) _mm512_loadu_si512(from)
#elif VECTOR == 32
typedef __m256i bytes;
#define OP(name) _mm256_##name
#define AND _mm256_and_si256
#define LOAD(from) _mm256_loadu_si256((const __m256i *)(from))
#else
typedef __m128i bytes;
#define OP(name) _mm_##name
#define AND _mm_and_si128
#define LOAD(from) _mm_loadu_si128((const __m128i *)(from))
#endif

INLINE __m128i some_of_sixteen(const uint8_t *from, long some) {
    if (some >= 16) return _mm_loadu_si128((const __m128i *)from);
    return _mm_set_epi64x((long long)(some > 8 ? some_of_eight(from + 8, some - 8) : 0), (long long)some_of_eight(from, some));
}

INLINE void store_some_of_sixteen(uint8_t *to, __m128i value, long some) {
    if (some >= 16) {
        _mm_storeu_si128((__m128i *)to, value);
        return;
    }
    store_some_of_eight(to, (uint64_t)_mm_cvtsi128_si64(value), some);
    if (some > 8) store_some_of_eight(to + 8, (uint64_t)_mm_extract_epi64(value, 1), some - 8);
}

/* Load `some` bytes of a row; with `two`, load up to HALF bytes of each of two rows, one after the other. `is_whole` and
 * `two` are constants after inlining. */
INLINE bytes load_rows(const uint8_t *one, const uint8_t *other, long some, const int two, const int is_whole) {
    (void)other, (void)two;
#if VECTOR == 64
    if (!two) return is_whole ? LOAD(one) : _mm512_maskz_loadu_epi8((1ull << some) - 1, one);
    const __mmask32 which = some >= 32 ? ~0u : (1u << some) - 1;
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi8(which, one)), _mm256_maskz_loadu_epi8(which, other), 1);
#elif VECTOR == 32
    if (is_whole && !two) return LOAD(one);
    if (two) return _mm256_inserti128_si256(_mm256_castsi128_si256(some_of_sixteen(one, some)), some_of_sixteen(other, some), 1);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(some_of_sixteen(one, some)), some_of_sixteen(one + 16, some - 16), 1);
#else
    return is_whole ? LOAD(one) : some_of_sixteen(one, some);
#endif
}

INLINE void store_rows(uint8_t *to, uint8_t *next, bytes value, long some, const int two, const int is_whole) {
    (void)next, (void)two;
#if VECTOR == 64
    if (!two) {
        if (is_whole) _mm512_storeu_si512(to, value);
        else _mm512_mask_storeu_epi8(to, (1ull << some) - 1, value);
        return;
    }
    const __mmask32 which = some >= 32 ? ~0u : (1u << some) - 1;
    _mm256_mask_storeu_epi8(to, which, _mm512_castsi512_si256(value));
    if (next) _mm256_mask_storeu_epi8(next, which, _mm512_extracti64x4_epi64(value, 1));
#elif VECTOR == 32
    if (is_whole && !two) {
        _mm256_storeu_si256((__m256i *)to, value);
        return;
    }
    store_some_of_sixteen(to, _mm256_castsi256_si128(value), some);
    if (!two) store_some_of_sixteen(to + 16, _mm256_extracti128_si256(value, 1), some - 16);
    else if (next) store_some_of_sixteen(next, _mm256_extracti128_si256(value, 1), some);
#else
    if (is_whole) _mm_storeu_si128((__m128i *)to, value);
    else store_some_of_sixteen(to, value, some);
#endif
}

/* Add four products of unsigned and signed bytes to each sum. Without a dot product instruction, the products of even and
 * of odd bytes are computed separately, with weights widened to 16 bits beforehand. */
#ifdef QUADS
typedef bytes factors;
INLINE factors prepare(const int8_t *from) { return LOAD(from); }
INLINE bytes add_products(bytes sums, bytes values, factors by) {
#if VECTOR == 64
    return _mm512_dpbusd_epi32(sums, values, by);
#else
    return _mm256_dpbusd_avx_epi32(sums, values, by);
#endif
}
#else
typedef struct {
    bytes even, odd;
} factors;
INLINE factors prepare(const int8_t *from) {
    const bytes both = LOAD(from);
    return (factors){OP(srai_epi16)(OP(slli_epi16)(both, 8), 8), OP(srai_epi16)(both, 8)};
}
INLINE bytes add_products(bytes sums, bytes values, factors by) {
    const bytes even = AND(values, OP(set1_epi16)(255)), odd = OP(srli_epi16)(values, 8);
    return OP(add_epi32)(sums, OP(add_epi32)(OP(madd_epi16)(even, by.even), OP(madd_epi16)(odd, by.odd)));
}
#endif

/* Look up the rows of `number` entries of the table, from entry `first` on. */
INLINE void find_rows(const reading *in, long first, long number, const uint8_t **found) {
#if VECTOR == 64
    const __m512i stride = _mm512_set1_epi64(in->stride), rows = _mm512_set1_epi64((long)in->rows);
    const __m256i count = _mm256_set1_epi32((int)in->count);
    for (long i = 0; i < number; i += 8) {
        const __mmask8 which = number - i >= 8 ? 0xff : (1 << (number - i)) - 1;
        const __m256i entries = _mm256_maskz_loadu_epi32(which, in->table + first + i);
        _mm512_mask_storeu_epi64(found + i, which, _mm512_add_epi64(rows, _mm512_mul_epu32(_mm512_cvtepu32_epi64(entries), stride)));
        for (unsigned others = _mm256_mask_cmpge_epi32_mask(which, entries, count); others; others &= others - 1) {
            const long place = i + __builtin_ctz(others);
            found[place] = row_of_tap(in, 0, first + place);
        }
    }
#else
    for (long i = 0; i < number; i++) found[i] = row_of_tap(in, 0, first + i);
#endif
}

/* Convolve `many` result rows from row `at` on, up to MANY channels from `start` on. from[i * taps + tap] is the row that a
 * tap of row i reads. The values of four taps of a channel are interleaved: part k holds, of every sixteen channels, the
 * four from 4 k on, and packing restores their order. With `two`, two rows are processed at a time. With `nine` taps, the
 * weights stay in registers if there are enough. `two`, `nine` and `is_whole` are constants after inlining. */
INLINE void convolve_channels(const result *r, const int8_t *weight, const uint8_t *const *from, long taps, long at, long many,
                              long channels, long start, const int two, const int nine, const int is_whole) {
    const long left = channels - start;
    factors weights[MOST_TAPS];
    bytes offset[4];
    lane scale[4], bias[4];
    for (long k = 0; k < (nine ? 12 : (taps + 3) / 4 * 4); k++) weights[k] = prepare(weight + MANY * k);
    for (int k = 0; k < 4; k++) {
        offset[k] = LOAD(r->offset + start + LANES * k);
        scale[k] = load_some_sums(r->scale + start + LANES * k, LANES);
        bias[k] = load_some_sums(r->bias + start + LANES * k, LANES);
    }
    const lane low = all_lanes(r->low), high = all_lanes(r->high);
    const long step = two ? 2 : 1;
    for (long i = 0; i < many; i += step) {
        const uint8_t *const *one = from + i * taps, *const *other = i + 1 < many ? one + taps : one;
        uint8_t *out = r->out + (at + i) * channels + start;
        bytes sums[4] = {offset[0], offset[1], offset[2], offset[3]};
#pragma GCC unroll 4
        for (long tap = 0; tap < (nine ? 9 : taps); tap += 4) { /* weights after the last tap are zero */
            bytes values[4];
#pragma GCC unroll 4
            for (long j = 0; j < 4; j++) {
                const long read = tap + j < (nine ? 9 : taps) ? tap + j : tap;
                values[j] = read == tap && j ? values[0] : load_rows(one[read] + start, other[read] + start, left, two, is_whole);
            }
            const bytes ab = OP(unpacklo_epi8)(values[0], values[1]), cd = OP(unpacklo_epi8)(values[2], values[3]);
            const bytes more_ab = OP(unpackhi_epi8)(values[0], values[1]), more_cd = OP(unpackhi_epi8)(values[2], values[3]);
            const bytes part[4] = {OP(unpacklo_epi16)(ab, cd), OP(unpackhi_epi16)(ab, cd),
                                   OP(unpacklo_epi16)(more_ab, more_cd), OP(unpackhi_epi16)(more_ab, more_cd)};
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) sums[k] = add_products(sums[k], part[k], weights[tap + k]);
        }
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            const lane value = multiply_add((lane)OP(cvtepi32_ps)(sums[k]), scale[k], bias[k]);
            sums[k] = (bytes)to_whole(clamp(value, low, high));
        }
        const bytes packed = OP(packus_epi16)(OP(packs_epi32)(sums[0], sums[1]), OP(packs_epi32)(sums[2], sums[3]));
        store_rows(out, i + 1 < many ? out + channels : 0, packed, left, two, is_whole);
    }
}

typedef struct {
    const reading *in;
    const result *r;
    const int8_t *weight;
} depthwise;

static void convolve_rows(long begin, long end, void *work) {
    const depthwise *d = work;
    const reading *in = d->in;
    const result known = *d->r;
    const long taps = in->taps, span = (taps + 3) / 4 * 4, channels = in->channels;
    for (long at = begin * TOGETHER; at < end * TOGETHER && at < in->n; at += TOGETHER) {
        const uint8_t *from[TOGETHER * MOST_TAPS];
        const long many = in->n - at < TOGETHER ? in->n - at : TOGETHER;
        find_rows(in, at * taps, many * taps, from);
        for (long start = 0; start < channels; start += MANY) {
            const int8_t *w = d->weight + start * span;
            const int two = channels - start <= HALF, nine = taps == 9, is_whole = channels - start >= MANY;
#define CHANNELS(two, nine, is_whole) convolve_channels(&known, w, from, taps, at, many, channels, start, two, nine, is_whole)
            if (is_whole && nine) CHANNELS(0, 1, 1);
            else if (is_whole) CHANNELS(0, 0, 1);
            else if (two && nine) CHANNELS(1, 1, 0);
            else if (two) CHANNELS(1, 0, 0);
            else if (nine) CHANNELS(0, 1, 0);
            else CHANNELS(0, 0, 0);
        }
    }
}

long SUFFIX(pack_depthwise)(const unpacked *from, const void *const *constants, char *to, long *bytes) {
    const long channels = from->groups, padded = rounded_up(channels, MANY), span = rounded_up(from->taps, 4);
    if (channels == 1 || from->outputs != 1 || from->channels != 1 || from->taps > MOST_TAPS) return NOT_TAKEN;
    CHECK_UNPACKED(from, sizeof(int8_t), to ? CONSTANTS : 0, sizeof(float));
    const long first = rounded_up(padded * span, 64), array = padded * (long)sizeof(float);
    if (to && *bytes < first + CONSTANTS * array) return IMPOSSIBLE;
    *bytes = first + CONSTANTS * array;
    for (long place = 0; to && place < padded; place++) {
        const long start = place / MANY * MANY, lane = place % MANY; /* (4, MANY / 16, 4) as (part, m, x) */
        long channel = lane % (MANY / 4) / 4 * 16 + lane / (MANY / 4) * 4 + lane % 4;
        if (channels - start <= HALF && channel >= MANY - HALF) channel -= MANY - HALF;
        if (start + channel >= channels) continue;
        for (long tap = 0; tap < from->taps; tap++)
            to[start * span + (tap / 4 * MANY + lane) * 4 + tap % 4] =
                ((const char *)from->data)[index_of(from, start + channel, 0, 0, tap)];
        for (long i = 0; i < CONSTANTS; i++)
            memcpy(to + first + i * array + place * 4, (const char *)constants[i] + (start + channel) * 4, 4);
    }
    return first;
}

/* Int8 depthwise convolution with up to MOST_TAPS taps. weight is (chunks, taps / 4, 4, MANY / 16, 4, 4) in the parts of
 * `convolve_channels`; offset, scale and bias are (chunks, 4, MANY / 16, 4) in the same order. A last chunk of at most HALF
 * channels holds them twice. */
long SUFFIX(depthwise)(const reading *in, const result *r, const int8_t *weight) {
    depthwise d = {in, r, weight};
    POSSIBLE(in->taps <= MOST_TAPS && r->outputs == in->channels && !r->more);
    RETURN_UNLESS_FITS(check_bytes(in, r, 1, MANY));
    NEEDS(in->held, OWN, product_of(padded_to(in->channels, MANY), padded_to(in->taps, 4)), int8_t);
    cadsurgery_share((in->n + TOGETHER - 1) / TOGETHER, 8, convolve_rows, &d);
    return FITS;
}
#endif
