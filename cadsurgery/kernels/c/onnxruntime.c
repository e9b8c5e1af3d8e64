/* Operations of ONNX Runtime: convolutions of rows, for files written with `with_kernels`.
 *
 * ONNX Runtime calls `RegisterCustomOps` when a session registers this library. The operations have the names of functions
 * in the file, whose bodies are standard operations; ONNX Runtime runs a body only if no operation of its name is
 * registered. Compiled once, for the architecture's baseline; it calls the widest forms that the processor has.
 *
 * ONNX Runtime's C interface is a table of functions that is only ever extended at its end, so positions are stable.
 */
#include "parallel.h"
#include "vector.h"

void *malloc(size_t bytes);
void free(void *memory);
char *getenv(const char *name);
unsigned long processor_features(void);

READING(float);

/* ---- The part of ONNX Runtime's C interface that is used. A status is NULL for success. */

typedef struct status status;
typedef struct value value;
typedef struct context context;
typedef const void *const *functions;

typedef struct {
    functions (*of_version)(uint32_t version);
    const char *(*version)(void);
} interface;

/* The versions of the interface that first have `share`, and all fields of `operation`. */
enum { VERSION = 17, VERSION_OF_OPERATION = 16 };
enum { FLOAT = 1, INT32 = 6, FAILURE = 1, MOST_DIMENSIONS = 4 };

typedef status *create_status(int code, const char *message);
typedef status *create_domain(const char *name, void **domain);
typedef status *add(void *to, const void *what);
typedef status *data_of(const value *tensor, void **data);
typedef status *rank_of(const void *shape, size_t *rank);
typedef status *dimensions_of(const void *shape, int64_t *dimensions, size_t rank);
typedef status *shape_of(const value *tensor, void **shape);
typedef status *float_of(const void *node, const char *name, float *number);
typedef status *input_of(const context *of, size_t place, const value **tensor);
typedef status *output_of(context *of, size_t place, const int64_t *dimensions, size_t rank, value **tensor);
typedef status *constant_of(const void *node, size_t place, int *is_constant, const value **tensor);
typedef status *share(const context *of, void (*body)(void *, size_t), size_t count, size_t batches, void *work);
typedef void release(void *what);

#define CALL(kind, place, ...) ((kind *)api[place])(__VA_ARGS__)
#define CREATE_STATUS(...) CALL(create_status, 0, __VA_ARGS__)
#define CREATE_DOMAIN(...) CALL(create_domain, 26, __VA_ARGS__)
#define ADD_OPERATION(...) CALL(add, 27, __VA_ARGS__)
#define ADD_DOMAIN(...) CALL(add, 28, __VA_ARGS__)
#define DATA_OF(...) CALL(data_of, 51, __VA_ARGS__)
#define RANK_OF(...) CALL(rank_of, 61, __VA_ARGS__)
#define DIMENSIONS_OF(...) CALL(dimensions_of, 62, __VA_ARGS__)
#define SHAPE_OF(...) CALL(shape_of, 65, __VA_ARGS__)
#define FLOAT_OF(...) CALL(float_of, 85, __VA_ARGS__)
#define INPUT_OF(...) CALL(input_of, 90, __VA_ARGS__)
#define OUTPUT_OF(...) CALL(output_of, 91, __VA_ARGS__)
#define RELEASE_SHAPE(...) CALL(release, 99, __VA_ARGS__)
#define CONSTANT_OF(...) CALL(constant_of, 249, __VA_ARGS__)
#define SHARE(...) CALL(share, 274, __VA_ARGS__)

/* An operation as ONNX Runtime asks for it. */
typedef struct operation {
    uint32_t version;
    void *(*create)(const struct operation *, functions, const void *node);
    const char *(*name)(const struct operation *);
    const char *(*provider)(const struct operation *);
    int (*input_type)(const struct operation *, size_t);
    size_t (*input_count)(const struct operation *);
    int (*output_type)(const struct operation *, size_t);
    size_t (*output_count)(const struct operation *);
    void (*compute)(void *kernel, context *);
    void (*destroy)(void *kernel);
    int (*input_kind)(const struct operation *, size_t);
    int (*output_kind)(const struct operation *, size_t);
    int (*memory)(const struct operation *, size_t);
    int (*least_inputs)(const struct operation *);
    int (*same_inputs)(const struct operation *);
    int (*least_outputs)(const struct operation *);
    int (*same_outputs)(const struct operation *);
    status *(*create_or_fail)(const struct operation *, functions, const void *node, void **kernel);
    status *(*compute_or_fail)(void *kernel, context *);
    const char *own_name; /* ONNX Runtime does not read beyond the fields of the operation's version */
} operation;

