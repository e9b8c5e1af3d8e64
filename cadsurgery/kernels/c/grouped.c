/* Grouped convolutions with fewer channels per group than a vector has lanes, including depthwise convolutions. */
#include "pairs.h"
#include "parallel.h"

#include "pack.h"

#ifdef BYTES
typedef int8_t given;
enum { TILE = 4, MOST_GROUP = 1 }; /* sums of larger groups may not be exact */
#else
typedef element given;
enum { TILE = 4, MOST_GROUP = VECTOR / 8 };
#endif

INLINE sum in_sums(given value) {
#ifdef BF16
    return widened(value);
#else
    return value;
#endif
}

long SUFFIX(pack_grouped)(const unpacked *from, const void *const *constants, char *to, long *bytes) {
    const long group = from->channels, all = from->groups * group, padded = rounded_up(all, LANES), taps = from->taps;
    if (from->groups == 1 || from->outputs != group || group > MOST_GROUP || group & (group - 1) || taps > TAPS || taps < 1) return NOT_TAKEN;
    CHECK_UNPACKED(from, sizeof(given), to ? 1 : 0, sizeof(sum));
    if (to && *bytes < taps * group * padded * (long)sizeof(sum)) return IMPOSSIBLE;
    for (long place = 0; to && place < taps * group * padded; place++) {
        const long output = place % padded, input = place / padded % group, tap = place / padded / group;
        if (output >= all) continue;
        ((sum *)to)[place] = in_sums(((const given *)from->data)[index_of(from, output / group, output % group, input, tap)]);
    }
    const unpacked flat = {.groups = 1, .outputs = all};
    return pack_constants(&flat, constants, 1, sizeof(sum), padded, taps * group * padded * (long)sizeof(sum), to, bytes);
}

typedef struct {
    const reading *in;
    const sum *weight, *bias; /* (taps, group, padded) and (padded); padded: channels rounded up to whole vectors */
    const sum *scale, *shift; /* (channels), or null */
    const element *more;
    element *out;
    sum low, high;
} grouped;

/* Apply scale, shift and residual to the sums of `some` channels of element `at`, from `start` on. */
INLINE lane follow(const grouped *g, lane value, long at, long start, long channels, long some) {
    if (g->scale) value = value * load_some_sums(g->scale + start, some) + load_some_sums(g->shift + start, some);
    if (g->more) value += load_some(g->more + at * channels + start, some);
    return clamp(value, all_lanes(g->low), all_lanes(g->high));
}

INLINE lane permute(lane value, mask which) {
#if VECTOR == 64 && defined(WIDE)
    return (lane)_mm512_permutexvar_pd((__m512i)which, (__m512d)value);
#elif VECTOR == 64
    return (lane)_mm512_permutexvar_ps((__m512i)which, (__m512)value);
#elif VECTOR == 32 && !defined(WIDE)
    return (lane)_mm256_permutevar8x32_ps((__m256)value, (__m256i)which);
#elif defined(__clang__)
    lane result;
    for (int l = 0; l < LANES; l++) result[l] = value[which[l]];
    return result;
#else
    return __builtin_shuffle(value, which);
#endif
}

/* Convolve one tile of elements, `wide` vectors of channels from `start` on. `group` (channels per group), `wide` and
 * `whole` (no vector extends beyond the last channel) are constants after inlining, so that sums stay in registers. */
