/* Vectors of the instruction set that a file is compiled for, with loads and stores of rows.
 *
 * A file is compiled once per instruction set, with -DSUFFIX(name)=name##_float32_avx2 and the compiler's flags for that
 * set, and once per element type: -DELEMENT=float, -DELEMENT=double -DWIDE, -DBF16 (bfloat16 kept as its 16 bits, summed
 * in float) or -DBYTES (whole numbers in 0..255, summed in float, rounded to even). -DSCALAR disables intrinsics, for
 * processors without support here.
 */
#ifndef CADSURGERY_VECTOR_H
#define CADSURGERY_VECTOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "check.h"

#if defined(SCALAR)
#define VECTOR 16
#elif defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX2__)
#define VECTOR 32
#else
#define VECTOR 16
#if defined(__SSE4_1__)
#define SSE4
#elif defined(__aarch64__)
#define NEON
#endif
#endif

#if !defined(SCALAR) && (defined(__x86_64__) || defined(_M_X64))
#include <immintrin.h>
#elif defined(NEON)
#include <arm_neon.h>
#endif

/* Number of vector registers. */
#if VECTOR == 64 || defined(NEON)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif

#define INLINE static inline __attribute__((always_inline, unused))

/* Input rows (count, channels of a group), `stride` elements apart, and the kernel map `table` (n, taps). An entry
 * r < count refers to row r, r == count to the row `outside`, and r > count to row r - count - 1 of `halo`. `held`: the bytes
 * of all buffers of the call, see check.h. */
#define READING(element)                         \
    typedef struct {                             \
        const element *rows, *halo, *outside;    \
        const int32_t *table;                    \
        long count, n, taps, channels, stride;   \
        const long *held;                        \
    } reading

#if defined(ELEMENT) || defined(BF16) || defined(BYTES)

#ifdef BF16
typedef uint16_t element;
typedef float sum;
INLINE float widened(uint16_t from) {
    const uint32_t bits = (uint32_t)from << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}
#elif defined(BYTES)
typedef uint8_t element;
typedef float sum;
#else
typedef ELEMENT element;
typedef ELEMENT sum;
#endif

READING(element);

#if defined(BF16) && !defined(SCALAR) && \
    (defined(__AVX512BF16__) || (defined(NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)))
#define PAIRS /* one instruction multiplies pairs of adjacent values and sums the products */
#endif

enum { LANES = VECTOR / sizeof(sum), TAPS = 128 };
typedef sum lane __attribute__((vector_size(VECTOR)));
#ifndef WIDE
typedef int32_t mask __attribute__((vector_size(VECTOR)));
#else
typedef int64_t mask __attribute__((vector_size(VECTOR)));
#endif
#ifdef BF16
typedef uint32_t words __attribute__((vector_size(VECTOR)));
typedef uint16_t narrow __attribute__((vector_size(VECTOR / 2)));
#elif defined(BYTES)
typedef uint8_t narrow __attribute__((vector_size(VECTOR / 4)));
typedef mask whole;
#endif

#ifdef BYTES
/* Load up to eight bytes, padded with zeros, without reading beyond the row. */
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

/* Round to the nearest whole number, ties to even; values below 2^22. */
INLINE whole to_whole(lane value) {
#if VECTOR == 64
    return (whole)_mm512_cvtps_epi32((__m512)value);
#elif VECTOR == 32
    return (whole)_mm256_cvtps_epi32((__m256)value);
#elif defined(NEON)
    return (whole)vcvtnq_s32_f32((float32x4_t)value);
#else
    const lane shift = (lane){} + 12582912.0f; /* after adding 1.5 * 2^23 there are no fraction bits */
    return (whole)(value + shift) - (whole)shift;
#endif
}
#endif

INLINE lane load(const element *from) {
    lane value;
#ifdef BF16
    narrow bits;
    memcpy(&bits, from, sizeof bits);
#if VECTOR == 64
    value = (lane)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#elif VECTOR == 32
    value = (lane)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
    value = (lane)(__builtin_convertvector(bits, words) << 16);
#endif
#elif defined(BYTES)
    narrow bytes;
    memcpy(&bytes, from, sizeof bytes);
#if VECTOR == 64
    value = (lane)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)bytes));
#elif VECTOR == 32
    value = (lane)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    value = __builtin_convertvector(__builtin_convertvector(bytes, mask), lane);
#endif
#else
    memcpy(&value, from, sizeof value);
#endif
    return value;
}

#if VECTOR == 64
#define FIRST(some) ((1u << (some)) - 1)
#elif VECTOR == 32 && !defined(BF16) && !defined(BYTES)
/* Return a mask with -1 in the first `some` lanes. */
INLINE __m256i first_lanes(long some) {
#ifdef WIDE
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(some), _mm256_setr_epi64x(0, 1, 2, 3));
#else
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)some), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
#endif
}
#endif

/* Load the first `some` channels, padded with zeros, without reading beyond the row: its end may be the end of the memory. */
INLINE lane load_some(const element *from, long some) {
    if (some >= LANES) return load(from);
#if VECTOR == 64 && defined(BF16)
    return (lane)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(FIRST(some), from)), 16);
#elif VECTOR == 64 && defined(BYTES)
    return (lane)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(FIRST(some), from)));
#elif VECTOR == 64 && defined(WIDE)
    return (lane)_mm512_maskz_loadu_pd(FIRST(some), from);
#elif VECTOR == 64
    return (lane)_mm512_maskz_loadu_ps(FIRST(some), from);
#elif VECTOR == 32 && defined(WIDE)
    return (lane)_mm256_maskload_pd(from, first_lanes(some));