/* ---- Forms of the kernels, narrowest first. */

typedef void product_form(const reading *, const float *, const float *, const int32_t *, const float *, const float *,
                          const float *, float *, long, long, double, double);
typedef void grouped_form(const reading *, const float *, const float *, const int32_t *, const float *, const float *,
                          const float *, float *, long, double, double);
typedef void mix_form(const reading *, const float *, float *);

typedef struct {
    const char *name;
    unsigned long needs;
    product_form *product;
    grouped_form *grouped;
    mix_form *mix;
    const long *product_layout, *grouped_layout;
} form;

#define DECLARE(set)                                                       \
    __attribute__((weak)) extern product_form product_float32_##set;       \
    __attribute__((weak)) extern grouped_form grouped_float32_##set;       \
    __attribute__((weak)) extern mix_form mix_float32_##set;               \
    __attribute__((weak)) extern const long product_layout_float32_##set[]; \
    __attribute__((weak)) extern const long grouped_layout_float32_##set[];
#define FORM(set, needs)                                                                  \
    {#set, needs, product_float32_##set, grouped_float32_##set, mix_float32_##set, \
     product_layout_float32_##set, grouped_layout_float32_##set}

DECLARE(scalar)
#if defined(__x86_64__)
DECLARE(sse4)
DECLARE(avx2)
DECLARE(avx512)
static const form forms[] = {FORM(scalar, 0), FORM(sse4, 1ul), FORM(avx2, 3ul), FORM(avx512, 11ul)};
#elif defined(__aarch64__)
DECLARE(neon)
static const form forms[] = {FORM(scalar, 0), FORM(neon, 64ul)};
#else
static const form forms[] = {FORM(scalar, 0)};
#endif

/* Return the widest form that the processor has and the variable CADSURGERY_ISA allows. */
static const form *widest(void) {
    const char *cap = getenv("CADSURGERY_ISA");
    const unsigned long features = processor_features();
    const form *found = forms;
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        const form *one = forms + i;
        if ((features & one->needs) == one->needs && one->product && one->grouped && one->mix) found = one;
        long same = 0;
        while (cap && one->name[same] && one->name[same] == cap[same]) same++;
        if (cap && cap[0] && !one->name[same] && !cap[same]) break;
    }
    return found;
}

/* ---- Convolutions. */

/* Inputs of all operations. Rows (N, C), table (M, taps), halo (H, K) rows and their shares, weight, bias (O), residual
 * (M, O) or one number, which adds nothing. */
enum { ROWS_IN, TABLE, SOURCES, SHARES, WEIGHT, BIAS, RESIDUAL, INPUTS };

typedef struct {
    functions api;
    const form *forms;
    float outside, low, high;
    long taps, groups, channels, outputs; /* per group */
    int is_product;
    float *weight, *bias; /* packed */
    void *spare;          /* memory of an earlier call, or NULL */
} kernel;

typedef struct {
    void *data;
    size_t rank;
    int64_t size[MOST_DIMENSIONS];
} tensor;

static status *fail(functions api, const char *message) { return CREATE_STATUS(FAILURE, message); }

#define TRY(call)                   \
    do {                            \
        status *failed = (call);    \
        if (failed) return failed;  \
    } while (0)
#define REFUSE_UNLESS(holds, message) \
    do {                              \
        if (!(holds)) return fail(api, message); \
    } while (0)

static status *read_tensor(functions api, const value *from, tensor *to) {
    void *shape;
    TRY(SHAPE_OF(from, &shape));
    status *failed = RANK_OF(shape, &to->rank);
    if (!failed && to->rank > MOST_DIMENSIONS) failed = fail(api, "cadsurgery: a tensor has too many dimensions");
    if (!failed) failed = DIMENSIONS_OF(shape, to->size, to->rank);
    RELEASE_SHAPE(shape);
    return failed ? failed : DATA_OF(from, &to->data);
}

