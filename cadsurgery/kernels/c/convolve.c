/* Convolutions of rows for engines: see convolve.h.
 *
 * Compiled once, for the architecture's baseline; it calls the widest forms that the processor has. */
#include "convolve.h"
#include "vector.h"

void *malloc(size_t bytes);
void free(void *memory);
char *getenv(const char *name);
unsigned long processor_features(void);

READING(float);

/* ---- Forms of the kernels, narrowest first. */

typedef void product_form(const reading *, const float *, const float *, const int32_t *, const float *, const float *,
                          const float *, float *, long, long, double, double);
typedef void grouped_form(const reading *, const float *, const float *, const int32_t *, const float *, const float *,
                          const float *, float *, long, double, double);
typedef void mix_form(const reading *, const float *, float *);

typedef struct {
    const char *name;
    unsigned long needs;
    product_form *product; /* NULL in 8 bits */
    grouped_form *grouped;
    mix_form *mix;
    const long *product_layout, *grouped_layout;
} form;

/* In 8 bits the pointers to rows and results of the declared types point to bytes. */
#define DECLARE(set, element)                                                   \
    __attribute__((weak)) extern grouped_form grouped_##element##_##set;        \
    __attribute__((weak)) extern mix_form mix_##element##_##set;                \
    __attribute__((weak)) extern const long grouped_layout_##element##_##set[];
#define DECLARE_PRODUCT(set)                                         \
    __attribute__((weak)) extern product_form product_float32_##set; \
    __attribute__((weak)) extern const long product_layout_float32_##set[];
