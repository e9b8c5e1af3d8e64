/* Resizing maps, and the error of interpolation, for engines: see convolve.h.
 *
 * Compiled once, for the architecture's baseline; it calls the widest form that the processor has. */
#include "resize.h"

#include "packed.h"

typedef struct {
    unsigned long needs;
    long (*resize)(const resizing *);
    void (*find_error)(const erring *);
} form;

#define DECLARE(set)                                                   \
    __attribute__((weak)) extern long resize_##set(const resizing *);  \
    __attribute__((weak)) extern void interpolation_error_##set(const erring *);
#define FORM(set) {NEEDS_##set, resize_##set, interpolation_error_##set}

BY_VECTOR(DECLARE)
static const form forms[] = FORMS_BY_VECTOR;

const char *cadsurgery_size_of_resized(const tensor *in, int64_t *size) {
    REFUSE_UNLESS(in[MAPS].rank == 4 && in[SIZES].rank == 1 && in[SIZES].size[0] == 4, "maps to resize have no four dimensions");
    const int64_t *from = in[MAPS].size;
    const int32_t *to = in[SIZES].data;
    REFUSE_UNLESS(to[0] == from[0] && to[1] == from[1], "only height and width of maps can be resized");
    for (int i = 2; i < 4; i++)
        REFUSE_UNLESS(from[i] > 0 && from[i] <= INT32_MAX && to[i] > 0, "maps to resize are empty or too large");
    for (int i = 0; i < 4; i++) size[i] = to[i];
    return 0;
}

/* Set where `to->length` samples lie among `from`, as torch does: their first and last samples, or else the borders of these,
 * lie in the same places. */
static void place(long from, int is_aligned, axis *to) {
    const float step = !is_aligned ? (float)from / to->length : to->length > 1 ? (float)(from - 1) / (to->length - 1) : 0;
    for (long i = 0; i < to->length; i++) {
        const float at = is_aligned ? step * i : step * (i + .5f) - .5f, inside = at < 0 ? 0 : at;
        const long whole = (long)inside, first = whole < from - 1 ? whole : from - 1;
        to->first[i] = first, to->second[i] = first < from - 1 ? first + 1 : first;
        to->share[i] = first < whole ? 0 : inside - first;
    }
}

static const char *resize_by(int is_aligned, const tensor *in, void *out, share_in_engine *way) {
    const int64_t *from = in[MAPS].size;
    const int32_t *to = in[SIZES].data;
    const form *by = 0;
    int64_t size[4];
    const char *reason = cadsurgery_size_of_resized(in, size);
    if (reason) return reason;
    WIDEST(forms, resize, by);
    REFUSE_UNLESS(by, "the library has no kernels for this processor");
    char *memory = malloc(((size_t)to[2] + to[3]) * (2 * sizeof(int32_t) + sizeof(float)) + 64);
    REFUSE_UNLESS(memory, "there is no memory for the places of samples");
    resizing all = {in[MAPS].data, out, from[0] * from[1], from[2], from[3], {.length = to[2]}, {.length = to[3]}};
    axis *const axes[2] = {&all.down, &all.across};
    char *next = memory;
    for (int i = 0; i < 2; i++) {
        axis *const one = axes[i];
        one->first = (int32_t *)next, one->second = one->first + one->length;
        one->share = (float *)(one->second + one->length), next = (char *)(one->share + one->length);
        place(from[2 + i], is_aligned, one);
    }
    cadsurgery_share_by(way);
    by->resize(&all);
    cadsurgery_share_by(0);
    free(memory);
    return 0;
}

const char *cadsurgery_resize(const tensor *in, void *out, share_in_engine *way) { return resize_by(0, in, out, way); }
const char *cadsurgery_resize_aligned(const tensor *in, void *out, share_in_engine *way) { return resize_by(1, in, out, way); }

const char *cadsurgery_size_of_error(const tensor *in, int64_t *size) {
    REFUSE_UNLESS(in[MAPS].rank == 2 && in[SIZES].rank == 1 && in[SIZES].size[0] == 3, "maps to interpolate are no rows");
    int64_t samples = 1;
    for (int i = 0; i < 3; i++) samples *= size[i] = ((const int32_t *)in[SIZES].data)[i];
    REFUSE_UNLESS(samples == in[MAPS].size[0] && size[0] >= 0 && size[1] >= 0, "maps to interpolate have another number of rows");
    return 0;
}

const char *cadsurgery_find_error(const tensor *in, void *out, share_in_engine *way) {
    const int32_t *size = in[SIZES].data;
    const form *by = 0;
    int64_t sizes[3];
    const char *reason = cadsurgery_size_of_error(in, sizes);
    if (reason) return reason;
    WIDEST(forms, find_error, by);
    REFUSE_UNLESS(by, "the library has no kernels for this processor");
    const erring all = {in[MAPS].data, out, size[0], in[MAPS].size[1], size[1], size[2]};
    cadsurgery_share_by(way);
    by->find_error(&all);
    cadsurgery_share_by(0);
    return 0;
}