/* Pack weights (taps, groups, channels, outputs) for `product`: see product.c. */
static void pack_product(const kernel *k, const float *from, float *to, const float *bias, float *offset) {
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
static void pack_grouped(const kernel *k, const float *from, float *to, const float *bias, float *offset) {
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

static status *create_convolution(const operation *self, functions api, const void *node, void **made) {
    (void)self;
    kernel k = {.api = api, .forms = widest()};
    const value *weight, *bias;
    tensor w, b;
    int is_constant = 0;
    REFUSE_UNLESS(k.forms->product, "cadsurgery: the library has no kernels for this processor");
    TRY(FLOAT_OF(node, "outside", &k.outside));
    TRY(FLOAT_OF(node, "low", &k.low));
    TRY(FLOAT_OF(node, "high", &k.high));
    TRY(CONSTANT_OF(node, WEIGHT, &is_constant, &weight));
    REFUSE_UNLESS(is_constant, "cadsurgery: the weight of a convolution is not constant");
    TRY(CONSTANT_OF(node, BIAS, &is_constant, &bias));
    REFUSE_UNLESS(is_constant, "cadsurgery: the bias of a convolution is not constant");
    TRY(read_tensor(api, weight, &w));
    TRY(read_tensor(api, bias, &b));
    REFUSE_UNLESS(w.rank >= 2 && b.rank == 1, "cadsurgery: weight or bias of a convolution have no such dimensions");
    /* (taps, channels) of a depthwise convolution, (taps, C, O), or (taps, groups, C, O) */
    k.taps = w.size[0];
    k.groups = w.rank == 3 ? 1 : w.size[1];
    k.channels = w.rank == 2 ? 1 : w.size[w.rank - 2];
    k.outputs = w.rank == 2 ? 1 : w.size[w.rank - 1];
    REFUSE_UNLESS(k.taps > 0 && k.groups > 0 && k.channels > 0 && k.outputs > 0 && b.size[0] == k.groups * k.outputs,
                  "cadsurgery: weight and bias of a convolution do not fit");
    const long *layout = k.forms->grouped_layout;
    const int in_vector = k.channels <= layout[1] && !(k.channels & (k.channels - 1)) && k.outputs == k.channels;
    k.is_product = k.groups == 1 || !in_vector || k.taps > layout[2];
    const long width = k.is_product ? k.forms->product_layout[1] : layout[0];
    const long of_group = k.is_product ? k.outputs : k.groups * k.outputs, groups = k.is_product ? k.groups : 1;
    const size_t padded = (size_t)groups * ((of_group + width - 1) / width * width);
    kernel *kept = malloc(sizeof k);
    k.weight = malloc(padded * k.taps * k.channels * sizeof(float) + 64);
    k.bias = malloc(padded * sizeof(float) + 64);
    if (!kept || !k.weight || !k.bias) {
        free(kept), free(k.weight), free(k.bias);
        return fail(api, "cadsurgery: there is no memory for the weights of a convolution");
    }
    (k.is_product ? pack_product : pack_grouped)(&k, w.data, k.weight, b.data, k.bias);
    *kept = k;
    *made = kept;
    return 0;
}

static void destroy_convolution(void *one) {
    kernel *k = one;
    free(k->weight), free(k->bias), free(k->spare), free(k);
}

static int is_within(const int32_t *entries, int64_t count, int64_t end) {
    int32_t least = 0, most = 0;
    for (int64_t i = 0; i < count; i++) {
        least = entries[i] < least ? entries[i] : least;
        most = entries[i] > most ? entries[i] : most;
    }
    return least >= 0 && most < end;
}

/* What shares work in this thread while it is in a call of ONNX Runtime. */
typedef struct {
    functions api;
    const context *within;
} sharing;

static __thread const sharing *ours;

typedef struct {
    long count, grain;
    share_body body;
    void *work;
} parts;

static void do_part(void *all, size_t part) {
    const parts *p = all;
    const long begin = (long)part * p->grain, end = begin + p->grain;
    p->body(begin, end < p->count ? end : p->count, p->work);
}

/* Share work among the threads of ONNX Runtime. */
static int share_in_call(long count, long grain, share_body body, void *work) {
    const functions api = ours->api;
    parts all = {count, grain, body, work};
    const size_t number = (count + grain - 1) / grain;
    return number > 1 && !SHARE(ours->within, do_part, number, 0, &all);
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

static status *convolve(void *one, context *within) {
    kernel *k = one;
    const functions api = k->api;
    tensor in[INPUTS];
    for (size_t i = 0; i < INPUTS; i++) {
        const value *from;
        if (i == WEIGHT || i == BIAS) continue;
        TRY(INPUT_OF(within, i, &from));
        TRY(read_tensor(api, from, in + i));
        REFUSE_UNLESS(in[i].rank == 2 || i == RESIDUAL, "cadsurgery: an input of a convolution is not two-dimensional");
    }
    const long rows = in[ROWS_IN].size[0], channels = in[ROWS_IN].size[1], count = in[TABLE].size[0];
    const long halo = in[SOURCES].size[0], many = in[SOURCES].size[1], outputs = k->groups * k->outputs;
    REFUSE_UNLESS(channels == k->groups * k->channels && in[TABLE].size[1] == k->taps,
                  "cadsurgery: rows and table do not fit the weight of a convolution");
    REFUSE_UNLESS(in[SHARES].size[0] == halo && in[SHARES].size[1] == many, "cadsurgery: shares do not fit the halo");
    const int adds = in[RESIDUAL].rank == 2;
    REFUSE_UNLESS(!adds || (in[RESIDUAL].size[0] == count && in[RESIDUAL].size[1] == outputs),
                  "cadsurgery: the residual of a convolution has another shape than its result");
    REFUSE_UNLESS(is_within(in[TABLE].data, count * k->taps, rows + 1 + halo) &&
                      is_within(in[SOURCES].data, halo * many, rows),
                  "cadsurgery: a table names rows that do not exist");
    const int64_t size[] = {count, outputs};
    value *made;
    void *out;
    TRY(OUTPUT_OF(within, 0, size, 2, &made));
    TRY(DATA_OF(made, &out));
    /* One row for what lies outside, then the halo. The memory is kept for the next call, since new pages cost more than
     * what is written to them. */
    struct spare { size_t bytes; } *memory = swap(&k->spare, 0);
    const size_t bytes = (size_t)(halo + 1) * channels * sizeof(float);
    if (!memory || memory->bytes < bytes) {
        free(memory);
        memory = malloc(64 + bytes);
        REFUSE_UNLESS(memory, "cadsurgery: there is no memory for the halo of a convolution");
        memory->bytes = bytes;
    }
    float *beyond = (float *)((char *)memory + 64);
    for (long c = 0; c < channels; c++) beyond[c] = k->outside;
    const sharing here = {api, within};
    ours = &here;
    cadsurgery_share_by(share_in_call);
    if (halo) {
        const reading from = {in[ROWS_IN].data, 0, beyond, in[SOURCES].data, rows, halo, many, channels, channels};
        k->forms->mix(&from, in[SHARES].data, beyond + channels);
    }
    const long of_group = k->is_product ? k->channels : channels;
    const reading from = {in[ROWS_IN].data, beyond + channels, beyond, in[TABLE].data, rows, count, k->taps, of_group, channels};
    const float *more = adds ? in[RESIDUAL].data : 0;
    if (k->is_product)
        k->forms->product(&from, k->weight, k->bias, 0, 0, 0, more, out, k->groups, k->outputs, k->low, k->high);
    else
        k->forms->grouped(&from, k->weight, k->bias, 0, 0, 0, more, out, k->channels, k->low, k->high);
    cadsurgery_share_by(0);
    free(swap(&k->spare, memory));
    return 0;
}

/* ---- Registration. */

static const char *name_of(const operation *self) { return self->own_name; }
static const char *any_provider(const operation *self) { return (void)self, (const char *)0; }
static int type_of(const operation *self, size_t place) {
    return (void)self, place == TABLE || place == SOURCES ? INT32 : FLOAT;
}
static int result_type(const operation *self, size_t place) { return (void)self, (void)place, FLOAT; }
static size_t input_count(const operation *self) { return (void)self, INPUTS; }
static size_t one_output(const operation *self) { return (void)self, 1; }
static int required(const operation *self, size_t place) { return (void)self, (void)place, 0; }
static int one(const operation *self) { return (void)self, 1; }

#define OPERATION(name)                                                                                            \
    {VERSION_OF_OPERATION, 0, name_of, any_provider, type_of, input_count, result_type, one_output, 0, destroy_convolution,     \
     required, required, required, one, one, one, one, create_convolution, convolve, name}

static const operation operations[] = {OPERATION("Convolve"), OPERATION("ConvolveDepthwise"), OPERATION("ConvolveGroups")};

/* Add the operations to the options of a session; called by ONNX Runtime. */
status *RegisterCustomOps(void *options, const interface *base) {
    functions api = base->of_version(VERSION);
    void *domain;
    if (!api) {
        api = base->of_version(1);
        return fail(api, "cadsurgery: this ONNX Runtime is older than 1.17");
    }
    TRY(CREATE_DOMAIN("cadsurgery", &domain));
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++) TRY(ADD_OPERATION(domain, operations + i));
    return ADD_DOMAIN(options, domain);
}
