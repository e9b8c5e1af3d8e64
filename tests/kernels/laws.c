/* The laws of the compiled kernels as a program of its own, for processors on which torch does not run here.
 *
 * test_forms.py compiles this file once for each form, with the flags by which the form itself is named (-DSUFFIX(name)=...
 * and the element type) and -DOF_product, -DOF_grouped, ... for the files that the form consists of, and links it with
 * them. Each law fills buffers with pseudo-random numbers, calls a kernel and compares the result with a plain loop in
 * double precision. The program prints a line per law, and its exit status is 1 if one of them does not hold.
 *
 * Every buffer ends where a page that must not be touched begins, so that reading or writing behind a row is noticed.
 * Structures are declared here as Python declares them, not taken from the kernels' headers, but for those that only C
 * declares.
 */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define COUNT(array) ((long)(sizeof(array) / sizeof(array)[0]))
#define HELPER static inline __attribute__((unused)) /* not every form needs it */

#if defined(BF16)
typedef uint16_t element;
typedef float sum;
#elif defined(ELEMENT)
typedef ELEMENT element;
typedef ELEMENT sum;
#else
typedef uint8_t element;
typedef float sum;
#endif

typedef struct {
    const element *rows, *halo, *outside;
    const int32_t *table;
    long count, n, taps, channels, stride;
    const long *held; /* NULL: these laws call as an engine does, which has checked its tensors */
} reading;

typedef struct {
    const void *data;
    long groups, outputs, channels, taps, next_group, next_output, next_channel, next_tap;
    const long *held;
} unpacked;
typedef long pack(const unpacked *, const void *const *, char *, long *);

/* -- buffers, numbers, comparisons ---------------------------------------------------------------------------------- */

static struct {
    void *begin;
    size_t bytes;
} buffers[64];
static long buffer_count;

/* Memory for `count` values of `size` bytes that ends at a page which nothing may touch. */
static void *memory(long count, size_t size) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), needed = (size_t)count * size;
    const size_t usable = (needed + page - 1) / page * page + page;
    char *begin = mmap(NULL, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED || mprotect(begin + usable, page, PROT_NONE) != 0 || buffer_count == COUNT(buffers)) {
        perror("no memory");
        exit(2);
    }
    buffers[buffer_count].begin = begin;
    buffers[buffer_count++].bytes = usable + page;
    memset(begin, 0x5a, usable);
    return begin + usable - needed;
}

#define NEW(type, count) ((type *)memory(count, sizeof(type)))

static void free_all(void) {
    while (buffer_count) {
        buffer_count--;
        munmap(buffers[buffer_count].begin, buffers[buffer_count].bytes);
    }
}

typedef struct {
    void *weights, *constants; /* NULL if the form does not take such weights */
    long bytes_of_constants;
} packed;

/* Pack weights (groups * outputs, channels, taps) and constants of each output, each in memory of its own. */
HELPER packed pack_by(pack *by, const void *weights, long groups, long outputs, long channels, long taps,
                      const void *const *constants) {
    const unpacked from = {weights, groups, outputs, channels, taps, outputs * channels * taps, channels * taps, taps, 1, NULL};
    long bytes;
    const long first = by(&from, constants, NULL, &bytes);
    if (first < 0) return (packed){NULL, NULL, 0};
    char *all = memory(bytes, 1);
    memset(all, 0, (size_t)bytes);
    by(&from, constants, all, &bytes);
    packed to = {memory(first, 1), memory(bytes - first, 1), bytes - first};
    memcpy(to.weights, all, (size_t)first), memcpy(to.constants, all + first, (size_t)to.bytes_of_constants);
    return to;
}

static uint64_t state = 88172645463325252ull;

static uint64_t draw(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state >> 11;
}

static long below(long limit) { return (long)(draw() % (uint64_t)limit); }

HELPER double between(double low, double high) { return low + (high - low) * ((double)draw() / 9007199254740992.0); }

HELPER double value_of(element from) {
#if defined(BF16)
    const uint32_t bits = (uint32_t)from << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#else
    return from;
#endif
}

HELPER element element_of(double from) {
#if defined(BF16)
    const float value = (float)from;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#else
    return (element)from;
#endif
}

HELPER element random_element(void) {
#if defined(BF16) || defined(ELEMENT)
    return element_of(between(-1, 1));
#else
    return (element)below(256);
#endif
}

HELPER const element *elements(long count) {
    element *all = NEW(element, count);
    for (long i = 0; i < count; i++) all[i] = random_element();
    return all;
}

HELPER const sum *sums(long count, double low, double high) {
    sum *all = NEW(sum, count);
    for (long i = 0; i < count; i++) all[i] = (sum)between(low, high);
    return all;
}

static int has_failed, fails;
static long compared;

/* Compares a value with the expected one; `terms` is the sum of the magnitudes of all that was added. */
HELPER void check(const char *what, double found, double expected, double terms) {
    double allowed = (sizeof(sum) == 8 ? 1e-14 : 4e-6) * terms;
#if defined(BF16)
    allowed += fabs(expected) / 256;
#elif !defined(ELEMENT)
    allowed += 0.5;
#endif
    compared++;
    if (isnan(found) && isnan(expected)) return;
    if (fabs(found - expected) <= allowed) return;
    if (!fails++) printf("  %s: found %.17g, expected %.17g, allowed is a difference of %g\n", what, found, expected, allowed);
}

HELPER void check_exactly(const char *what, double found, double expected) {
    compared++;
    if (found == expected || (isnan(found) && isnan(expected))) return;
    if (!fails++) printf("  %s: found %.17g, expected %.17g\n", what, found, expected);
}

