/* The convolution of int8.c by an instruction that adds the products of two adjacent channels in 16 bits, and saturates.
 *
 * Its sums are exact only for weights of which no two neighbours of equal sign sum to more than 128: 255 times 128 fits into
 * 16 bits. Beside these products it takes one addition for four channels instead of two, and reads weights and rows as bytes.
 */
#define LIMITED
#include "int8.c"
