/* How weights are packed, for torch and for engines.
 *
 * A function `pack_<kernel>` of a form writes what this form of the kernel takes: the weights, then, from a multiple of 64
 * bytes on, constants of each output, one array after the other. It returns where the constants begin, in bytes, and sets the
 * number of all bytes; without memory it only counts them. The caller sets the memory to zero before. A function returns -1 for
 * weights that its kernel does not take. */
#ifndef CADSURGERY_PACK_H
#define CADSURGERY_PACK_H

/* Weights as they come. Outputs and channels are those of a group; the next one of each is so many numbers further. */
typedef struct {
    const void *data;
    long groups, outputs, channels, taps, next_group, next_output, next_channel, next_tap;
} unpacked;

typedef long pack(const unpacked *from, const void *const *constants, char *to, long *bytes);

INLINE long rounded_up(long count, long part) { return (count + part - 1) / part * part; }

INLINE long index_of(const unpacked *w, long group, long output, long channel, long tap) {
    return group * w->next_group + output * w->next_output + channel * w->next_channel + tap * w->next_tap;
}

/* Write arrays of constants, each a number of `size` bytes for each output, behind so many bytes of weights; each group has
 * memory for `padded` outputs. A missing array is zero. */
INLINE long pack_constants(const unpacked *from, const void *const *constants, long count, long size, long padded, long weights,
                           char *to, long *bytes) {
    const long first = rounded_up(weights, 64), array = from->groups * padded * size;
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
    const long outputs = rounded_up(w->outputs, chunk);
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
    return pack_constants(w, constants, count, size, outputs, w->groups * outputs / chunk * of_chunk * (long)sizeof(PACKED), to, bytes);
}
#endif
#endif