static void end_law(const char *name) {
    printf("%s %s: %ld values, %d wrong\n", fails ? "FAILED" : "ok", name, compared, fails);
    has_failed |= fails > 0;
    fails = 0, compared = 0;
}

/* Rows, one value of which is not a number where there are such, a halo, what lies outside and a table that reads them
 * all; `all` channels to a row. */
HELPER reading random_reading(long count, long halo, long n, long taps, long channels, long all) {
    int32_t *table = NEW(int32_t, n * taps);
    for (long i = 0; i < n * taps; i++) table[i] = (int32_t)below(count + 1 + halo);
    element *rows = (element *)elements(count * all);
#if defined(BF16) || defined(ELEMENT)
    rows[below(count * all)] = element_of(NAN);
#endif
    return (reading){rows, elements(halo * all), elements(all), table, count, n, taps, channels, all, NULL};
}

/* Channel `c` of the row that a tap of row `i` reads. */
HELPER double read_value(const reading *in, long i, long tap, long c) {
    const long entry = in->table ? in->table[i * in->taps + tap] : i;
    if (entry < in->count) return value_of(in->rows[entry * in->stride + c]);
    if (entry == in->count) return value_of(in->outside[c]);
    return value_of(in->halo[(entry - in->count - 1) * in->stride + c]);
}

HELPER double within(double value, double low, double high) { return value < low ? low : value > high ? high : value; }

/* -- convolutions --------------------------------------------------------------------------------------------------- */

#if defined(OF_product) || defined(OF_product_tiles) || defined(OF_grouped)
/* What follows the sums of a convolution: factors, a residual. */
typedef struct {
    const sum *scale, *shift;
    const element *more;
    double low, high;
} following;

enum { WITH_MORE = 1, WITH_CLAMP = 2, WITH_SCALE = 4 };

static following random_following(long n, long outputs, int with) {
    following f = {NULL, NULL, NULL, -INFINITY, INFINITY};
    if (with & WITH_SCALE) f.scale = sums(outputs, .5, 1.5), f.shift = sums(outputs, -1, 1);
    if (with & WITH_MORE) f.more = elements(n * outputs);
    if (with & WITH_CLAMP) f.low = -.25, f.high = 1.5;
#if !defined(BF16) && !defined(ELEMENT)
    f.low = 0, f.high = 255;
#endif
    return f;
}

static void check_output(const char *what, const following *f, element found, double total, double terms, long i, long o,
                         long outputs) {
    if (f->scale) total = total * f->scale[o] + f->shift[o], terms = terms * fabs(f->scale[o]) + fabs(f->shift[o]);
    if (f->more) total += value_of(f->more[i * outputs + o]), terms += fabs(value_of(f->more[i * outputs + o]));
    check(what, value_of(found), within(total, f->low, f->high), terms);
}
#endif

#if defined(OF_product) || defined(OF_product_tiles)
pack SUFFIX(pack_product);
long SUFFIX(product)(const reading *, const element *, const sum *, const element *, element *, long, long, double, double);

static void product_law(void) {
    static const struct {
        long n, channels, outputs, groups, taps;
        int with;
    } cases[] = {
        {37, 5, 64, 1, 1, WITH_MORE | WITH_CLAMP}, {37, 33, 17, 3, 9, 0}, {205, 70, 50, 1, 9, WITH_MORE},
        {1, 9, 1, 1, 1, 0},   {100, 8, 48, 2, 4, WITH_CLAMP},  {99, 16, 33, 1, 1, WITH_CLAMP | WITH_MORE},
        {13, 1101, 35, 1, 1, WITH_MORE}, {7, 520, 6, 2, 9, 0}, {97, 31, 23, 1, 0, WITH_CLAMP},  {6, 12, 96, 1, 1, 0},
        {69, 64, 40, 1, 0, WITH_MORE}, {35, 530, 530, 1, 1, WITH_MORE | WITH_CLAMP},
        {69, 16, 24, 2, 0, WITH_MORE}, /* groups that together are as long as a tile */
    };
    for (long k = 0; k < COUNT(cases); k++) {
        const long n = cases[k].n, channels = cases[k].channels, outputs = cases[k].outputs, groups = cases[k].groups;
        const long taps = cases[k].taps ? cases[k].taps : 1, all = groups * outputs;
        reading in = random_reading(cases[k].taps ? 40 : n, cases[k].taps ? 7 : 0, n, taps, channels, channels * groups);
        if (!cases[k].taps) in.table = NULL; /* each row reads itself */
        const following f = random_following(n, all, cases[k].with);
        const element *weight = elements(all * channels * taps); /* (groups * outputs, channels, taps) */
        const sum *bias = sums(all, -1, 1);
        const packed p = pack_by(SUFFIX(pack_product), weight, groups, outputs, channels, taps, (const void *[]){bias});
        element *out = NEW(element, n * all);
        SUFFIX(product)(&in, p.weights, p.constants, f.more, out, groups, outputs, f.low, f.high);
        for (long i = 0; i < n; i++)
            for (long o = 0; o < all; o++) {
                double total = bias[o], terms = fabs(bias[o]);
                for (long tap = 0; tap < taps; tap++)
                    for (long c = 0; c < channels; c++) {
                        const double term = read_value(&in, i, tap, o / outputs * channels + c) *
                                            value_of(weight[(o * channels + c) * taps + tap]);
                        total += term, terms += fabs(term);
                    }
                check_output("product", &f, out[i * all + o], total, terms, i, o, all);
            }
        free_all();
    }
    end_law(TEXT(SUFFIX(product)));
}
#endif

#ifdef OF_grouped
pack SUFFIX(pack_grouped);
long SUFFIX(grouped)(const reading *, const sum *, const sum *, const sum *, const sum *, const element *, element *, long, double,
                     double);

