/* Bilinear interpolation of maps: what resize.c and interpolate.c share. */
#ifndef CADSURGERY_RESIZE_H
#define CADSURGERY_RESIZE_H

#include <stdint.h>

#include "parallel.h"

/* Where the samples of an axis lie: between a first and a second sample of the map, nearer to the second by its share. */
typedef struct {
    int32_t *first, *second;
    float *share;
    long length;
} axis;

typedef struct {
    const float *maps; /* (count, height, width) */
    float *out;        /* (count, down.length, across.length) */
    long count, height, width;
    axis down, across;
    const long *held; /* bytes of the buffers in this order, see check.h; second samples follow first ones, or are these */
} resizing;

/* Maps whose error of interpolation is found. */
typedef struct {
    const float *maps; /* (batch, height, width, channels) */
    float *out;        /* (batch, height, width) */
    long batch, channels, height, width;
} erring;

#endif
