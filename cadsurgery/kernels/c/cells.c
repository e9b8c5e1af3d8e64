/* Cells of level maps, and kernel maps, for engines: see convolve.h. maps.c computes them; here their numbers are checked and
 * converted, as engines index by int32. So are pixels, which pixels.c reads.
 *
 * Compiled once, for the architecture's baseline. */
#include <string.h>

#include "maps.h"
#include "packed.h"
#include "pixels.h"

__attribute__((weak)) extern long find_cells_scalar(const cells *);
__attribute__((weak)) extern long shift_taps_scalar(const map *);

/* Let `place` point to the next `count` numbers of an area, or count their bytes if it has no memory yet. */
typedef struct {
    char *memory;
    size_t used;
} area;

static void *take(area *of, int64_t count, size_t bytes) {
    void *place = of->memory ? of->memory + of->used : 0;
    of->used += ((size_t)count * bytes + 63) / 64 * 64;
    return place;
}

static int are_positive(const tensor *numbers) {
    const int32_t *values = numbers->data;
    for (int64_t i = 0; i < numbers->size[0]; i++)
        if (values[i] < 1) return 0;
    return numbers->size[0] > 0;
}

/* Check the sizes of a level map and the sides of its cells; its levels are checked where they are copied. */
static const char *check_levels(const tensor *in) {
    const tensor *levels = in + LEVELS, *sides = in + SIDES;
    REFUSE_UNLESS(levels->rank == 3 && sides->rank == 1, "a level map or its sides have no such dimensions");
    const int64_t pixels = levels->size[0] * levels->size[1] * levels->size[2];
    REFUSE_UNLESS(pixels <= INT32_MAX && sides->size[0] <= 64, "a level map is too large");
    REFUSE_UNLESS(are_positive(sides), "a level map has a level without a side");
    return 0;
}

static void widen(const tensor *from, int64_t count, int64_t *to) {
    for (int64_t i = 0; i < count; i++) to[i] = ((const int32_t *)from->data)[i];
}

enum { AT_ONCE = 4096 }; /* levels that are checked, and copied while they are near */

static const char *copy_levels(const tensor *from, int64_t pixels, int64_t many, int8_t *to) {
    const int32_t *levels = from->data;
    for (int64_t first = 0, some; first < pixels; first += some) {
        some = pixels - first < AT_ONCE ? pixels - first : AT_ONCE;
        REFUSE_UNLESS(cadsurgery_is_within(levels + first, some, many), "a level map has a level without a side");
        for (int64_t i = first; i < first + some; i++) to[i] = (int8_t)levels[i];
    }
    return 0;
}

/* Make a result of rows, or a vector, which has no columns. */
static void *made(make_result *make, void *call, size_t place, int64_t rows, int64_t columns) {
    const int64_t size[2] = {rows, columns};
    return make(call, place, size, columns ? 2 : 1);
}

#define NO_MEMORY "there is no memory for a result"

const char *cadsurgery_find_cells(const tensor *in, make_result *make, void *call, share_in_engine *way) {
    const char *reason = check_levels(in);
    if (reason) return reason;
    const int64_t *size = in[LEVELS].size, pixels = size[0] * size[1] * size[2], many = in[SIDES].size[0];
    int64_t *sides = 0;
    int8_t *levels = 0;
    cells c = {.batch = size[0], .height = size[1], .width = size[2]};
    area all = {0};
    for (int pass = 0; pass < 2; pass++) {
        c.anchors = take(&all, pixels, sizeof *c.anchors), sides = take(&all, many, sizeof *sides);
        c.counts = take(&all, size[0], sizeof *c.counts), levels = take(&all, pixels, 1);
        if (pass) break;
        all = (area){malloc(all.used + 64), 0};
        REFUSE_UNLESS(all.memory, "there is no memory for the cells of a level map");
    }
    widen(in + SIDES, many, sides);
    c.levels = levels, c.sides = sides;
    reason = copy_levels(in + LEVELS, pixels, many, levels); /* before there is a result, which could look like one */
    if (!reason && !(c.index = made(make, call, 1, pixels, 0)) && pixels) reason = NO_MEMORY;
    if (!reason) {
        cadsurgery_share_by(way);
        const long count = find_cells_scalar(&c);
        cadsurgery_share_by(0);
        int32_t *const anchors = made(make, call, 0, count, 0);
        for (long i = 0; i < count && anchors; i++) anchors[i] = (int32_t)c.anchors[i];
        reason = anchors || !count ? 0 : NO_MEMORY;
    }
    free(all.memory);
    return reason;
}

