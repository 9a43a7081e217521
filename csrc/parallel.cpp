#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include <dlfcn.h>
#include <unistd.h>

namespace thanos {
namespace {

constexpr size_t kAlignment = 64;

struct Loop {
    int64_t count, grain;
    void (*body)(void*, int64_t, int64_t, int);
    void* context;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};

    void work() {
        int worker = workers.fetch_add(1);
        for (;;) {
            int64_t begin = next.fetch_add(grain);
            if (begin >= count) return;
            body(context, begin, begin + grain < count ? begin + grain : count, worker);
        }
    }

    static void run(void* loop) { static_cast<Loop*>(loop)->work(); }
};

using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

const pid_t kOwner = getpid();  // of the process that loaded the library

// Loops run on the OpenMP threads that PyTorch has loaded: threads of our own would wait for a processor on which
// PyTorch's idle ones still spin, and the other way round. A forked child has lost those threads, whether or not a loop
// of ours ever ran in its parent. Each thread that calls has a team of its own.
OpenMpParallel open_mp() {
    static const OpenMpParallel function = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return kOwner == getpid() ? function : nullptr;
}

void run_on_new_threads(int threads, Loop& loop) {
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < threads; ++i) others.emplace_back(Loop::run, &loop);
    } catch (const std::system_error&) {  // out of threads: those there are do the work
    }
    loop.work();
    for (std::thread& other : others) other.join();
}

}  // namespace

void run_parallel(int threads, int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t, int),
                  void* context) {
    if (count <= 0) return;
    Loop loop{count, grain < 1 ? 1 : grain, body, context};
    int64_t chunks = (count + loop.grain - 1) / loop.grain;
    if (threads <= 1 || chunks == 1)
        loop.work();
    else if (OpenMpParallel parallel = open_mp())
        parallel(Loop::run, &loop, static_cast<unsigned>(threads), 0);
    else
        run_on_new_threads(threads, loop);
}

Workspace::Workspace(size_t bytes) {
    size_t rounded = (bytes + kAlignment) / kAlignment * kAlignment;
    data_ = static_cast<char*>(std::aligned_alloc(kAlignment, rounded));
    if (!data_) throw std::bad_alloc();
}

Workspace::~Workspace() { std::free(data_); }

}  // namespace thanos
