/* Inverted bottleneck: a 1x1 convolution of a dense map, a depthwise convolution and a 1x1 convolution in one pass. */
#include "pairs.h"
#include "parallel.h"

void *calloc(size_t, size_t);
void free(void *);

typedef struct {
    const element *image;               /* (batch, height, width, channels) */
    const element *weight, *then, *last; /* 1x1 convolutions in `product`'s layout, `then` in `depthwise`'s */
    const sum *bias, *then_bias, *last_bias;
    const element *more;                /* in the result's shape, or NULL */
    element *out;                       /* (batch, lines, columns, outputs; or middle without a last convolution) */
    long batch, height, width, channels, middle, outputs, lines, columns, tall, wide, stride, top, left;
    double low, high, then_low, then_high, last_low, last_high;
} expansion;

/* Compute channels first..last of a line of the expanded map, with `pitch` values per pixel and zeros after the line. */
static void expand_line(const expansion *e, const element *image, long first, long last, element *to, long pitch) {
    for (long chunk = first; chunk < last; chunk += CHUNK) {
        const element *weight = e->weight + chunk * ((e->channels + 1) / 2 * 2);
        const finish f = {{0}, 0, to + chunk - first, pitch, all_lanes((sum)e->low), all_lanes((sum)e->high)};
        for (long x = 0; x < e->width; x += ROWS) {
            const element *a[ROWS];
            for (int i = 0; i < ROWS; i++) a[i] = image + (x + i < e->width ? x + i : e->width - 1) * e->channels;
            const factors by = {a, weight, 1, e->channels, 0};
            multiply_once(&by, e->bias + chunk, &f, x, last - chunk);
        }
    }
    memset(to + e->width * pitch, 0, (e->wide + ROWS) * pitch * sizeof(element)); /* also clears values written beyond the line */
}

/* Apply the last convolution to a line of the depthwise convolution's result. */
static void project_line(const expansion *e, const element *line, long at) {
    for (long chunk = 0; chunk < e->outputs; chunk += CHUNK) {
        const long place = at * e->outputs + chunk;
        const finish f = {{0}, e->more ? e->more + place : 0, e->out + place, e->outputs, all_lanes((sum)e->last_low),
                          all_lanes((sum)e->last_high)};
        for (long x = 0; x < e->columns; x += ROWS) {
            const element *a[ROWS], *weight = e->last + chunk * ((e->middle + 1) / 2 * 2);
            const long begin = x + ROWS <= e->columns ? x : e->columns - ROWS; /* the last tile overlaps the one before */
            for (int i = 0; i < ROWS; i++) a[i] = line + (begin + i) * e->middle;
            const factors by = {a, weight, 1, e->middle, 0};
            multiply_once(&by, e->last_bias + chunk, &f, begin, e->outputs - chunk);
        }
    }
}

enum { BAND = 32, CACHE = 1 << 18 };

typedef struct {
    const expansion *e;
    long is_done;
} expanding;

static void expand_bands(long from_job, long to_job, void *work) {
    expanding *x = work;
    const expansion *e = x->e;
    const long bands = (e->lines + BAND - 1) / BAND, taps = e->tall * e->wide, all = (e->middle + CHUNK - 1) / CHUNK;
    const long pixels = e->left + e->width + e->wide + ROWS, fit = CACHE / (e->tall * pixels * CHUNK);
    const long pitch = (e->last || fit > all ? all : fit < 1 ? 1 : fit) * CHUNK, length = pixels * pitch;
    for (long job = from_job; job < to_job; job++) {
        const long zeros = e->tall * length, spare = zeros + length; /* a line of zeros, and a line of the depthwise result */
        element *ring = calloc(spare + (e->last ? e->columns * e->middle : 0), sizeof(element));
        if (!ring) {
            __atomic_store_n(&x->is_done, 0, __ATOMIC_RELAXED);
            continue;
        }
        const element *image = e->image + job / bands * e->height * e->width * e->channels;
        const long top = job % bands * BAND, bottom = top + BAND < e->lines ? top + BAND : e->lines;
        for (long first = 0; first < e->middle; first += pitch) {
            const long some = e->middle - first < pitch ? e->middle - first : pitch;
            element *to = (e->last ? ring + spare : e->out) + first;
            const lane least = all_lanes((sum)e->then_low), most = all_lanes((sum)e->then_high);
            const by_level none = {0};
            long next = 0; /* next line to compute */
            for (long y = top; y < bottom; y++) {
                const element *from[TAPS];
                for (long v = 0; v < e->tall; v++) {
                    const long line = y * e->stride - e->top + v;
                    const int inside = line >= 0 && line < e->height;
                    element *at = ring + (inside ? line % e->tall * length : zeros);
                    if (inside && line >= next) {
                        const element *read = image + line * e->width * e->channels;
                        expand_line(e, read, first, first + some, at + e->left * pitch, pitch);
                        next = line + 1;
                    }
                    for (long h = 0; h < e->wide; h++) from[v * e->wide + h] = at + h * pitch;
                }
                const long place = (job / bands * e->lines + y) * e->columns, step = e->stride * pitch;
                const long at = e->last ? 0 : place;
                for (long start = 0; start < some; start += MANY) {
                    const element *w = e->then + (first + start) * ((taps + 1) / 2 * 2);
                    if (some - start >= MANY && taps == 9)
                        convolve_pairs(none, 0, to, least, most, e->then_bias + first, w, from, at, e->columns, some, e->middle, start, 9, 0, step, 1, 1);
                    else if (some - start >= MANY)
                        convolve_pairs(none, 0, to, least, most, e->then_bias + first, w, from, at, e->columns, some, e->middle, start, taps, 0, step, 1, 1);
                    else convolve_pairs(none, 0, to, least, most, e->then_bias + first, w, from, at, e->columns, some, e->middle, start, taps, 0, step, 0, 1);
                }
                if (e->last) project_line(e, ring + spare, place);
            }
        }
        free(ring);
    }
}

/* A 1x1 convolution of a dense map, a depthwise convolution and optionally another 1x1 convolution, to whose result `more`
 * is added. The expanded map is never in memory as a whole: a ring buffer holds as many of its lines as the depthwise
 * kernel is tall; without a last convolution it holds only as many channels as fit into the L2 cache. Returns 0 if there
 * is no memory for the buffer, else 1. With a last convolution there must be at least ROWS columns. */
long SUFFIX(expand_depthwise)(const expansion *e) {
    expanding x = {e, 1};
    cadsurgery_share(e->batch * ((e->lines + BAND - 1) / BAND), 1, expand_bands, &x);
    return x.is_done;
}
