/* From exact 32-bit sums to results: sum * scale + bias, plus more * more_scale, clamped to low..high, which are whole
 * numbers in 0..255, and rounded to nearest, ties to even. */
#ifndef CADSURGERY_REQUANTISE_H
#define CADSURGERY_REQUANTISE_H

#include <stdint.h>

typedef struct {
    const int32_t *offset; /* initial value of the sums: minus the rows' zero point times the weights */
    const float *scale, *bias;
    const uint8_t *more;
    uint8_t *out;
    long outputs;
    float more_scale, low, high;
} result;

enum { CONSTANTS = 3 }; /* arrays of constants of each output: offset, scale and bias */

#endif
