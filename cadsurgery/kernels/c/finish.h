/* From the sums of a row to its results in the type of the elements. */
#ifndef CADSURGERY_FINISH_H
#define CADSURGERY_FINISH_H

#include "vector.h"

/* Operations on the sums of a row: a residual, clamping. Pointers refer to the first output of a chunk; rows of the result
 * and of the residual have length `outputs`. */
typedef struct {
    const element *more;
    element *out;
    long outputs;
    lane least, most;
} finish;

INLINE void finish_some(const finish *f, lane value, long at, long start, long some) {
    const long place = at * f->outputs + start;
    if (f->more) value += load_some(f->more + place, some);
    store_some(f->out + place, clamp(value, f->least, f->most), some);
}

#endif