static void grouped_law(void) {
    static const struct {
        long group, channels, taps;
        int with;
    } cases[] = {
        {1, 5, 1, WITH_MORE | WITH_CLAMP}, {1, 32, 9, WITH_SCALE},  {1, 77, 49, WITH_MORE | WITH_SCALE | WITH_CLAMP},
        {1, 23, 9, WITH_SCALE},            {2, 6, 9, WITH_MORE},    {2, 34, 1, WITH_SCALE | WITH_CLAMP},
        {4, 36, 9, WITH_MORE},             {8, 104, 4, WITH_SCALE | WITH_MORE},
    };
    const long n = 37;
    for (long k = 0; k < COUNT(cases); k++) {
        const long group = cases[k].group, channels = cases[k].channels, taps = cases[k].taps;
        const reading in = random_reading(40, 7, n, taps, channels, channels);
        const following f = random_following(n, channels, cases[k].with);
#ifdef BYTES
        int8_t *weight = NEW(int8_t, taps * group * channels);
        for (long i = 0; i < taps * group * channels; i++) weight[i] = (int8_t)(below(255) - 127);
#define WEIGHT(value) (value)
#else
        const element *weight = elements(taps * group * channels); /* (channels, group, taps) */
#define WEIGHT(value) value_of(value)
#endif
        const sum *bias = sums(channels, -1, 1);
        const packed p = pack_by(SUFFIX(pack_grouped), weight, channels / group, group, group, taps, (const void *[]){bias});
        if (!p.weights) continue; /* wider than a vector */
        element *out = NEW(element, n * channels);
        SUFFIX(grouped)(&in, p.weights, p.constants, f.scale, f.shift, f.more, out, group, f.low, f.high);
        for (long i = 0; i < n; i++)
            for (long o = 0; o < channels; o++) {
                double total = bias[o], terms = fabs(bias[o]);
                for (long tap = 0; tap < taps; tap++)
                    for (long c = 0; c < group; c++) {
                        const double term = read_value(&in, i, tap, o / group * group + c) * WEIGHT(weight[(o * group + c) * taps + tap]);
                        total += term, terms += fabs(term);
                    }
                check_output("grouped", &f, out[i * channels + o], total, terms, i, o, channels);
            }
        free_all();
    }
    end_law(TEXT(SUFFIX(grouped)));
}
#endif

/* -- rows that are copied, mixed, pooled and filled ------------------------------------------------------------------ */

#ifdef OF_move
long SUFFIX(mix)(const reading *, const sum *, element *);
long SUFFIX(gather_mixing)(const reading *, const int32_t *, const sum *, long, element *);
long SUFFIX(mix_lines)(const reading *, const sum *, long, element *);

static const long widths[] = {1, 3, 16, 50, 67};

/* Shares whose sum is at most one, one in four of them zero. */
static const sum *random_shares(long n, long many) {
    sum *shares = NEW(sum, n * many);
    for (long i = 0; i < n * many; i++) shares[i] = below(4) ? (sum)(between(0, 1) / many) : 0;
    return shares;
}

static void mix_law(void) {
    static const long taps[] = {1, 2, 4, 7, 70};
    for (long k = 0; k < COUNT(widths) * COUNT(taps); k++) {
        const long channels = widths[k % COUNT(widths)], many = taps[k / COUNT(widths)], n = 23;
        const reading in = random_reading(40, 7, n, many, channels, channels);
        const sum *shares = random_shares(n, many);
        element *out = NEW(element, n * channels);
        SUFFIX(mix)(&in, shares, out);
        for (long i = 0; i < n * channels; i++) {
            double total = 0, terms = 0;
            for (long tap = 0; tap < many; tap++) {
                const double share = shares[i / channels * many + tap];
                const double term = share != 0 ? share * read_value(&in, i / channels, tap, i % channels) : 0;
                total += term, terms += fabs(term);
            }
            check("mix", value_of(out[i]), total, terms);
        }
        free_all();
    }
    end_law(TEXT(SUFFIX(mix)));
}

static void gather_mixing_law(void) {
    for (long k = 0; k < COUNT(widths); k++) {
        const long channels = widths[k], n = 41, halo = 11, many = 4;
        const reading in = random_reading(20, halo, n, 1, channels, channels);
        int32_t *sources = NEW(int32_t, halo * many);
        for (long i = 0; i < halo * many; i++) sources[i] = (int32_t)below(in.count);
        const sum *shares = random_shares(halo, many);
        element *out = NEW(element, n * channels);
        SUFFIX(gather_mixing)(&in, sources, shares, many, out);
        for (long i = 0; i < n * channels; i++) {
            const long row = in.table[i / channels] - in.count - 1, c = i % channels;
            if (row < 0) {
                check_exactly("a row that is there", value_of(out[i]), read_value(&in, i / channels, 0, c));
                continue;
            }
            double total = 0, terms = 0;
            for (long j = 0; j < many; j++) {
                const double share = shares[row * many + j];
                const double term = share != 0 ? share * value_of(in.rows[sources[row * many + j] * channels + c]) : 0;
                total += term, terms += fabs(term);
            }
            check("a mixed row", value_of(out[i]), total, terms);
        }
        free_all();
    }
    end_law(TEXT(SUFFIX(gather_mixing)));
}

