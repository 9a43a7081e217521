#include "parallel.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

#include <unistd.h>

namespace thanos {
namespace {

constexpr size_t kAlignment = 64;
constexpr int kSpins = 2000;  // some 50 microseconds, the gap between kernels of one block step

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Job {
    int threads;
    int64_t count, grain;
    void (*body)(void*, int64_t, int64_t, int);
    void* context;
};

// Workers join a job if they wake in time; the caller never waits for one that did not, only for those inside.
class Pool {
public:
    void run(const Job& job) {
        grow(job.threads - 1);
        job_ = job;
        next_.store(0);
        {
            std::lock_guard<std::mutex> lock(sleep_);
            open_.store(generation_.load() + 1);
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        work(0);
        open_.store(0);
        for (int spins = 0; inside_.load() != 0; ++spins) spins < kSpins ? pause() : std::this_thread::yield();
    }

private:
    void grow(int workers) {
        for (; workers_ < workers; ++workers_) std::thread(&Pool::loop, this, workers_ + 1).detach();
    }

    void work(int worker) {
        for (;;) {
            int64_t begin = next_.fetch_add(job_.grain);
            if (begin >= job_.count) return;
            int64_t end = begin + job_.grain < job_.count ? begin + job_.grain : job_.count;
            job_.body(job_.context, begin, end, worker);
        }
    }

    [[noreturn]] void loop(int worker) {
        uint64_t seen = 0;
        for (;;) {
            for (int spins = 0; generation_.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins) pause();
            if (generation_.load() == seen) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
            }
            seen = generation_.load();
            inside_.fetch_add(1);
            if (open_.load() == seen && worker < job_.threads) work(worker);
            inside_.fetch_sub(1);
        }
    }

    Job job_{};
    int workers_ = 0;
    std::atomic<int64_t> next_{0};
    std::atomic<int> inside_{0};
    std::atomic<uint64_t> generation_{0}, open_{0};
    std::mutex sleep_;
    std::condition_variable wake_;
};

thread_local bool in_loop = false;
std::atomic<bool> busy{false};
Pool* pool = nullptr;
pid_t owner = 0;

// A forked child has none of its parent's workers: it starts its own pool and leaves the parent's behind.
Pool& own_pool() {
    if (owner != getpid()) {
        pool = new Pool;
        owner = getpid();
    }
    return *pool;
}

}  // namespace

void run_parallel(int threads, int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t, int),
                  void* context) {
    if (count <= 0) return;
    if (grain < 1) grain = 1;
    bool forked = owner != 0 && owner != getpid();
    bool serial = threads <= 1 || count <= grain || in_loop;
    if (serial || (busy.exchange(true) && !forked)) {
        for (int64_t begin = 0; begin < count; begin += grain)
            body(context, begin, begin + grain < count ? begin + grain : count, 0);
        return;
    }
    in_loop = true;
    own_pool().run({threads, count, grain, body, context});
    in_loop = false;
    busy.store(false);
}

Workspace::Workspace(size_t bytes) {
    size_t rounded = (bytes + kAlignment) / kAlignment * kAlignment;
    data_ = static_cast<char*>(std::aligned_alloc(kAlignment, rounded));
    if (!data_) throw std::bad_alloc();
}

Workspace::~Workspace() { std::free(data_); }

}  // namespace thanos
