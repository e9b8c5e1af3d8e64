/* Rows that are copied and mixed: gathering, halos, interpolation along lines. */
#include "parallel.h"
#include "vector.h"

typedef struct {
    const reading *in;
    const int32_t *sources;
    const sum *mix;
    long many;
    element *out;
} move;

static void gather_entries(long begin, long end, void *work) {
    const move *m = work;
    const reading *in = m->in;
    for (long i = begin; i < end; i++)
        memcpy(m->out + i * in->channels, row(in, in->table[i]), in->channels * sizeof(element));
}

/* Rows of all taps side by side: out is (n, taps, channels). */
void SUFFIX(gather)(const reading *in, element *out) {
    move m = {in, 0, 0, 0, out};
    cadsurgery_share(in->n * in->taps, rows_at_once(in->channels * sizeof(element)), gather_entries, &m);
}

/* `many` is a constant where this is inlined, so that places and shares stay in registers. */
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
    if (many > MOST) { /* more than fit: in the order of the others, vector by vector */
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

/* Weighted sums of rows: out[i] = sum over `taps` of mix[i] times the rows its table names; out is (n, channels). */
void SUFFIX(mix)(const reading *in, const sum *mix, element *out) {
    move m = {in, 0, mix, 0, out};
    cadsurgery_share(in->n, rows_at_once(in->taps * in->channels * sizeof(element)), mix_rows, &m);
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

/* `gather` of one tap without a halo in memory: its rows, `many` of `sources` weighted by `mix`, are summed where they
 * are read. Fewer passes over memory than with a halo, if each is read once. */
void SUFFIX(gather_mixing)(const reading *in, const int32_t *sources, const sum *mix, long many, element *out) {
    move m = {in, sources, mix, many, out};
    cadsurgery_share(in->n, rows_at_once(in->channels * sizeof(element)), gather_or_mix, &m);
}

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

/* `mix` of two rows, of every line of a map alike: the rows are the first of `lines` lines, of count rows each; out is
 * (lines, n, channels). Whole vectors are read and written wherever what lies behind a row belongs to the line: what is
 * written too much there is written again. */
void SUFFIX(mix_lines)(const reading *in, const sum *mix, long lines, element *out) {
    move m = {in, 0, mix, 0, out};
    cadsurgery_share(lines, rows_at_once(in->n * in->channels * sizeof(element)) / 4, mix_line, &m);
}
