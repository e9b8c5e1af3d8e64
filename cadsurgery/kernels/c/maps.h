/* What cells and kernel maps are computed from; see maps.c. */
#ifndef CADSURGERY_MAPS_H
#define CADSURGERY_MAPS_H

#include <stdint.h>

typedef struct {
    const int8_t *levels; /* (batch * height * width), level of each pixel's cell */
    const int64_t *sides; /* side of a cell, per level */
    int64_t *anchors;     /* (count), ascending pixel numbers; there is memory for all pixels */
    int32_t *index;       /* (batch * height * width), row of each pixel's cell */
    int64_t *counts;      /* (batch), cells of each image */
    long batch, height, width;
    const long *held; /* bytes of the buffers in this order, see check.h */
} cells;

typedef struct {
    const int32_t *index;   /* (batch * height * width), row of the cell that contains each pixel; NULL if that is the pixel */
    const int64_t *anchors; /* (count), ascending pixel numbers of the source */
    const int8_t *levels;   /* (batch * height * width), level of that cell */
    const int64_t *sides;   /* side of a cell, per level */
    const int64_t *targets; /* (n), pixel numbers of the target, in the target's size */
    const int64_t *down, *across;
    int32_t *table;   /* (n, vertical * horizontal) */
    int32_t *rank;    /* (batch * height * width); scratch */
    int32_t *lines;   /* (batch * height); scratch */
    int32_t *sources; /* (most, 4), the rows that each halo row interpolates between */
    double *mix;      /* (most, 4), their weights */
    long pixels, count, n, height, width, target_height, target_width, vertical, horizontal, has_halo;
    const long *held; /* bytes of the buffers in this order, see check.h */
} map;

#endif
