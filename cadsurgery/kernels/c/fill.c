/* Fill the missing positions of maps from the computed positions around them. */
#include "parallel.h"
#include "vector.h"

enum { MOST_NEAR = 64 }; /* positions around one */

typedef struct {
    const reading *in;
    const uint8_t *there;
    const int32_t *index;
    const sum *shares, *weight;
    long side, height, width;
    double least;
    const element *baseline, *more;
    element *out;
    sum heaviest[32]; /* largest weight of each ring */
    lane bottom, top;
} filling;

/* Shares below this are skipped: in float they may change the sixth digit of the result, in double no digit. */
static const sum negligible = sizeof(sum) == 4 ? 2e-6 : 2.8e-17;

static void fill_positions(long begin, long end, void *work) {
    const filling *f = work;
    const reading *in = f->in;
    const uint8_t *there = f->there;
    const int32_t *index = f->index;
    const sum *shares = f->shares, *weight = f->weight, *heaviest = f->heaviest;
    const element *baseline = f->baseline, *more = f->more;
    element *out = f->out;
    const long channels = in->channels, side = f->side, reach = side / 2, height = f->height, width = f->width;
    const double least = f->least;
    const lane bottom = f->bottom, top = f->top;
    for (long i = begin; i < end; i++) {
        long at = in->table[i], line = at / width, x = at - line * width, y = line % height, many = 0;
        const element *from[MOST_NEAR + 1];
        sum mass[MOST_NEAR + 1], own = 0, total = 0, rest = 1;
        const element *self = 0;
        if (!there || there[at]) {
            long row_of = index ? index[at] : at;
            self = in->rows + row_of * channels;
            own = shares ? shares[row_of] : 1;
        }
        if (own < 1) {
            for (long ring = 0; ring <= reach; ring++) {
                if (heaviest[ring] < negligible * (least != 0 ? total + (sum)least : 1)) continue;
                for (long v = -ring; v <= ring; v++) {
                    if (y + v < 0 || y + v >= height) continue;
                    long step = v == -ring || v == ring || ring == 0 ? 1 : 2 * ring;
                    for (long u = -ring; u <= ring; u += step) {
                        long place = at + v * width + u;
                        if (x + u < 0 || x + u >= width || (there && !there[place])) continue;
                        long row_of = index ? index[place] : place;
                        sum m = weight[(v + reach) * side + u + reach] * (shares ? shares[row_of] : 1);
                        if (m == 0) continue;
                        from[many] = in->rows + row_of * channels;
                        mass[many++] = m;
                        total += m;
                    }
                }
            }
            sum scale = (1 - own) / (least != 0 ? total + (sum)least : 1), gone = 0;
            long kept = 0;
            for (long k = 0; k < many; k++) {
                sum m = mass[k] * scale;
                rest -= m;
                from[kept] = from[k];
                mass[kept] = m;
                if (m > negligible) kept++;
                else gone += m;
            }
            many = kept;
            if (!many) rest += gone;
            else if (gone > 0)
                for (long k = 0; k < many; k++) mass[k] *= (1 - rest) / (1 - rest - gone);
        }
        if (own > 0) {
            from[many] = self;
            mass[many++] = own;
            rest -= own;
        }
        for (long start = 0; start < channels; start += LANES) {
            long some = channels - start;
            lane value = {};
            if (own == 1) value = load_some(self + start, some);
            else {
                for (long k = 0; k < many; k++) value += mass[k] * load_some(from[k] + start, some);
                if (baseline) value += rest * load_some(baseline + start, some);
            }
            if (more) value += load_some(more + i * channels + start, some);
            store_some(out + i * channels + start, clamp(value, bottom, top), some);
        }
    }
}

/* Fill maps of one resolution from their computed positions, see gaps.py.
 *
 * `table` (n, 1) lists the positions to fill, as numbers in batch * height * width. Per position, `there` is nonzero if it
 * was computed (NULL: all were), `index` is its row (NULL: its own number) and `shares` the share of the row that counts
 * (NULL: all of it). weight is (side, side). If `least` is not 0, weights are divided by the sum of the weights of computed
 * positions plus `least`. `baseline`, if given, gets the rest of the weights up to 1. out is (n, channels); `more`, if given,
 * is added before clamping to low..high. */
long SUFFIX(fill)(const reading *in, const uint8_t *there, const int32_t *index, const sum *shares, const sum *weight,
                  long side, long height, long width, double least, const element *baseline, const element *more,
                  element *out, double low, double high) {
    filling f = {in, there, index, shares, weight, side, height, width, least, baseline, more, out, {0},
                 all_lanes((sum)low), all_lanes((sum)high)};
    const long reach = side / 2, results = product_of(in->n, in->channels), *const held = in->held;
    POSSIBLE(side > 0 && side % 2 && side <= MOST_NEAR && side * side <= MOST_NEAR && height > 0 && width > 0);
    CHECK_READING(in, in->channels, element);
    POSSIBLE(in->table && in->taps == 1 && in->stride == in->channels);
    if (held) { /* the maps that positions lie in, all of whose positions may be read */
        const long map = product_of(height, width), positions = product_of(sum_of(largest_of(in->table, in->n) / map, 1), map);
        NEEDS_IF(there, held, OWN, positions, uint8_t);
        NEEDS_IF(index, held, OWN + 1, positions, int32_t);
        POSSIBLE(index || positions <= in->count);
    }
    NEEDS_IF(shares, held, OWN + 2, in->count, sum);
    NEEDS(held, OWN + 3, side * side, sum);
    NEEDS_IF(baseline, held, OWN + 4, in->channels, element);
    NEEDS_IF(more, held, OWN + 5, results, element);
    NEEDS(held, OWN + 6, results, element);
    for (long v = -reach; v <= reach; v++)
        for (long u = -reach; u <= reach; u++) {
            const sum m = weight[(v + reach) * side + u + reach];
            long ring = v < 0 ? -v : v;
            if (u > ring || -u > ring) ring = u < 0 ? -u : u;
            if (m > f.heaviest[ring]) f.heaviest[ring] = m;
        }
    cadsurgery_share(in->n, 256, fill_positions, &f);
    return FITS;
}
