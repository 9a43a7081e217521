// Fresh memory: asking for huge pages where a kernel is about to fill much of it. Faulting small ones in can cost more
// than the kernel's own work.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace thanos {

static inline void expect_writes(void* start, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kHuge = 2 << 20;
    uintptr_t begin = (reinterpret_cast<uintptr_t>(start) + kHuge - 1) / kHuge * kHuge;
    uintptr_t end = (reinterpret_cast<uintptr_t>(start) + bytes) / kHuge * kHuge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

}  // namespace thanos