/* Check what a kernel map is computed from. */
static const char *check_map(const tensor *in) {
    const char *reason = check_levels(in);
    if (reason) return reason;
    for (size_t i = ANCHORS; i < INPUTS_OF_TAPS; i++) REFUSE_UNLESS(in[i].rank == 1, "an input of a kernel map is no vector");
    const tensor *levels = in + LEVELS;
    const int64_t pixels = levels->size[0] * levels->size[1] * levels->size[2];
    REFUSE_UNLESS(in[INDEX].size[0] == pixels && cadsurgery_is_within(in[INDEX].data, pixels, in[ANCHORS].size[0]) &&
                      cadsurgery_is_within(in[ANCHORS].data, in[ANCHORS].size[0], pixels),
                  "the cells of a kernel map do not fit its level map");
    REFUSE_UNLESS(in[SIZE].size[0] == 2 && are_positive(in + SIZE), "the size of a kernel map is not height and width");
    const int32_t *size = in[SIZE].data;
    REFUSE_UNLESS(cadsurgery_is_within(in[TARGETS].data, in[TARGETS].size[0], levels->size[0] * size[0] * size[1]),
                  "a kernel map has targets outside its size");
    REFUSE_UNLESS(in[DOWN].size[0] > 0 && in[ACROSS].size[0] > 0, "a kernel map has no taps");
    return 0;
}

static const char *read_taps(int has_halo, const tensor *in, make_result *make, void *call, share_in_engine *way) {
    const char *reason = check_map(in);
    if (reason) return reason;
    const int64_t *sides = in[LEVELS].size, pixels = sides[0] * sides[1] * sides[2], count = in[ANCHORS].size[0];
    const int64_t n = in[TARGETS].size[0], taps = in[DOWN].size[0] * in[ACROSS].size[0];
    const int64_t between = pixels - count, most = !has_halo ? 0 : between < n * taps ? between : n * taps;
    const int32_t *size = in[SIZE].data;
    int64_t *wide[5] = {0};
    const int widened[5] = {ANCHORS, SIDES, TARGETS, DOWN, ACROSS};
    map m = {0};
    int8_t *levels = 0;
    area all = {0};
    for (int pass = 0; pass < 2; pass++) {
        m.sources = take(&all, most * 4, sizeof *m.sources), m.mix = take(&all, most * 4, sizeof *m.mix);
        m.rank = take(&all, has_halo ? pixels : 0, sizeof *m.rank), levels = take(&all, pixels, 1);
        m.lines = take(&all, sides[0] * sides[1], sizeof *m.lines);
        for (int i = 0; i < 5; i++) wide[i] = take(&all, in[widened[i]].size[0], sizeof **wide);
        if (pass) break;
        all = (area){malloc(all.used + 64), 0};
        REFUSE_UNLESS(all.memory, "there is no memory for a kernel map");
    }
    for (int i = 0; i < 5; i++) widen(in + widened[i], in[widened[i]].size[0], wide[i]);
    m.index = in[INDEX].data, m.levels = levels, m.has_halo = has_halo;
    m.anchors = wide[0], m.sides = wide[1], m.targets = wide[2], m.down = wide[3], m.across = wide[4];
    m.pixels = pixels, m.count = count, m.n = n, m.height = sides[1], m.width = sides[2];
    m.target_height = size[0], m.target_width = size[1], m.vertical = in[DOWN].size[0], m.horizontal = in[ACROSS].size[0];
    reason = copy_levels(in + LEVELS, pixels, in[SIDES].size[0], levels);
    if (!reason && !(m.table = made(make, call, 0, n, taps)) && n) reason = NO_MEMORY;
    if (!reason) {
        cadsurgery_share_by(way);
        const long halo = shift_taps_scalar(&m);
        cadsurgery_share_by(0);
        int32_t *const sources = has_halo ? made(make, call, 1, halo, 4) : 0;
        float *const shares = has_halo ? made(make, call, 2, halo, 4) : 0;
        if (sources && shares) memcpy(sources, m.sources, 4 * halo * sizeof *sources);
        for (long i = 0; i < 4 * halo && shares; i++) shares[i] = (float)m.mix[i];
        reason = (sources && shares) || !halo ? 0 : NO_MEMORY;
    }
    free(all.memory);
    return reason;
}

