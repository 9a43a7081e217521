// Every kernel's signature, once: from this list come its declaration in each instruction set's namespace, its place in
// the table that is picked at run time, and its Python binding (pointers are passed as integers).
// Strides are in elements, from one row to the next; columns are contiguous.
#pragma once

#include <cstdint>

#include "sparse_kernels.h"

#define THANOS_KERNELS(KERNEL) \
    KERNEL(row_solve, const float* gram, int64_t gram_stride, const float* weights, int64_t weights_stride, \
           const uint8_t* mask, int64_t mask_stride, float* out, int32_t* info, int64_t rows, int64_t width, \
           int threads) \
    KERNEL(select_smallest, const float* weights, int64_t stride, const float* norms, int64_t rows, int64_t columns, \
           int64_t count, int64_t width, uint8_t* mask, int64_t* taken, int threads) \
    KERNEL(count_scores, const float* weights, int64_t stride, const float* norms, int64_t rows, int64_t columns, \
           int64_t prefix, int64_t shift, int64_t bits, int64_t* counts, int threads) \
    KERNEL(select_below, const float* weights, int64_t stride, const float* norms, int64_t rows, int64_t columns, \
           int64_t threshold, int64_t ties, int64_t width, uint8_t* mask, int64_t* taken, int threads) \
    KERNEL(select_per_row, const float* weights, int64_t stride, const float* norms, int64_t rows, int64_t columns, \
           int64_t count, uint8_t* mask, int threads) \
    KERNEL(select_n_of_m, const float* scores, int64_t stride, int64_t rows, int64_t columns, int64_t n, int64_t m, \
           uint8_t* mask, int threads) \
    KERNEL(column_sweep, const float* factor, int64_t factor_stride, const float* weights, int64_t stride, \
           const uint8_t* mask, int64_t mask_stride, float* errors, int64_t rows, int64_t width, int threads) \
    KERNEL(column_sweep_n_of_m, const float* factor, int64_t factor_stride, const float* weights, int64_t stride, \
           int64_t n, int64_t m, float* errors, uint8_t* mask, int64_t rows, int64_t width, int threads) \
    KERNEL(accumulate_hessian, float* hessian, int64_t width, const void* inputs, int64_t stride, int64_t tokens, \
           int kind, float keep, float scale, int threads) \
    THANOS_SPARSE_KERNELS(KERNEL)

namespace thanos {

struct Kernels {
#define KERNEL(name, ...) void (*name)(__VA_ARGS__);
    THANOS_KERNELS(KERNEL)
#undef KERNEL
};

}  // namespace thanos

#ifdef THANOS_ISA
namespace thanos::THANOS_ISA {
#define KERNEL(name, ...) void name(__VA_ARGS__);
THANOS_KERNELS(KERNEL)
#undef KERNEL
}  // namespace thanos::THANOS_ISA
#endif
