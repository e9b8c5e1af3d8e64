/* Bilinear interpolation of maps, and its error: see resize.c.
 *
 * Compiled once per instruction set with -DSUFFIX(name)=... */
#include "check.h"
#include "resize.h"

enum { BLOCK = 1024 };

/* Interpolate a row of the map between columns. */
static void interpolate_row(const resizing *of, const float *from, long begin, long width, float *restrict to) {
    const int32_t *left = of->across.first + begin, *right = of->across.second + begin;
    const float *share = of->across.share + begin;
#pragma omp simd
    for (long x = 0; x < width; x++) to[x] = (1 - share[x]) * from[left[x]] + share[x] * from[right[x]];
}

static void mix_rows(const float *one, const float *two, float share, long width, float *restrict to) {
    const float rest = 1 - share;
#pragma omp simd
    for (long x = 0; x < width; x++) to[x] = rest * one[x] + share * two[x];
}

/* Rows of all results are numbered map by map. Rows of a map that several results lie between are interpolated once. */
static void resize_rows(long begin, long end, void *work) {
    const resizing *of = work;
    float memory[2][BLOCK];
    for (long start = 0; start < of->across.length; start += BLOCK) {
        const long width = of->across.length - start < BLOCK ? of->across.length - start : BLOCK;
        long held[2] = {-1, -1};
        for (long row = begin; row < end; row++) {
            const long y = row % of->down.length, base = row / of->down.length * of->height;
            const long wanted[2] = {base + of->down.first[y], base + of->down.second[y]};
            for (int i = 0; i < 2; i++) {
                float *const place = memory[wanted[i] & 1]; /* rows that follow each other lie in different places */
                if (held[wanted[i] & 1] == wanted[i]) continue;
                held[wanted[i] & 1] = wanted[i];
                interpolate_row(of, of->maps + wanted[i] * of->width, start, width, place);
            }
            mix_rows(memory[wanted[0] & 1], memory[wanted[1] & 1], of->down.share[y], width,
                     of->out + row * of->across.length + start);
        }
    }
}

static long check_axis(const long *held, long place, const axis *one, long length) {
    POSSIBLE(one->length >= 0 && length > 0);
    NEEDS(held, place, one->length, int32_t);
    NEEDS(held, place + 1, one->length, int32_t);
    NEEDS(held, place + 2, one->length, float);
    for (long i = 0; i < one->length; i++) {
        const long step = (long)one->second[i] - one->first[i];
        POSSIBLE(one->first[i] >= 0 && one->second[i] < length && (step == 0 || step == 1));
    }
    return FITS;
}

static long check_resizing(const resizing *of) {
    const long *const held = of->held;
    if (!held) return FITS;
    POSSIBLE(of->count >= 0);
    NEEDS(held, 0, product_of(of->count, product_of(of->height, of->width)), float);
    NEEDS(held, 1, product_of(of->count, product_of(of->down.length, of->across.length)), float);
    RETURN_UNLESS_FITS(check_axis(held, 2, &of->down, of->height));
    return check_axis(held, 5, &of->across, of->width);
}

long SUFFIX(resize)(const resizing *of) {
    RETURN_UNLESS_FITS(check_resizing(of));
    cadsurgery_share(of->count * of->down.length, rows_at_once(of->across.length * sizeof(float)), resize_rows, (void *)of);
    return FITS;
}

/* The squared error of the mean of some rows of channels. */
static float error_of_two(const float *own, const float *a, const float *b, long channels) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long c = 0; c < channels; c++) {
        const float missed = own[c] - .5f * (a[c] + b[c]);
        sum += missed * missed;
    }
    return sum;
}

static float error_of_four(const float *own, const float *const *from, long channels) {
    const float *a = from[0], *b = from[1], *d = from[2], *e = from[3];
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long c = 0; c < channels; c++) {
        const float missed = own[c] - .25f * ((a[c] + b[c]) + (d[c] + e[c]));
        sum += missed * missed;
    }
    return sum;
}

/* Rows of all maps are numbered image by image. Pixels in odd rows and columns are interpolated. */
static void find_errors(long begin, long end, void *work) {
    const erring *of = work;
    const long channels = of->channels;
    for (long row = begin; row < end; row++) {
        const long y = row % of->height, up = y & 1, down = !up ? 0 : y + 1 < of->height ? 1 : -1;
        const float *const above = of->maps + (row - up) * of->width * channels;
        const float *const below = of->maps + (row + down) * of->width * channels;
        for (long x = 0; x < of->width; x++) {
            const long left = x - (x & 1), right = !(x & 1) ? x : x + 1 < of->width ? x + 1 : left;
            const float *const own = of->maps + (row * of->width + x) * channels;
            const float *const from[4] = {above + left * channels, above + right * channels, below + left * channels,
                                          below + right * channels};
            float *const out = of->out + row * of->width + x;
            if (left == x && !up) *out = 0;
            else if (left == x) *out = error_of_two(own, from[0], from[2], channels);
            else if (!up) *out = error_of_two(own, from[0], from[1], channels);
            else *out = error_of_four(own, from, channels);
        }
    }
}

void SUFFIX(interpolation_error)(const erring *of) {
    const long rows = rows_at_once(of->channels * of->width * sizeof(float));
    cadsurgery_share(of->batch * of->height, rows, find_errors, (void *)of);
}
