/* How weights are packed, for torch and for engines.
 *
 * A function `pack_<kernel>` of a form writes what this form of the kernel takes: the weights, then, from a multiple of 64
 * bytes on, constants of each output, one array after the other. It returns where the constants begin, in bytes, and sets the
 * number of all bytes; without memory it only counts them. With memory that number is what the memory holds. The caller sets the
 * memory to zero before. A function returns NOT_TAKEN for weights that its kernel does not take, and IMPOSSIBLE for buffers that are
 * too short. */
#ifndef CADSURGERY_PACK_H
#define CADSURGERY_PACK_H

#include "check.h"

/* Weights as they come. Outputs and channels are those of a group; the next one of each is so many numbers further. */
typedef struct {
    const void *data;
    long groups, outputs, channels, taps, next_group, next_output, next_channel, next_tap;
    const long *held; /* bytes of the data and of each array of constants, see check.h */
} unpacked;

typedef long pack(const unpacked *from, const void *const *constants, char *to, long *bytes);

INLINE long rounded_up(long count, long part) { return (count + part - 1) / part * part; }

/* Return from a function if the numbers of weights are impossible, or their buffers too short: `size` bytes of a weight, and
 * `count` arrays of constants, of so many bytes each. */
#define CHECK_UNPACKED(w, size, count, size_of_constant)                                        \
    do {                                                                                        \
        if (!are_held(w, size, count, size_of_constant)) return IMPOSSIBLE;                     \
    } while (0)

INLINE int are_held(const unpacked *w, long size, long count, long size_of_constant) {
    if (w->groups < 1 || w->outputs < 1 || w->channels < 1 || w->taps < 1) return 0;
    if (!w->held) return 1;
    const long steps[] = {product_of(w->groups - 1, w->next_group), product_of(w->outputs - 1, w->next_output),
                          product_of(w->channels - 1, w->next_channel), product_of(w->taps - 1, w->next_tap)};
    const long last = sum_of(sum_of(steps[0], steps[1]), sum_of(steps[2], steps[3]));
    if (w->held[0] < product_of(sum_of(last, 1), size)) return 0;
    for (long i = 1; i <= count; i++) /* a missing array holds nothing */
        if (w->held[i] && w->held[i] < product_of(product_of(w->groups, w->outputs), size_of_constant)) return 0;
    return 1;
}

INLINE long index_of(const unpacked *w, long group, long output, long channel, long tap) {
    return group * w->next_group + output * w->next_output + channel * w->next_channel + tap * w->next_tap;
}

/* Write arrays of constants, each a number of `size` bytes for each output, behind so many bytes of weights; each group has
 * memory for `padded` outputs. A missing array is zero. */
INLINE long pack_constants(const unpacked *from, const void *const *constants, long count, long size, long padded, long weights,
                           char *to, long *bytes) {
    const long first = rounded_up(weights, 64), array = from->groups * padded * size;
    if (to && *bytes < first + count * array) return IMPOSSIBLE;
    for (long i = 0; to && i < count; i++)
        for (long group = 0; constants[i] && group < from->groups; group++)
            memcpy(to + first + i * array + group * padded * size,
                   (const char *)constants[i] + group * from->outputs * size, from->outputs * size);
    *bytes = first + count * array;
    return first;
}

#ifdef PACKED /* the type of a packed weight; those that come are of the type GIVEN */

/* Weights as (groups, chunks of outputs, depth, chunk, side), where the depth is (taps, parts of `side` adjacent channels),
 * padded to a `multiple`; behind them constants as (groups, chunks, chunk). */
INLINE long pack_chunks(const unpacked *w, long chunk, long side, long multiple, const void *const *constants, long count,
                        long size, char *to, long *bytes) {
    const long parts = rounded_up(w->channels, side) / side, of_chunk = rounded_up(w->taps * parts, multiple) * chunk * side;
    const long outputs = rounded_up(w->outputs, chunk), weights = w->groups * outputs / chunk * of_chunk * (long)sizeof(PACKED);
    CHECK_UNPACKED(w, sizeof(GIVEN), to ? count : 0, size);
    if (to && *bytes < weights) return IMPOSSIBLE;
    for (long group = 0; to && group < w->groups; group++)
        for (long first = 0; first < w->outputs; first += chunk) {
            PACKED *place = (PACKED *)to + (group * outputs + first) / chunk * of_chunk;
            const long some = w->outputs - first < chunk ? w->outputs - first : chunk;
            for (long tap = 0; tap < w->taps; tap++)
                for (long channel = 0; channel < w->channels; channel++) {
                    const GIVEN *from = (const GIVEN *)w->data + index_of(w, group, first, channel, tap);
                    PACKED *column = place + (tap * parts + channel / side) * chunk * side + channel % side;
                    for (long j = 0; j < some; j++) column[j * side] = (PACKED)from[j * w->next_output];
                }
        }
    return pack_constants(w, constants, count, size, outputs, weights, to, bytes);
}
#endif
#endif
