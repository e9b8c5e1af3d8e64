/* Vectors of 32-bit sums, their requantisation, and rows of 8-bit values.
 *
 * Sums are exact on every processor: an instruction that saturates at 16 bits is used only with weights for which it cannot
 * (LIMITED, see int8_limited.c). Requantisation uses single precision without contraction, with one rounding per operation, so
 * that torch operations give the same bits.
 */
#ifndef CADSURGERY_INT8_H
#define CADSURGERY_INT8_H

#include "parallel.h"
#include "requantise.h"
#include "vector.h"

#if VECTOR == 64 && defined(__AVX512VNNI__)
#define QUADS /* four products of bytes in one instruction */
#elif VECTOR == 32 && (defined(__AVXVNNI__) || defined(LIMITED))
#define QUADS
#elif defined(NEON) && defined(__ARM_FEATURE_DOTPROD)
#define QUADS
#define SIGNED /* both factors are signed: 128 is subtracted from the rows */
#endif

enum { LANES = VECTOR / 4 };
typedef float lane __attribute__((vector_size(VECTOR)));
typedef int32_t whole __attribute__((vector_size(VECTOR)));
typedef uint8_t narrow __attribute__((vector_size(VECTOR / 4)));

READING(uint8_t);

/* Return the input row that a tap of result row `at` reads. */
INLINE const uint8_t *row_of_tap(const reading *in, long at, long tap) {
    if (!in->table) return in->rows + at * in->stride;
    const int32_t entry = in->table[at * in->taps + tap];
    if (entry < in->count) return in->rows + (long)entry * in->stride;
    return entry == in->count ? in->outside : in->halo + (entry - in->count - 1) * in->stride;
}

/* Compare what a convolution in 8 bits is given, but for its weights, with what it reads and writes; outputs of a group are padded
 * to a multiple of `chunk`. Buffers of its own: weight, offset, scale, bias, residual, result. */
static __attribute__((unused)) long check_bytes(const reading *in, const result *r, long groups, long chunk) {
    POSSIBLE(groups > 0 && r->outputs > 0 && r->outputs % groups == 0);
    const long constants = product_of(groups, padded_to(r->outputs / groups, chunk)), results = product_of(in->n, r->outputs);
    CHECK_READING(in, product_of(groups, in->channels), uint8_t);
    for (int i = 1; i <= CONSTANTS; i++) NEEDS(in->held, OWN + i, constants, float);
    NEEDS_IF(r->more, in->held, OWN + 4, results, uint8_t);
    NEEDS(in->held, OWN + 5, results, uint8_t);
    return FITS;
}

/* Load up to eight bytes, padded with zeros, without reading beyond the row: its end may be the end of the memory. */
INLINE uint64_t some_of_eight(const uint8_t *from, long some) {
    uint64_t value = 0;
    if (some >= 8) memcpy(&value, from, 8);
    else if (some >= 4) { /* two overlapping parts */
        uint32_t first, last;
        memcpy(&first, from, 4), memcpy(&last, from + some - 4, 4);
        value = first | (uint64_t)last << 8 * (some - 4);
    } else if (some > 0) {
        value = from[0] | (uint64_t)from[some / 2] << 8 * (some / 2) | (uint64_t)from[some - 1] << 8 * (some - 1);
    }
    return value;
}

INLINE void store_some_of_eight(uint8_t *to, uint64_t value, long some) {
    if (some >= 8) memcpy(to, &value, 8);
    else {
        if (some & 4) memcpy(to, &value, 4), to += 4, value >>= 32;
        if (some & 2) memcpy(to, &value, 2), to += 2, value >>= 16;
        if (some & 1) *to = (uint8_t)value;
    }
}

INLINE lane all(float value) { return (lane){} + value; }

