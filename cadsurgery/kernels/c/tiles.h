/* Tiles: eight registers of 16 rows by 64 bytes, which AMX multiplies. -DEMULATE_TILES compiles them as plain loops, for tests
 * on processors without AMX. The element type of the file decides what is multiplied: pairs of bfloat16, summed in float, or
 * fours of bytes, summed exactly. */
#ifndef CADSURGERY_TILES_H
#define CADSURGERY_TILES_H

#include "vector.h"

enum { TILE = 16, LINE = 64 }; /* rows of a tile, and bytes of each */

#ifdef BF16
typedef uint16_t value;
typedef uint16_t weight;
typedef float total;
#else
typedef uint8_t value;
typedef int8_t weight;
typedef int32_t total;
#endif
enum { TOGETHER = 4 / sizeof(value), STEP = LINE / sizeof(value) }; /* adjacent values of a row that are multiplied at once: by a lane, by a tile */

#ifdef EMULATE_TILES
#define TILES unsigned char tiles[8][TILE][LINE]
#define BEGIN_TILES() ((void)0)
#define END_TILES() ((void)0)
#define LOAD_TILE(t, from, stride) \
    for (long line = 0; line < TILE; line++) memcpy(tiles[t][line], (const char *)(from) + line * (stride), LINE)
#define STORE_TILE(t, to, stride) \
    for (long line = 0; line < TILE; line++) memcpy((char *)(to) + line * (stride), tiles[t][line], LINE)
#define MULTIPLY_TILES(t, a, b) multiply_plainly(tiles[t], tiles[a], tiles[b])

static void multiply_plainly(unsigned char sums[TILE][LINE], unsigned char rows[TILE][LINE], unsigned char by[TILE][LINE]) {
    for (long row = 0; row < TILE; row++)
        for (long column = 0; column < TILE; column++) {
            total sum;
            memcpy(&sum, sums[row] + 4 * column, sizeof sum);
            for (long lane = 0; lane < TILE; lane++) {
                value a[TOGETHER];
                weight b[TOGETHER];
                memcpy(a, rows[row] + 4 * lane, 4), memcpy(b, by[lane] + 4 * column, 4);
#ifdef BF16
                for (long i = 0; i < TOGETHER; i++) sum += widened(a[i]) * widened(b[i]);
#else
                for (long i = 0; i < TOGETHER; i++) sum += a[i] * b[i];
#endif
            }
            memcpy(sums[row] + 4 * column, &sum, sizeof sum);
        }
}
#else
#define TILES ((void)0)
#define BEGIN_TILES() begin_tiles()
#define END_TILES() _tile_release()
#define LOAD_TILE(t, from, stride) _tile_loadd(t, from, stride)
#define STORE_TILE(t, to, stride) _tile_stored(t, to, stride)
#ifdef BF16
#define MULTIPLY_TILES(t, a, b) _tile_dpbf16ps(t, a, b)
#else
#define MULTIPLY_TILES(t, a, b) _tile_dpbusd(t, a, b)
#endif

/* Give this thread's tiles their whole size. */
static void begin_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config __attribute__((aligned(64))) = {.palette = 1};
    for (int t = 0; t < 8; t++) config.bytes[t] = LINE, config.rows[t] = TILE;
    _tile_loadconfig(&config);
}
#endif

/* ---- A product of rows that a kernel map names with packed weights, block by block.
 *
 * The values that the taps of a row read stand one after another, each tap padded to TOGETHER values: the depth of a sum. It is
 * cut into parts of at most STEPS tiles. For a block of rows and a part, the values are copied to a panel, which stays in the
 * second-level cache beside the sums of unfinished depth. Its rows are an odd number of lines long, so that rows of a tile never
 * share a set of the first-level cache. Only whole rows that follow one another are read in place: parts of rows are often a
 * power of two apart, which takes longer than copying them. Two by two tiles of sums, a unit, are computed at once. */

enum { BLOCK = 256, STEPS = 16 };           /* rows of a block; tiles of a part */
enum { ABREAST = 16, MOST_CHUNKS = 32 }; /* chunks that rows are multiplied by in turn, and that have unfinished sums */
enum { SIDE_OF_UNIT = 2 * TILE, UNIT = SIDE_OF_UNIT * SIDE_OF_UNIT, BYTES_OF_TILE = TILE * LINE };

typedef struct {
    const reading *in;
    const weight *weight; /* (groups, chunks, steps, TILE, TILE, TOGETHER): outputs of a group are padded to whole chunks */
    long groups, outputs; /* outputs per group */
    long chunks, block, steps, parts, of_part, pitch; /* pitch: bytes of a row of the panel */
    const total *start;   /* what sums start with: (groups, chunks, TILE) */
    const void *finish;
} tiled;

/* The rows, outputs and part of the depth that are computed now. */
typedef struct {
    long group, at, many; /* rows from `at` on */
    long first, last;     /* chunks of the group's outputs */
    long step, steps;     /* tiles of the depth */
    long in_place;        /* of these rows the first that are read where they are */
} piece_of_work;

