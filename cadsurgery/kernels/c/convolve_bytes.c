/* Convolutions in 8 bits for engines: see convolve.h. Their sums are exact, and the same on every processor.
 *
 * Compiled once, for the architecture's baseline; it calls the widest forms that the processor has. */
#include "packed.h"

/* ---- Forms of the kernels, narrowest first. */

typedef struct {
    unsigned long needs;
    long (*convolve)(const reading *, const result *, const void *, long);
    void (*depthwise)(const reading *, const result *, const int8_t *); /* NULL where there is none */
    const long *layout;
    long (*limited)(const reading *, const result *, const void *, long); /* see int8_limited.c; NULL where there is none */
    const long *limited_layout;
} form;

typedef struct {
    unsigned long needs;
    grouped_form *grouped;
    mix_form *mix;
    const long *layout;
} form_by_width;

#define DECLARE(set)                                                                                       \
    __attribute__((weak)) extern long convolve_##set(const reading *, const result *, const void *, long); \
    __attribute__((weak)) extern const long int8_layout_##set[];
#define DECLARE_WITH_DEPTHWISE(set) \
    DECLARE(set)                    \
    __attribute__((weak)) extern void depthwise_##set(const reading *, const result *, const int8_t *);
#define DECLARE_BY_WIDTH(set)                                      \
    __attribute__((weak)) extern grouped_form grouped_uint8_##set; \
    __attribute__((weak)) extern mix_form mix_uint8_##set;         \
    __attribute__((weak)) extern const long grouped_layout_uint8_##set[];
