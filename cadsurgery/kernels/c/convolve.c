/* Convolutions of rows for engines: see convolve.h.
 *
 * Compiled once, for the architecture's baseline; it calls the widest forms that the processor has. */
#include "packed.h"

char *getenv(const char *name);
unsigned long processor_features(void);

/* ---- Instruction sets, by the features that they need: see kernels/build.py. */

typedef struct {
    const char *name;
    unsigned long needs;
} set;

static const set sets[] = {{"scalar", 0}, {"sse4", 1}, {"avx2", 3}, {"avxvnni", 7}, {"avx512", 11}, {"avx512vnni", 27},
                           {"avx512bf16", 59}, {"amx", 571}, {"neon", 64}, {"dotprod", 192}, {"bf16", 448}};

static int is_same(const char *one, const char *other) {
    while (*one && *one == *other) one++, other++;
    return *one == *other;
}

unsigned long cadsurgery_features(void) {
    const char *cap = getenv("CADSURGERY_ISA");
    for (size_t i = 0; cap && i < sizeof sets / sizeof *sets; i++)
        if (is_same(cap, sets[i].name)) return processor_features() & sets[i].needs;
    return processor_features();
}

/* ---- Forms of the kernels for floats, narrowest first. */

typedef struct {
    unsigned long needs;
    product_form *product;
    grouped_form *grouped;
    mix_form *mix;
    const long *product_layout, *grouped_layout;
} form;

#define DECLARE(set)                                                  \
    __attribute__((weak)) extern product_form product_float32_##set;  \
    __attribute__((weak)) extern grouped_form grouped_float32_##set;  \
    __attribute__((weak)) extern mix_form mix_float32_##set;          \
    __attribute__((weak)) extern const long product_layout_float32_##set[]; \
    __attribute__((weak)) extern const long grouped_layout_float32_##set[];