/* Store the sums of a unit (2, 2, TILE, TILE) as results of the piece's rows from `row` on and of its group's outputs from
 * `first` on. */
static void finish_unit(const tiled *work, const piece_of_work *now, const total *unit, long row, long first);

/* Copy values, whose end may be the end of the memory, to a row of the panel, followed by zeros to the end of a line. */
INLINE void copy_lines(char *to, const char *from, long bytes) {
    for (; bytes >= LINE; bytes -= LINE, from += LINE, to += LINE) memcpy(to, from, LINE);
    if (bytes <= 0) return;
#if VECTOR == 64
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi8(~0ull >> (LINE - bytes), from));
#else
    memcpy(to, from, bytes);
    memset(to + bytes, 0, LINE - bytes);
#endif
}

/* Copy the values that a block's rows read to rows of the panel. Zeros behind a tap are overwritten by the next one, and those
 * behind a row by the next row. */
static void copy_rows(const tiled *work, const piece_of_work *now, char *panel) {
    const reading *in = work->in;
    const long channels = in->channels, padded = (channels + TOGETHER - 1) / TOGETHER * TOGETHER;
    const long first = now->step * STEP, last = first + now->steps * STEP, tap_of_first = first / padded;
    panel += now->in_place * work->pitch;
    for (long i = now->in_place; i < now->many; i++, panel += work->pitch) {
        if (!in->table) {
            const value *from = in->rows + (now->at + i) * in->stride + now->group * channels + first;
            copy_lines(panel, (const char *)from, ((last < channels ? last : channels) - first) * (long)sizeof(value));
            continue;
        }
        long k = first;
        for (long tap = tap_of_first; tap < in->taps && k < last; tap++) {
            const long begin = k - tap * padded, end = last - tap * padded < padded ? last - tap * padded : padded;
            const value *from = row_of_tap(in, now->at + i, tap) + now->group * channels + begin;
            copy_lines(panel + (k - first) * sizeof(value), (const char *)from,
                       ((end < channels ? end : channels) - begin) * (long)sizeof(value));
            k += end - begin;
        }
        if (k < last) memset(panel + (k - first) * sizeof(value), 0, LINE);
    }
}

/* Add the products of `tall` by `wide` tiles, constants after inlining, to the sums of a unit, or to what these start with. */
#define MULTIPLY_UNIT(tall, wide)                                              \
    do {                                                                       \
        if (!start) {                                                          \
            LOAD_TILE(0, unit, LINE);                                          \
            if (wide > 1) LOAD_TILE(1, unit + TILE * TILE, LINE);              \
            if (tall > 1) LOAD_TILE(2, unit + 2 * TILE * TILE, LINE);          \
            if (tall * wide > 2) LOAD_TILE(3, unit + 3 * TILE * TILE, LINE);   \
        } else {                                                               \
            LOAD_TILE(0, start, 0);                                            \
            if (wide > 1) LOAD_TILE(1, start + TILE, 0);                       \
            if (tall > 1) LOAD_TILE(2, start, 0);                              \
            if (tall * wide > 2) LOAD_TILE(3, start + TILE, 0);                \
        }                                                                      \
        for (long step = 0; step < steps; step++) {                            \
            LOAD_TILE(4, rows + step * LINE, pitch);                           \
            LOAD_TILE(6, by + step * BYTES_OF_TILE, LINE);                     \
            MULTIPLY_TILES(0, 4, 6);                                           \
            if (wide > 1) {                                                    \
                LOAD_TILE(7, by + next + step * BYTES_OF_TILE, LINE);          \
                MULTIPLY_TILES(1, 4, 7);                                       \
            }                                                                  \
            if (tall > 1) {                                                    \
                LOAD_TILE(5, rows + TILE * pitch + step * LINE, pitch);        \
                MULTIPLY_TILES(2, 5, 6);                                       \
                if (wide > 1) MULTIPLY_TILES(3, 5, 7);                         \
            }                                                                  \
        }                                                                      \
        STORE_TILE(0, unit, LINE);                                             \
        if (wide > 1) STORE_TILE(1, unit + TILE * TILE, LINE);                 \
        if (tall > 1) STORE_TILE(2, unit + 2 * TILE * TILE, LINE);             \
        if (tall * wide > 2) STORE_TILE(3, unit + 3 * TILE * TILE, LINE);      \
    } while (0)

static void multiply_unit(total *unit, const total *start, const char *rows, long pitch, const char *by, long next, long steps,
                          int tall, int wide) {
    TILES;
    if (tall > 1 && wide > 1) MULTIPLY_UNIT(2, 2);
    else if (tall > 1) MULTIPLY_UNIT(2, 1);
    else if (wide > 1) MULTIPLY_UNIT(1, 2);
    else MULTIPLY_UNIT(1, 1);
}

/* Multiply the rows of the panel by chunks, with sums (chunks / 2, rows / 32, UNIT) of unfinished depth. A unit is finished while
 * the next one is multiplied. */
