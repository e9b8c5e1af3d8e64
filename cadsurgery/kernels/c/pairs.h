/* Depthwise convolution in bfloat16: two taps at once, for twice as many channels as a vector has sums. */
#ifndef CADSURGERY_PAIRS_H
#define CADSURGERY_PAIRS_H

#include "product.h"

#if defined(PAIRS) && VECTOR == 64
enum { MANY = 2 * LANES };

INLINE __m512i load_many(const element *from, __mmask32 which, const int whole) {
    return whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(which, from);
}

/* Convolve up to MANY channels from `start` on (no further than `channels`) of `many` elements from `first` on. `from`
 * points to the rows that the taps of the first element read; those of the next element follow. `taps`, `whole` (all MANY
 * channels exist) and `plain` (only clamping follows) may be constants after inlining. One vector of sums holds the first
 * half of each quarter of the channels, the other the second half. */
INLINE void convolve_pairs(const element *more, element *out, const lane least, const lane most, const sum *bias,
                           const element *weight, const element *const *from, long first, long many, long channels,
                           long start, const long taps, const int whole, const int plain) {
    const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    const lane offset[2] = {load_some_sums(bias + start, LANES), load_some_sums(bias + start + LANES, LANES)};
    const __mmask32 which = whole ? ~0u : (1u << (channels - start)) - 1;
    for (long i = 0; i < many; i++, from += taps) {
        __m512 near = _mm512_setzero_ps(), far = near;
        for (long tap = 0; tap < taps; tap += 4) __builtin_prefetch(from[tap] + start + MANY);
#pragma GCC unroll 8
        for (long tap = 0; tap < taps; tap += 2) {
            const element *w = weight + tap * MANY;
            __m512i a = load_many(from[tap] + start, which, whole), b = _mm512_setzero_si512();
            if (tap + 1 < taps) b = load_many(from[tap + 1] + start, which, whole);
            near = _mm512_dpbf16_ps(near, (__m512bh)_mm512_unpacklo_epi16(a, b), (__m512bh)_mm512_loadu_si512(w));
            far = _mm512_dpbf16_ps(far, (__m512bh)_mm512_unpackhi_epi16(a, b), (__m512bh)_mm512_loadu_si512(w + MANY));
        }
        lane value[2] = {offset[0] + (lane)_mm512_permutex2var_ps(near, lower, far),
                         offset[1] + (lane)_mm512_permutex2var_ps(near, upper, far)};
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            const long begin = start + v * LANES, some = channels - begin;
            if (!plain && some > 0 && more) value[v] += load_some(more + (first + i) * channels + begin, some);
            value[v] = clamp(value[v], least, most);
        }
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)value[1], (__m512)value[0]);
        element *to = out + (first + i) * channels + start;
        if (whole) _mm512_storeu_si512(to, both);
        else _mm512_mask_storeu_epi16(to, which, both);
    }
}
#endif
#endif
