/* Convolutions in 8 bits for engines: see convolve.h. Their sums are exact, and the same on every processor.
 *
 * Compiled once, for the architecture's baseline; it calls the widest forms that the processor has. */
#include "packed.h"

/* ---- Forms of the kernels, narrowest first. */

typedef long convolve_form(const reading *, const result *, const void *, long);
typedef long depthwise_form(const reading *, const result *, const int8_t *);

typedef struct {
    unsigned long needs;
    convolve_form *convolve;
    pack *pack_convolve;
    depthwise_form *depthwise; /* NULL where there is none */
    pack *pack_depthwise;
    convolve_form *limited; /* see int8_limited.c; NULL where there is none */
    pack *pack_limited;
} form;

typedef struct {
    unsigned long needs;
    grouped_form *grouped;
    mix_form *mix;
    pack *pack_grouped;
} form_by_width;

#define DECLARE(set)                                               \
    __attribute__((weak)) extern convolve_form convolve_##set;     \
    __attribute__((weak)) extern pack pack_convolve_##set;
#define DECLARE_WITH_DEPTHWISE(set)                                \
    DECLARE(set)                                                   \
    __attribute__((weak)) extern depthwise_form depthwise_##set;   \
    __attribute__((weak)) extern pack pack_depthwise_##set;
#define DECLARE_BY_WIDTH(set)                                      \
    __attribute__((weak)) extern grouped_form grouped_uint8_##set; \
    __attribute__((weak)) extern mix_form mix_uint8_##set;         \
    __attribute__((weak)) extern pack pack_grouped_uint8_##set;
#define FORM(set) {NEEDS_##set, convolve_##set, pack_convolve_##set}
#define WITH_DEPTHWISE(set) {NEEDS_##set, convolve_##set, pack_convolve_##set, depthwise_##set, pack_depthwise_##set}
#define WITH_LIMITED(set)                                                                   \
    {NEEDS_##set, convolve_##set, pack_convolve_##set, depthwise_##set, pack_depthwise_##set, convolve_limited_##set, \
     pack_convolve_limited_##set}
#define BY_WIDTH(set) {NEEDS_##set, grouped_uint8_##set, mix_uint8_##set, pack_grouped_uint8_##set}

DECLARE(scalar) DECLARE_BY_WIDTH(scalar)
#if defined(__x86_64__)
DECLARE_WITH_DEPTHWISE(sse4) DECLARE_WITH_DEPTHWISE(avx2) DECLARE_WITH_DEPTHWISE(avxvnni) DECLARE_WITH_DEPTHWISE(avx512vnni)
DECLARE(limited_avx2) DECLARE(amx) DECLARE_BY_WIDTH(avx2) DECLARE_BY_WIDTH(avx512)
static const form forms[] = {FORM(scalar), WITH_DEPTHWISE(sse4), WITH_LIMITED(avx2), WITH_DEPTHWISE(avxvnni),
                             WITH_DEPTHWISE(avx512vnni), FORM(amx)};
static const form_by_width by_width[] = {BY_WIDTH(scalar), BY_WIDTH(avx2), BY_WIDTH(avx512)};
#elif defined(__aarch64__)
DECLARE(neon) DECLARE(dotprod) DECLARE_BY_WIDTH(neon)
static const form forms[] = {FORM(scalar), FORM(neon), FORM(dotprod)};
static const form_by_width by_width[] = {BY_WIDTH(scalar), BY_WIDTH(neon)};
#else
static const form forms[] = {FORM(scalar)};
static const form_by_width by_width[] = {BY_WIDTH(scalar)};
#endif

/* Set the constants of each output, from its sum to its number in 8 bits, one array after the other. */
static void set_constants(float *constants, const numbers *of, const unpacked *from, const float *scales, const float *bias) {
    const double step = of->scale_of_result, more = (double)of->scale_of_residual * of->zero_of_residual;
    const long all = from->groups * from->outputs;
    for (long place = 0; place < all; place++) {
        long sum = 0;
        for (long tap = 0; tap < from->taps; tap++)
            for (long c = 0; c < from->channels; c++)
                sum += ((const int8_t *)from->data)[index_of(from, place / from->outputs, place % from->outputs, c, tap)];
        const int32_t offset = (int32_t)(-sum * (long)of->zero);
        ((int32_t *)constants)[place] = offset;
        constants[all + place] = (float)((double)scales[place] * of->scale / step);
        constants[2 * all + place] = (float)((bias[place] - more) / step + of->zero_of_result);
        constants[3 * all + place] = (float)offset;
    }
}

static float clamp(float value) { return value < 0 ? 0 : value > 255 ? 255 : (float)(int)(value + 0.5f); }

const char *cadsurgery_pack_bytes(convolution *k, const numbers *of, const unpacked *from, const float *scales,
                                  const float *bias) {
    const form *any = 0, *of_depthwise = 0;
    const form_by_width *wide = 0;
    WIDEST(forms, convolve, any);
    WIDEST(forms, depthwise, of_depthwise);
    WIDEST(by_width, grouped, wide);
    REFUSE_UNLESS(any && wide && wide->mix, "the library has no kernels in 8 bits for this processor");
    const float step = of->scale_of_result, zero = of->zero_of_result;
    const long all = k->groups * k->outputs;
    bytes *to = &k->bytes;
    float *constants = to->constants = malloc((CONSTANTS + 1) * all * sizeof(float));
    REFUSE_UNLESS(constants, "there is no memory for the weights of a convolution");
    set_constants(constants, of, from, scales, bias);
    const void *arrays[] = {constants, constants + all, constants + 2 * all}, *as_float[] = {constants + 3 * all};
    k->outside = clamp(of->outside / of->scale + of->zero);
    k->low = clamp(of->low / step + zero), k->high = clamp(of->high / step + zero);
    k->mix = wide->mix;
    to->known = (result){.outputs = all, .more_scale = of->scale_of_residual / step, .low = k->low, .high = k->high};
    /* The first way that takes the weights; the last one takes any. */
    enum { DEPTHWISE, GROUPED, LIMITED, ANY, WAYS };
    pack *ways[WAYS] = {of_depthwise ? of_depthwise->pack_depthwise : 0, wide->pack_grouped, any->pack_limited, any->pack_convolve};
    long place = -1, end = 0;
    char *memory = 0;
    int way = -1;
    while (place < 0 && ++way < WAYS) memory = cadsurgery_pack(ways[way], from, way == GROUPED ? as_float : arrays, &place, &end);
    REFUSE_UNLESS(memory, "there is no memory for the weights of a convolution");
    to->weight = memory;
    if (way == DEPTHWISE) to->depthwise = of_depthwise->depthwise;
    else if (way == GROUPED) to->grouped = wide->grouped;
    else to->convolve = way == LIMITED ? any->limited : any->convolve;
    const long array = way == GROUPED ? 0 : (end - place) / CONSTANTS;
    to->known.offset = (int32_t *)(memory + place);
    to->known.scale = array ? (float *)(memory + place + array) : constants + all;
    to->known.bias = array ? (float *)(memory + place + 2 * array) : constants + 2 * all;
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
        by->grouped(&from, by->weight, (const float *)r.offset, r.scale, r.bias, 0, (float *)out, 1, k->low, k->high);
    else {
        if (is_plain(in)) from.table = 0;
        REFUSE_UNLESS(by->convolve(&from, &r, by->weight, k->groups) != NO_MEMORY, "there is no memory for rows of a convolution");
    }
    return 0;
}
