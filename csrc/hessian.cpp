// hessian = keep * hessian + scale * x.T x over rows x of 32- or 16-bit floats, accumulated in float32.
//
// Tokens are packed into panels of kWidth columns; the lower triangle is computed in register tiles of kRows x kWidth,
// kDepth tokens at a time, then mirrored. bfloat16 stays as it is where the processor multiplies pairs of it (a token and
// the next in one 32-bit word): its products are exact in float32. Where there are matrix tiles, hessian_tiles.h does it.
#include "hessian.h"
#include "hessian_tiles.h"
#include "kernels.h"

namespace thanos::THANOS_ISA {
namespace {

constexpr int kVectors = 3;
constexpr int kWidth = kVectors * kLanes;
constexpr int kRows = kLanes == 16 ? 8 : 4;  // fills the registers; divides kWidth
constexpr int64_t kDepth = 256;              // steps (tokens, or pairs) that one register tile sums
constexpr int64_t kTaskPanels = 12;          // panels that a task multiplies one panel with: they fit in L2

inline float half_to_float(uint16_t half) {
    uint32_t magnitude = half & 0x7fff, sign = static_cast<uint32_t>(half & 0x8000) << 16;
    uint32_t shifted = magnitude << 13, special = shifted | 0x7f800000;
    float value, infinite;
    std::memcpy(&value, &shifted, sizeof value);
    std::memcpy(&infinite, &special, sizeof infinite);
    value = magnitude < 0x7c00 ? value * 0x1p112f : infinite;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Packs one panel of tokens [begin, end) as `steps` rows of kWidth words, zero beyond the data.
void pack(const Problem& problem, int64_t panel, int64_t begin, int64_t end, uint32_t* packed) {
    int64_t first = panel * kWidth, columns = minimum(kWidth, problem.width - first);
    auto half_row = [&](int64_t token) {
        return reinterpret_cast<const uint16_t*>(problem.inputs) + token * problem.stride + first;
    };
    for (int64_t token = begin; token < end; token += problem.tokens_a_step(), packed += kWidth) {
        for (int64_t j = columns; j < kWidth; ++j) packed[j] = 0;
        if (problem.pairs && token + 1 < end) {
            const uint16_t *row = half_row(token), *next = half_row(token + 1);
            for (int64_t j = 0; j < columns; ++j) packed[j] = row[j] | static_cast<uint32_t>(next[j]) << 16;
        } else if (problem.pairs) {
            const uint16_t* row = half_row(token);
            for (int64_t j = 0; j < columns; ++j) packed[j] = row[j];
        } else if (problem.kind == kBFloat16) {
            const uint16_t* row = half_row(token);
            for (int64_t j = 0; j < columns; ++j) packed[j] = static_cast<uint32_t>(row[j]) << 16;
        } else if (problem.kind == kFloat16) {
            const uint16_t* row = half_row(token);
            float* to = reinterpret_cast<float*>(packed);
            for (int64_t j = 0; j < columns; ++j) to[j] = half_to_float(row[j]);
        } else {
            const float* row = reinterpret_cast<const float*>(problem.inputs) + token * problem.stride + first;
            std::memcpy(packed, row, columns * sizeof(float));
        }
    }
}

template <bool pairs>
inline Vec multiply_add(Vec sum, Vec a, Vec b) {
#if defined(__AVX512BF16__)
    if constexpr (pairs)
        return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                      reinterpret_cast<__m512bh>(b)));
#endif
    return sum + a * b;
}

// sums = a.T b over packed steps; a and b point into panels. Not inlined: it needs every register for itself.
template <bool pairs>
__attribute__((noinline)) void product(const float* a, const float* b, int64_t steps, Vec (&sums)[kRows][kVectors]) {
    Vec total[kRows][kVectors] = {};
    for (int64_t step = 0; step < steps; ++step, a += kWidth, b += kWidth) {
        Vec right[kVectors];
        for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes);
        for (int r = 0; r < kRows; ++r) {
            Vec left = broadcast(a[r]);
            for (int v = 0; v < kVectors; ++v) total[r][v] = multiply_add<pairs>(total[r][v], left, right[v]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sums[r][v] = total[r][v];
}

// hessian[row.., column..] = keep * hessian + scale * sums; with keep = 0 its old content is not read.
inline void flush(const Problem& problem, int64_t row, int64_t column, float keep,
                  const Vec (&sums)[kRows][kVectors]) {
    int64_t rows = minimum(kRows, problem.width - row), columns = problem.width - column;
    Vec scale = broadcast(problem.scale), old = broadcast(keep);
    for (int64_t r = 0; r < rows; ++r) {
        float* to = problem.hessian + (row + r) * problem.width + column;
        for (int v = 0; v < kVectors; ++v) {
            int64_t room = minimum(kLanes, columns - v * kLanes);
            if (room <= 0) break;
            Vec value = sums[r][v] * scale;
            if (keep != 0) {
                Vec before = {};
                std::memcpy(&before, to + v * kLanes, room * sizeof(float));
                value += old * before;
            }
            std::memcpy(to + v * kLanes, &value, room * sizeof(float));
        }
    }
}

template <bool pairs>
void multiply_panels(const Problem& problem, const float* packed, int64_t steps, int64_t panel, int64_t from,
                     int64_t to, float keep) {
    for (int64_t start = 0; start < steps; start += kDepth) {
        int64_t depth = minimum(kDepth, steps - start);
        for (int row = 0; row < kWidth && panel * kWidth + row < problem.width; row += kRows)
            for (int64_t other = from; other < to; ++other) {
                Vec sums[kRows][kVectors];
                product<pairs>(packed + (panel * steps + start) * kWidth + row,
                               packed + (other * steps + start) * kWidth, depth, sums);
                flush(problem, panel * kWidth + row, other * kWidth, start == 0 ? keep : 1.0f, sums);
            }
    }
}

// Tasks are pairs (panel, run of kTaskPanels panels up to it), longest rows first.
struct Task {
    int64_t panel, from, to;
};

Task find_task(int64_t panels, int64_t index) {
    for (int64_t panel = panels - 1;; --panel) {
        int64_t runs = ceil_div(panel + 1, kTaskPanels);
        if (index < runs) return {panel, index * kTaskPanels, minimum((index + 1) * kTaskPanels, panel + 1)};
        index -= runs;
    }
}

}  // namespace

void accumulate_hessian(float* hessian, int64_t width, const void* inputs, int64_t stride, int64_t tokens, int kind,
                        float keep, float scale, int threads) {
#if defined(__AVX512BF16__)
    bool pairs = kind == kBFloat16;
#else
    bool pairs = false;
#endif
    Problem problem{hessian, width, static_cast<const char*>(inputs), stride, tokens, static_cast<Kind>(kind),
                    pairs,   keep,  scale};
#if defined(__AMX_BF16__)
    if (kind == kBFloat16) return accumulate_by_tiles(problem, threads);
#endif
    int64_t panels = ceil_div(width, kWidth), tasks = 0, group = problem.tokens_a_step();
    for (int64_t panel = 0; panel < panels; ++panel) tasks += ceil_div(panel + 1, kTaskPanels);
    int64_t most = maximum(1, kPackedBytes / (panels * kWidth * 4 * kDepth)) * kDepth;
    int64_t capacity = minimum(most, ceil_div(tokens, group));
    Workspace space(panels * capacity * kWidth * sizeof(float));
    float* packed = reinterpret_cast<float*>(space.data());
    for (int64_t begin = 0; begin < tokens; begin += capacity * group) {
        int64_t end = minimum(begin + capacity * group, tokens), steps = ceil_div(end - begin, group);
        bool last = end == tokens;
        parallel_for(threads, panels, 1, [&](int64_t first, int64_t stop, int) {
            for (int64_t panel = first; panel < stop; ++panel)
                pack(problem, panel, begin, end, reinterpret_cast<uint32_t*>(packed + panel * steps * kWidth));
        });
        parallel_for(threads, tasks, 1, [&](int64_t first, int64_t stop, int) {
            for (int64_t index = first; index < stop; ++index) {
                Task task = find_task(panels, index);
                float before = begin == 0 ? keep : 1.0f;
                if (pairs)
                    multiply_panels<true>(problem, packed, steps, task.panel, task.from, task.to, before);
                else
                    multiply_panels<false>(problem, packed, steps, task.panel, task.from, task.to, before);
                if (last)
                    mirror(problem, task.panel * kWidth, minimum((task.panel + 1) * kWidth, width), task.from * kWidth,
                           minimum(task.to * kWidth, width));
            }
        });
    }
}

}  // namespace thanos::THANOS_ISA
