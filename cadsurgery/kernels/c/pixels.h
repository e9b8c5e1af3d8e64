/* What the pixels of a map are read from; see pixels.c. */
#ifndef CADSURGERY_PIXELS_H
#define CADSURGERY_PIXELS_H

#include <stdint.h>

typedef struct {
    const void *rows;      /* (count, channels) */
    const int32_t *index;  /* (batch * height * width), row of the cell that contains each pixel */
    const int8_t *levels;  /* (batch * height * width), level of that cell */
    const int64_t *sides;  /* side of a cell, per level */
    void *out;             /* (batch, height / spacing, width / spacing, channels), rounded up */
    long count, batch, height, width, channels, spacing, interpolates;
    const long *held; /* bytes of the buffers in this order, see check.h */
} pixels;

#endif
