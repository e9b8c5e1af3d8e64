/* Every so many-th pixel of a map, read from its cells: linear between the first pixels of a cell and of the next ones to the
 * right and below, at the border its own; or the row of its cell. The results are those of `gather_mixing` by the table and
 * the halo of `shift_taps`, without either of them. */
#include "pixels.h"

#include "check.h"
#include "parallel.h"
#include "vector.h"

enum { AT_ONCE = 64 }; /* pixels whose shares are held */

/* Write `many` pixels of a line of a cell, the first of which lies `at` pixels behind the cell's left side. The products and
 * sums are those of `interpolate` in maps.c and `mix_row` in move.c, in their order; rows of share 0 are not read. */
static void write_run(const pixels *p, const element *const corners[4], double down, long at, long many, long side, element *out) {
    const long channels = p->channels, first = at == 0;
    sum shares[4][AT_ONCE];
    for (long i = 0; i < many; i++) {
        const double across = (at + i * p->spacing) / (double)side;
        shares[0][i] = (sum)((1 - down) * (1 - across)), shares[1][i] = (sum)((1 - down) * across);
        shares[2][i] = (sum)(down * (1 - across)), shares[3][i] = (sum)(down * across);
    }
#if !defined(BF16)
    if (channels == 1) {
        const sum values[4] = {*corners[0], *corners[1], *corners[2], *corners[3]};
        if (down == 0)
            for (long i = first; i < many; i++) {
                sum total = 0;
                total += shares[0][i] * values[0];
                total += shares[1][i] * values[1];
                out[i] = total;
            }
        else
            for (long i = first; i < many; i++) {
                sum total = 0;
                total += shares[0][i] * values[0];
                total += shares[1][i] * values[1];
                total += shares[2][i] * values[2];
                total += shares[3][i] * values[3];
                out[i] = total;
            }
        if (first) {
            sum total = 0;
            total += shares[0][0] * values[0];
            if (down != 0) total += shares[2][0] * values[2];
            out[0] = total;
        }
        return;
    }
#endif
    for (long start = 0; start < channels; start += LANES) {
        const long some = channels - start < LANES ? channels - start : LANES;
        lane rows[4] = {};
        for (int k = 0; k < 4; k++)
            if ((k < 2 || down != 0) && (k % 2 == 0 || many > first)) rows[k] = load_some(corners[k] + start, some);
        for (long i = 0; i < many; i++) {
            lane total = {};
            for (int k = 0; k < 4; k++)
                if ((k < 2 || down != 0) && (k % 2 == 0 || i >= first)) total += shares[k][i] * rows[k];
            store_some(out + i * channels + start, total, some);
        }
    }
}

static void read_lines(long begin, long end, void *work) {
    const pixels *p = work;
    const element *const rows = p->rows;
    const long channels = p->channels, spacing = p->spacing, width = p->width;
    const long lines = (p->height + spacing - 1) / spacing, columns = (width + spacing - 1) / spacing;
    for (long line = begin; line < end; line++) {
        const long y = line % lines * spacing, first = line / lines * p->height;
        const int8_t *const levels = p->levels + (first + y) * width;
        const int32_t *const index = p->index + first * width;
        element *out = (element *)p->out + line * columns * channels;
        for (long x = 0, stop; x < width; x = stop) {
            const long side = p->sides[levels[x]], at = x % side, up = y % side, end_of_cell = x - at + side;
            const long many = ((end_of_cell < width ? end_of_cell : width) - x + spacing - 1) / spacing;
            const element *const own = rows + (long)index[y * width + x] * channels;
            stop = x + many * spacing;
            if (!p->interpolates || (!at && !up && many == 1)) {
                for (long i = 0; i < many; i++, out += channels) memcpy(out, own, channels * sizeof(element));
                continue;
            }
            const long top = y - up, bottom = top + side < p->height ? top + side : p->height - 1;
            const long right = end_of_cell < width ? end_of_cell : width - 1, left = x - at;
            const long places[4] = {top * width + left, top * width + right, bottom * width + left, bottom * width + right};
            const element *corners[4];
            for (int i = 0; i < 4; i++) corners[i] = rows + (long)index[places[i]] * channels;
            /* Between a row and itself lies the row, to the bit, as in `interpolate` of maps.c. */
            const double down = corners[0] == corners[2] && corners[1] == corners[3] ? 0 : up / (double)side;
            const int is_flat = corners[0] == corners[1] && (down == 0 || corners[2] == corners[3]);
            for (long i = 0, some; i < many; i += some, out += some * channels) {
                some = is_flat ? 1 : many - i < AT_ONCE ? many - i : AT_ONCE;
                write_run(p, corners, down, is_flat ? 0 : at + i * spacing, some, side, out);
            }
        }
    }
}

static long check_pixels(const pixels *p, long all) {
    const long *const held = p->held;
    POSSIBLE(p->count >= 0 && p->batch >= 0 && p->height > 0 && p->width > 0 && p->channels > 0 && p->spacing > 0);
    if (!held) return FITS;
    NEEDS(held, 0, product_of(p->count, p->channels), element);
    NEEDS(held, 1, all, int32_t);
    NEEDS(held, 2, all, int8_t);
    const long many = held[3] / (long)sizeof *p->sides;
    for (long i = 0; i < many; i++) POSSIBLE(p->sides[i] > 0);
    POSSIBLE(many > 0 && many < 128 && highest_level(p->levels, all) < many);
    POSSIBLE(largest_of(p->index, all) < p->count);
    const long lines = (p->height + p->spacing - 1) / p->spacing, columns = (p->width + p->spacing - 1) / p->spacing;
    NEEDS(held, 4, product_of(product_of(p->batch, lines), product_of(columns, p->channels)), element);
    return FITS;
}

long SUFFIX(read_pixels)(const pixels *p) {
    const long all = product_of(p->batch, product_of(p->height, p->width));
    if (!all) return FITS;
    RETURN_UNLESS_FITS(check_pixels(p, all));
    const long lines = (p->height + p->spacing - 1) / p->spacing;
    const long bytes = p->width / p->spacing * p->channels * sizeof(element);
    cadsurgery_share(p->batch * lines, rows_at_once(bytes), read_lines, (void *)p);
    return FITS;
}
