/* Convolutions of rows for engines: see convolve.h.
 *
 * Compiled once, for the architecture's baseline; it calls the widest forms that the processor has. */
#include "packed.h"

char *getenv(const char *name);
unsigned long processor_features(void);

/* ---- Instruction sets, by the features that they need. */

typedef struct {
    const char *name;
    unsigned long needs;
} set;

static const set sets[] = {SETS};

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
    pack *pack_product, *pack_grouped;
} form;

#define DECLARE(set)                                                  \
    __attribute__((weak)) extern product_form product_float32_##set;  \
    __attribute__((weak)) extern grouped_form grouped_float32_##set;  \
    __attribute__((weak)) extern mix_form mix_float32_##set;          \
    __attribute__((weak)) extern pack pack_product_float32_##set, pack_grouped_float32_##set;
#define FORM(set)                                                                   \
    {NEEDS_##set, product_float32_##set, grouped_float32_##set, mix_float32_##set, \
     pack_product_float32_##set, pack_grouped_float32_##set}

DECLARE(scalar)
#if defined(__x86_64__)
DECLARE(sse4) DECLARE(avx2) DECLARE(avx512)
static const form forms[] = {FORM(scalar), FORM(sse4), FORM(avx2), FORM(avx512)};
#elif defined(__aarch64__)
DECLARE(neon)
static const form forms[] = {FORM(scalar), FORM(neon)};
#else
static const form forms[] = {FORM(scalar)};
#endif

char *cadsurgery_pack(pack *by, const unpacked *from, const void *const *constants, long *place, long *bytes) {
    *place = by ? by(from, constants, 0, bytes) : NOT_TAKEN;
    char *memory = *place < 0 ? 0 : calloc(1, *bytes + 64);
    if (memory) by(from, constants, memory, bytes);
    return memory;
}

static const char *pack_floats(convolution *k, const unpacked *from, const float *bias) {
    const form *by = 0;
    WIDEST(forms, grouped, by);
    REFUSE_UNLESS(by && by->mix, "the library has no kernels for this processor");
    const void *constants[] = {bias};
    long place, bytes;
    char *memory = cadsurgery_pack(by->pack_grouped, from, constants, &place, &bytes);
    if (place >= 0) k->floats.grouped = by->grouped;
    else memory = cadsurgery_pack(by->pack_product, from, constants, &place, &bytes), k->floats.product = by->product;
    REFUSE_UNLESS(memory, "there is no memory for the weights of a convolution");
    k->floats.weight = (float *)memory, k->floats.bias = (float *)(memory + place);
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
    const long of_channel = k.outputs, of_group = k.channels * of_channel;
    const unpacked from = {w.data, k.groups, k.outputs, k.channels, k.taps, of_group, 1, of_channel, k.groups * of_group};
    const char *reason = in_8_bits ? cadsurgery_pack_bytes(&k, of, &from, in[SCALES].data, b.data)
                                   : pack_floats(&k, &from, b.data);
    *kept = k;
    if (reason) cadsurgery_free_convolution(kept);
    else *made = kept;
    return reason;
}

void cadsurgery_free_convolution(convolution *k) {
    free(k->floats.weight), free(k->bytes.weight), free(k->bytes.constants), free(k->spare), free(k);
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
    const uint32_t last = (uint32_t)(end > INT32_MAX ? INT32_MAX : end - 1);
    uint32_t either = 0; /* its highest bit: an entry, or its distance to the last one, is negative */
    for (int64_t i = 0; i < count; i++) either |= (uint32_t)entries[i] | (last - (uint32_t)entries[i]);
    return !count || (end > 0 && either <= INT32_MAX);
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
    int64_t size[2];
    const char *reason = cadsurgery_size_of_result(k, in, size);
    if (!reason) reason = cadsurgery_check_rows(in);
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
        by->product(&from, by->weight, by->bias, more, out, k->groups, k->outputs, k->low, k->high);
    else by->grouped(&from, by->weight, by->bias, 0, 0, more, out, k->channels, k->low, k->high);
    cadsurgery_share_by(0);
    free(swap(&k->spare, memory));
    return reason;
}
