/* Cells of level maps, and kernel maps of windows whose taps have the same offset everywhere and read zero outside the map.
 * The results equal those of `_cells` in lattice.py and `_shift_taps` in kernel_map.py, entry by entry.
 *
 * Compiled once with -DSUFFIX(name)=... . All tensors are contiguous; pixels are numbered image by image, line by line.
 */
#include "maps.h"

#include <string.h>

#include "check.h"

#include "parallel.h"

/* Levels that have no side, or one that is not positive, would be read beyond it. */
static long check_cells(const cells *c, long pixels) {
    const long *const held = c->held;
    POSSIBLE(c->batch >= 0 && c->height >= 0 && c->width >= 0);
    if (!held) return FITS;
    NEEDS(held, 0, pixels, int8_t);
    NEEDS(held, 2, pixels, int64_t);
    NEEDS(held, 3, pixels, int32_t);
    NEEDS(held, 4, c->batch, int64_t);
    const long many = held[1] / (long)sizeof *c->sides;
    for (long i = 0; i < many; i++) POSSIBLE(c->sides[i] > 0);
    int least = 0, most = 0;
    for (long i = 0; i < pixels; i++) {
        least = c->levels[i] < least ? c->levels[i] : least;
        most = c->levels[i] > most ? c->levels[i] : most;
    }
    POSSIBLE(least >= 0 && (most < many || !pixels));
    return FITS;
}

/* Return the number of cells; write their anchors, the row of each pixel's cell and the number of cells of each image. Along a
 * line, all pixels of a cell follow from its first. */
long SUFFIX(find_cells)(const cells *c) {
    const long width = c->width, pixels = product_of(product_of(c->batch, c->height), width);
    const int64_t *const sides = c->sides;
    RETURN_UNLESS_FITS(check_cells(c, pixels));
    long count = 0;
    for (long line = 0; line < c->batch * c->height; line++) {
        const long y = line % c->height, first = line * width, image = line / c->height;
        const int8_t *level = c->levels + first;
        int32_t *own = c->index + first;
        if (y == 0) c->counts[image] = 0;
        for (long x = 0; x < width;) {
            const long side = sides[level[x]], end = x + side < width ? x + side : width;
            if (y % side) {
                memcpy(own + x, own + x - width, (end - x) * sizeof *own);
            } else {
                c->anchors[count] = first + x;
                c->counts[image]++;
                for (long i = x; i < end; i++) own[i] = (int32_t)count;
                count++;
            }
            x = end;
        }
    }
    return count;
}

