/* From exact 32-bit sums to results: sum * scale + bias, plus more * more_scale, then activation and clamping. A result in
 * 8 bits is rounded to nearest, ties to even; low and high are then whole numbers in 0..255. */
#ifndef CADSURGERY_REQUANTISE_H
#define CADSURGERY_REQUANTISE_H

#include <stdint.h>

typedef struct {
    const int32_t *offset; /* initial value of the sums: minus the rows' zero point times the weights */
    const float *scale, *bias;
    const void *more;
    void *out;
    long outputs, more_is_8_bits, out_is_8_bits, activation; /* activation: 0 for clamping alone, else see `activate` */
    float more_scale, factor, zero, low, high;
} result;

enum { CONSTANTS = 3 }; /* arrays of constants of each output: offset, scale and bias */

#endif