#define FORM(set, needs)                                                           \
    {#set, needs, product_float32_##set, grouped_float32_##set, mix_float32_##set, \
     product_layout_float32_##set, grouped_layout_float32_##set}
#define BYTE_FORM(set, needs) {#set, needs, 0, grouped_uint8_##set, mix_uint8_##set, 0, grouped_layout_uint8_##set}
enum { MOST_FORMS = 4 };

DECLARE(scalar, float32) DECLARE(scalar, uint8) DECLARE_PRODUCT(scalar)
#if defined(__x86_64__)
DECLARE(sse4, float32) DECLARE_PRODUCT(sse4)
DECLARE(avx2, float32) DECLARE(avx2, uint8) DECLARE_PRODUCT(avx2)
DECLARE(avx512, float32) DECLARE(avx512, uint8) DECLARE_PRODUCT(avx512)
static const form of_floats[MOST_FORMS] = {FORM(scalar, 0), FORM(sse4, 1ul), FORM(avx2, 3ul), FORM(avx512, 11ul)};
static const form of_bytes[MOST_FORMS] = {
    BYTE_FORM(scalar, 0), {"sse4", 1ul, 0, 0, 0, 0, 0}, BYTE_FORM(avx2, 3ul), BYTE_FORM(avx512, 11ul)};
#elif defined(__aarch64__)
DECLARE(neon, float32) DECLARE(neon, uint8) DECLARE_PRODUCT(neon)
static const form of_floats[MOST_FORMS] = {FORM(scalar, 0), FORM(neon, 64ul)};
static const form of_bytes[MOST_FORMS] = {BYTE_FORM(scalar, 0), BYTE_FORM(neon, 64ul)};
#else
static const form of_floats[MOST_FORMS] = {FORM(scalar, 0)};
static const form of_bytes[MOST_FORMS] = {BYTE_FORM(scalar, 0)};
#endif

/* Return the widest of the forms that the processor has and the variable CADSURGERY_ISA allows. */
static const form *widest(const form *forms) {
    const char *cap = getenv("CADSURGERY_ISA");
    const unsigned long features = processor_features();
    const form *found = forms;
    for (const form *one = forms; one < forms + MOST_FORMS && one->name; one++) {
        if ((features & one->needs) == one->needs && one->grouped && one->mix) found = one;
        long same = 0;
        while (cap && one->name[same] && one->name[same] == cap[same]) same++;
        if (cap && cap[0] && !one->name[same] && !cap[same]) break;
    }
    return found;
}

struct convolution {
    const form *forms;
    float outside, low, high; /* in 8 bits the numbers that stand for these values */
    long taps, groups, channels, outputs; /* per group */
    int is_product, in_8_bits;
    float *weight, *bias; /* packed */
    void *spare;          /* memory of an earlier call, or NULL */
};

#define REFUSE_UNLESS(holds, message)                    \
    do {                                                 \
        if (!(holds)) return "cadsurgery: " message; \
    } while (0)

/* Pack weights (taps, groups, channels, outputs) for `product`: see product.c. */
static void pack_product(const convolution *k, const float *from, float *to, const float *bias, float *offset) {
    const long chunk = k->forms->product_layout[1], chunks = (k->outputs + chunk - 1) / chunk;
    for (long group = 0; group < k->groups; group++)
        for (long part = 0; part < chunks; part++)
            for (long j = 0; j < chunk; j++) {
                const long output = part * chunk + j, there = output < k->outputs;
                offset[(group * chunks + part) * chunk + j] = there ? bias[group * k->outputs + output] : 0;
                for (long tap = 0; tap < k->taps; tap++)
                    for (long c = 0; c < k->channels; c++)
                        to[(((group * chunks + part) * k->taps + tap) * k->channels + c) * chunk + j] =
                            there ? from[((tap * k->groups + group) * k->channels + c) * k->outputs + output] : 0;
            }
}

/* Pack weights for `grouped`: see grouped.c. */
static void pack_grouped(const convolution *k, const float *from, float *to, const float *bias, float *offset) {
    const long lanes = k->forms->grouped_layout[0], all = k->groups * k->outputs;
    const long padded = (all + lanes - 1) / lanes * lanes;
    for (long o = 0; o < padded; o++) {
        offset[o] = o < all ? bias[o] : 0;
        for (long tap = 0; tap < k->taps; tap++)
            for (long c = 0; c < k->channels; c++)
                to[(tap * k->channels + c) * padded + o] =
                    o < all ? from[((tap * k->groups + o / k->outputs) * k->channels + c) * k->outputs + o % k->outputs] : 0;
    }
}

static float clamp(float value, float low, float high) { return value < low ? low : value > high ? high : value; }

/* Put a depthwise convolution of packed weights into numbers of 8 bits: of its rows, and of its result. */
static void to_8_bits(convolution *k, const numbers *of, long padded) {
    const float step = of->scale_of_result, zero = of->zero_of_result, ratio = of->scale / step;
    k->outside = (float)(int)(clamp(of->outside / of->scale + of->zero, 0, 255) + 0.5f);
    k->low = clamp(of->low / step + zero, 0, 255), k->high = clamp(of->high / step + zero, 0, 255);
    for (long o = 0; o < padded; o++) {
        double sum = 0;
        for (long tap = 0; tap < k->taps; tap++) sum += k->weight[tap * padded + o];
        k->bias[o] = (float)(zero + (k->bias[o] - sum * of->scale * of->zero) / step);
        for (long tap = 0; tap < k->taps; tap++) k->weight[tap * padded + o] *= ratio;
    }
}

const char *cadsurgery_make_convolution(const numbers *of, const tensor *weight, const tensor *bias, convolution **made) {
    convolution k = {.outside = of->outside, .low = of->low, .high = of->high, .in_8_bits = of->scale != 0};
    const tensor w = *weight, b = *bias;
    k.forms = widest(k.in_8_bits ? of_bytes : of_floats);
    REFUSE_UNLESS(k.forms->grouped, "the library has no kernels for this processor");
    REFUSE_UNLESS(!k.in_8_bits || (of->scale > 0 && of->scale_of_result > 0), "a scale of 8 bits is not positive");
    REFUSE_UNLESS(w.rank >= 2 && b.rank == 1, "weight or bias of a convolution have no such dimensions");
    k.taps = w.size[0];
    k.groups = w.rank == 3 ? 1 : w.size[1];
    k.channels = w.rank == 2 ? 1 : w.size[w.rank - 2];
    k.outputs = w.rank == 2 ? 1 : w.size[w.rank - 1];
    REFUSE_UNLESS(k.taps > 0 && k.groups > 0 && k.channels > 0 && k.outputs > 0 && b.size[0] == k.groups * k.outputs,
                  "weight and bias of a convolution do not fit");
    const long *layout = k.forms->grouped_layout;
    const int in_vector = k.channels <= layout[1] && !(k.channels & (k.channels - 1)) && k.outputs == k.channels;
    k.is_product = !k.in_8_bits && (k.groups == 1 || !in_vector || k.taps > layout[2]);
    REFUSE_UNLESS(!k.in_8_bits || (k.channels == 1 && in_vector && k.taps <= layout[2]),
                  "in 8 bits, convolutions are depthwise and of few taps");
    const long width = k.is_product ? k.forms->product_layout[1] : layout[0];
    const long of_group = k.is_product ? k.outputs : k.groups * k.outputs, groups = k.is_product ? k.groups : 1;
    const size_t padded = (size_t)groups * ((of_group + width - 1) / width * width);
    convolution *kept = malloc(sizeof k);
    k.weight = malloc(padded * k.taps * k.channels * sizeof(float) + 64);
    k.bias = malloc(padded * sizeof(float) + 64);
    if (!kept || !k.weight || !k.bias) free(kept), free(k.weight), free(k.bias);
    REFUSE_UNLESS(kept && k.weight && k.bias, "there is no memory for the weights of a convolution");
    (k.is_product ? pack_product : pack_grouped)(&k, w.data, k.weight, b.data, k.bias);
    if (k.in_8_bits) to_8_bits(&k, of, (long)padded);
    *kept = k;
    *made = kept;
    return 0;
}

void cadsurgery_free_convolution(convolution *k) { free(k->weight), free(k->bias), free(k->spare), free(k); }

const char *cadsurgery_size_of_result(const convolution *k, const tensor *in, int64_t *size) {
    for (size_t i = 0; i < WEIGHT; i++) REFUSE_UNLESS(in[i].rank == 2, "an input of a convolution is not two-dimensional");
    size[0] = in[TABLE].size[0], size[1] = k->groups * k->outputs;
    REFUSE_UNLESS(in[ROWS_IN].size[1] == k->groups * k->channels && in[TABLE].size[1] == k->taps,
                  "rows and table do not fit the weight of a convolution");
    REFUSE_UNLESS(in[SHARES].size[0] == in[SOURCES].size[0] && in[SHARES].size[1] == in[SOURCES].size[1],
                  "shares do not fit the halo");
    REFUSE_UNLESS(in[RESIDUAL].rank != 2 || !k->in_8_bits, "in 8 bits, convolutions take no residual");
    REFUSE_UNLESS(in[RESIDUAL].rank != 2 || (in[RESIDUAL].size[0] == size[0] && in[RESIDUAL].size[1] == size[1]),
                  "the residual of a convolution has another shape than its result");
    return 0;
}

static int is_within(const int32_t *entries, int64_t count, int64_t end) {
    int32_t least = 0, most = 0;
    for (int64_t i = 0; i < count; i++) {
        least = entries[i] < least ? entries[i] : least;
        most = entries[i] > most ? entries[i] : most;
    }
    return least >= 0 && most < end;
}

/* Put a pointer in the place of another and return that (atomic). */
static void *swap(void **place, void *with) {
#if defined(__aarch64__) && !defined(__APPLE__) && !defined(_WIN32)
    /* Compilers would call a function of their runtime library here, which is not linked. */
    void *old;
    int failed;
    do __asm__ volatile("ldaxr %0, [%2]\n\tstlxr %w1, %3, [%2]"
                        : "=&r"(old), "=&r"(failed) : "r"(place), "r"(with) : "memory");
    while (failed);
    return old;
#else
    return __atomic_exchange_n(place, with, __ATOMIC_ACQ_REL);
#endif
}

const char *cadsurgery_convolve(convolution *k, const tensor *in, void *out, share_in_engine *way) {
    const long rows = in[ROWS_IN].size[0], channels = in[ROWS_IN].size[1], count = in[TABLE].size[0];
    const long halo = in[SOURCES].size[0], many = in[SOURCES].size[1];
    REFUSE_UNLESS(is_within(in[TABLE].data, count * k->taps, rows + 1 + halo) &&
                      is_within(in[SOURCES].data, halo * many, rows),
                  "a table names rows that do not exist");
    /* One row for what lies outside, then the halo. The memory is kept for the next call, since new pages cost more than
     * what is written to them. */
    struct spare { size_t bytes; } *memory = swap(&k->spare, 0);
    const size_t row = channels * (k->in_8_bits ? 1 : sizeof(float)), bytes = (halo + 1) * row;
    if (!memory || memory->bytes < bytes) {
        free(memory);
        memory = malloc(64 + bytes);
        REFUSE_UNLESS(memory, "there is no memory for the halo of a convolution");
        memory->bytes = bytes;
    }
    char *first = (char *)memory + 64;
    float *beyond = (float *)first, *mixed = (float *)(first + row);
    for (long c = 0; c < channels; c++)
        if (k->in_8_bits) ((uint8_t *)first)[c] = (uint8_t)k->outside;
        else beyond[c] = k->outside;
    cadsurgery_share_by(way);
    if (halo) {
        const reading from = {in[ROWS_IN].data, 0, beyond, in[SOURCES].data, rows, halo, many, channels, channels};
        k->forms->mix(&from, in[SHARES].data, mixed);
    }
    const long of_group = k->is_product ? k->channels : channels;
    const reading from = {in[ROWS_IN].data, mixed, beyond, in[TABLE].data, rows, count, k->taps, of_group, channels};
    const float *more = in[RESIDUAL].rank == 2 ? in[RESIDUAL].data : 0;
    if (k->is_product)
        k->forms->product(&from, k->weight, k->bias, 0, 0, 0, more, out, k->groups, k->outputs, k->low, k->high);
    else
        k->forms->grouped(&from, k->weight, k->bias, 0, 0, 0, more, out, k->channels, k->low, k->high);
    cadsurgery_share_by(0);
    free(swap(&k->spare, memory));
    return 0;
}