/* Bilinear interpolation of a pixel between its cell and the next cells to the right and below; at the border only its own. */
static void interpolate(const map *m, long pixel, int32_t *sources, double *mix) {
    long x = pixel % m->width, y = pixel / m->width % m->height, first = pixel - y * m->width - x, side = m->sides[m->levels[pixel]];
    long top = y - y % side, left = x - x % side;
    long bottom = top + side < m->height ? top + side : m->height - 1;
    long right = left + side < m->width ? left + side : m->width - 1;
    double down = (y - top) / (double)side, across = (x - left) / (double)side;
    long corners[4] = {first + top * m->width + left, first + top * m->width + right, first + bottom * m->width + left,
                       first + bottom * m->width + right};
    double shares[4] = {(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across};
    for (int i = 0; i < 4; i++) {
        sources[i] = m->index[shares[i] > 0 ? corners[i] : corners[0]]; /* rows with weight zero are not read */
        mix[i] = shares[i];
    }
}

static void read_taps(long begin, long end, void *work) {
    const map *m = work;
    const long taps = m->vertical * m->horizontal;
    for (long e = begin; e < end; e++) {
        long x = m->targets[e] % m->target_width, line = m->targets[e] / m->target_width;
        long y = line % m->target_height, image = line / m->target_height;
        int32_t *entries = m->table + e * taps;
        for (long v = 0; v < m->vertical; v++)
            for (long h = 0; h < m->horizontal; h++) {
                long row = y + m->down[v], column = x + m->across[h];
                if (row < 0 || row >= m->height || column < 0 || column >= m->width) {
                    *entries++ = m->count;
                    continue;
                }
                long pixel = (image * m->height + row) * m->width + column;
                int32_t cell = m->index ? m->index[pixel] : (int32_t)pixel;
                if (m->has_halo && m->anchors[cell] != pixel) {
                    cell = -1 - pixel; /* until its row is known */
                    __atomic_store_n(m->rank + pixel, 1, __ATOMIC_RELAXED);
                }
                *entries++ = cell;
            }
    }
}

static void name_halo(long begin, long end, void *work) {
    const map *m = work;
    for (long i = begin; i < end; i++)
        if (m->table[i] < 0) m->table[i] = m->rank[-1 - m->table[i]];
}

/* Mark the lines in which targets have taps. */
static void mark_lines(long begin, long end, void *work) {
    const map *m = work;
    for (long e = begin; e < end; e++) {
        long line = m->targets[e] / m->target_width, y = line % m->target_height, first = line / m->target_height * m->height;
        for (long v = 0; v < m->vertical; v++) {
            long row = y + m->down[v];
            if (row >= 0 && row < m->height) __atomic_store_n(m->lines + first + row, 1, __ATOMIC_RELAXED);
        }
    }
}

static void clear_lines(long begin, long end, void *work) {
    const map *m = work;
    for (long line = begin; line < end; line++)
        if (m->lines[line]) memset(m->rank + line * m->width, 0, m->width * sizeof *m->rank);
}

/* Count the halo rows of each line. */
static void count_lines(long begin, long end, void *work) {
    const map *m = work;
    for (long line = begin; line < end; line++) {
        if (!m->lines[line]) continue;
        const int32_t *rank = m->rank + line * m->width;
        int32_t count = 0;
        for (long x = 0; x < m->width; x++) count += rank[x];
        m->lines[line] = count;
    }
}

/* Interpolate the halo rows of each line, whose first row is `lines`; untouched lines have -1. */
static void fill_lines(long begin, long end, void *work) {
    const map *m = work;
    for (long line = begin; line < end; line++) {
        long halo = m->lines[line];
        for (long pixel = line * m->width; halo >= 0 && pixel < (line + 1) * m->width; pixel++)
            if (m->rank[pixel]) {
                interpolate(m, pixel, m->sources + 4 * halo, m->mix + 4 * halo);
                m->rank[pixel] = m->count + ++halo;
            }
    }
}

enum { MAP_INDEX, MAP_ANCHORS, MAP_LEVELS, MAP_SIDES, MAP_TARGETS, MAP_DOWN, MAP_ACROSS, MAP_TABLE, MAP_RANK, MAP_LINES, MAP_SOURCES, MAP_MIX };

static long check_map(const map *m) {
    const long *const held = m->held;
    POSSIBLE(m->pixels >= 0 && m->count >= 0 && m->n >= 0 && m->height > 0 && m->width > 0 && m->target_height > 0 &&
             m->target_width > 0 && m->vertical > 0 && m->horizontal > 0 && m->pixels % product_of(m->height, m->width) == 0);
    const long taps = product_of(m->vertical, m->horizontal), entries = product_of(m->n, taps), between = m->pixels - m->count;
    const long most = 4 * (between < 0 ? 0 : between < entries ? between : entries);
    NEEDS_IF(m->index, held, MAP_INDEX, m->pixels, int32_t);
    POSSIBLE(m->index || m->count == m->pixels);
    if (m->has_halo || m->index) NEEDS(held, MAP_ANCHORS, m->has_halo ? m->count : 0, int64_t);
    NEEDS(held, MAP_TARGETS, m->n, int64_t);
    if (held) { /* as many images as the source has */
        const long all = product_of(m->pixels / product_of(m->height, m->width), product_of(m->target_height, m->target_width));
        for (long i = 0; i < m->n; i++) POSSIBLE(m->targets[i] >= 0 && m->targets[i] < all);
    }
    NEEDS(held, MAP_DOWN, m->vertical, int64_t);
    NEEDS(held, MAP_ACROSS, m->horizontal, int64_t);
    NEEDS(held, MAP_TABLE, entries, int32_t);
    if (!m->has_halo) return FITS;
    NEEDS(held, MAP_LEVELS, m->pixels, int8_t);
    NEEDS(held, MAP_RANK, m->pixels, int32_t);
    NEEDS(held, MAP_LINES, m->pixels / m->width, int32_t);
    NEEDS(held, MAP_SOURCES, most, int32_t);
    NEEDS(held, MAP_MIX, most, double);
    return FITS;
}

/* Fill the kernel map and return the number of halo rows, or minus the reason why there is none: one for every pixel that is read and is no anchor, in order. */
long SUFFIX(shift_taps)(const map *m) {
    RETURN_UNLESS_FITS(check_map(m));
    const long taps = m->vertical * m->horizontal, lines = m->pixels / m->width;
    if (m->has_halo) {
        memset(m->lines, 0, lines * sizeof *m->lines);
        cadsurgery_share(m->n, 65536, mark_lines, (void *)m);
        cadsurgery_share(lines, 64, clear_lines, (void *)m);
    }
    cadsurgery_share(m->n, 65536 / taps + 1, read_taps, (void *)m);
    if (!m->has_halo) return 0;
    cadsurgery_share(lines, 64, count_lines, (void *)m);
    long halo = 0;
    for (long line = 0; line < lines; line++) {
        const int32_t own = m->lines[line];
        m->lines[line] = own ? (int32_t)halo : -1;
        halo += own;
    }
    cadsurgery_share(lines, 16, fill_lines, (void *)m);
    cadsurgery_share(m->n * taps, 65536, name_halo, (void *)m);
    return halo;
}
