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

#if VECTOR == 64
INLINE lane multiply_add(lane a, lane b, lane c) { return (lane)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif VECTOR == 32
INLINE lane multiply_add(lane a, lane b, lane c) { return (lane)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(NEON)
INLINE lane multiply_add(lane a, lane b, lane c) { return (lane)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
/* Fused multiply-add: the product is exact in double; only ties of the sum in double can differ from a single rounding. */
INLINE lane multiply_add(lane a, lane b, lane c) {
    lane value;
    for (int i = 0; i < LANES; i++) value[i] = (float)((double)a[i] * b[i] + c[i]);
    return value;
}
#endif

/* Requantise and store the sums of `some` outputs of row `at`, starting at output `first`. */
INLINE void finish(const result *r, whole sums, long at, long first, long some) {
    const lane scale = load_some_sums(r->scale + first, LANES), bias = load_some_sums(r->bias + first, LANES);
    lane value = multiply_add(__builtin_convertvector(sums, lane), scale, bias);
    const long place = at * r->outputs + first;
    if (r->more) value = multiply_add(load_some(r->more + place, some), all_lanes(r->more_scale), value);
    store_some(r->out + place, clamp(value, all_lanes(r->low), all_lanes(r->high)), some);
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
