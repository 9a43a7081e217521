// SparseGPT's compensation inside a block: factor[q, q].T e[q] = w[q] for each row, rows in lanes.
//
// Columns are taken a panel at a time: what all earlier columns owe it is one product in registers; inside the panel
// each column's error is taken from those after it at once. For n:m a group's mask is chosen when the sweep reaches it.
#include "group_ranks.h"
#include "kernels.h"
#include "parallel.h"

namespace thanos::THANOS_ISA {
namespace {

constexpr int kGroups = kLanes == 16 ? 2 : 1;  // vectors of rows in a tile
constexpr int kTile = kGroups * kLanes;
constexpr int kWide = 8;  // columns of a product in registers

struct Sweep {
    const float* factor;  // packed by pack_factor
    const float* diagonal;
    int64_t width, panel;  // panel: columns a panel, a multiple of m
    int64_t n, m;          // m = 0: the mask is given
};

// The factor's rows in strips of kWide columns, so that a product reads it in order; zero beyond the width.
void pack_factor(const float* factor, int64_t stride, int64_t width, float* packed, float* diagonal) {
    for (int64_t strip = 0; strip < width; strip += kWide)
        for (int64_t j = 0; j < width; ++j)
            for (int i = 0; i < kWide; ++i)
                *packed++ = strip + i < width ? factor[j * stride + strip + i] : 0.0f;
    for (int64_t j = 0; j < width; ++j) diagonal[j] = factor[j * stride + j];
}

// work[strip] -= errors[:, :before] factor[:before, strip], for kWide columns.
inline void subtract_product(const Sweep& sweep, const float* errors, int64_t before, int64_t strip, float* work) {
    const float* factor = sweep.factor + strip * sweep.width;
    Vec sums[kWide][kGroups];
    for (int i = 0; i < kWide; ++i)
        for (int g = 0; g < kGroups; ++g) sums[i][g] = Vec{};
    for (int64_t j = 0; j < before; ++j) {
        Vec error[kGroups];
        for (int g = 0; g < kGroups; ++g) error[g] = load(errors + j * kTile + g * kLanes);
        for (int i = 0; i < kWide; ++i) {
            Vec entry = broadcast(factor[j * kWide + i]);
            for (int g = 0; g < kGroups; ++g) sums[i][g] += error[g] * entry;
        }
    }
    for (int64_t i = 0; i < minimum(kWide, sweep.width - strip); ++i)
        for (int g = 0; g < kGroups; ++g) {
            float* place = work + (strip + i) * kTile + g * kLanes;
            store(place, load(place) - sums[i][g]);
        }
}

// Chooses the n smallest of (w / diagonal)^2 in the group that starts at column `first`.
inline void choose_group(const Sweep& sweep, const float* work, int64_t first, IntVec* keys, IntVec* chosen,
                         int32_t* mask) {
    for (int g = 0; g < kGroups; ++g) {
        for (int64_t i = 0; i < sweep.m; ++i) {
            Vec value = load(work + (first + i) * kTile + g * kLanes);
            keys[i] = order_keys(choose(value < 0, -value, value) / broadcast(sweep.diagonal[first + i]));
        }
        mark_smallest(keys, sweep.m, sweep.n, chosen);
        for (int64_t i = 0; i < sweep.m; ++i)
            std::memcpy(mask + (first + i) * kTile + g * kLanes, &chosen[i], sizeof(IntVec));
    }
}

// Sweeps a tile of rows: `work` holds the weights transposed and is used up, `mask` is read or written, `errors` written.
void sweep_tile(const Sweep& sweep, float* work, int32_t* mask, float* errors, IntVec* keys) {
    for (int64_t start = 0; start < sweep.width; start += sweep.panel) {
        int64_t stop = minimum(start + sweep.panel, sweep.width);
        for (int64_t strip = start; strip < stop; strip += kWide) subtract_product(sweep, errors, start, strip, work);
        for (int64_t j = start; j < stop; ++j) {
            if (sweep.m && j % sweep.m == 0) choose_group(sweep, work, j, keys, keys + sweep.m, mask);
            Vec error[kGroups];
            for (int g = 0; g < kGroups; ++g) {
                IntVec masked;
                std::memcpy(&masked, mask + j * kTile + g * kLanes, sizeof masked);
                Vec quotient = load(work + j * kTile + g * kLanes) / broadcast(sweep.diagonal[j]);
                error[g] = choose(masked, quotient, Vec{});
                store(errors + j * kTile + g * kLanes, error[g]);
            }
            for (int64_t k = j + 1; k < stop; ++k) {
                Vec entry = broadcast(sweep.factor[(k / kWide * sweep.width + j) * kWide + k % kWide]);
                for (int g = 0; g < kGroups; ++g) {
                    float* place = work + k * kTile + g * kLanes;
                    store(place, load(place) - error[g] * entry);
                }
            }
        }
    }
}

void sweep_rows(const float* factor, int64_t factor_stride, const float* weights, int64_t stride, const uint8_t* given,
                int64_t given_stride, int64_t n, int64_t m, float* out, uint8_t* chosen, int64_t rows, int64_t width,
                int threads) {
    // Panels are whole strips and whole groups.
    int64_t panel = kWide;
    while (m && panel % m) panel += kWide;
    size_t packed_bytes = ceil_div(width, kWide) * kWide * width * sizeof(float);
    size_t tile_bytes = (width * kTile * 3 + 2 * m * kLanes) * sizeof(float);
    Workspace packed(packed_bytes + width * sizeof(float)), tiles(tile_bytes * threads);
    float* strips = reinterpret_cast<float*>(packed.data());
    float* diagonal = reinterpret_cast<float*>(packed.data() + packed_bytes);
    pack_factor(factor, factor_stride, width, strips, diagonal);
    Sweep sweep{strips, diagonal, width, panel, n, m};
    parallel_for(threads, ceil_div(rows, kTile), 1, [&](int64_t begin, int64_t end, int worker) {
        float* work = reinterpret_cast<float*>(tiles.data() + worker * tile_bytes);
        float* errors = work + width * kTile;
        int32_t* mask = reinterpret_cast<int32_t*>(errors + width * kTile);
        IntVec* keys = reinterpret_cast<IntVec*>(mask + width * kTile);
        for (int64_t first = begin * kTile; first < minimum(end * kTile, rows); first += kTile) {
            int64_t lanes = minimum(kTile, rows - first);
            if (lanes < kTile) {
                std::memset(work, 0, width * kTile * sizeof(float));
                std::memset(mask, 0, width * kTile * sizeof(int32_t));
            }
            for (int64_t lane = 0; lane < lanes; ++lane)
                for (int64_t j = 0; j < width; ++j) work[j * kTile + lane] = weights[(first + lane) * stride + j];
            if (given)
                for (int64_t lane = 0; lane < lanes; ++lane)
                    for (int64_t j = 0; j < width; ++j)
                        mask[j * kTile + lane] = -static_cast<int32_t>(given[(first + lane) * given_stride + j]);
            sweep_tile(sweep, work, mask, errors, keys);
            for (int64_t lane = 0; lane < lanes; ++lane)
                for (int64_t j = 0; j < width; ++j) out[(first + lane) * width + j] = errors[j * kTile + lane];
            if (chosen)
                for (int64_t lane = 0; lane < lanes; ++lane)
                    for (int64_t j = 0; j < width; ++j) chosen[(first + lane) * width + j] = mask[j * kTile + lane] & 1;
        }
    });
}

}  // namespace

void column_sweep(const float* factor, int64_t factor_stride, const float* weights, int64_t stride, const uint8_t* mask,
                  int64_t mask_stride, float* errors, int64_t rows, int64_t width, int threads) {
    sweep_rows(factor, factor_stride, weights, stride, mask, mask_stride, 0, 0, errors, nullptr, rows, width, threads);
}

void column_sweep_n_of_m(const float* factor, int64_t factor_stride, const float* weights, int64_t stride, int64_t n,
                         int64_t m, float* errors, uint8_t* mask, int64_t rows, int64_t width, int threads) {
    sweep_rows(factor, factor_stride, weights, stride, nullptr, 0, n, m, errors, mask, rows, width, threads);
}

}  // namespace thanos::THANOS_ISA