#ifndef BYTES /* maps are interpolated in floats */
static void mix_lines_law(void) {
    for (long k = 0; k < COUNT(widths); k++) {
        const long channels = widths[k], lines = 5, count = 21, n = 33;
        int32_t *table = NEW(int32_t, 2 * n);
        for (long i = 0; i < n; i++) table[2 * i] = (int32_t)(i * (count - 1) / n), table[2 * i + 1] = table[2 * i] + 1;
        table[2 * n - 1] = table[2 * n - 2] = (int32_t)count - 1;
        sum *mix = NEW(sum, 2 * n);
        for (long i = 0; i < n; i++) mix[2 * i] = (sum)between(0, 1), mix[2 * i + 1] = 1 - mix[2 * i];
        const reading in = {elements(lines * count * channels), NULL, NULL, table, count, n, 2, channels, channels, NULL};
        element *out = NEW(element, lines * n * channels);
        SUFFIX(mix_lines)(&in, mix, lines, out);
        for (long i = 0; i < lines * n * channels; i++) {
            const long line = i / (n * channels), at = i / channels % n, c = i % channels;
            double total = 0, terms = 0;
            for (int j = 0; j < 2; j++) {
                const double term = mix[2 * at + j] * value_of(in.rows[(line * count + table[2 * at + j]) * channels + c]);
                total += term, terms += fabs(term);
            }
            check("mix_lines", value_of(out[i]), total, terms);
        }
        free_all();
    }
    end_law(TEXT(SUFFIX(mix_lines)));
}
#endif
#endif

#ifdef OF_pool
long SUFFIX(pool)(const reading *, element *, long);

static void pool_law(void) {
    static const struct {
        long channels, taps, largest;
    } cases[] = {{3, 4, 1}, {16, 9, 1}, {77, 1, 1}, {50, 9, 1}, {3, 9, 0}, {77, 4, 0}, {32, 9, 0}};
    for (long k = 0; k < COUNT(cases); k++) {
        const long channels = cases[k].channels, taps = cases[k].taps, largest = cases[k].largest, n = 37;
        const reading in = random_reading(40, 7, n, taps, channels, channels);
        element *rows = (element *)in.rows;
#if defined(BF16) || defined(ELEMENT)
        rows[3 * channels] = element_of(NAN);
#else
        if (!largest) { /* sums that 8 bits hold */
            for (long i = 0; i < 40 * channels; i++) rows[i] %= 28;
            for (long i = 0; i < 7 * channels; i++) ((element *)in.halo)[i] %= 28;
            for (long i = 0; i < channels; i++) ((element *)in.outside)[i] %= 28;
        }
#endif
        element *out = NEW(element, n * channels);
        SUFFIX(pool)(&in, out, largest);
        for (long i = 0; i < n * channels; i++) {
            double most = -INFINITY, total = 0, terms = 0;
            for (long tap = 0; tap < taps; tap++) {
                const double value = read_value(&in, i / channels, tap, i % channels);
                if (value > most || isnan(value)) most = isnan(most) ? most : value;
                total += value, terms += fabs(value);
            }
            if (!largest) check("a sum", value_of(out[i]), total, terms);
            else if (isnan(most)) check_exactly("not a number", isnan(value_of(out[i])), 1);
            else check_exactly("the largest", value_of(out[i]), most);
        }
        free_all();
    }
    end_law(TEXT(SUFFIX(pool)));
}
#endif

#ifdef OF_fill
long SUFFIX(fill)(const reading *, const uint8_t *, const int32_t *, const sum *, const sum *, long, long, long, double,
                  const element *, const element *, element *, double, double);

enum { WITH_THERE = 1, WITH_SHARES = 2, WITH_LEAST = 4, WITH_FLOOR = 8, WITH_REST = 16 };

static void fill_law(void) {
    static const struct {
        long channels;
        int with;
    } cases[] = {{21, WITH_THERE | WITH_LEAST},
                 {3, WITH_THERE | WITH_SHARES | WITH_LEAST | WITH_FLOOR},
                 {32, WITH_THERE | WITH_LEAST | WITH_FLOOR | WITH_REST},
                 {7, WITH_SHARES | WITH_FLOOR},
                 {50, WITH_SHARES | WITH_LEAST | WITH_REST}};
    const long batch = 2, height = 9, width = 14, side = 5, reach = side / 2, pixels = batch * height * width;
    for (long k = 0; k < COUNT(cases); k++) {
        const long channels = cases[k].channels;
        const int with = cases[k].with;
        uint8_t *there = NEW(uint8_t, pixels);
        int32_t *index = NEW(int32_t, pixels), *table = NEW(int32_t, pixels);
        long count = 0, n = 0;
        for (long i = 0; i < pixels; i++) there[i] = !(with & WITH_THERE) || below(100) < 15, index[i] = (int32_t)(count += there[i]) - 1;
        for (long i = 0; i < pixels; i++)
            if (below(10) < 6) table[n++] = (int32_t)i;
        sum *shares = NEW(sum, count), *weight = NEW(sum, side * side), all = 0;
        for (long i = 0; i < count; i++) shares[i] = below(5) < 2 ? below(2) : (sum)between(.4, 1);
        for (long i = 0; i < side * side; i++) weight[i] = (sum)between(0, 1), all += weight[i];
        if (!(with & WITH_LEAST)) /* the weights are those of a mean */
            for (long i = 0; i < side * side; i++) weight[i] /= all;
        const double least = with & WITH_LEAST ? 1e-5 : 0, low = with & WITH_REST ? 0 : -INFINITY;
        const element *floor = with & WITH_FLOOR ? elements(channels) : NULL;
        const element *more = with & WITH_REST ? elements(n * channels) : NULL;
        const reading in = {elements(count * channels), NULL, NULL, table, count, n, 1, channels, channels, NULL};
        element *out = NEW(element, n * channels);
        SUFFIX(fill)(&in, with & WITH_THERE ? there : NULL, with & WITH_THERE ? index : NULL, with & WITH_SHARES ? shares : NULL,
                     weight, side, height, width, least, floor, more, out, low, INFINITY);
        for (long i = 0; i < n * channels; i++) {
            const long at = table[i / channels], c = i % channels, x = at % width, y = at / width % height;
            const double own = there[at] ? with & WITH_SHARES ? shares[index[at]] : 1 : 0;
            double total = 0, mixed = 0;
            for (long v = -reach; v <= reach; v++)
                for (long u = -reach; u <= reach; u++) {
                    const long place = at + v * width + u;
                    if (y + v < 0 || y + v >= height || x + u < 0 || x + u >= width || !there[place]) continue;
                    const double m =
                        weight[(v + reach) * side + u + reach] * (with & WITH_SHARES ? (double)shares[index[place]] : 1);
                    total += m, mixed += m * value_of(in.rows[index[place] * channels + c]);
                }
            const double scale = (1 - own) / (least != 0 ? total + least : 1);
            double value = scale * mixed + (own > 0 ? own * value_of(in.rows[index[at] * channels + c]) : 0);
            if (floor) value += (1 - own - scale * total) * value_of(floor[c]);
            if (more) value += value_of(more[i]);
            check("fill", value_of(out[i]), within(value, low, INFINITY), sizeof(sum) == 8 ? 4 : 20); /* less what is negligible */
        }
        free_all();
    }
    end_law(TEXT(SUFFIX(fill)));
}
#endif