#if VECTOR == 64
INLINE __mmask16 first(long some) { return some >= LANES ? 0xffff : (1 << some) - 1; }
INLINE lane load(const float *from, long some) { return (lane)_mm512_maskz_loadu_ps(first(some), from); }
INLINE lane load_bytes(const uint8_t *from, long some) {
    return (lane)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(some), from)));
}
INLINE lane multiply_add(lane a, lane b, lane c) { return (lane)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE lane clamp(lane value, lane least, lane most) {
    return (lane)_mm512_min_ps(_mm512_max_ps((__m512)value, (__m512)least), (__m512)most);
}
INLINE whole to_whole(lane value) { return (whole)_mm512_cvtps_epi32((__m512)value); }
INLINE void store_bytes(uint8_t *to, lane value, long some) { /* values in 0..255 */
    _mm_mask_storeu_epi8(to, first(some), _mm512_cvtepi32_epi8((__m512i)to_whole(value)));
}
#else
INLINE lane load(const float *from, long some) {
    lane value = {};
    if (some >= LANES) memcpy(&value, from, sizeof value);
    else for (long i = 0; i < some; i++) value[i] = from[i];
    return value;
}
#if VECTOR == 32
INLINE lane load_bytes(const uint8_t *from, long some) {
    return (lane)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)some_of_eight(from, some))));
}
INLINE lane multiply_add(lane a, lane b, lane c) { return (lane)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE lane clamp(lane value, lane least, lane most) {
    return (lane)_mm256_min_ps(_mm256_max_ps((__m256)value, (__m256)least), (__m256)most);
}
INLINE whole to_whole(lane value) { return (whole)_mm256_cvtps_epi32((__m256)value); }
INLINE void store_bytes(uint8_t *to, lane value, long some) {
    const __m256i pairs = _mm256_packs_epi32((__m256i)to_whole(value), _mm256_setzero_si256());
    const __m256i fours = _mm256_packus_epi16(pairs, pairs);
    const __m256i bytes = _mm256_permutevar8x32_epi32(fours, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    store_some_of_eight(to, (uint64_t)_mm_cvtsi128_si64(_mm256_castsi256_si128(bytes)), some);
}
#else
INLINE lane load_bytes(const uint8_t *from, long some) {
    const uint32_t four = (uint32_t)some_of_eight(from, some < LANES ? some : LANES);
    narrow bytes;
    memcpy(&bytes, &four, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, whole), lane);
}
INLINE lane clamp(lane value, lane least, lane most) {
    const whole is_less = value < least;
    value = (lane)((is_less & (whole)least) | (~is_less & (whole)value));
    const whole is_more = value > most;
    return (lane)((is_more & (whole)most) | (~is_more & (whole)value));
}
#ifdef NEON
INLINE lane multiply_add(lane a, lane b, lane c) { return (lane)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE whole to_whole(lane value) { return (whole)vcvtnq_s32_f32((float32x4_t)value); }
#else
/* Fused multiply-add: the product is exact in double; only ties of the sum in double can differ from a single rounding. */
INLINE lane multiply_add(lane a, lane b, lane c) {
    lane value;
    for (int i = 0; i < LANES; i++) value[i] = (float)((double)a[i] * b[i] + c[i]);
    return value;
}
INLINE whole to_whole(lane value) { /* for values below 2^22: adding 1.5 * 2^23 leaves no fraction bits */
    return (whole)(value + 12582912.0f) - (whole)all(12582912.0f);
}
#endif
INLINE void store_bytes(uint8_t *to, lane value, long some) {
    const narrow bytes = __builtin_convertvector(to_whole(value), narrow);
    uint32_t four;
    memcpy(&four, &bytes, sizeof four);
    store_some_of_eight(to, four, some < LANES ? some : LANES);
}
#endif
#endif

/* Requantise and store the sums of `some` outputs of row `at`, starting at output `first`. */
INLINE void finish(const result *r, whole sums, long at, long first, long some) {
    lane value = multiply_add(__builtin_convertvector(sums, lane), load(r->scale + first, LANES), load(r->bias + first, LANES));
    const long place = at * r->outputs + first;
    if (r->more) value = multiply_add(load_bytes(r->more + place, some), all(r->more_scale), value);
    store_bytes(r->out + place, clamp(value, all(r->low), all(r->high)), some);
}

/* Return the requantisation of one group: `r` with pointers moved to the group's outputs. */
INLINE result of_group(const result *r, long group, long outputs, long padded) {
    result own = *r;
    own.offset += group * padded, own.scale += group * padded, own.bias += group * padded;
    own.out += group * outputs;
    if (r->more) own.more += group * outputs;
    return own;
}

#endif
