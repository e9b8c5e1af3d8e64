/* Convolutions of rows in 8 bits as products of tiles: see `convolve` in int8.c, whose interface this has. */
#include "int8.h"
#include "tiles.h"

/* Layout of packed weights: see `int8_layout` in int8.c. */
const long SUFFIX(int8_layout)[] = {TILE, TILE, TOGETHER, TILE, sizeof(weight), 0, 0, 0};

static void finish_unit(const tiled *work, const piece_of_work *now, const total *unit, long row, long first) {
    enum { VECTORS = SIDE_OF_UNIT / LANES };
    const result r = of_group(work->finish, now->group, work->outputs, work->chunks * TILE);
    const long some = work->outputs - first, tall = now->many - row < SIDE_OF_UNIT ? now->many - row : SIDE_OF_UNIT;
    const int is_plain = some >= SIDE_OF_UNIT && r.out_is_8_bits && !r.is_hardswish && (!r.more || r.more_is_8_bits);
    const lane least = all(r.low), most = all(r.high), more_scale = all(r.more_scale);
    whole offset[VECTORS] = {0};
    lane scale[VECTORS] = {0}, bias[VECTORS] = {0};
    for (int j = 0; j < VECTORS && j * LANES < some; j++) {
        memcpy(offset + j, r.offset + first + j * LANES, sizeof(whole));
        scale[j] = load(r.scale + first + j * LANES, LANES), bias[j] = load(r.bias + first + j * LANES, LANES);
    }
    for (long i = 0; i < tall; i++) {
        const total *from = unit + i / TILE * 2 * TILE * TILE + i % TILE * TILE;
        const long at = now->at + row + i;
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) {
            const long column = j * LANES, place = at * r.outputs + first + column;
            whole sums;
            memcpy(&sums, from + column / TILE * TILE * TILE + column % TILE, sizeof sums);
            sums += offset[j];
            if (!is_plain) {
                if (column < some) finish(&r, sums, at, first + column, some - column);
                continue;
            }
            lane value = multiply_add(__builtin_convertvector(sums, lane), scale[j], bias[j]);
            if (r.more) value = multiply_add(load_bytes((const uint8_t *)r.more + place, LANES), more_scale, value);
            store_bytes((uint8_t *)r.out + place, clamp(value, least, most), LANES);
        }
    }
}

/* Returns 1: it needs no memory that it could lack. */
long SUFFIX(convolve)(const reading *in, const result *r, const weight *weights, long groups) {
    multiply_in_tiles(in, weights, groups, r->outputs / groups, r);
    return 1;
}
