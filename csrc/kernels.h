// Every kernel's signature, once: from this list come its declaration in each instruction set's namespace, its place in
// the table that is picked at run time, and its Python binding (pointers are passed as integers).
// Strides are in elements, from one row to the next; columns are contiguous.
#pragma once

#include <cstdint>

#include "sparse_kernels.h"

#define THANOS_KERNELS(KERNEL) \
    KERNEL(noop, int64_t count, int threads) \
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
