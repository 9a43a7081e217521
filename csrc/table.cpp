// The table of this instruction set's kernels.
#include "kernels.h"

namespace thanos::THANOS_ISA {

extern const Kernels table;
const Kernels table = {
#define KERNEL(name, ...) name,
    THANOS_KERNELS(KERNEL)
#undef KERNEL
};

}  // namespace thanos::THANOS_ISA
