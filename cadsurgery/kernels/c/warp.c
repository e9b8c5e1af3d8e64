/* Invert a warp: find the location of each image pixel among the points of a grid.
 *
 * Compiled once per element type with -DSUFFIX(name)=... and -DELEMENT=float or -DELEMENT=double. `_invert` and `_polish`
 * of methods/resampling/back.py compute the same in torch and explain the method.
 */
#include <stdint.h>

#include "check.h"
#include "parallel.h"

typedef ELEMENT element;

enum { BLOCK = 256, STEPS = 8 };

typedef struct {
    const element *grid;    /* (batch, n, m, 2), in pixels */
    const element *samples; /* (batch, h, w, 2), in pixels */
    const int32_t *boxes;   /* (batch, n - 1, m - 1, 4): first row and column of a cell's pixels, last row and column */
    const uint8_t *bent_rows, *bent_columns; /* (h - 1), (w - 1): nonzero if a location lies between two samples */
    element *found;                          /* (2, batch, height, width): rows, columns */
    long batch, n, m, h, w, height, width;
    const long *held; /* bytes of the buffers in this order, see check.h */
} warp;

typedef struct {
    element best[BLOCK], u[BLOCK], v[BLOCK]; /* distance from the cell's centre; position in the grid */
} line;

static inline element least(element a, element b) { return a < b ? a : b; }
static inline element most(element a, element b) { return a > b ? a : b; }
static inline element within(element value, element last) { return least(most(value, 0), last); }

/* Solve for columns `from` to `to` of image row y, in the cell whose first corner is `a`, in a grid of m columns. */
static void solve(line *row, const element *a, long m, element y, long from, long to, long start, element i, element j) {
    const element *below = a + 2 * m, *beside = a + 2, *beyond = below + 2;
    const element by = below[0] - a[0], bx = below[1] - a[1], cy = beside[0] - a[0], cx = beside[1] - a[1];
    const element dy = beyond[0] - below[0] - cy, dx = beyond[1] - below[1] - cx;
    const element away = y - a[0], left = a[1], q2 = cx * dy - cy * dx;
    const element twice0 = -2 * bx * away, q10 = away * dx + (by * cx - bx * cy);
    element *best = row->best, *us = row->u, *vs = row->v;
#pragma omp simd
    for (long x = from; x <= to; x++) {
        element along = (element)x - left, twice = twice0 + 2 * by * along, q1 = q10 - along * dy;
        element root = __builtin_sqrt(q1 * q1 + 2 * q2 * twice);
        element upright = twice / (q1 + root), turned = (root - q1) / (2 * q2), v = q1 >= 0 ? upright : turned;
        element down = v * dy + by, across = v * dx + bx;
        element u = ((away - v * cy) * down + (along - v * cx) * across) / (down * down + across * across);
        element far_u = u > (element).5 ? u - (element).5 : (element).5 - u;
        element far_v = v > (element).5 ? v - (element).5 : (element).5 - v;
        element before = best[x - start];
        int better = (far_u < before) & (far_v < before); /* false for NaN */
        best[x - start] = better ? most(far_u, far_v) : before;
        us[x - start] = better ? u + i : us[x - start];
        vs[x - start] = better ? v + j : vs[x - start];
    }
}

