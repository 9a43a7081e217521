// A parallel loop on the OpenMP threads that PyTorch already runs. Between two calls of a model's forward these threads
// still spin; a second pool beside them would fight them for the cores at every layer.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#endif

#include "parallel.h"

namespace thanos {

using StartTeam = void (*)(void (*)(void*), void*, unsigned, unsigned);

// GOMP_parallel of the OpenMP runtime in this process; null where there is none, or in a forked child, which lacks its
// parent's threads.
static inline StartTeam find_team() {
#if defined(__unix__) || defined(__APPLE__)
    static const StartTeam found = reinterpret_cast<StartTeam>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    static const pid_t owner = getpid();
    return owner == getpid() ? found : nullptr;
#else
    return nullptr;
#endif
}

// As parallel_for, but body(begin, end) is not told its worker.
template <class Body>
static inline void team_for(int threads, int64_t count, int64_t grain, Body&& body) {
    StartTeam start = threads > 1 && count > grain ? find_team() : nullptr;
    if (!start) {
        parallel_for(threads, count, grain, [&](int64_t begin, int64_t end, int) { body(begin, end); });
        return;
    }
    struct Loop {
        std::atomic<int64_t> next;
        int64_t count, grain;
        std::remove_reference_t<Body>* body;
    } loop{{0}, count, grain, &body};
    auto work = [](void* data) {
        auto& loop = *static_cast<Loop*>(data);
        for (int64_t begin; (begin = loop.next.fetch_add(loop.grain)) < loop.count;)
            (*loop.body)(begin, std::min(loop.count, begin + loop.grain));
    };
    start(work, &loop, static_cast<unsigned>(threads), 0);
}

}  // namespace thanos