/* -- kernel maps ----------------------------------------------------------------------------------------------------- */

#ifdef OF_maps
typedef struct {
    const int32_t *index;
    const int64_t *anchors;
    const int8_t *levels;
    const int64_t *sides, *targets, *down, *across;
    int32_t *table, *rank;
    int32_t *lines;
    int32_t *sources;
    double *mix;
    long pixels, count, n, height, width, target_height, target_width, vertical, horizontal, has_halo;
    const long *held;
} map;

typedef struct {
    const int8_t *levels;
    const int64_t *sides;
    int64_t *anchors;
    int32_t *index;
    int64_t *counts;
    long batch, height, width;
    const long *held;
} cells;

long SUFFIX(find_cells)(const cells *);
long SUFFIX(shift_taps)(const map *);

/* The cells of a level map, and the taps of a 3 x 3 window around each of them. */
static void maps_law(void) {
    enum { BATCH = 2, HEIGHT = 77, WIDTH = 18, PIXELS = BATCH * HEIGHT * WIDTH, TAPS = 9 };
    static const int64_t side_of[] = {1, 2, 4}, steps[] = {-3, 0, 2};
    for (int has_halo = 0; has_halo < 2; has_halo++) {
        int64_t *sides = NEW(int64_t, 3), *anchors = NEW(int64_t, PIXELS), *counts = NEW(int64_t, BATCH);
        int8_t *levels = NEW(int8_t, PIXELS), patches[BATCH][(HEIGHT + 3) / 4][(WIDTH + 3) / 4];
        int32_t *index = NEW(int32_t, PIXELS), expected[PIXELS];
        memcpy(sides, side_of, sizeof side_of);
        for (long i = 0; i < (long)sizeof patches; i++) ((int8_t *)patches)[i] = (int8_t)below(3);
        for (long i = 0; i < PIXELS; i++) levels[i] = patches[i / WIDTH / HEIGHT][i / WIDTH % HEIGHT / 4][i % WIDTH / 4];
        const cells c = {levels, sides, anchors, index, counts, BATCH, HEIGHT, WIDTH, NULL};
        const long count = SUFFIX(find_cells)(&c);
        long so_far = 0;
        int64_t of_image[BATCH] = {0};
        for (long i = 0; i < PIXELS; i++) {
            const long side = side_of[levels[i]], y = i / WIDTH % HEIGHT, x = i % WIDTH;
            const long anchor = i - y % side * WIDTH - x % side;
            if (anchor == i) {
                check_exactly("an anchor", (double)anchors[so_far], (double)i);
                expected[i] = (int32_t)so_far++, of_image[i / WIDTH / HEIGHT]++;
            }
            expected[i] = expected[anchor];
            check_exactly("the cell of a pixel", index[i], expected[i]);
        }
        check_exactly("the number of cells", (double)count, (double)so_far);
        for (long b = 0; b < BATCH; b++) check_exactly("the cells of an image", (double)counts[b], (double)of_image[b]);
        end_law(TEXT(SUFFIX(find_cells)));

        int64_t *targets = NEW(int64_t, count), *down = NEW(int64_t, 3), *across = NEW(int64_t, 3);
        memcpy(targets, anchors, count * sizeof(int64_t));
        memcpy(down, steps, sizeof steps), memcpy(across, steps, sizeof steps);
        int32_t *table = NEW(int32_t, count * TAPS), *rank = NEW(int32_t, PIXELS), *sources = NEW(int32_t, 4 * PIXELS);
        double *mix = NEW(double, 4 * PIXELS);
        int32_t *lines = NEW(int32_t, BATCH * HEIGHT);
        const map m = {index, anchors, levels, sides, targets, down, across, table, rank, lines, sources, mix, PIXELS, count, count,
                       HEIGHT, WIDTH, HEIGHT, WIDTH, 3, 3, has_halo, NULL};
        const long halo = SUFFIX(shift_taps)(&m);
        static long reads[PIXELS], entry_of[PIXELS]; /* of a pixel that is read inside a cell, and its entry */
        memset(reads, 0, sizeof reads);
        for (int pass = 0; pass < 2; pass++) {
            long found = 0;
            for (long i = 0; pass && i < PIXELS; i++)
                if (reads[i]) entry_of[i] = count + 1 + found++;
            for (long e = 0; e < count * TAPS; e++) {
                const long target = targets[e / TAPS], y = target / WIDTH % HEIGHT + steps[e % TAPS / 3], x = target % WIDTH + steps[e % 3];
                const long pixel = (target / WIDTH / HEIGHT * HEIGHT + y) * WIDTH + x;
                long entry = count;
                if (y >= 0 && y < HEIGHT && x >= 0 && x < WIDTH) {
                    entry = expected[pixel];
                    if (has_halo && anchors[entry] != pixel) reads[pixel] = 1, entry = entry_of[pixel];
                }
                if (pass) check_exactly("an entry", table[e], (double)entry);
            }
            if (pass) check_exactly("the rows of the halo", (double)halo, (double)found);
        }
        for (long i = 0, row = 0; i < PIXELS; i++) {
            if (!reads[i]) continue;
            const long side = side_of[levels[i]], y = i / WIDTH % HEIGHT, x = i % WIDTH;
            long up = y % side, back = x % side;
            int32_t rows[4];
            for (int corner = 0; corner < 4; corner++) {
                const long below_it = y - up + side * (corner / 2), beside = x - back + side * (corner % 2);
                const long line = below_it < HEIGHT ? below_it : HEIGHT - 1, column = beside < WIDTH ? beside : WIDTH - 1;
                rows[corner] = expected[(i / WIDTH / HEIGHT * HEIGHT + line) * WIDTH + column];
            }
            if (rows[0] == rows[2] && rows[1] == rows[3]) up = 0; /* nothing lies between a row and itself */
            if (rows[0] == rows[1] && (!up || rows[2] == rows[3])) back = 0;
            for (int corner = 0; corner < 4; corner++) {
                const double share = (corner / 2 ? up : side - up) / (double)side * (corner % 2 ? back : side - back) / (double)side;
                check("a share", mix[4 * row + corner], share, 1);
                if (share > 0) check_exactly("a source", sources[4 * row + corner], rows[corner]);
            }
            row++;
        }
        end_law(has_halo ? TEXT(SUFFIX(shift_taps)) " with a halo" : TEXT(SUFFIX(shift_taps)));
        free_all();
    }
}
#endif

