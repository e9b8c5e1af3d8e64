/* Convolutions as matrix products that read their rows in place, without gathering them.
 *
 * Tiles and packed weights follow XNNPACK's indirect convolution: pointers to rows instead of copies.
 */
#include "parallel.h"
#include "product.h"

#define GIVEN element
#define PACKED element
#include "pack.h"

enum { BLOCK = 16 * ROWS, DEPTH = 512 * SIDE };

long SUFFIX(pack_product)(const unpacked *from, const void *const *constants, char *to, long *bytes) {
    return pack_chunks(from, CHUNK, SIDE, 1, constants, 1, sizeof(sum), to, bytes);
}

typedef struct {
    const reading *in;
    const element *weight, *more;
    const sum *bias;
    element *out;
    long groups, outputs; /* outputs per group */
    sum low, high;
} product;

static int is_all_zero(const element *values, long count) {
    for (long i = 0; i < count; i++)
        if (values[i] != 0) return 0;
    return 1;
}

/* Zero times a weight that is no finite number is no number. */
static int are_finite(const element *values, long count) {
#ifdef BF16
    int others = 0;
#pragma omp simd reduction(| : others)
    for (long i = 0; i < count; i++) others |= (values[i] & 0x7f80) == 0x7f80;
    return !others;
#else
    element total = 0;
#pragma omp simd reduction(+ : total)
    for (long i = 0; i < count; i++) total += 0 * values[i];
    return total == 0;
#endif
}

/* Compute blocks begin..end of rows, for all groups and outputs. */
static void multiply_blocks(long begin, long end, void *work) {
    const product *p = work;
    const reading *in = p->in;
    const long channels = in->channels, padded = (channels + SIDE - 1) / SIDE * SIDE, all = p->groups * p->outputs;
    const long chunks = (p->outputs + CHUNK - 1) / CHUNK;
    sum sums[BLOCK * CHUNK] __attribute__((aligned(64)));
    const int skips = in->table && is_all_zero(in->outside, p->groups * channels);
    for (long first = begin * BLOCK; first < end * BLOCK && first < in->n; first += BLOCK) {
        const long count = in->n - first < BLOCK ? in->n - first : BLOCK;
        for (long part = 0; part < p->groups * chunks; part++) {
            const long group = part / chunks, chunk = part % chunks, shift = group * channels;
            const long some = p->outputs - chunk * CHUNK < CHUNK ? p->outputs - chunk * CHUNK : CHUNK;
            const long wide = (some + LANES - 1) / LANES, place = group * p->outputs + chunk * CHUNK;
            const element *weight = p->weight + part * in->taps * padded * CHUNK;
            const sum *bias = p->bias + part * CHUNK;
            finish f = {p->more, p->out + first * all + place, all, all_lanes(p->low), all_lanes(p->high)};
            if (f.more) f.more += first * all + place;
            long done = 0; /* finished rows of the block */
            if (in->taps <= TAPS && in->taps * channels <= DEPTH)
                for (; done + ROWS <= count; done += ROWS) {
                    const element *a[TAPS * ROWS];
                    const factors x = {a, weight, in->taps, channels, padded};
                    for (long tap = 0; tap < in->taps; tap++)
                        for (int i = 0; i < ROWS; i++) a[tap * ROWS + i] = row_of_tap(in, first + done + i, tap) + shift;
                    multiply_once(&x, bias, &f, done, some);
                }
            for (long i = done; i < (count + ROWS - 1) / ROWS * ROWS; i++)
                memcpy(sums + i * CHUNK, bias, CHUNK * sizeof(sum));
            for (long from = 0; from < channels; from += DEPTH)
                for (long tap = 0; tap < in->taps; tap++) {
                    const long depth = channels - from < DEPTH ? channels - from : DEPTH;
                    const element *b = weight + (tap * padded + from) * CHUNK;
                    int skips_tap = -1; /* not known yet */
                    for (long tile = done; tile < count; tile += ROWS) {
                        const element *a[ROWS], *const outside = in->outside + shift + from;
                        int reads = !skips;
                        for (int i = 0; i < ROWS; i++) {
                            const long at = first + (tile + i < count ? tile + i : count - 1);
                            a[i] = row_of_tap(in, at, tap) + shift + from;
                            reads |= a[i] != outside;
                        }
                        if (!reads && skips_tap < 0) skips_tap = are_finite(b, (depth + SIDE - 1) / SIDE * SIDE * CHUNK);
                        if (!reads && skips_tap) continue; /* all outside, where everything is zero */
                        multiply(a, depth, b, sums + tile * CHUNK, wide);
                    }
                }
            for (long i = done; i < count; i++)
                for (long j = 0; j < some; j += LANES)
                    finish_some(&f, load_some_sums(sums + i * CHUNK + j, LANES), i, j, some - j);
        }
    }
}

static long check(const reading *in, const element *more, long groups, long outputs) {
    POSSIBLE(groups > 0 && outputs > 0);
    const long padded = padded_to(in->channels, SIDE), chunks = padded_to(outputs, CHUNK), all = product_of(groups, outputs);
    const long results = product_of(in->n, all);
    CHECK_READING(in, product_of(groups, in->channels), element);
    NEEDS(in->held, OWN, product_of(product_of(groups, chunks), product_of(in->taps, padded)), element);
    NEEDS(in->held, OWN + 1, product_of(groups, chunks), sum);
    NEEDS_IF(more, in->held, OWN + 2, results, element);
    NEEDS(in->held, OWN + 3, results, element);
    return FITS;
}

/* Grouped convolution with `in->channels` input channels per group. out (n, groups * outputs) is clamped to low..high after
 * `more`, if given, is added. weight is (groups, chunks, taps, channels, CHUNK), or (groups, chunks, taps, channels / 2,
 * CHUNK, 2) for pairs of channels, with a zero beside an odd last channel. bias is (groups, chunks * CHUNK). Outputs of a
 * group are padded to whole chunks.
 *
 * Rows are processed in blocks, so that the values read by a block's taps stay in the cache beside the weights of one tap,
 * one chunk of outputs and DEPTH channels. A tap that is outside for all rows of a tile is skipped if zero lies there, as in
 * layers whose dilation is half as large as the map. Without a table each row reads itself, with one tap. */
long SUFFIX(product)(const reading *in, const element *weight, const sum *bias, const element *more, element *out, long groups,
                     long outputs, double low, double high) {
    product p = {in, weight, more, bias, out, groups, outputs, (sum)low, (sum)high};
    RETURN_UNLESS_FITS(check(in, more, groups, outputs));
    cadsurgery_share((in->n + BLOCK - 1) / BLOCK, 1, multiply_blocks, &p);
    return FITS;
}
