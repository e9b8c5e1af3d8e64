/* Operations of ONNX Runtime: convolutions of rows, their kernel maps, and interpolation, for files written with `with_kernels`.
 *
 * ONNX Runtime calls `RegisterCustomOps` when a session registers this library. Without it, it refuses the file.
 *
 * ONNX Runtime's C interface is a table of functions that is only ever extended at its end, so positions are stable.
 */
#include "convolve.h"

void *malloc(size_t bytes);
void free(void *memory);

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
enum { FLOAT = 1, UINT8 = 2, INT8 = 3, INT32 = 6, FAILURE = 1 };

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
    const int *types;     /* of the inputs; the first is that of the results, too */
    size_t inputs, outputs;
    find *find; /* what finds several results, or NULL */
    size_t dimensions; /* of what is computed of maps, with what sets its size and computes it */
    find_size *size;
    of_maps *of_maps;
} operation;

static const int of_floats[] = {FLOAT, INT32, INT32, FLOAT, FLOAT, FLOAT, FLOAT};
static const int of_bytes[] = {UINT8, INT32, INT32, FLOAT, INT8, FLOAT, UINT8, FLOAT};
static const int of_found[] = {INT32, INT32, INT32, INT32, INT32, INT32, INT32, INT32};
static const int of_maps_and_sizes[] = {FLOAT, INT32, INT32, INT32, INT32};

/* ---- Convolutions, picks, maps, cells and kernel maps. */

typedef struct {
    functions api;
    const operation *operation;
    convolution *convolution; /* NULL for other operations */
} kernel;

static status *fail(functions api, const char *message) { return message ? CREATE_STATUS(FAILURE, message) : 0; }

#define TRY(call)                   \
    do {                            \
        status *failed = (call);    \
        if (failed) return failed;  \
    } while (0)

static status *read_tensor(functions api, const value *from, tensor *to) {
    void *shape, *data;
    TRY(SHAPE_OF(from, &shape));
    status *failed = RANK_OF(shape, &to->rank);
    if (!failed && to->rank > MOST_DIMENSIONS) failed = fail(api, "cadsurgery: a tensor has too many dimensions");
    if (!failed) failed = DIMENSIONS_OF(shape, to->size, to->rank);
    RELEASE_SHAPE(shape);
    if (!failed) failed = DATA_OF(from, &data);
    if (!failed) to->data = data;
    return failed;
}

static status *read_constant(functions api, const void *node, size_t place, tensor *to) {
    const value *from;
    int is_constant = 0;
    TRY(CONSTANT_OF(node, place, &is_constant, &from));
    if (!is_constant) return fail(api, "cadsurgery: weight or bias of a convolution are not constant");
    return read_tensor(api, from, to);
}

static status *create_convolution(const operation *self, functions api, const void *node, void **made) {
    numbers of = {0};
    tensor in[INPUTS_IN_8_BITS];
    TRY(FLOAT_OF(node, "outside", &of.outside));
    TRY(FLOAT_OF(node, "low", &of.low));
    TRY(FLOAT_OF(node, "high", &of.high));
    if (self->types == of_bytes) {
        TRY(FLOAT_OF(node, "scale", &of.scale));
        TRY(FLOAT_OF(node, "zero", &of.zero));
        TRY(FLOAT_OF(node, "scale_of_result", &of.scale_of_result));
        TRY(FLOAT_OF(node, "zero_of_result", &of.zero_of_result));
        TRY(FLOAT_OF(node, "scale_of_residual", &of.scale_of_residual));
        TRY(FLOAT_OF(node, "zero_of_residual", &of.zero_of_residual));
        TRY(read_constant(api, node, SCALES, in + SCALES));
    }
    TRY(read_constant(api, node, WEIGHT, in + WEIGHT));
    TRY(read_constant(api, node, BIAS, in + BIAS));
    kernel *k = malloc(sizeof *k);
    if (!k) return fail(api, "cadsurgery: there is no memory for a convolution");
    *k = (kernel){api, self, 0};
    const char *reason = cadsurgery_make_convolution(&of, in, &k->convolution);
    if (reason) free(k);
    else *made = k;
    return fail(api, reason);
}

static status *create_other(const operation *self, functions api, const void *node, void **made) {
    (void)node;
    kernel *k = malloc(sizeof *k);
    if (!k) return fail(api, "cadsurgery: there is no memory for an operation");
    *k = (kernel){api, self, 0};
    *made = k;
    return 0;
}

static void destroy(void *one) {
    kernel *k = one;
    if (k->convolution) cadsurgery_free_convolution(k->convolution);
    free(k);
}

/* The call of ONNX Runtime that this thread is in. */
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

