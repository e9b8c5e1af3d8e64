/* A convolution for engines with its packed weights: what convolve.c and convolve_bytes.c share. */
#ifndef CADSURGERY_PACKED_H
#define CADSURGERY_PACKED_H

#include "convolve.h"
#include "requantise.h"
#include "vector.h"

#include "pack.h"

void *malloc(size_t bytes);
void *calloc(size_t count, size_t bytes);
void free(void *memory);

READING(float);

/* In 8 bits the pointers to rows and results of the declared types point to bytes. */
typedef long grouped_form(const reading *, const float *, const float *, const float *, const float *,
                          const float *, float *, long, double, double);
typedef long mix_form(const reading *, const float *, float *);

#define REFUSE_UNLESS(holds, message)                \
    do {                                             \
        if (!(holds)) return "cadsurgery: " message; \
    } while (0)

/* Weights of floats, and the kernel that takes them; the other one is NULL. */
typedef long product_form(const reading *, const float *, const float *, const float *, float *, long, long, double, double);
typedef struct {
    product_form *product;
    grouped_form *grouped;
    float *weight, *bias;
} floats;

/* Weights in 8 bits, and the kernel that takes them; the others are NULL. */
typedef struct {
    long (*convolve)(const reading *, const result *, const void *, long);
    long (*depthwise)(const reading *, const result *, const int8_t *);
    grouped_form *grouped;
    void *weight;
    float *constants; /* of each output: offset, scale, bias, and the offset as a float */
    result known;     /* but for residual and result */
} bytes;

struct convolution {
    long taps, groups, channels, outputs; /* per group */
    int in_8_bits;
    float outside, low, high; /* in 8 bits the numbers that stand for these values */
    mix_form *mix;
    floats floats;
    bytes bytes;
    void *spare; /* memory of an earlier call, or NULL */
};

/* Return the features that the processor has and the variable CADSURGERY_ISA allows. */
unsigned long cadsurgery_features(void);

/* Let `found` point to the last form of a table whose features the processor has and which has a symbol. */
#define WIDEST(from, symbol, found)                                                                   \
    do {                                                                                              \
        const unsigned long features = cadsurgery_features();                                         \
        for (size_t i = 0; i < sizeof from / sizeof *from; i++)                                       \
            if ((features & from[i].needs) == from[i].needs && from[i].symbol) found = from + i;      \
    } while (0)

/* The forms of a file with one for each width of vectors, by the macros DECLARE(set) and FORM(set). */
#if defined(__x86_64__)
#define BY_VECTOR(declare) declare(scalar) declare(avx2) declare(avx512)
#define FORMS_BY_VECTOR {FORM(scalar), FORM(avx2), FORM(avx512)}
#elif defined(__aarch64__)
#define BY_VECTOR(declare) declare(scalar) declare(neon)
#define FORMS_BY_VECTOR {FORM(scalar), FORM(neon)}
#else
#define BY_VECTOR(declare) declare(scalar)
#define FORMS_BY_VECTOR {FORM(scalar)}
#endif

/* Return true if numbers are in 0..end-1. */
int cadsurgery_is_within(const int32_t *numbers, int64_t count, int64_t end);

/* Check that table and sources name rows that there are. */
const char *cadsurgery_check_rows(const tensor *in);

/* Return new memory with packed weights and constants, see pack.h; NULL if there is no memory, or no such function, or its
 * kernel does not take these weights: the place is then negative. */
char *cadsurgery_pack(pack *by, const unpacked *from, const void *const *constants, long *place, long *bytes);

/* Pack weights in 8 bits with the scale of each output. */
const char *cadsurgery_pack_bytes(convolution *to, const numbers *of, const unpacked *from, const float *scales,
                                  const float *bias);

/* Compute a result in 8 bits. */
const char *cadsurgery_convolve_bytes(const convolution *by, const reading *from, const uint8_t *residual, uint8_t *out);

#endif
