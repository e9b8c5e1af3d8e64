/* Pooling: the maximum or the sum over the taps of each element. */
#include "parallel.h"
#include "vector.h"

typedef struct {
    const reading *in;
    element *out;
    long largest;
} pool;

#ifdef BYTES
/* Maximum of whole byte vectors: it needs no widening to sums. */
static void largest_bytes(const reading *in, const int32_t *entries, uint8_t *out) {
    typedef uint8_t many __attribute__((vector_size(VECTOR)));
    for (long start = 0; start < in->channels; start += sizeof(many)) {
        const long some = in->channels - start < (long)sizeof(many) ? in->channels - start : (long)sizeof(many);
        many result = {};
        for (long tap = 0; tap < in->taps; tap++) {
            many value = {};
            const uint8_t *from = row(in, entries[tap]) + start;
            if (some == sizeof(many)) memcpy(&value, from, sizeof value);
            else memcpy(&value, from, some);
            many is_larger = (many)(value > result);
            result = (is_larger & value) | (~is_larger & result);
        }
        memcpy(out + start, &result, some);
    }
}
#endif

static void pool_elements(long begin, long end, void *work) {
    const pool *p = work;
    const reading *in = p->in;
    for (long e = begin; e < end; e++) {
        const int32_t *entries = in->table + e * in->taps;
#ifdef BYTES
        if (p->largest) {
            largest_bytes(in, entries, p->out + e * in->channels);
            continue;
        }
#endif
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
