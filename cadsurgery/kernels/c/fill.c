/* Maps of one resolution, some of whose positions were computed: the others are filled from those around. */
#include "parallel.h"
#include "vector.h"

typedef struct {
    const reading *in;
    const uint8_t *there;
    const int32_t *index;
    const sum *shares, *weight;
    long side, height, width;
    double least;
    const element *floor, *more;
    element *out;
    sum heaviest[32]; /* weight of each ring */
    lane bottom, top;
} filling;

/* Shares that are left out: in float some may change the result in its sixth digit, in double none does. */
static const sum negligible = sizeof(sum) == 4 ? 2e-6 : 2.8e-17;

static void fill_positions(long begin, long end, void *work) {
    const filling *f = work;
    const reading *in = f->in;
    const uint8_t *there = f->there;
    const int32_t *index = f->index;
    const sum *shares = f->shares, *weight = f->weight, *heaviest = f->heaviest;
    const element *floor = f->floor, *more = f->more;
    element *out = f->out;
    const long channels = in->channels, side = f->side, reach = side / 2, height = f->height, width = f->width;
    const double least = f->least;
    const lane bottom = f->bottom, top = f->top;
    for (long i = begin; i < end; i++) {
        long at = in->table[i], line = at / width, x = at - line * width, y = line % height, many = 0;
        const element *from[64 + 1];
        sum mass[64 + 1], own = 0, total = 0, rest = 1;
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
                if (floor) value += rest * load_some(floor + start, some);
            }
            if (more) value += load_some(more + i * channels + start, some);
            store_some(out + i * channels + start, clamp(value, bottom, top), some);
        }
    }
}

/* Maps of one resolution, of which some positions were computed, filled from those around: see gaps.py.
 *
 * `table` (n, 1) names the positions wanted among batch * height * width; `there` tells which have a row (null: all),
 * `index` which (null: its own number), `shares` how much of a row counts (null: all of it). weight is (side, side), the
 * sum of the weights of what is there plus `least` divides them if that is not 0. What is left to 1 is `floor`, if any.
 * out is (n, channels); `more`, if any, is added before clamping to low..high. */
void SUFFIX(fill)(const reading *in, const uint8_t *there, const int32_t *index, const sum *shares, const sum *weight,
                  long side, long height, long width, double least, const element *floor, const element *more,
                  element *out, double low, double high) {
    filling f = {in, there, index, shares, weight, side, height, width, least, floor, more, out, {0},
                 all_lanes((sum)low), all_lanes((sum)high)};
    const long reach = side / 2;
    for (long v = -reach; v <= reach; v++)
        for (long u = -reach; u <= reach; u++) {
            const sum m = weight[(v + reach) * side + u + reach];
            long ring = v < 0 ? -v : v;
            if (u > ring || -u > ring) ring = u < 0 ? -u : u;
            if (m > f.heaviest[ring]) f.heaviest[ring] = m;
        }
    cadsurgery_share(in->n, 256, fill_positions, &f);
}