#define FORM(set, needs) {needs, convolve_##set, 0, int8_layout_##set}
#define WITH_DEPTHWISE(set, needs) {needs, convolve_##set, depthwise_##set, int8_layout_##set}
#define WITH_LIMITED(set, needs) \
    {needs, convolve_##set, depthwise_##set, int8_layout_##set, convolve_limited_##set, int8_layout_limited_##set}
#define BY_WIDTH(set, needs) {needs, grouped_uint8_##set, mix_uint8_##set, grouped_layout_uint8_##set}

DECLARE(scalar) DECLARE_BY_WIDTH(scalar)
#if defined(__x86_64__)
DECLARE_WITH_DEPTHWISE(sse4) DECLARE_WITH_DEPTHWISE(avx2) DECLARE_WITH_DEPTHWISE(avxvnni) DECLARE_WITH_DEPTHWISE(avx512vnni)
DECLARE(limited_avx2) DECLARE(amx) DECLARE_BY_WIDTH(avx2) DECLARE_BY_WIDTH(avx512)
static const form forms[] = {FORM(scalar, 0), WITH_DEPTHWISE(sse4, 1), WITH_LIMITED(avx2, 3), WITH_DEPTHWISE(avxvnni, 7),
                             WITH_DEPTHWISE(avx512vnni, 27), FORM(amx, 571)};
static const form_by_width by_width[] = {BY_WIDTH(scalar, 0), BY_WIDTH(avx2, 3), BY_WIDTH(avx512, 11)};
#elif defined(__aarch64__)
DECLARE(neon) DECLARE(dotprod) DECLARE_BY_WIDTH(neon)
static const form forms[] = {FORM(scalar, 0), FORM(neon, 64), FORM(dotprod, 192)};
static const form_by_width by_width[] = {BY_WIDTH(scalar, 0), BY_WIDTH(neon, 64)};
#else
static const form forms[] = {FORM(scalar, 0)};
static const form_by_width by_width[] = {BY_WIDTH(scalar, 0)};
#endif

/* Layout of packed weights: see `int8_layout` in int8.c. */
enum { CHUNK = 1, SIDE, DEPTH, BYTES_OF_WEIGHT, SHIFT, MANY, HALF, MOST_TAPS = 64 };

/* ---- Packing. The constants of an output lie in three arrays of `padded` numbers behind the weights. */

typedef struct {
    const convolution *of;
    const int8_t *weight;
    const float *scales, *bias;
    const numbers *numbers;
    long shift;
    int32_t *offset;
    float *scale, *shifted;
} packing;

static int weight_of(const packing *p, long tap, long group, long channel, long output) {
    const convolution *k = p->of;
    return p->weight[((tap * k->groups + group) * k->channels + channel) * k->outputs + output];
}

/* True if no two adjacent channels can saturate 16 bits: their weights of equal sign sum to at most 128. */
static int is_limited(const packing *p) {
    const convolution *k = p->of;
    for (long tap = 0; tap < k->taps; tap++)
        for (long group = 0; group < k->groups; group++)
            for (long c = 0; c + 1 < k->channels; c += 2)
                for (long output = 0; output < k->outputs; output++) {
                    const int first = weight_of(p, tap, group, c, output), second = weight_of(p, tap, group, c + 1, output);
                    if (first * second > 0 && (first + second > 128 || first + second < -128)) return 0;
                }
    return 1;
}

/* Set the constants of an output at a place: from its sum to its number in 8 bits. */
static void set_constants(const packing *p, long group, long output, long place) {
    const convolution *k = p->of;
    const numbers *of = p->numbers;
    const long which = group * k->outputs + output;
    const double step = of->scale_of_result, more = (double)of->scale_of_residual * of->zero_of_residual;
    long sum = 0;
    for (long tap = 0; tap < k->taps; tap++)
        for (long c = 0; c < k->channels; c++) sum += weight_of(p, tap, group, c, output);
    p->offset[place] = (int32_t)(sum * (p->shift - (long)of->zero));
    p->scale[place] = (float)((double)p->scales[which] * of->scale / step);
    p->shifted[place] = (float)((p->bias[which] - more) / step + of->zero_of_result);
}

/* Return how many groups of adjacent channels, of all taps, a chunk of outputs has in a layout. */
static long depth_of(const convolution *k, const long *layout) {
    const long depth = k->taps * ((k->channels + layout[SIDE] - 1) / layout[SIDE]);
    return (depth + layout[DEPTH] - 1) / layout[DEPTH] * layout[DEPTH];
}

/* Weights (groups, chunks, depth, chunk, side) for `convolve`, where the depth is (taps, parts) and what pads it. */
static void pack_convolve(const packing *p, const long *layout, void *to) {
    const convolution *k = p->of;
    const long chunk = layout[CHUNK], side = layout[SIDE], chunks = (k->outputs + chunk - 1) / chunk;
    const long parts = (k->channels + side - 1) / side, of_chunk = depth_of(k, layout) * chunk * side;
    for (long group = 0; group < k->groups; group++)
        for (long first = 0; first < chunks * chunk; first += chunk) {
            long place = (group * chunks + first / chunk) * of_chunk;
            for (long tap = 0; tap < k->taps; tap++)
                for (long part = 0; part < parts; part++)
                    for (long j = 0; j < chunk; j++)
                        for (long s = 0; s < side; s++, place++) {
                            const long output = first + j, channel = part * side + s;
                            const int is_there = output < k->outputs && channel < k->channels;
                            const int value = is_there ? weight_of(p, tap, group, channel, output) : 0;
                            if (layout[BYTES_OF_WEIGHT] == 1) ((int8_t *)to)[place] = (int8_t)value;
                            else ((int16_t *)to)[place] = (int16_t)value;
                        }
            for (long output = first; output < first + chunk && output < k->outputs; output++)
                set_constants(p, group, output, group * chunks * chunk + output);
        }
}

/* Weights (chunks, taps / 4, 4, many / 16, 4, 4) for `depthwise`. A last part of at most half a vector is stored twice. */
static void pack_depthwise(const packing *p, const long *layout, int8_t *to) {
    const long channels = p->of->groups, taps = p->of->taps, many = layout[MANY], half = layout[HALF];
    const long spans = (taps + 3) / 4;
    for (long start = 0; start < channels; start += many)
        for (long part = 0; part < 4; part++)
            for (long m = 0; m < many / 16; m++)
                for (long x = 0; x < 4; x++) {
                    long channel = m * 16 + part * 4 + x;
                    if (channels - start <= half && channel >= many - half) channel -= many - half;
                    const int is_there = start + channel < channels;
                    const long lane = (part * (many / 16) + m) * 4 + x;
                    for (long tap = 0; tap < 4 * spans; tap++)
                        to[start * 4 * spans + (tap / 4 * many + lane) * 4 + tap % 4] =
                            is_there && tap < taps ? (int8_t)weight_of(p, tap, start + channel, 0, 0) : 0;
                    if (is_there) set_constants(p, start + channel, 0, start + lane);
                }
}

/* Weights (taps, padded channels) for `grouped`, whole numbers in floats. */
static void pack_grouped(const packing *p, long padded, float *to) {
    for (long c = 0; c < p->of->groups; c++) {
        for (long tap = 0; tap < p->of->taps; tap++) to[tap * padded + c] = (float)weight_of(p, tap, c, 0, 0);
        set_constants(p, c, 0, c);
        const float offset = (float)p->offset[c];
        memcpy(p->offset + c, &offset, sizeof offset);
    }
}

static float clamp(float value) { return value < 0 ? 0 : value > 255 ? 255 : (float)(int)(value + 0.5f); }

const char *cadsurgery_pack_bytes(convolution *k, const numbers *of, const int8_t *weight, const float *scales,
                                  const float *bias) {
    const form *any = 0, *of_depthwise = 0;
    const form_by_width *wide = 0;
    WIDEST(forms, convolve, any);
    WIDEST(forms, depthwise, of_depthwise);
    WIDEST(by_width, grouped, wide);
    REFUSE_UNLESS(any && wide && wide->mix, "the library has no kernels in 8 bits for this processor");
    const int is_depthwise = k->channels == 1 && k->outputs == 1 && k->groups > 1;
    const int by_taps = is_depthwise && of_depthwise && k->taps <= MOST_TAPS;
    const int as_floats = is_depthwise && !by_taps && k->taps <= wide->layout[2];
    packing p = {.of = k, .weight = weight, .scales = scales, .bias = bias, .numbers = of};
    const int limited = !by_taps && !as_floats && any->limited && is_limited(&p);
    const long *layout = by_taps ? of_depthwise->layout : limited ? any->limited_layout : any->layout;
    const long lanes = wide->layout[0];
    long padded, size; /* of constants, and of bytes of weights */
    if (by_taps) {
        padded = (k->groups + layout[MANY] - 1) / layout[MANY] * layout[MANY];
        size = padded * ((k->taps + 3) / 4 * 4);
    } else if (as_floats) {
        padded = (k->groups + lanes - 1) / lanes * lanes;
        size = padded * k->taps * (long)sizeof(float);
    } else {
        padded = k->groups * ((k->outputs + layout[CHUNK] - 1) / layout[CHUNK] * layout[CHUNK]);
        size = padded * depth_of(k, layout) * layout[SIDE] * layout[BYTES_OF_WEIGHT];
    }
    size = (size + 63) / 64 * 64;
    bytes *to = &k->bytes;
    char *memory = to->weight = malloc(size + 3 * padded * sizeof(float) + 64);
    REFUSE_UNLESS(memory, "there is no memory for the weights of a convolution");
    memset(memory, 0, size + 3 * padded * sizeof(float) + 64);
    float *constants = (float *)(memory + size);
    p.shift = by_taps || as_floats ? 0 : layout[SHIFT];
    p.offset = (int32_t *)constants, p.scale = constants + padded, p.shifted = constants + 2 * padded;
    if (by_taps) pack_depthwise(&p, layout, to->weight), to->depthwise = of_depthwise->depthwise;
    else if (as_floats) pack_grouped(&p, padded, to->weight), to->grouped = wide->grouped;
    else pack_convolve(&p, layout, to->weight), to->convolve = limited ? any->limited : any->convolve;
    const float step = of->scale_of_result, zero = of->zero_of_result;
    k->outside = clamp(of->outside / of->scale + of->zero);
    k->low = clamp(of->low / step + zero), k->high = clamp(of->high / step + zero);
    k->mix = wide->mix;
    to->known = (result){.offset = p.offset, .scale = p.scale, .bias = p.shifted, .outputs = k->groups * k->outputs,
                         .more_is_8_bits = 1, .out_is_8_bits = 1, .more_scale = of->scale_of_residual / step, .factor = 1,
                         .low = k->low, .high = k->high};
    return 0;
}

/* True if each result row reads the row of its own number. */
static int is_plain(const reading *in) {
    if (in->taps != 1 || in->n != in->count) return 0;
    for (long i = 0; i < in->n; i++)
        if (in->table[i] != i) return 0;
    return 1;
}

const char *cadsurgery_convolve_bytes(const convolution *k, const reading *in, const uint8_t *residual, uint8_t *out) {
    const bytes *by = &k->bytes;
    result r = by->known;
    reading from = *in;
    r.more = residual, r.out = out;
    if (by->depthwise) by->depthwise(&from, &r, by->weight);
    else if (by->grouped)
        by->grouped(&from, by->weight, (const float *)r.offset, 0, r.scale, r.bias, 0, (float *)out, 1, k->low, k->high);
    else {
        if (is_plain(in)) from.table = 0;
        REFUSE_UNLESS(by->convolve(&from, &r, by->weight, k->groups), "there is no memory for rows of a convolution");
    }
    return 0;
}
