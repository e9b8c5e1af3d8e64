/* Convolutions of rows in 8 bits as products of tiles: see `convolve` in int8.c, whose interface this has. */
#include "int8.h"
#include "tiles.h"

#define GIVEN int8_t
#define PACKED weight
#include "pack.h"

long SUFFIX(pack_convolve)(const unpacked *from, const void *const *constants, char *to, long *bytes) {
    return pack_chunks(from, TILE, TOGETHER, TILE, constants, CONSTANTS, sizeof(float), to, bytes);
}

#if VECTOR == 64
/* `finish` for two rows, or one, and up to SIDE_OF_UNIT outputs: results and
 * residuals of the second row are `next` bytes after those of the first. */
INLINE void finish_rows(const result *r, const total *sums, const lane *scale, const lane *bias, __mmask32 which, long place,
                        long next, const int wide, const int has_more, const int has_second) {
    whole part[2][2] = {0};
    for (int row = 0; row <= has_second; row++)
        for (int j = 0; j < wide; j++) {
            lane value = __builtin_convertvector(*(const whole *)(sums + row * TILE + j * TILE * TILE), lane);
            value = multiply_add(value, scale[j], bias[j]);
            if (has_more) {
                const uint8_t *more = r->more + place + row * next + j * TILE;
                const __m128i bytes = _mm_maskz_loadu_epi8((__mmask16)(which >> j * TILE), more);
                value = multiply_add((lane)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), all_lanes(r->more_scale), value);
            }
            part[row][j] = to_whole((lane)_mm512_min_ps((__m512)value, (__m512)all_lanes(r->high))); /* packing clamps to 0 */
        }
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32((__m512i)part[0][0], (__m512i)part[0][1]),
                                        _mm512_packs_epi32((__m512i)part[1][0], (__m512i)part[1][1]));
    bytes = _mm512_max_epu8(_mm512_permutexvar_epi32(order, bytes), _mm512_set1_epi8((char)(int)r->low));
    _mm256_mask_storeu_epi8(r->out + place, which, _mm512_castsi512_si256(bytes));
    if (has_second) _mm256_mask_storeu_epi8(r->out + place + next, which, _mm512_extracti64x4_epi64(bytes, 1));
}

INLINE void finish_bytes(const result *r, const total *unit, long at, long tall, long first, long some, const int wide,
                         const int has_more) {
    const __mmask32 which = some >= SIDE_OF_UNIT ? ~0u : (1u << some) - 1;
    lane scale[2], bias[2];
    for (int j = 0; j < wide; j++) {
        scale[j] = load_some_sums(r->scale + first + j * TILE, LANES);
        bias[j] = load_some_sums(r->bias + first + j * TILE, LANES);
    }
    for (long i = 0; i < tall; i += 2) {
        const total *sums = unit + i / TILE * 2 * TILE * TILE + i % TILE * TILE;
        const long place = (at + i) * r->outputs + first;
        if (i + 1 < tall) finish_rows(r, sums, scale, bias, which, place, r->outputs, wide, has_more, 1);
        else finish_rows(r, sums, scale, bias, which, place, 0, wide, has_more, 0);
    }
}
#endif

static void finish_unit(const tiled *work, const piece_of_work *now, const total *unit, long row, long first) {
    const result r = of_group(work->finish, now->group, work->outputs, work->chunks * TILE);
    const long some = work->outputs - first, tall = now->many - row < SIDE_OF_UNIT ? now->many - row : SIDE_OF_UNIT;
#if VECTOR == 64
    const long at = now->at + row;
    if (some > TILE && r.more) finish_bytes(&r, unit, at, tall, first, some, 2, 1);
    else if (some > TILE) finish_bytes(&r, unit, at, tall, first, some, 2, 0);
    else finish_bytes(&r, unit, at, tall, first, some, 1, r.more != 0);
#else
    for (long i = 0; i < tall; i++)
        for (long column = 0; column < SIDE_OF_UNIT && column < some; column += LANES) {
            whole sums;
            memcpy(&sums, unit + (i / TILE * 2 + column / TILE) * TILE * TILE + i % TILE * TILE + column % TILE, sizeof sums);
            finish(&r, sums, now->at + row + i, first + column, some - column);
        }
#endif
}

long SUFFIX(convolve)(const reading *in, const result *r, const weight *weights, long groups) {
    RETURN_UNLESS_FITS(check_bytes(in, r, groups, TILE));
    NEEDS(in->held, OWN, product_of(groups, numbers_of_tiles(in, r->outputs / groups)), weight);
    multiply_in_tiles(in, weights, groups, r->outputs / groups, r->offset, r);
    return FITS;
}
