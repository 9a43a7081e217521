// The signatures of the kernels for compressed weights; part of the list in kernels.h.
//
// Weights are rows x columns. `targets`, where given, holds each row's place in the outputs and the bias. `stride` is
// the distance of two tokens' outputs; inputs are contiguous. item_size is 4 (float32) or 2 (bfloat16; the decoders
// take any 2-byte type). int8 values have either bits and starts or metadata, the others null, and a float16 scale for
// each 128 columns of a row.
#pragma once

#define THANOS_SPARSE_KERNELS(KERNEL)                                                                              \
    KERNEL(bitmask_linear, const void* values, const uint64_t* bits, const int64_t* starts, const void* inputs,    \
           const void* bias, const int64_t* targets, void* outputs, int64_t rows, int64_t columns, int64_t tokens, \
           int64_t stride, int item_size, int threads)                                                             \
    KERNEL(sparse24_linear, const void* values, const uint16_t* metadata, const void* inputs, const void* bias,    \
           const int64_t* targets, void* outputs, int64_t rows, int64_t columns, int64_t tokens, int64_t stride,   \
           int item_size, int threads)                                                                             \
    KERNEL(dense_linear, const void* values, const void* inputs, const void* bias, const int64_t* targets,         \
           void* outputs, int64_t rows, int64_t columns, int64_t tokens, int64_t stride, int item_size,            \
           int threads)                                                                                            \
    KERNEL(bitmask_decode, const void* values, const uint64_t* bits, const int64_t* starts, int64_t rows,          \
           int64_t columns, int64_t first, int64_t count, void* out, int item_size, int threads)                   \
    KERNEL(sparse24_decode, const void* values, const uint16_t* metadata, int64_t rows, int64_t columns,           \
           int64_t first, int64_t count, void* out, int item_size, int threads)                                    \
    KERNEL(int8_linear, const int8_t* values, const uint64_t* bits, const int64_t* starts, const void* metadata,   \
           const uint16_t* scales, const void* inputs, const void* bias, const int64_t* targets, void* outputs,    \
           int64_t rows, int64_t columns, int64_t tokens, int64_t stride, int item_size, int threads)              \
    KERNEL(int8_decode, const int8_t* values, const uint64_t* bits, const int64_t* starts, const void* metadata,   \
           const uint16_t* scales, int64_t rows, int64_t columns, int64_t first, int64_t count, void* out,         \
           int item_size, int threads)                                                                             \
    KERNEL(gather_columns, const void* inputs, const int64_t* index, void* outputs, int64_t rows, int64_t columns, \
           int64_t count, int item_size, int threads)                                                              \
    KERNEL(pack_24, const void* weights, void* values, void* metadata, int64_t* offender, int64_t rows,            \
           int64_t columns, int item_size, bool pairs, int layout, int threads)                                    \
    KERNEL(unpack_24, const void* values, const void* metadata, void* weights, int64_t* offender, int64_t rows,    \
           int64_t columns, int item_size, bool pairs, int layout, int threads)