static void multiply_panel(const tiled *work, const piece_of_work *now, const char *panel, total *sums) {
    const long next = work->steps * BYTES_OF_TILE, units = work->block / SIDE_OF_UNIT;
    const char *weights = (const char *)work->weight + now->group * work->chunks * next + now->step * BYTES_OF_TILE;
    const total *start = work->start + now->group * work->chunks * TILE;
    const int is_last = now->step + now->steps == work->steps;
    const long own_pitch = work->in->stride * (long)sizeof(value);
    const char *own_rows = (const char *)work->in->rows + now->at * own_pitch;
    const total *before = 0;
    long row_before = 0, chunk_before = 0, which = 0;
    for (long first = now->first; first < now->last; first += ABREAST)
        for (long row = 0; row < now->many; row += SIDE_OF_UNIT)
            for (long chunk = first; chunk < first + ABREAST && chunk < now->last; chunk += 2) {
                total *unit = sums + (work->parts == 1 ? which : (chunk - now->first) / 2 * units + row / SIDE_OF_UNIT) * UNIT;
                const int tall = now->many - row > TILE ? 2 : 1, wide = now->last - chunk > 1 ? 2 : 1;
                const char *from = row < now->in_place ? own_rows + row * own_pitch : panel + row * work->pitch;
                multiply_unit(unit, now->step ? 0 : start + chunk * TILE, from,
                              row < now->in_place ? own_pitch : work->pitch, weights + chunk * next, next, now->steps, tall, wide);
                if (!is_last) continue;
                if (before) finish_unit(work, now, before, row_before, chunk_before * TILE);
                before = unit, row_before = row, chunk_before = chunk, which = !which;
            }
    if (before) finish_unit(work, now, before, row_before, chunk_before * TILE);
}

void *malloc(size_t bytes);
void free(void *memory);

static void multiply_blocks(long begin, long end, void *context) {
    const tiled *work = context;
    const long block = work->block;
    const long at_once = work->parts > 1 && work->chunks > MOST_CHUNKS ? MOST_CHUNKS : work->chunks;
    const long units = work->parts > 1 ? block / SIDE_OF_UNIT * ((at_once + 1) / 2) : 2;
    char spare[SIDE_OF_UNIT * (STEPS | 1) * LINE + LINE + 2 * UNIT * sizeof(total)] __attribute__((aligned(64)));
    char *const memory = malloc(block * work->pitch + units * UNIT * sizeof(total) + 2 * LINE);
    char *const panel = memory ? memory + (LINE - (uintptr_t)memory % LINE) : spare;
    /* Without memory one unit is computed at once. */
    const long tall = memory ? block : SIDE_OF_UNIT, wide = memory ? at_once : 2;
    const long last = end * block < work->in->n ? end * block : work->in->n;
    const long depth = work->steps * STEP;
    const int is_contiguous = !work->in->table && work->parts == 1 && work->in->channels == depth && work->in->stride == depth;
    piece_of_work now;
    BEGIN_TILES();
    for (now.at = begin * block; now.at < last; now.at += tall)
        for (now.group = 0; now.group < work->groups; now.group++)
            for (now.first = 0; now.first < work->chunks; now.first += wide)
                for (now.step = 0; now.step < work->steps; now.step += work->of_part) {
                    now.many = last - now.at < tall ? last - now.at : tall;
                    now.last = work->chunks - now.first < wide ? work->chunks : now.first + wide;
                    now.steps = work->steps - now.step < work->of_part ? work->steps - now.step : work->of_part;
                    now.in_place = is_contiguous ? now.many / SIDE_OF_UNIT * SIDE_OF_UNIT : 0;
                    copy_rows(work, &now, panel);
                    multiply_panel(work, &now, panel, (total *)(panel + tall * work->pitch + LINE));
                }
    END_TILES();
    free(memory);
}

/* Return how many numbers the packed weights of a group have, see `pack_chunks`. */
static long numbers_of_tiles(const reading *in, long outputs) {
    const long parts = padded_to(in->channels, TOGETHER) / TOGETHER, depth = padded_to(product_of(in->taps, parts), TILE);
    return product_of(padded_to(outputs, TILE), product_of(depth, TOGETHER));
}

static void multiply_in_tiles(const reading *in, const weight *weight, long groups, long outputs, const total *start,
                              const void *finish) {
    const long padded = (in->channels + TOGETHER - 1) / TOGETHER * TOGETHER, steps = (in->taps * padded + STEP - 1) / STEP;
    const long parts = (steps + STEPS - 1) / STEPS, of_part = (steps + parts - 1) / parts;
    long block = in->n / 8 / SIDE_OF_UNIT * SIDE_OF_UNIT; /* at least eight, for as many threads */
    block = block < 2 * SIDE_OF_UNIT ? 2 * SIDE_OF_UNIT : block > BLOCK ? BLOCK : block;
    const tiled work = {in, weight, groups, outputs, (outputs + TILE - 1) / TILE, block, steps, (steps + of_part - 1) / of_part,
                        of_part, (of_part | 1) * LINE, start, finish};
    cadsurgery_share((in->n + block - 1) / block, 1, multiply_blocks, (void *)&work);
}

#endif