const char *cadsurgery_read_taps(const tensor *in, make_result *make, void *call, share_in_engine *way) {
    return read_taps(1, in, make, call, way);
}

const char *cadsurgery_read_near_taps(const tensor *in, make_result *make, void *call, share_in_engine *way) {
    return read_taps(0, in, make, call, way);
}

/* ---- Pixels. */

typedef struct {
    unsigned long needs;
    long (*read_pixels)(const pixels *);
} form;

#define DECLARE(set) __attribute__((weak)) extern long read_pixels_float32_##set(const pixels *);
#define FORM(set) {NEEDS_##set, read_pixels_float32_##set}

BY_VECTOR(DECLARE)
static const form forms[] = FORMS_BY_VECTOR;

const char *cadsurgery_size_of_pixels(const tensor *in, int64_t *size) {
    const char *reason = check_levels(in + LEVELS_OF);
    if (reason) return reason;
    const int64_t *levels = in[LEVELS_OF].size, all = levels[0] * levels[1] * levels[2];
    REFUSE_UNLESS(in[ROWS_IN].rank == 2 && in[INDEX_OF].rank == 1 && in[INDEX_OF].size[0] == all &&
                      cadsurgery_is_within(in[INDEX_OF].data, all, in[ROWS_IN].size[0]),
                  "the cells of pixels do not fit their level map");
    REFUSE_UNLESS(in[STEP].rank == 1 && in[STEP].size[0] == 1 && are_positive(in + STEP), "the step of pixels is not one number");
    const int64_t step = *(const int32_t *)in[STEP].data;
    size[0] = levels[0], size[1] = (levels[1] + step - 1) / step, size[2] = (levels[2] + step - 1) / step;
    size[3] = in[ROWS_IN].size[1];
    return 0;
}

const char *cadsurgery_read_pixels(const tensor *in, void *out, share_in_engine *way) {
    const int64_t *size = in[LEVELS_OF].size, all = size[0] * size[1] * size[2], many = in[SIDES_OF].size[0];
    const long channels = in[ROWS_IN].size[1];
    const form *by = 0;
    WIDEST(forms, read_pixels, by);
    REFUSE_UNLESS(by, "the library has no kernels for this processor");
    if (!all || !channels) return 0;
    int64_t *sides = malloc(many * sizeof *sides + all + 64);
    REFUSE_UNLESS(sides, "there is no memory for the levels of pixels");
    int8_t *const levels = (int8_t *)(sides + many);
    const char *const reason = copy_levels(in + LEVELS_OF, all, many, levels);
    widen(in + SIDES_OF, many, sides);
    const pixels p = {in[ROWS_IN].data, in[INDEX_OF].data, levels, sides, out, in[ROWS_IN].size[0], size[0], size[1], size[2],
                      channels, *(const int32_t *)in[STEP].data, 1, 0};
    cadsurgery_share_by(way);
    if (!reason) by->read_pixels(&p);
    cadsurgery_share_by(0);
    free(sides);
    return reason;
}