#elif VECTOR == 32 && !defined(BF16) && !defined(BYTES)
    return (lane)_mm256_maskload_ps(from, first_lanes(some));
#elif defined(BYTES)
    const uint64_t part = some_of_eight(from, some);
    return load((const element *)&part);
#else
    element part[LANES] = {0};
    for (long i = 0; i < some; i++) part[i] = from[i];
    return load(part);
#endif
}

INLINE void store_some(element *to, lane value, long some) {
#if defined(PAIRS) && VECTOR == 64
    __m256i part = (__m256i)_mm512_cvtneps_pbh((__m512)value); /* flushes subnormal numbers to 0 */
#elif defined(BF16)
    words bits = (words)value;
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
    words is_nan = (words)(value != value);
    words wide = (is_nan & 0x7fc0) | (~is_nan & rounded);
#if VECTOR == 64
    __m256i part = _mm512_cvtepi32_epi16((__m512i)wide);
#elif VECTOR == 32
    __m256i packed = _mm256_packus_epi32((__m256i)wide, (__m256i)wide);
    __m128i part = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    narrow part = __builtin_convertvector(wide, narrow);
#endif
#elif defined(BYTES)
#if VECTOR == 64
    __m128i part = _mm512_cvtepi32_epi8((__m512i)to_whole(value));
#elif VECTOR == 32
    const __m256i numbers = (__m256i)(to_whole(value) & 255);
    const __m256i pairs = _mm256_packus_epi32(numbers, numbers), fours = _mm256_packus_epi16(pairs, pairs);
    narrow part = (narrow)_mm_cvtsi128_si64(_mm256_castsi256_si128(
        _mm256_permutevar8x32_epi32(fours, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4))));
#else
    narrow part = __builtin_convertvector(to_whole(value) & 255, narrow);
#endif
#else
    lane part = value;
#endif
    if (some >= LANES) {
        memcpy(to, &part, sizeof part);
        return;
    }
#if VECTOR == 64 && defined(BF16)
    _mm256_mask_storeu_epi16(to, FIRST(some), part);
#elif VECTOR == 64 && defined(BYTES)
    _mm_mask_storeu_epi8(to, FIRST(some), part);
#elif VECTOR == 64 && defined(WIDE)
    _mm512_mask_storeu_pd(to, FIRST(some), (__m512d)part);
#elif VECTOR == 64
    _mm512_mask_storeu_ps(to, FIRST(some), (__m512)part);
#elif VECTOR == 32 && defined(WIDE)
    _mm256_maskstore_pd(to, first_lanes(some), (__m256d)part);
#elif VECTOR == 32 && !defined(BF16) && !defined(BYTES)
    _mm256_maskstore_ps(to, first_lanes(some), (__m256)part);
#elif defined(BYTES)
    uint64_t all = 0;
    memcpy(&all, &part, sizeof part);
    store_some_of_eight(to, all, some);
#else
    element all[LANES];
    memcpy(all, &part, sizeof part);
    for (long i = 0; i < some; i++) to[i] = all[i];
#endif
}

INLINE lane all_lanes(sum value) { return (lane){} + value; }

INLINE lane choose(mask which, lane yes, lane no) { return (lane)((which & (mask)yes) | (~which & (mask)no)); }

/* Clamp; NaN stays NaN. */
INLINE lane clamp(lane value, lane least, lane most) {
#if VECTOR == 64 && defined(WIDE)
    return (lane)_mm512_min_pd((__m512d)most, _mm512_max_pd((__m512d)least, (__m512d)value));
#elif VECTOR == 64
    return (lane)_mm512_min_ps((__m512)most, _mm512_max_ps((__m512)least, (__m512)value));
#elif VECTOR == 32 && defined(WIDE)
    return (lane)_mm256_min_pd((__m256d)most, _mm256_max_pd((__m256d)least, (__m256d)value));
#elif VECTOR == 32
    return (lane)_mm256_min_ps((__m256)most, _mm256_max_ps((__m256)least, (__m256)value));
#elif defined(SSE4) && defined(WIDE)
    return (lane)_mm_min_pd((__m128d)most, _mm_max_pd((__m128d)least, (__m128d)value));
#elif defined(SSE4)
    return (lane)_mm_min_ps((__m128)most, _mm_max_ps((__m128)least, (__m128)value));
#elif defined(NEON) && !defined(WIDE)
    return (lane)vminq_f32(vmaxq_f32((float32x4_t)value, (float32x4_t)least), (float32x4_t)most);
#elif defined(NEON)
    return (lane)vminq_f64(vmaxq_f64((float64x2_t)value, (float64x2_t)least), (float64x2_t)most);
#else
    value = choose(value < least, least, value);
    return choose(value > most, most, value);
#endif
}

/* Load the first `some` values of a vector stored in the type of the sums. */
INLINE lane load_some_sums(const sum *from, long some) {
    lane value = {};
    if (some >= LANES) memcpy(&value, from, sizeof value);
    else for (long i = 0; i < some; i++) value[i] = from[i];
    return value;
}

/* Return the row that an entry of the table refers to. */
INLINE const element *row(const reading *in, int32_t entry) {
    if (entry < in->count) return in->rows + (long)entry * in->stride;
    return entry == in->count ? in->outside : in->halo + (entry - in->count - 1) * in->stride;
}

/* Return the row that a tap of result row `at` reads; row `at` itself without a table. */
INLINE const element *row_of_tap(const reading *in, long at, long tap) {
    return in->table ? row(in, in->table[at * in->taps + tap]) : in->rows + at * in->stride;
}

#endif /* an element type */
#endif
