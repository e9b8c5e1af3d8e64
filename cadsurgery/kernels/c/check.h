/* What the buffers of a call hold, compared with what the call reads and writes, once, before it computes.
 *
 * A caller states how many bytes each of its buffers holds: those of the `reading` first, in its order, then those of the
 * function's other pointers, in theirs; a missing buffer holds 0. A function returns FITS or a count of its own, or, below zero, why
 * it computed nothing.
 * Callers of this library that have checked their tensors themselves (convolve.c, pick.c, cells.c) pass NULL. */
#ifndef CADSURGERY_CHECK_H
#define CADSURGERY_CHECK_H

#include <limits.h>
#include <stdint.h>

/* The order is that of `dispatch.py`. NOT_TAKEN: the form does not take such weights. TOO_SHORT minus the place of a buffer: it holds
 * too little. */
enum { FITS = 0, NOT_TAKEN = -1, IMPOSSIBLE = -2, NO_MEMORY = -3, TOO_SHORT = -4 };
/* Places of the buffers of a `reading`, and of the first of a function's own. */
enum { OF_ROWS, OF_HALO, OF_OUTSIDE, OF_TABLE, OWN };

/* Products and sums of sizes; one that no buffer can hold is the largest number. */
static inline __attribute__((unused)) long product_of(long a, long b) {
    long result;
    return a < 0 || b < 0 || __builtin_mul_overflow(a, b, &result) ? LONG_MAX : result;
}
static inline __attribute__((unused)) long sum_of(long a, long b) {
    long result;
    return a < 0 || b < 0 || __builtin_add_overflow(a, b, &result) ? LONG_MAX : result;
}
static inline __attribute__((unused)) long padded_to(long count, long part) { return product_of(sum_of(count, part - 1) / part, part); }

/* Return the largest of some numbers, none of which is negative; else the largest that there is. */
static inline __attribute__((unused)) long largest_of(const int32_t *numbers, long count) {
    int32_t least = 0, most = 0;
    for (long i = 0; i < count; i++) {
        least = numbers[i] < least ? numbers[i] : least;
        most = numbers[i] > most ? numbers[i] : most;
    }
    return least < 0 ? LONG_MAX : most;
}

/* Return the highest of some levels; a negative one counts as more than any that is. */
static inline __attribute__((unused)) int highest_level(const int8_t *levels, long count) {
    uint8_t most = 0;
    for (long i = 0; i < count; i++) most = (uint8_t)levels[i] > most ? (uint8_t)levels[i] : most;
    return most;
}

/* Return from a function if a buffer holds fewer than so many values of a type. */
#define NEEDS(held, place, count, type)                                                                             \
    do {                                                                                                            \
        if ((held) && (held)[place] < product_of(count, (long)sizeof(type))) return TOO_SHORT - (place);            \
    } while (0)
#define NEEDS_IF(pointer, held, place, count, type)             \
    do {                                                        \
        if (pointer) NEEDS(held, place, count, type);           \
    } while (0)
#define POSSIBLE(condition)                    \
    do {                                       \
        if (!(condition)) return IMPOSSIBLE;   \
    } while (0)

/* Return from a function if a `reading` has impossible numbers, or buffers that hold too little; `wide` is the number of
 * channels of a row, those of all groups. Entries of the table are not read here: they come from this library's kernel maps, and
 * `Work.check` in choose.py compares the rows with the lattice that a map is for. */
#define CHECK_READING(in, wide, type)                                                                               \
    do {                                                                                                            \
        POSSIBLE((in)->count >= 0 && (in)->n >= 0 && (in)->taps > 0 && (in)->channels > 0 && (in)->stride > 0);     \
        if ((in)->n == 0) return FITS;                                                                              \
        POSSIBLE((in)->table || ((in)->taps == 1 && (in)->n <= (in)->count));                                       \
        if ((in)->count)                                                                                            \
            NEEDS((in)->held, OF_ROWS, sum_of(product_of((in)->count - 1, (in)->stride), wide), type);              \
        POSSIBLE(!(in)->held || !(in)->held[OF_HALO] ||                                                             \
                 ((in)->stride == (wide) && (in)->held[OF_HALO] % product_of(wide, (long)sizeof(type)) == 0));      \
        NEEDS_IF((in)->table, (in)->held, OF_OUTSIDE, wide, type);                                                  \
        NEEDS_IF((in)->table, (in)->held, OF_TABLE, product_of((in)->n, (in)->taps), int32_t);                      \
    } while (0)

/* Return from a function if a code is not FITS. */
#define RETURN_UNLESS_FITS(code)            \
    do {                                    \
        const long returned = (code);       \
        if (returned != FITS) return returned; \
    } while (0)

#endif
