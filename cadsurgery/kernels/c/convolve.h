/* Operations for engines, which bring their own tensors and threads; implemented in convolve.c, pick.c, resize.c and
 * cells.c.
 *
 * Functions that can fail return NULL, or the reason. */
#ifndef CADSURGERY_CONVOLVE_H
#define CADSURGERY_CONVOLVE_H

#include <stddef.h>
#include <stdint.h>

#include "parallel.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOST_DIMENSIONS = 4 };

/* A tensor of an engine, in row-major order. */
typedef struct {
    const void *data;
    size_t rank;
    int64_t size[MOST_DIMENSIONS];
} tensor;

/* Inputs of an operation. Rows (N, C); a table (M, taps) of numbers of rows; a halo of H rows, each a mix of K rows: their
 * numbers and shares (H, K); weight; bias (O); residual (M, O), or one number, which adds nothing. Numbers of the table count
 * the rows, then a row of the value outside, then the halo. The weight is (taps, C) of a depthwise convolution, (taps, C, O),
 * or (taps, groups, C per group, O per group). Numbers of rows are int32, the rest is float. In 8 bits rows, residual and
 * result are uint8, the weight is int8, and the scale of its outputs (O numbers) is one more input; depthwise convolutions
 * then take no residual. */
enum { ROWS_IN, TABLE, SOURCES, SHARES, WEIGHT, BIAS, RESIDUAL, INPUTS, SCALES = INPUTS, INPUTS_IN_8_BITS };

/* A convolution with its weights packed for this processor. Several threads may call one at a time. */
typedef struct convolution convolution;

/* A convolution's numbers: the value of rows that lie outside of the map, and bounds of the results. In 8 bits q stands for
 * the value (q - zero) scale, of rows, results and residual; without, `scale` is 0. */
typedef struct {
    float outside, low, high, scale, zero, scale_of_result, zero_of_result, scale_of_residual, zero_of_residual;
} numbers;

/* Make a convolution; `in` has its weight and bias, and in 8 bits scales. */
const char *cadsurgery_make_convolution(const numbers *of, const tensor *in, convolution **made);

/* Check that inputs fit, and set the size (M, O) of the result. Weight, bias and scales are not read. */
const char *cadsurgery_size_of_result(const convolution *of, const tensor *in, int64_t *size);

/* Compute a result whose inputs fit; `way` shares the work among the engine's threads. */
const char *cadsurgery_convolve(convolution *by, const tensor *in, void *out, share_in_engine *way);

void cadsurgery_free_convolution(convolution *one);

/* Pick rows by a table (M, 1), with the halo mixed as it is read: result (M, C). Of the inputs of a convolution these are the
 * first four; the value outside is zero. Rows and result are float, or uint8 in 8 bits. */
enum { INPUTS_OF_PICK = WEIGHT };
const char *cadsurgery_size_of_pick(const tensor *in, int64_t *size);
const char *cadsurgery_pick(int in_8_bits, const tensor *in, void *out, share_in_engine *way);

/* Resize maps (B, C, H, W) by bilinear interpolation between their samples, to the sizes that four int32 name: B, C,
 * height and width. As F.interpolate in torch: aligned with align_corners=True. */
enum { MAPS, SIZES, INPUTS_OF_MAPS };
const char *cadsurgery_size_of_resized(const tensor *in, int64_t *size);
typedef const char *find_size(const tensor *in, int64_t *size);
typedef const char *of_maps(const tensor *in, void *out, share_in_engine *way);
of_maps cadsurgery_resize, cadsurgery_resize_aligned;

/* Compute the squared error of bilinear interpolation of maps from every second sample, summed over channels: (B, H, W), which
 * are the sizes. Their samples are rows (B H W, C). Beyond the last sample that is taken, interpolation repeats it. */
const char *cadsurgery_size_of_error(const tensor *in, int64_t *size);
of_maps cadsurgery_find_error;

/* Operations that do not know the sizes of their results beforehand ask for each of them: numbers of 4 bytes, which lie where
 * `make_result` returns; NULL if there is no memory. */
typedef void *make_result(void *call, size_t place, const int64_t *size, size_t rank);
typedef const char *find(const tensor *in, make_result *make, void *call, share_in_engine *way);

/* Find the cells of a level map (B, H, W) whose levels have these sides: the numbers of their first pixels (N), and the cell
 * of each pixel (B * H * W). All numbers are int32. */
enum { LEVELS, SIDES, INPUTS_OF_CELLS };
find cadsurgery_find_cells;

/* Find the rows that a window reads around targets (n), which are numbers of pixels in maps of a size (height, width). It has
 * taps so many pixels down (V) and across (H); see maps.c. Level map, sides and cells are those of the rows. Results: a table
 * (n, V * H), and the sources and shares (M, 4) of its halo; of near taps, which read the cell that they lie in, the table. */
enum { ANCHORS = INPUTS_OF_CELLS, INDEX, TARGETS, SIZE, DOWN, ACROSS, INPUTS_OF_TAPS };
find cadsurgery_read_taps, cadsurgery_read_near_taps;

/* Read every so many-th pixel of rows of cells (N, C): (B, height, width, C), see pixels.c. Level map and sides are those of the
 * cells, INDEX_OF is the cell of each pixel, and STEP is one number. */
enum { LEVELS_OF = 1, SIDES_OF, INDEX_OF, STEP, INPUTS_OF_PIXELS };
const char *cadsurgery_size_of_pixels(const tensor *in, int64_t *size);
of_maps cadsurgery_read_pixels;

/* All operations, by their names in files: those of elements/backends/operators.py, of which some have a form in 8 bits, and
 * resizes. onnxruntime.c and openvino.cpp make of each line what their engines ask for.
 *
 * CONVOLVE and PICK: name, and whether in 8 bits. OF_MAPS: name, numbers of inputs and of dimensions of the result, and the functions that set
 * its size and compute it. FIND: name, numbers of inputs and results, function. */
#define OPERATIONS(CONVOLVE, PICK, OF_MAPS, FIND)                                                   \
    CONVOLVE(Convolve, 0)                                                                           \
    CONVOLVE(ConvolveDepthwise, 0)                                                                  \
    CONVOLVE(ConvolveGroups, 0)                                                                     \
    CONVOLVE(ConvolveIn8Bits, 1)                                                                    \
    CONVOLVE(ConvolveDepthwiseIn8Bits, 1)                                                           \
    CONVOLVE(ConvolveGroupsIn8Bits, 1)                                                              \
    PICK(Pick, 0)                                                                                   \
    PICK(PickIn8Bits, 1)                                                                            \
    OF_MAPS(ResizeLinear, INPUTS_OF_MAPS, 4, cadsurgery_size_of_resized, cadsurgery_resize)         \
    OF_MAPS(ResizeLinearAligned, INPUTS_OF_MAPS, 4, cadsurgery_size_of_resized, cadsurgery_resize_aligned) \
    OF_MAPS(InterpolationError, INPUTS_OF_MAPS, 3, cadsurgery_size_of_error, cadsurgery_find_error) \
    OF_MAPS(ReadPixels, INPUTS_OF_PIXELS, 4, cadsurgery_size_of_pixels, cadsurgery_read_pixels)     \
    FIND(FindCells, INPUTS_OF_CELLS, 2, cadsurgery_find_cells)                                      \
    FIND(ReadTaps, INPUTS_OF_TAPS, 3, cadsurgery_read_taps)                                         \
    FIND(ReadNearTaps, INPUTS_OF_TAPS, 1, cadsurgery_read_near_taps)

#ifdef __cplusplus
}
#endif

#endif