/* Compute a result; weight and bias were read when the kernel was created. */
static status *compute(void *one, context *within) {
    const kernel *k = one;
    convolution *const by = k->convolution;
    const functions api = k->api;
    tensor in[INPUTS];
    for (size_t i = 0; i < (by ? INPUTS : INPUTS_OF_PICK); i++) {
        const value *from;
        if (i == WEIGHT || i == BIAS) continue;
        TRY(INPUT_OF(within, i, &from));
        TRY(read_tensor(api, from, in + i));
    }
    int64_t size[2];
    value *made;
    void *out;
    TRY(fail(api, by ? cadsurgery_size_of_result(by, in, size) : cadsurgery_size_of_pick(in, size)));
    TRY(OUTPUT_OF(within, 0, size, 2, &made));
    TRY(DATA_OF(made, &out));
    const sharing here = {api, within};
    ours = &here;
    return fail(api, by ? cadsurgery_convolve(by, in, out, share_in_call) : cadsurgery_pick(k->operation->types == of_bytes, in, out, share_in_call));
}

/* Read all inputs of an operation. */
static status *read_inputs(const kernel *k, const context *within, tensor *in) {
    const functions api = k->api;
    for (size_t i = 0; i < k->operation->inputs; i++) {
        const value *from;
        TRY(INPUT_OF(within, i, &from));
        TRY(read_tensor(api, from, in + i));
    }
    return 0;
}

/* Resize maps, find the error of their interpolation, or read pixels. */
static status *compute_maps(void *one, context *within) {
    const kernel *k = one;
    const functions api = k->api;
    const sharing here = {api, within};
    const operation *const made_by = k->operation;
    tensor in[INPUTS_OF_PIXELS];
    TRY(read_inputs(k, within, in));
    int64_t size[4];
    value *made;
    void *out;
    TRY(fail(api, made_by->size(in, size)));
    TRY(OUTPUT_OF(within, 0, size, made_by->dimensions, &made));
    TRY(DATA_OF(made, &out));
    ours = &here;
    return fail(api, made_by->of_maps(in, out, share_in_call));
}

typedef struct {
    functions api;
    context *within;
    status *failed;
} results;

static void *make_result_of(void *call, size_t place, const int64_t *size, size_t rank) {
    results *const of = call;
    const functions api = of->api;
    value *made;
    void *out = 0;
    if (!of->failed) of->failed = OUTPUT_OF(of->within, place, size, rank, &made);
    if (!of->failed) of->failed = DATA_OF(made, &out);
    return out;
}

/* Find results whose sizes are not known before. */
static status *compute_found(void *one, context *within) {
    const kernel *k = one;
    const functions api = k->api;
    const sharing here = {api, within};
    results made = {api, within, 0};
    tensor in[INPUTS_OF_TAPS];
    TRY(read_inputs(k, within, in));
    ours = &here;
    const char *const reason = k->operation->find(in, make_result_of, &made, share_in_call);
    return made.failed ? made.failed : fail(api, reason);
}

/* ---- Registration. */

static const char *name_of(const operation *self) { return self->own_name; }
static const char *any_provider(const operation *self) { return (void)self, (const char *)0; }
static int type_of(const operation *self, size_t place) { return self->types[place]; }
static int result_type(const operation *self, size_t place) {
    return place == 2 ? FLOAT : self->types[0]; /* shares are the third result */
}
static size_t input_count(const operation *self) { return self->inputs; }
static size_t output_count(const operation *self) { return self->outputs; }
static int required(const operation *self, size_t place) { return (void)self, (void)place, 0; }
static int one(const operation *self) { return (void)self, 1; }

#define OPERATION(name, types, inputs, outputs, create, compute, ...)                                                         \
    {VERSION_OF_OPERATION, 0, name_of, any_provider, type_of, input_count, result_type, output_count, 0, destroy,              \
     required, required, required, one, one, one, one, create, compute, #name, types, inputs, outputs, __VA_ARGS__},
#define CONVOLVE(name, bytes) \
    OPERATION(name, bytes ? of_bytes : of_floats, bytes ? INPUTS_IN_8_BITS : INPUTS, 1, create_convolution, compute, 0, 0, 0, 0)
#define PICK(name, bytes) OPERATION(name, bytes ? of_bytes : of_floats, INPUTS_OF_PICK, 1, create_other, compute, 0, 0, 0, 0)
#define OF_MAPS(name, inputs, dimensions, size, function) \
    OPERATION(name, of_maps_and_sizes, inputs, 1, create_other, compute_maps, 0, dimensions, size, function)
#define FIND(name, inputs, outputs, function) \
    OPERATION(name, of_found, inputs, outputs, create_other, compute_found, function, 0, 0, 0)

static const operation operations[] = {OPERATIONS(CONVOLVE, PICK, OF_MAPS, FIND)};

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