/* Refine a location by Newton's method on the warp between samples, which is bilinear between four neighbours. */
static void polish(const warp *one, const element *samples, element y, element x, element enough, element *row, element *column) {
    const element last_row = one->h - 1, last_column = one->w - 1;
    element r = *row, c = *column, missed = __builtin_inff();
    for (int step = 0; step < STEPS; step++) {
        long top = (long)least(r, last_row - 1), left = (long)least(c, last_column - 1);
        const element *p = samples + 2 * (top * one->w + left), *below = p + 2 * one->w;
        element u = r - top, v = c - left, by = below[0] - p[0], bx = below[1] - p[1];
        element cy = p[2] - p[0], cx = p[3] - p[1], dy = below[2] - p[2] - by, dx = below[3] - p[3] - bx;
        element wrong_y = y - (p[0] + u * by + v * cy + u * v * dy), wrong_x = x - (p[1] + u * bx + v * cx + u * v * dx);
        element error = most(most(wrong_y, -wrong_y), most(wrong_x, -wrong_x));
        if (error < missed) missed = error, *row = r, *column = c;
        if (!(error > enough)) return;
        element down_y = by + v * dy, down_x = bx + v * dx, across_y = cy + u * dy, across_x = cx + u * dx;
        element area = down_y * across_x - down_x * across_y;
        if (area != 0) {
            r += least(most((wrong_y * across_x - wrong_x * across_y) / area, -1), 1);
            c += least(most((down_y * wrong_x - down_x * wrong_y) / area, -1), 1);
        }
        r = within(r, last_row), c = within(c, last_column);
    }
}

typedef struct {
    const warp *one;
    element enough;
} inverting;

static void invert_lines(long begin, long end, void *work) {
    const inverting *job = work;
    const warp *one = job->one;
    const element enough = job->enough;
    const long cells = (one->n - 1) * (one->m - 1), rows = one->batch * one->height;
    const element per_row = (element)(one->h - 1) / (one->n - 1), per_column = (element)(one->w - 1) / (one->m - 1);
    for (long at = begin; at < end; at++) {
        const long image = at / one->height, y = at % one->height;
        const element *grid = one->grid + image * one->n * one->m * 2, *samples = one->samples + image * one->h * one->w * 2;
        for (long start = 0; start < one->width; start += BLOCK) {
            line row;
            const long wide = one->width - start < BLOCK ? one->width - start : BLOCK;
            for (long x = 0; x < wide; x++) row.best[x] = __builtin_inff(), row.u[x] = row.v[x] = 0;
            for (long cell = 0; cell < cells; cell++) {
                const int32_t *box = one->boxes + 4 * (image * cells + cell);
                const long i = cell / (one->m - 1), j = cell % (one->m - 1);
                const long from = box[1] < start ? start : box[1], to = box[3] < start + wide ? box[3] : start + wide - 1;
                if (box[0] <= y && y <= box[2] && from <= to)
                    solve(&row, grid + 2 * (i * one->m + j), one->m, y, from, to, start, i, j);
            }
            element *out = one->found + at * one->width + start, *next = out + rows * one->width;
            for (long x = 0; x < wide; x++) {
                out[x] = within(row.u[x], one->n - 1) * per_row;
                next[x] = within(row.v[x], one->m - 1) * per_column;
            }
            for (long x = 0; x < wide; x++) {
                const long r = (long)least(out[x], one->h - 2), c = (long)least(next[x], one->w - 2);
                if (one->bent_rows[r] | one->bent_columns[c])
                    polish(one, samples, y, start + x, enough, out + x, next + x);
            }
        }
    }
}

/* Find the location of every pixel of an image, to within `enough` pixels. */
long SUFFIX(invert)(const warp *one, double enough) {
    inverting job = {one, (element)enough};
    const long *const held = one->held, batch = one->batch;
    POSSIBLE(batch >= 0 && one->n > 1 && one->m > 1 && one->h > 1 && one->w > 1 && one->height >= 0 && one->width >= 0);
    NEEDS(held, 0, product_of(product_of(batch, 2), product_of(one->n, one->m)), element);
    NEEDS(held, 1, product_of(product_of(batch, 2), product_of(one->h, one->w)), element);
    NEEDS(held, 2, product_of(product_of(batch, 4), product_of(one->n - 1, one->m - 1)), int32_t);
    NEEDS(held, 3, one->h - 1, uint8_t);
    NEEDS(held, 4, one->w - 1, uint8_t);
    NEEDS(held, 5, product_of(product_of(batch, 2), product_of(one->height, one->width)), element);
    cadsurgery_share(one->batch * one->height, 1, invert_lines, &job);
    return FITS;
}
