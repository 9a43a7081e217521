// In each group of m consecutive scores, the n smallest: one group a lane.
#include "group_ranks.h"
#include "kernels.h"
#include "parallel.h"

namespace thanos::THANOS_ISA {

void select_n_of_m(const float* scores, int64_t stride, int64_t rows, int64_t columns, int64_t n, int64_t m,
                   uint8_t* mask, int threads) {
    int64_t per_row = columns / m, groups = rows * per_row;
    size_t bytes = m * (sizeof(Vec) + 2 * sizeof(IntVec));
    bytes = (bytes + 63) / 64 * 64;
    Workspace space(bytes * threads);
    int64_t grain = maximum(1, 16384 / (m * kLanes));
    parallel_for(threads, ceil_div(groups, kLanes), grain, [&](int64_t begin, int64_t end, int worker) {
        float* values = reinterpret_cast<float*>(space.data() + worker * bytes);
        IntVec* keys = reinterpret_cast<IntVec*>(values + m * kLanes);
        IntVec* taken = keys + m;
        std::memset(values, 0, m * sizeof(Vec));
        for (int64_t first = begin * kLanes; first < minimum(end * kLanes, groups); first += kLanes) {
            int lanes = static_cast<int>(minimum(kLanes, groups - first));
            int64_t row = first / per_row, group = first % per_row;
            for (int lane = 0; lane < lanes; ++lane) {
                const float* source = scores + row * stride + group * m;
                for (int64_t i = 0; i < m; ++i) values[i * kLanes + lane] = source[i];
                if (++group == per_row) group = 0, ++row;
            }
            for (int64_t i = 0; i < m; ++i) keys[i] = order_keys(load(values + i * kLanes));
            mark_smallest(keys, m, n, taken);
            const int32_t* marks = reinterpret_cast<const int32_t*>(taken);
            for (int lane = 0; lane < lanes; ++lane)
                for (int64_t i = 0; i < m; ++i) mask[(first + lane) * m + i] = marks[i * kLanes + lane] & 1;
        }
    });
}

}  // namespace thanos::THANOS_ISA
