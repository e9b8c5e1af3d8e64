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
    POSSIBLE(highest_level(c->levels, pixels) < many || !pixels);
    return FITS;
}

/* The cells of a map in blocks of lines, in which whole cells lie. */
typedef struct {
    const cells *c;
    int levels; /* how many there are */
    long tall;  /* lines of a block: the side of the largest cells */
} blocks;

static blocks blocks_of(const cells *c, long pixels) {
    blocks b = {c, highest_level(c->levels, pixels) + 1, 1};
    for (int i = 0; i < b.levels; i++) b.tall = c->sides[i] > b.tall ? c->sides[i] : b.tall;
    return b;
}

/* Count the anchors of each line, in its first entry of the index. Only the last cell of a line can be cut off, so the pixels of
 * a level tell its cells. */
static void count_anchors(long begin, long end, void *work) {
    const blocks *b = work;
    const cells *c = b->c;
    for (long line = begin; line < end; line++) {
        const long y = line % c->height;
        const int8_t *level = c->levels + line * c->width;
        int32_t count = 0;
        for (int i = 0; i < b->levels; i++) {
            const long side = c->sides[i];
            if (y % side) continue;
            int32_t pixels = 0;
            for (long x = 0; x < c->width; x++) pixels += level[x] == i;
            count += (pixels + side - 1) / side;
        }
        c->index[line * c->width] = count;
    }
}

/* Write anchors and rows of blocks; the first entry of each line is the row of its first anchor. Pixels are taken in runs of
 * cells of one level. */
static void fill_cells(long begin, long end, void *work) {
    const blocks *b = work;
    const cells *c = b->c;
    const long width = c->width, each = (c->height + b->tall - 1) / b->tall;
    for (long block = begin; block < end; block++) {
        const long top = block % each * b->tall, bottom = top + b->tall < c->height ? top + b->tall : c->height;
        for (long y = top; y < bottom; y++) {
            const long first = (block / each * c->height + y) * width;
            const int8_t *level = c->levels + first;
            int32_t *own = c->index + first, row = *own;
            for (long x = 0, stop; x < width; x = stop) {
                const long side = c->sides[level[x]];
                for (stop = x + side; stop < width && level[stop] == level[x];) stop += side;
                stop = stop < width ? stop : width;
                if (y % side) {
                    memcpy(own + x, own + x - width, (stop - x) * sizeof *own);
                } else if (side == 1) {
                    for (long i = 0; i < stop - x; i++) c->anchors[row + i] = first + x + i;
                    for (long i = 0; i < stop - x; i++) own[x + i] = row + (int32_t)i;
                    row += (int32_t)(stop - x);
                } else {
                    for (long at = x; at < stop; at += side) {
                        c->anchors[row] = first + at;
                        for (long i = at; i < (at + side < stop ? at + side : stop); i++) own[i] = row;
                        row++;
                    }
                }
            }
        }
    }
}

/* Return the number of cells; write their anchors, the row of each pixel's cell and the number of cells of each image. */
long SUFFIX(find_cells)(const cells *c) {
    const long lines = product_of(c->batch, c->height), pixels = product_of(lines, c->width);
    RETURN_UNLESS_FITS(check_cells(c, pixels));
    if (!pixels) {
        for (long image = 0; image < c->batch; image++) c->counts[image] = 0;
        return 0;
    }
    const blocks b = blocks_of(c, pixels);
    cadsurgery_share(lines, 64, count_anchors, (void *)&b);
    long count = 0;
    for (long image = 0; image < c->batch; image++) {
        const long before = count;
        for (long line = image * c->height; line < (image + 1) * c->height; line++) {
            int32_t *own = c->index + line * c->width;
            const long anchors = *own;
            *own = (int32_t)count;
            count += anchors;
        }
        c->counts[image] = count - before;
    }
    const long each = (c->height + b.tall - 1) / b.tall;
    cadsurgery_share(c->batch * each, (64 + b.tall - 1) / b.tall, fill_cells, (void *)&b);
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
    int32_t rows[4];
    for (int i = 0; i < 4; i++) rows[i] = m->index[corners[i]];
    /* Between a row and itself lies the row, to the bit: equal values stay equal, for maxima and their places. */
    if (rows[0] == rows[2] && rows[1] == rows[3]) down = 0;
    if (rows[0] == rows[1] && (down == 0 || rows[2] == rows[3])) across = 0;
    const double shares[4] = {(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across};
    for (int i = 0; i < 4; i++) {
        sources[i] = rows[shares[i] > 0 ? i : 0]; /* rows with weight zero are not read */
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
