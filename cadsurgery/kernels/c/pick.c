/* Picking rows for engines: see convolve.h.
 *
 * Compiled once, for the architecture's baseline; it calls the widest form that the processor has. */
#include "packed.h"

typedef long pick_form(const reading *, const int32_t *, const float *, long, void *);

typedef struct {
    unsigned long needs;
    pick_form *of_floats, *of_bytes;
} form;

#define DECLARE(set)                                                     \
    __attribute__((weak)) extern pick_form gather_mixing_float32_##set;  \
    __attribute__((weak)) extern pick_form gather_mixing_uint8_##set;
#define FORM(set) {NEEDS_##set, gather_mixing_float32_##set, gather_mixing_uint8_##set}

BY_VECTOR(DECLARE)
static const form forms[] = FORMS_BY_VECTOR;

const char *cadsurgery_size_of_pick(const tensor *in, int64_t *size) {
    for (size_t i = 0; i < INPUTS_OF_PICK; i++) REFUSE_UNLESS(in[i].rank == 2, "an input of a pick is not two-dimensional");
    REFUSE_UNLESS(in[TABLE].size[1] == 1, "the table of a pick has more than one column");
    REFUSE_UNLESS(in[SHARES].size[0] == in[SOURCES].size[0] && in[SHARES].size[1] == in[SOURCES].size[1],
                  "shares do not fit the halo");
    size[0] = in[TABLE].size[0], size[1] = in[ROWS_IN].size[1];
    return 0;
}

const char *cadsurgery_pick(int in_8_bits, const tensor *in, void *out, share_in_engine *way) {
    const long rows = in[ROWS_IN].size[0], channels = in[ROWS_IN].size[1], count = in[TABLE].size[0];
    const form *by = 0;
    if (in_8_bits) WIDEST(forms, of_bytes, by);
    else WIDEST(forms, of_floats, by);
    REFUSE_UNLESS(by, "the library has no kernels for this processor");
    int64_t size[2];
    const char *reason = cadsurgery_size_of_pick(in, size);
    if (!reason) reason = cadsurgery_check_rows(in);
    if (reason) return reason;
    float *beyond = malloc(channels * sizeof(float) + 64);
    REFUSE_UNLESS(beyond, "there is no memory for a row");
    memset(beyond, 0, channels * sizeof(float));
    const reading from = {in[ROWS_IN].data, 0, beyond, in[TABLE].data, rows, count, 1, channels, channels};
    cadsurgery_share_by(way);
    (in_8_bits ? by->of_bytes : by->of_floats)(&from, in[SOURCES].data, in[SHARES].data, in[SOURCES].size[1], out);
    cadsurgery_share_by(0);
    free(beyond);
    return 0;
}