#define FORM(set, needs)                                                     \
    {needs, product_float32_##set, grouped_float32_##set, mix_float32_##set, \
     product_layout_float32_##set, grouped_layout_float32_##set}

DECLARE(scalar)
#if defined(__x86_64__)
DECLARE(sse4) DECLARE(avx2) DECLARE(avx512)
static const form forms[] = {FORM(scalar, 0), FORM(sse4, 1), FORM(avx2, 3), FORM(avx512, 11)};
#elif defined(__aarch64__)
DECLARE(neon)
static const form forms[] = {FORM(scalar, 0), FORM(neon, 64)};
#else
static const form forms[] = {FORM(scalar, 0)};
#endif

/* Pack weights (taps, groups, channels, outputs) for `product`: see product.c. */
static void pack_product(const convolution *k, long chunk, const float *from, float *to, const float *bias, float *offset) {
    const long chunks = (k->outputs + chunk - 1) / chunk;
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
static void pack_grouped(const convolution *k, long lanes, const float *from, float *to, const float *bias, float *offset) {
    const long all = k->groups * k->outputs;
    const long padded = (all + lanes - 1) / lanes * lanes;
    for (long o = 0; o < padded; o++) {
        offset[o] = o < all ? bias[o] : 0;
        for (long tap = 0; tap < k->taps; tap++)
            for (long c = 0; c < k->channels; c++)
                to[(tap * k->channels + c) * padded + o] =
                    o < all ? from[((tap * k->groups + o / k->outputs) * k->channels + c) * k->outputs + o % k->outputs] : 0;
    }
}

static const char *pack_floats(convolution *k, const float *weight, const float *bias) {
    const form *by = 0;
    WIDEST(forms, grouped, by);
    REFUSE_UNLESS(by && by->mix, "the library has no kernels for this processor");
    const long *layout = by->grouped_layout;
    const int in_vector = k->channels <= layout[1] && !(k->channels & (k->channels - 1)) && k->outputs == k->channels;
    const int is_product = k->groups == 1 || !in_vector || k->taps > layout[2];
    const long width = is_product ? by->product_layout[1] : layout[0];
    const long of_group = is_product ? k->outputs : k->groups * k->outputs, groups = is_product ? k->groups : 1;
    const size_t padded = (size_t)groups * ((of_group + width - 1) / width * width);
    floats *to = &k->floats;
    to->weight = malloc(padded * k->taps * k->channels * sizeof(float) + 64);
    to->bias = malloc(padded * sizeof(float) + 64);
    REFUSE_UNLESS(to->weight && to->bias, "there is no memory for the weights of a convolution");
    (is_product ? pack_product : pack_grouped)(k, width, weight, to->weight, bias, to->bias);
    if (is_product) to->product = by->product;
    else to->grouped = by->grouped;
    k->mix = by->mix;
    return 0;
}

const char *cadsurgery_make_convolution(const numbers *of, const tensor *in, convolution **made) {
    const tensor w = in[WEIGHT], b = in[BIAS];
    const int in_8_bits = of->scale != 0;
    REFUSE_UNLESS(w.rank >= 2 && b.rank == 1, "weight or bias of a convolution have no such dimensions");
    convolution k = {.taps = w.size[0],
                     .groups = w.rank == 3 ? 1 : w.size[1],
                     .channels = w.rank == 2 ? 1 : w.size[w.rank - 2],
                     .outputs = w.rank == 2 ? 1 : w.size[w.rank - 1],
                     .in_8_bits = in_8_bits,
                     .outside = of->outside,
                     .low = of->low,
                     .high = of->high};
    REFUSE_UNLESS(k.taps > 0 && k.groups > 0 && k.channels > 0 && k.outputs > 0 && b.size[0] == k.groups * k.outputs,
                  "weight and bias of a convolution do not fit");
    if (in_8_bits) {
        int64_t scales = 1;
        for (size_t i = 0; i < in[SCALES].rank; i++) scales *= in[SCALES].size[i];
        REFUSE_UNLESS(scales == b.size[0], "the scales of a weight do not fit it");
        REFUSE_UNLESS(of->scale > 0 && of->scale_of_result > 0, "a scale of 8 bits is not positive");
    }
    convolution *kept = malloc(sizeof k);
    REFUSE_UNLESS(kept, "there is no memory for a convolution");
    const char *reason = in_8_bits ? cadsurgery_pack_bytes(&k, of, w.data, in[SCALES].data, b.data)
                                   : pack_floats(&k, w.data, b.data);
    *kept = k;
    if (reason) cadsurgery_free_convolution(kept);
    else *made = kept;
    return reason;
}

void cadsurgery_free_convolution(convolution *k) {
    free(k->floats.weight), free(k->floats.bias), free(k->bytes.weight), free(k->spare), free(k);
}

const char *cadsurgery_size_of_result(const convolution *k, const tensor *in, int64_t *size) {
    for (size_t i = 0; i < WEIGHT; i++) REFUSE_UNLESS(in[i].rank == 2, "an input of a convolution is not two-dimensional");
    size[0] = in[TABLE].size[0], size[1] = k->groups * k->outputs;
    REFUSE_UNLESS(in[ROWS_IN].size[1] == k->groups * k->channels && in[TABLE].size[1] == k->taps,
                  "rows and table do not fit the weight of a convolution");
    REFUSE_UNLESS(in[SHARES].size[0] == in[SOURCES].size[0] && in[SHARES].size[1] == in[SOURCES].size[1],
                  "shares do not fit the halo");
    REFUSE_UNLESS(in[RESIDUAL].rank != 2 || !k->in_8_bits || k->bytes.convolve,
                  "in 8 bits, depthwise convolutions take no residual");
    REFUSE_UNLESS(in[RESIDUAL].rank != 2 || (in[RESIDUAL].size[0] == size[0] && in[RESIDUAL].size[1] == size[1]),
                  "the residual of a convolution has another shape than its result");
    return 0;
}

int cadsurgery_is_within(const int32_t *entries, int64_t count, int64_t end) {
    int32_t least = 0, most = 0;
    for (int64_t i = 0; i < count; i++) {
        least = entries[i] < least ? entries[i] : least;
        most = entries[i] > most ? entries[i] : most;
    }
    return least >= 0 && most < end;
}

const char *cadsurgery_check_rows(const tensor *in) {
    const tensor *table = in + TABLE, *sources = in + SOURCES;
    const int64_t rows = in[ROWS_IN].size[0], halo = sources->size[0];
    REFUSE_UNLESS(cadsurgery_is_within(table->data, table->size[0] * table->size[1], rows + 1 + halo) &&
                      cadsurgery_is_within(sources->data, halo * sources->size[1], rows),
                  "a table names rows that do not exist");
    return 0;
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
    const char *reason = cadsurgery_check_rows(in);
    if (reason) return reason;
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
        k->mix(&from, in[SHARES].data, mixed);
    }
    const floats *by = &k->floats;
    const void *more = in[RESIDUAL].rank == 2 ? in[RESIDUAL].data : 0;
    const long of_group = by->grouped || k->bytes.depthwise || k->bytes.grouped ? channels : k->channels;
    const reading from = {in[ROWS_IN].data, mixed, beyond, in[TABLE].data, rows, count, k->taps, of_group, channels};
    if (k->in_8_bits) reason = cadsurgery_convolve_bytes(k, &from, more, out);
    else if (by->product)
        by->product(&from, by->weight, by->bias, 0, 0, 0, more, out, k->groups, k->outputs, k->low, k->high);
    else by->grouped(&from, by->weight, by->bias, 0, 0, 0, more, out, k->channels, k->low, k->high);
    cadsurgery_share_by(0);
    free(swap(&k->spare, memory));
    return reason;
}
