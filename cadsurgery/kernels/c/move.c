/* Copy rows and weighted sums of rows: halos, interpolation along lines. */
#include "parallel.h"
#include "vector.h"

typedef struct {
    const reading *in;
    const int32_t *sources;
    const sum *mix;
    long many;
    element *out;
} move;

/* `many` is a constant after inlining, so that pointers and shares stay in registers. */
INLINE void mix_known(const element *const *from, const sum *share, long channels, element *out, const long many) {
    for (long start = 0; start < channels; start += LANES) {
        const long some = channels - start;
        lane total = {};
        if (some >= LANES)
            for (long i = 0; i < many; i++) total += share[i] * load(from[i] + start);
        else
            for (long i = 0; i < many; i++) total += share[i] * load_some(from[i] + start, some);
        store_some(out + start, total, some);
    }
}

static inline void mix_row(const reading *in, const int32_t *entries, const sum *shares, long many, element *out) {
    enum { MOST = 64 };
    const element *from[MOST];
    sum share[MOST];
    long kept = 0;
    if (many > MOST) { /* too many for registers: the same order of sums, vector by vector */
        for (long start = 0; start < in->channels; start += LANES) {
            const long some = in->channels - start;
            lane total = {};
            for (long i = 0; i < many; i++)
                if (shares[i] != 0) total += shares[i] * load_some(row(in, entries[i]) + start, some);
            store_some(out + start, total, some);
        }
        return;
    }
    for (long i = 0; i < many; i++)
        if (shares[i] != 0) from[kept] = row(in, entries[i]), share[kept++] = shares[i];
    if (kept == 4) mix_known(from, share, in->channels, out, 4);
    else if (kept == 2) mix_known(from, share, in->channels, out, 2);
    else mix_known(from, share, in->channels, out, kept);
}

static void mix_rows(long begin, long end, void *work) {
    const move *m = work;
    const reading *in = m->in;
    for (long i = begin; i < end; i++)
        mix_row(in, in->table + i * in->taps, m->mix + i * in->taps, in->taps, m->out + i * in->channels);
}

/* Weighted sums of rows: out[i] = sum over taps of mix[i, tap] times row table[i, tap]; out is (n, channels). */
long SUFFIX(mix)(const reading *in, const sum *mix, element *out) {
    move m = {in, 0, mix, 0, out};
    CHECK_READING(in, in->channels, element);
    POSSIBLE(in->table);
    NEEDS(in->held, OWN, product_of(in->n, in->taps), sum);
    NEEDS(in->held, OWN + 1, product_of(in->n, in->channels), element);
    cadsurgery_share(in->n, rows_at_once(in->taps * in->channels * sizeof(element)), mix_rows, &m);
    return FITS;
}

static void gather_or_mix(long begin, long end, void *work) {
    const move *m = work;
    const reading *in = m->in;
    for (long i = begin; i < end; i++) {
        const long halo = in->table[i] - in->count - 1;
        element *to = m->out + i * in->channels;
        if (halo < 0) memcpy(to, row(in, in->table[i]), in->channels * sizeof(element));
        else mix_row(in, m->sources + halo * m->many, m->mix + halo * m->many, m->many, to);
    }
}

/* Copy the rows of the table's only tap; out is (n, channels). Each halo row, a sum of `many` rows `sources` weighted by `mix`,
 * is computed when it is read: this takes fewer passes over memory than a halo that is written first, if each is read once. */
long SUFFIX(gather_mixing)(const reading *in, const int32_t *sources, const sum *mix, long many, element *out) {
    move m = {in, sources, mix, many, out};
    CHECK_READING(in, in->channels, element);
    POSSIBLE(in->table && in->taps == 1 && many >= 0);
    if (in->held) { /* of the halo as many rows are read as the table names */
        const long halo = largest_of(in->table, in->n) - in->count, named = halo < 0 ? 0 : product_of(halo, many);
        NEEDS(in->held, OWN, named, int32_t);
        NEEDS(in->held, OWN + 1, named, sum);
    }
    NEEDS(in->held, OWN + 2, product_of(in->n, in->channels), element);
    cadsurgery_share(in->n, rows_at_once(in->channels * sizeof(element)), gather_or_mix, &m);
    return FITS;
}

#ifndef BYTES /* maps are interpolated in floats */
static void mix_line(long begin, long end, void *work) {
    const move *m = work;
    const reading *in = m->in;
    const long channels = in->channels, behind = (LANES - 1) / channels + 1;
    for (long line = begin; line < end; line++) {
        const element *rows = in->rows + line * in->count * channels;
        for (long i = 0; i < in->n; i++) {
            const int32_t first = in->table[2 * i], second = in->table[2 * i + 1];
            const element *a = rows + first * channels, *b = rows + second * channels;
            element *to = m->out + (line * in->n + i) * channels;
            const sum near = m->mix[2 * i], far = m->mix[2 * i + 1];
            const long last = first > second ? first : second;
            if (last + behind < in->count && i + behind < in->n)
                for (long c = 0; c < channels; c += LANES)
                    store_some(to + c, near * load(a + c) + far * load(b + c), LANES);
            else
                for (long c = 0; c < channels; c += LANES) {
                    const long some = channels - c;
                    store_some(to + c, near * load_some(a + c, some) + far * load_some(b + c, some), some);
                }
        }
    }
}

/* `mix` for two rows, with the same table for each of `lines` lines of count rows; out is (lines, n, channels). Whole vectors
 * are read and written as long as they stay within the line: values written beyond a row are overwritten by the next row. */
long SUFFIX(mix_lines)(const reading *in, const sum *mix, long lines, element *out) {
    move m = {in, 0, mix, 0, out};
    POSSIBLE(lines >= 0 && in->count >= 0 && in->n >= 0 && in->channels > 0 && in->taps == 2);
    if (!lines || !in->n) return FITS;
    NEEDS(in->held, OF_ROWS, product_of(product_of(lines, in->count), in->channels), element);
    NEEDS(in->held, OF_TABLE, product_of(in->n, 2), int32_t);
    NEEDS(in->held, OWN, product_of(in->n, 2), sum);
    NEEDS(in->held, OWN + 1, product_of(product_of(lines, in->n), in->channels), element);
    cadsurgery_share(lines, rows_at_once(in->n * in->channels * sizeof(element)) / 4, mix_line, &m);
    return FITS;
}
#endif
