/* Pooling: the maximum or the sum over the taps of each element. */
#include "parallel.h"
#include "vector.h"

typedef struct {
    const reading *in;
    element *out;
    long largest;
} pool;

static void pool_elements(long begin, long end, void *work) {
    const pool *p = work;
    const reading *in = p->in;
    for (long e = begin; e < end; e++) {
        const int32_t *entries = in->table + e * in->taps;
        for (long start = 0; start < in->channels; start += LANES) {
            const long some = in->channels - start;
            lane result = load_some(row(in, entries[0]) + start, some);
            for (long tap = 1; tap < in->taps; tap++) {
                const lane value = load_some(row(in, entries[tap]) + start, some);
                if (p->largest) result = choose((value > result) | (value != value), value, result);
                else result += value;
            }
            store_some(p->out + e * in->channels + start, result, some);
        }
    }
}

/* Maximum (largest != 0) or sum over the taps: out is (n, channels). */
long SUFFIX(pool)(const reading *in, element *out, long largest) {
    pool p = {in, out, largest};
    CHECK_READING(in, in->channels, element);
    POSSIBLE(in->table);
    NEEDS(in->held, OWN, product_of(in->n, in->channels), element);
    cadsurgery_share(in->n, rows_at_once(in->taps * in->channels * sizeof(element)), pool_elements, &p);
    return FITS;
}