INLINE void convolve(const grouped *g, const mask *spread, const element *const (*from)[TAPS], long tile, long start,
                     const long group, const int wide, const int whole) {
    const reading *in = g->in;
    const long channels = in->channels, padded = (channels + LANES - 1) / LANES * LANES;
    lane result[TILE][2];
#pragma GCC unroll 4
    for (int i = 0; i < TILE; i++)
#pragma GCC unroll 2
        for (int v = 0; v < wide; v++) memcpy(&result[i][v], g->bias + start + v * LANES, sizeof(lane));
    for (long tap = 0; tap < in->taps; tap++) {
        const sum *w = g->weight + tap * group * padded + start;
        lane read[TILE][2];
#pragma GCC unroll 4
        for (int i = 0; i < TILE; i++)
#pragma GCC unroll 2
            for (int v = 0; v < wide; v++) {
                const element *source = from[i][tap] + start + v * LANES;
                read[i][v] = whole ? load(source) : load_some(source, channels - start);
            }
        for (long input = 0; input < group; input++) {
#pragma GCC unroll 2
            for (int v = 0; v < wide; v++) {
                lane by;
                memcpy(&by, w + input * padded + v * LANES, sizeof by);
#pragma GCC unroll 4
                for (int i = 0; i < TILE; i++)
                    result[i][v] += by * (group == 1 ? read[i][v] : permute(read[i][v], spread[input]));
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < TILE; i++)
#pragma GCC unroll 2
        for (int v = 0; v < wide; v++) {
            const long at = tile + i, first = start + v * LANES, some = whole ? LANES : channels - start;
            if (at < in->n)
                store_some(g->out + at * channels + first, follow(g, result[i][v], at, first, channels, some), some);
        }
}

INLINE void convolve_tiles(const grouped *g, long begin, long end, const long group) {
    const reading *in = g->in;
    const long channels = in->channels;
    mask spread[LANES]; /* spread[input][l]: the lane of this input channel in the group of lane l */
    for (long input = 0; input < LANES; input++)
        for (long l = 0; l < LANES; l++) spread[input][l] = l / group * group + input;
    for (long tile = begin * TILE; tile < end * TILE && tile < in->n; tile += TILE) {
        const element *from[TILE][TAPS];
        for (int i = 0; i < TILE; i++) {
            const int32_t *entries = in->table + (tile + i < in->n ? tile + i : in->n - 1) * in->taps;
            for (long tap = 0; tap < in->taps; tap++) from[i][tap] = row(in, entries[tap]);
        }
        long start = 0;
        /* without shuffles, two vectors at once: enough independent sums to hide the latency */
        if (group == 1)
            for (; start + 2 * LANES <= channels; start += 2 * LANES) convolve(g, spread, from, tile, start, group, 2, 1);
        for (; start + LANES <= channels; start += LANES) convolve(g, spread, from, tile, start, group, 1, 1);
        if (start < channels) convolve(g, spread, from, tile, start, group, 1, 0);
    }
}

#define TILES_OF(group)                                                                  \
    static void tiles_of_##group(long begin, long end, void *work) { convolve_tiles(work, begin, end, group); }
TILES_OF(1)
#ifndef BYTES
TILES_OF(2)
#if VECTOR > 16
TILES_OF(4)
#endif
#if VECTOR > 32
TILES_OF(8)
#endif
#endif

/* `factors`: the number of buffers between the bias and what is added, scale and shift or none. */
static long check(const reading *in, const element *more, long padded, long weights, long size, long factors) {
    const long results = product_of(in->n, in->channels);
    POSSIBLE(in->taps > 0 && in->channels > 0);
    CHECK_READING(in, in->channels, element);
    NEEDS(in->held, OWN, product_of(weights, size), char);
    NEEDS(in->held, OWN + 1, padded, sum);
    NEEDS_IF(more, in->held, OWN + 2 + factors, results, element);
    NEEDS(in->held, OWN + 3 + factors, results, element);
    return FITS;
}

/* Convolution in groups of `group` input and output channels (a power of two up to MOST_GROUP; `product` handles larger
 * groups), clamped to low..high. out is (n, channels); scale, shift and `more`, if given, are applied to the sums before
 * clamping. taps <= TAPS. */
long SUFFIX(grouped)(const reading *in, const sum *weight, const sum *bias, const sum *scale, const sum *shift,
                     const element *more, element *out, long group, double low, double high) {
    grouped g = {in, weight, bias, scale, shift, more, out, (sum)low, (sum)high};
    share_body body = tiles_of_1;
    POSSIBLE(group > 0 && group <= MOST_GROUP && !(group & (group - 1)) && in->channels % group == 0 && in->taps <= TAPS);
    const long padded = padded_to(in->channels, LANES), weights = product_of(product_of(in->taps, group), padded);
    RETURN_UNLESS_FITS(check(in, more, padded, weights, sizeof(sum), 2));
    NEEDS_IF(scale, in->held, OWN + 2, in->channels, sum);
    NEEDS_IF(shift, in->held, OWN + 3, in->channels, sum);
#ifndef BYTES
    if (group == 2) body = tiles_of_2;
#if VECTOR > 16
    if (group == 4) body = tiles_of_4;
#endif
#if VECTOR > 32
    if (group == 8) body = tiles_of_8;
#endif
#endif
    const long tiles = (in->n + TILE - 1) / TILE;
    cadsurgery_share(tiles, rows_at_once(TILE * in->taps * in->channels * sizeof(element)), body, &g);
    return FITS;
}

#if defined(PAIRS) && VECTOR == 64
enum { NEAR = 576 };

long SUFFIX(pack_depthwise)(const unpacked *from, const void *const *constants, char *to, long *bytes) {
    const long channels = from->groups, padded = rounded_up(channels, MANY), span = rounded_up(from->taps, 2);
    if (from->outputs != 1 || from->channels != 1) return NOT_TAKEN;
    CHECK_UNPACKED(from, sizeof(element), to ? 1 : 0, sizeof(sum));
    if (to && *bytes < padded * span * (long)sizeof(element)) return IMPOSSIBLE;
    for (long channel = 0; to && channel < channels; channel++) {
        const long part = channel % MANY / (MANY / 8), lane = part % 2 * 4 * (MANY / 8) + part / 2 * (MANY / 8) + channel % (MANY / 8);
        for (long tap = 0; tap < from->taps; tap++)
            ((element *)to)[channel / MANY * MANY * span + (tap / 2 * MANY + lane) * 2 + tap % 2] =
                ((const element *)from->data)[index_of(from, channel, 0, 0, tap)];
    }
    const unpacked flat = {.groups = 1, .outputs = channels};
    return pack_constants(&flat, constants, 1, sizeof(sum), padded, padded * span * (long)sizeof(element), to, bytes);
}

typedef struct {
    const reading *in;
    const element *weight, *more;
    const sum *bias;
    element *out;
    lane least, most;
} depthwise;

static void convolve_near(long from_block, long to_block, void *work) {
    const depthwise *d = work;
    const reading *in = d->in;
    const long channels = in->channels, taps = in->taps, block = NEAR / taps, step = (taps + 1) / 2 * 2 * MANY;
    const int plain = !d->more;
    for (long begin = from_block * block; begin < to_block * block && begin < in->n; begin += block) {
        const element *from[NEAR];
        const int32_t *entries = in->table + begin * taps;
        const long many = in->n - begin < block ? in->n - begin : block;
        for (long i = 0; i < many * taps; i++) from[i] = row(in, entries[i]);
        for (long start = 0; start < channels; start += MANY) {
            const element *w = d->weight + start / MANY * step;
#define PAIRS_OF(taps, whole, plain)                                                                                    \
    convolve_pairs(d->more, d->out, d->least, d->most, d->bias, w, from, begin, many, channels, start, taps, whole, plain)
            const int whole = channels - start >= MANY;
            if (whole && taps == 9 && plain) PAIRS_OF(9, 1, 1);
            else if (whole && taps == 9) PAIRS_OF(9, 1, 0);
            else if (whole && plain) PAIRS_OF(taps, 1, 1);
            else if (whole) PAIRS_OF(taps, 1, 0);
            else PAIRS_OF(taps, 0, 0);
        }
    }
}

/* Like `grouped` for groups of one channel, two taps of MANY channels at once. weight is (chunks of channels, pairs of
 * taps, 2, MANY / 2, 2) in the order of `convolve_pairs`, padded with zeros after the last tap and channel; bias is
 * (chunks * MANY).
 *
 * A few elements are processed together, one chunk of channels after the other, so that the values they share stay in the
 * L1 cache. */
long SUFFIX(depthwise)(const reading *in, const element *weight, const sum *bias, const element *more, element *out, double low,
                       double high) {
    depthwise d = {in, weight, more, bias, out, all_lanes((sum)low), all_lanes((sum)high)};
    POSSIBLE(in->taps > 0 && in->taps <= NEAR);
    const long padded = padded_to(in->channels, MANY), block = NEAR / in->taps;
    RETURN_UNLESS_FITS(check(in, more, padded, product_of(padded, padded_to(in->taps, 2)), sizeof(element), 0));
    cadsurgery_share((in->n + block - 1) / block, 1, convolve_near, &d);
    return FITS;
}
#endif
