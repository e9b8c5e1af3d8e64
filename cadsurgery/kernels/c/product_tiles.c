/* Convolutions of rows in bfloat16 as products of tiles: see `product` in product.c, whose interface this has. */
#include "finish.h"
#include "parallel.h"
#include "tiles.h"

#define GIVEN element
#define PACKED weight
#include "pack.h"

long SUFFIX(pack_product)(const unpacked *from, const void *const *constants, char *to, long *bytes) {
    return pack_chunks(from, TILE, TOGETHER, TILE, constants, 1, sizeof(sum), to, bytes);
}

typedef struct {
    const element *more;
    element *out;
    sum low, high;
} following;

static void finish_unit(const tiled *work, const piece_of_work *now, const total *unit, long row, long first) {
    const following *p = work->finish;
    const long all = work->groups * work->outputs, place = now->group * work->outputs + first, some = work->outputs - first;
    const long tall = now->many - row < SIDE_OF_UNIT ? now->many - row : SIDE_OF_UNIT;
    const int is_plain = some >= SIDE_OF_UNIT;
    finish f = {p->more, p->out + place, all, all_lanes(p->low), all_lanes(p->high)};
    if (f.more) f.more += place;
    for (long i = 0; i < tall; i++) {
        const total *sums = unit + i / TILE * 2 * TILE * TILE + i % TILE * TILE;
        const long at = now->at + row + i;
#pragma GCC unroll 8
        for (long column = 0; column < SIDE_OF_UNIT; column += LANES) {
            const long there = at * all + column;
            lane value = load_some_sums(sums + column / TILE * TILE * TILE + column % TILE, LANES);
            if (!is_plain) {
                if (column < some) finish_some(&f, value, at, column, some - column);
                continue;
            }
            if (f.more) value += load(f.more + there);
            store_some(f.out + there, clamp(value, f.least, f.most), LANES);
        }
    }
}

static long check(const reading *in, const element *more, long groups, long outputs) {
    POSSIBLE(groups > 0 && outputs > 0);
    const long all = product_of(groups, outputs), results = product_of(in->n, all);
    CHECK_READING(in, product_of(groups, in->channels), element);
    NEEDS(in->held, OWN, product_of(groups, numbers_of_tiles(in, outputs)), weight);
    NEEDS(in->held, OWN + 1, product_of(groups, padded_to(outputs, TILE)), sum);
    NEEDS_IF(more, in->held, OWN + 2, results, element);
    NEEDS(in->held, OWN + 3, results, element);
    return FITS;
}

long SUFFIX(product)(const reading *in, const element *weight, const sum *bias, const element *more, element *out, long groups,
                     long outputs, double low, double high) {
    const following p = {more, out, (sum)low, (sum)high};
    RETURN_UNLESS_FITS(check(in, more, groups, outputs));
    multiply_in_tiles(in, weight, groups, outputs, bias, &p);
    return FITS;
}