/* -- maps in another size --------------------------------------------------------------------------------------------- */

#ifdef OF_interpolate
#include "../../cadsurgery/kernels/c/resize.h"

void SUFFIX(resize)(const resizing *);
void SUFFIX(interpolation_error)(const erring *);

static const float *floats(long count) {
    float *all = NEW(float, count);
    for (long i = 0; i < count; i++) all[i] = (float)between(-1, 1);
    return all;
}

static axis random_axis(long from, long length) {
    const axis made = {NEW(int32_t, length), NEW(int32_t, length), NEW(float, length), length};
    for (long i = 0; i < length; i++) {
        made.first[i] = (int32_t)below(from), made.share[i] = (float)between(0, 1);
        made.second[i] = made.first[i] + (made.first[i] < from - 1);
    }
    return made;
}

static double mixed(double a, double b, double share) { return a + share * (b - a); }

static void resize_law(void) {
    static const long cases[][4] = {{5, 7, 11, 29}, {1, 1, 2, 3}, {9, 40, 4, 17}, {3, 6, 5, 1100}};
    for (long k = 0; k < COUNT(cases); k++) {
        const long count = 3, height = cases[k][0], width = cases[k][1], high = cases[k][2], wide = cases[k][3];
        const float *maps = floats(count * height * width);
        float *out = NEW(float, count * high * wide);
        const resizing all = {maps, out, count, height, width, random_axis(height, high), random_axis(width, wide), 0};
        SUFFIX(resize)(&all);
        for (long i = 0; i < count * high * wide; i++) {
            const float *map = maps + i / wide / high * height * width;
            const long y = i / wide % high, x = i % wide, left = all.across.first[x], right = all.across.second[x];
            const float *top = map + all.down.first[y] * width, *bottom = map + all.down.second[y] * width;
            const double share = all.across.share[x];
            const double expected = mixed(mixed(top[left], top[right], share), mixed(bottom[left], bottom[right], share), all.down.share[y]);
            check_exactly("a pixel is near", fabs(out[i] - expected) < 1e-6, 1);
        }
        free_all();
    }
    end_law(TEXT(SUFFIX(resize)));
}

/* The error of each pixel in an odd row or column, which lies between those of even rows and columns. */
static void error_law(void) {
    static const long cases[][3] = {{5, 7, 19}, {4, 6, 32}, {1, 1, 3}, {2, 1, 16}, {1, 4, 33}};
    for (long k = 0; k < COUNT(cases); k++) {
        const long batch = 2, height = cases[k][0], width = cases[k][1], channels = cases[k][2];
        const float *maps = floats(batch * height * width * channels);
        float *out = NEW(float, batch * height * width);
        const erring all = {maps, out, batch, channels, height, width};
        SUFFIX(interpolation_error)(&all);
        for (long i = 0; i < batch * height * width; i++) {
            const long y = i / width % height, x = i % width, first = i - y * width - x;
            const long top = y / 2 * 2, left = x / 2 * 2, bottom = y % 2 && y + 1 < height ? y + 1 : top;
            const long right = x % 2 && x + 1 < width ? x + 1 : left;
            const long corners[] = {top * width + left, top * width + right, bottom * width + left, bottom * width + right};
            double expected = 0;
            for (long c = 0; c < channels; c++) {
                double missed = maps[i * channels + c];
                for (int corner = 0; corner < 4; corner++) missed -= maps[(first + corners[corner]) * channels + c] / 4.0;
                expected += missed * missed;
            }
            check_exactly("an error is near", fabs(out[i] - expected) <= 1e-6 * (double)channels, 1);
        }
        free_all();
    }
    end_law(TEXT(SUFFIX(interpolation_error)));
}
#endif

