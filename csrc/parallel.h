// A parallel loop for kernels. Header parts are internal to each source, so that no instruction set leaks into another.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thanos {

// Runs body(context, begin, end, worker) over [0, count) in chunks of `grain`, taken as they come by at most `threads`
// threads, the caller among them; `worker` < threads tells them apart. Returns when all is done.
void run_parallel(int threads, int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t, int),
                  void* context);

template <class Body>  // body(begin, end, worker)
static inline void parallel_for(int threads, int64_t count, int64_t grain, Body&& body) {
    run_parallel(
        threads, count, grain,
        [](void* context, int64_t begin, int64_t end, int worker) {
            (*static_cast<Body*>(context))(begin, end, worker);
        },
        &body);
}

// Memory aligned for any vector, uninitialised; allocated before a loop starts, because a body must not throw.
class Workspace {
public:
    explicit Workspace(size_t bytes);  // throws std::bad_alloc
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    char* data() const { return data_; }

private:
    char* data_;
};

}  // namespace thanos