/* -- warps ----------------------------------------------------------------------------------------------------------- */

#ifdef OF_warp
typedef struct {
    const element *grid, *samples;
    const int32_t *boxes;
    const uint8_t *bent_rows, *bent_columns;
    element *found;
    long batch, n, m, h, w, height, width;
    const long *held;
} warp;

long SUFFIX(invert)(const warp *, double);

/* The point of a grid (rows, columns, 2) at a place between its points. */
static double point(const element *grid, long rows, long columns, double y, double x, int axis) {
    const long top = y < rows - 1 ? (long)y : rows - 2, left = x < columns - 1 ? (long)x : columns - 2;
    const double u = y - top, v = x - left;
    const element *p = grid + (top * columns + left) * 2 + axis, *below_it = p + 2 * columns;
    return (1 - u) * ((1 - v) * p[0] + v * p[2]) + u * ((1 - v) * below_it[0] + v * below_it[2]);
}

/* Where the inverse says that a pixel lies, the warp gives that pixel. */
static void invert_law(void) {
    enum { N = 5, M = 4, H = 2 * N - 1, W = 2 * M - 1, HEIGHT = 33, WIDTH = 300 };
    for (int is_bent = 0; is_bent < 2; is_bent++) {
        element *grid = NEW(element, N * M * 2), *samples = NEW(element, H * W * 2), *found = NEW(element, 2 * HEIGHT * WIDTH);
        int32_t *boxes = NEW(int32_t, (N - 1) * (M - 1) * 4);
        uint8_t *bent_rows = NEW(uint8_t, H - 1), *bent_columns = NEW(uint8_t, W - 1);
        memset(bent_rows, is_bent, H - 1), memset(bent_columns, is_bent, W - 1);
        const double down = (HEIGHT + 3.0) / (N - 1), across = (WIDTH + 19.0) / (M - 1);
        for (long i = 0; i < N * M; i++) {
            grid[2 * i] = (element)(-2 + down * (i / M + between(-.1, .1)));
            grid[2 * i + 1] = (element)(-10 + across * (i % M + between(-.02, .02)));
        }
        for (long i = 0; i < M; i++) grid[2 * i] = -2, grid[2 * ((N - 1) * M + i)] = HEIGHT + 1;
        for (long i = 0; i < N; i++) grid[2 * i * M + 1] = -10, grid[2 * (i * M + M - 1) + 1] = WIDTH + 9;
        for (long i = 0; i < H * W; i++)
            for (int axis = 0; axis < 2; axis++) {
                const long y = i / W, x = i % W;
                const double moved = is_bent && y % 2 && x % 2 ? between(-.4, .4) : 0;
                samples[2 * i + axis] = (element)(point(grid, N, M, y / 2.0, x / 2.0, axis) + moved);
            }
        for (long cell = 0; cell < (N - 1) * (M - 1); cell++)
            for (int axis = 0; axis < 2; axis++) {
                const element *p = grid + (cell / (M - 1) * M + cell % (M - 1)) * 2 + axis;
                const double low = fmin(fmin(p[0], p[2]), fmin(p[2 * M], p[2 * M + 2]));
                const double high = fmax(fmax(p[0], p[2]), fmax(p[2 * M], p[2 * M + 2]));
                boxes[4 * cell + axis] = (int32_t)fmax(ceil(low - 1e-3), 0), boxes[4 * cell + 2 + axis] = (int32_t)floor(high + 1e-3);
            }
        const double enough = sizeof(sum) == 8 ? 1e-9 : 1e-3;
        const warp one = {grid, samples, boxes, bent_rows, bent_columns, found, 1, N, M, H, W, HEIGHT, WIDTH, NULL};
        SUFFIX(invert)(&one, enough);
        for (long i = 0; i < HEIGHT * WIDTH; i++) {
            const double y = point(samples, H, W, found[i], found[HEIGHT * WIDTH + i], 0);
            const double x = point(samples, H, W, found[i], found[HEIGHT * WIDTH + i], 1);
            check_exactly("a pixel is missed", fabs(y - i / WIDTH) < 2 * enough && fabs(x - i % WIDTH) < 2 * enough, 1);
        }
        free_all();
    }
    end_law(TEXT(SUFFIX(invert)));
}
#endif

/* -- 8 bits ---------------------------------------------------------------------------------------------------------- */

#if defined(OF_int8) || defined(OF_int8_tiles)
typedef struct {
    const int32_t *offset;
    const float *scale, *bias;
    const uint8_t *more;
    uint8_t *out;
    long outputs;
    float more_scale, low, high;
} result;

pack SUFFIX(pack_convolve);
long SUFFIX(convolve)(const reading *, const result *, const void *, long);
/* In one rounding: the product is exact in double precision. */
static float multiply_add(float a, float b, float c) { return (float)((double)a * b + c); }

static float in_float(float value, float low, float high) { return value < low ? low : value > high ? high : value; }

/* Sums are exact, and what follows is the same bit for bit. */
static void convolve_law(void) {
    enum { MORE = 1, LARGEST = 2 };
    static const struct {
        long n, channels, outputs, groups, taps;
        int with;
    } cases[] = {
        {97, 37, 45, 1, 9, 0},      {64, 128, 128, 1, 9, MORE},  {5, 3, 21, 1, 4, MORE},     {200, 130, 70, 1, 1, MORE},
        {100, 6, 12, 4, 9, MORE},   {33, 1, 1, 7, 9, 0},         {50, 34, 33, 1, 0, MORE},   {7, 2048, 16, 1, 0, LARGEST},
        {13, 9, 5, 2, 1, 0},        {205, 64, 64, 1, 1, 0},      {99, 128, 72, 1, 0, MORE},  {35, 1040, 530, 1, 1, MORE},
        {69, 32, 24, 2, 0, 0},
    };
    for (long k = 0; k < COUNT(cases); k++) {
        const long n = cases[k].n, channels = cases[k].channels, outputs = cases[k].outputs, groups = cases[k].groups;
        const long taps = cases[k].taps ? cases[k].taps : 1, all = groups * outputs;
        const int with = cases[k].with, zero = with & LARGEST ? 255 : 11;
        reading in = random_reading(cases[k].taps ? 40 : n, cases[k].taps ? 7 : 0, n, taps, channels, channels * groups);
        if (!cases[k].taps) in.table = NULL;
        if (with & LARGEST) memset((void *)in.rows, 0, n * channels * groups);
        int8_t *weight = NEW(int8_t, all * channels * taps);
        for (long i = 0; i < all * channels * taps; i++) weight[i] = with & LARGEST ? -127 : (int8_t)(below(255) - 127);
        int32_t *offset = NEW(int32_t, all);
        float *scale = NEW(float, all), *bias = NEW(float, all);
        for (long o = 0; o < all; o++) {
            scale[o] = with & LARGEST ? 1 : (float)between(.2, 1.5) / (float)(channels * taps) / 10;
            bias[o] = (float)(between(-1, 1) + 100);
            offset[o] = 0;
            for (long i = 0; i < channels * taps; i++) offset[o] -= zero * weight[o * channels * taps + i];
            if (with & LARGEST) bias[o] = 100 - 255.f * 127 * (float)(channels * taps); /* to see each bit of the sum */
        }
        const packed p =
            pack_by(SUFFIX(pack_convolve), weight, groups, outputs, channels, taps, (const void *[]){offset, scale, bias});
        const long array = p.bytes_of_constants / 3;
        const result r = {(int32_t *)p.constants, (float *)(p.constants + array), (float *)(p.constants + 2 * array),
                          with & MORE ? elements(n * all) : NULL, NEW(uint8_t, n * all), all, .37f, 12, 250};
        check_exactly("there is memory", (double)SUFFIX(convolve)(&in, &r, p.weights, groups), 0);
        for (long i = 0; i < n; i++)
            for (long o = 0; o < all; o++) {
                long total = 0;
                for (long tap = 0; tap < taps; tap++)
                    for (long c = 0; c < channels; c++)
                        total += ((long)read_value(&in, i, tap, o / outputs * channels + c) - zero) * weight[(o * channels + c) * taps + tap];
                float value = multiply_add((float)(int32_t)total, scale[o], bias[o]);
                if (with & MORE) value = multiply_add(r.more[i * all + o], r.more_scale, value);
                check_exactly("in 8 bits", r.out[i * all + o], nearbyintf(in_float(value, r.low, r.high)));
            }
        free_all();
    }
    end_law(TEXT(SUFFIX(convolve)));
}
#endif

/* -- threads --------------------------------------------------------------------------------------------------------- */

void cadsurgery_share(long count, long grain, void (*body)(long, long, void *), void *work);
void use_threads(void *parallel_for, void *parallel);
unsigned long processor_features(void);

typedef struct {
    int64_t begin, end;
    void (*body)(int64_t, int64_t, void *);
    void *context;
} part;

static void *run_part(void *given) {
    const part *one = given;
    one->body(one->begin, one->end, one->context);
    return NULL;
}

/* As torch's `torch_parallel_for`, with four threads. */
static int32_t parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void *), void *context) {
    pthread_t threads[4];
    part parts[4];
    (void)grain;
    for (int i = 0; i < 4; i++) {
        parts[i] = (part){begin + (end - begin) * i / 4, begin + (end - begin) * (i + 1) / 4, body, context};
        if (pthread_create(threads + i, NULL, run_part, parts + i) != 0) exit(2);
    }
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    return 0;
}

static void count_visits(long begin, long end, void *visits) {
    for (long i = begin; i < end; i++) __atomic_fetch_add((int *)visits + i, 1, __ATOMIC_RELAXED);
}

/* Every index is visited once, by one thread or by several. */
static void share_law(void) {
    enum { LENGTH = 100003 };
    for (int threads = 0; threads < 2; threads++) {
        int *visits = NEW(int, LENGTH);
        memset(visits, 0, LENGTH * sizeof(int));
        use_threads(threads ? (void *)parallel_for : NULL, NULL);
        cadsurgery_share(LENGTH, 3, count_visits, visits);
        for (long i = 0; i < LENGTH; i++) check_exactly("visits", visits[i], 1);
        free_all();
    }
    use_threads(NULL, NULL);
    end_law("cadsurgery_share");
}

int main(int count, char **arguments) {
    /* The features that the form needs, as bits: without them nothing can be said. */
    const unsigned long needs = count > 1 ? strtoul(arguments[1], NULL, 10) : 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if ((processor_features() & needs) != needs) {
        printf("the processor lacks what the form needs: it has %#lx of %#lx\n", processor_features(), needs);
        return 3;
    }
#if defined(OF_product) || defined(OF_product_tiles)
    product_law();
#endif
#ifdef OF_grouped
    grouped_law();
#endif
#ifdef OF_move
    mix_law();
    gather_mixing_law();
#ifndef BYTES
    mix_lines_law();
#endif
#endif
#ifdef OF_pool
    pool_law();
#endif
#ifdef OF_fill
    fill_law();
#endif
#ifdef OF_maps
    maps_law();
#endif
#ifdef OF_interpolate
    resize_law();
    error_law();
#endif
#ifdef OF_warp
    invert_law();
#endif
#if defined(OF_int8) || defined(OF_int8_tiles)
    convolve_law();
#endif
    share_law();
    return has_failed;
}
