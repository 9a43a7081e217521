// For each row, gram[q, q] x = w[q] with q the row's masked columns, by Cholesky, one row in each SIMD lane.
//
// Rows are sorted by the size of their systems, so that a group of kLanes hardly pads; padding is an identity row with a
// zero right-hand side. A group's lower triangle is kept as rows of 4 x 4 tiles; tile row I holds, for each column k up
// to its diagonal, 4 vectors. Columns are factored kPanel at a time, so that what a tile product reads stays in cache.
#include "kernels.h"
#include "parallel.h"
#include "row_gather.h"

namespace thanos::THANOS_ISA {
namespace {

constexpr int kT = 4;                                // rows and columns of a tile
constexpr int kColumns = kLanes == 8 ? 2 : 4;        // of them at a time in registers
constexpr int64_t kPanel = 48;                       // columns that stay in the nearest cache, for
constexpr int64_t kRows = 2;                         // tile rows at a time

inline int64_t tile_row(int64_t index) { return kT * kT * index * (index + 1) / 2; }

constexpr int64_t kSpare = 16;  // vectors that spreading may write past the end

struct Group {
    Vec* lower;     // tile rows
    Vec* inverse;   // of the diagonal
    Vec* right;     // right-hand sides, then the solution
    int64_t size;   // a multiple of kT
    IntVec failed;  // 1-based index within the system, or 0
};

// A tile's rows[r][c] -= sum over k < depth of a[k][r] b[k][c]; if `solve`, the tile then becomes
// tile inverse(diagonal tile).T. The loops are unrolled by hand's order: GCC spills the sums otherwise.
template <bool solve>
__attribute__((noinline)) void subtract_tile(Vec* tile, const Vec* a, const Vec* b, int64_t depth, const Vec* diagonal,
                                             const Vec* inverse) {
#pragma GCC unroll 4
    for (int first = 0; first < kT; first += kColumns) {
        Vec sums[kT][kColumns];
#pragma GCC unroll 4
        for (int r = 0; r < kT; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < kColumns; ++c) sums[r][c] = tile[(first + c) * kT + r];
        for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 4
            for (int r = 0; r < kT; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < kColumns; ++c) sums[r][c] -= a[k * kT + r] * b[k * kT + first + c];
        }
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 4
            for (int r = 0; r < kT; ++r) {
                if (solve) {
#pragma GCC unroll 4
                    for (int k = 0; k < first; ++k) sums[r][c] -= tile[k * kT + r] * diagonal[k * kT + first + c];
#pragma GCC unroll 4
                    for (int k = 0; k < c; ++k) sums[r][c] -= sums[r][k] * diagonal[(first + k) * kT + first + c];
                    sums[r][c] *= inverse[first + c];
                }
                tile[(first + c) * kT + r] = sums[r][c];
            }
        }
    }
}

inline void factor_tile(Vec* tile, Vec* inverse, IntVec& failed, int32_t first) {
    for (int c = 0; c < kT; ++c) {
        Vec pivot = tile[c * kT + c];
        for (int k = 0; k < c; ++k) pivot -= tile[k * kT + c] * tile[k * kT + c];
        IntVec good = pivot > 0;
        failed = (good | (failed != 0)) ? failed : (IntVec{} + (first + c + 1));
        pivot = choose(good, pivot, broadcast(1.0f));
        Vec root = square_root(pivot);
        tile[c * kT + c] = root;
        inverse[c] = broadcast(1.0f) / root;
        for (int r = c + 1; r < kT; ++r) {
            Vec value = tile[c * kT + r];
            for (int k = 0; k < c; ++k) value -= tile[k * kT + r] * tile[k * kT + c];
            tile[c * kT + r] = value * inverse[c];
        }
    }
}

// Tile row i of a panel: subtracts the panel's columns before each of its tiles, then solves with that tile's diagonal;
// the right-hand side follows as if it were another row.
inline void factor_row(Group& group, int64_t start, int64_t stop, int64_t i) {
    Vec* row = group.lower + tile_row(i);
    int64_t from = kT * kT * start, last = minimum(stop, i);
    for (int64_t j = start; j < last; ++j) {
        const Vec* other = group.lower + tile_row(j);
        subtract_tile<true>(row + kT * kT * j, row + from, other + from, kT * (j - start), other + kT * kT * j,
                            group.inverse + kT * j);
    }
    Vec* right = group.right + kT * i;
    Vec sums[2][kT] = {{right[0], right[1], right[2], right[3]}};
    for (int64_t k = kT * start; k < kT * last; k += 2)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
            for (int r = 0; r < kT; ++r) sums[half][r] -= row[(k + half) * kT + r] * group.right[k + half];
#pragma GCC unroll 4
    for (int r = 0; r < kT; ++r) right[r] = sums[0][r] + sums[1][r];
    if (i >= stop) return;
    Vec* diagonal = row + kT * kT * i;
    const Vec* inverse = group.inverse + kT * i;
    subtract_tile<false>(diagonal, row + from, row + from, kT * (i - start), nullptr, nullptr);
    factor_tile(diagonal, group.inverse + kT * i, group.failed, kT * i);
    for (int r = 0; r < kT; ++r) {
        for (int k = 0; k < r; ++k) right[r] -= diagonal[k * kT + r] * right[k];
        right[r] *= inverse[r];
    }
}

// Panels of columns from left to right; rows beyond the panel a few at a time, so that what the others read of a row's
// panel is in the nearest cache for all of them.
__attribute__((noinline)) void factor(Group& group) {
    int64_t tiles = group.size / kT, panel = kPanel / kT;
    for (int64_t start = 0; start < tiles; start += panel) {
        int64_t stop = minimum(start + panel, tiles), from = kT * kT * start;
        for (int64_t i = start; i < stop; ++i) factor_row(group, start, stop, i);
        for (int64_t first = stop; first < tiles; first += kRows) {
            int64_t last = minimum(first + kRows, tiles);
            for (int64_t i = first; i < last; ++i) factor_row(group, start, stop, i);
            for (int64_t j = stop; j < last; ++j) {
                const Vec* other = group.lower + tile_row(j) + from;
                for (int64_t i = maximum(first, j); i < last; ++i) {
                    Vec* row = group.lower + tile_row(i);
                    subtract_tile<false>(row + kT * kT * j, row + from, other, kPanel, nullptr, nullptr);
                }
            }
        }
    }
}

// Backward substitution in place of the right-hand sides.
__attribute__((noinline)) void substitute(Group& group) {
    int64_t tiles = group.size / kT;
    for (int64_t i = tiles - 1; i >= 0; --i) {
        const Vec* row = group.lower + tile_row(i);
        Vec values[kT];
        for (int r = kT - 1; r >= 0; --r) {
            values[r] = group.right[kT * i + r];
            for (int k = r + 1; k < kT; ++k) values[r] -= row[(kT * i + r) * kT + k] * values[k];
            values[r] *= group.inverse[kT * i + r];
        }
        for (int r = 0; r < kT; ++r) group.right[kT * i + r] = values[r];
        for (int64_t k = 0; k < kT * i; ++k) {
            Vec sum = group.right[k];
            for (int r = 0; r < kT; ++r) sum -= row[k * kT + r] * values[r];
            group.right[k] = sum;
        }
    }
}

}  // namespace

void row_solve(const float* gram, int64_t gram_stride, const float* weights, int64_t weights_stride,
               const uint8_t* mask, int64_t mask_stride, float* out, int32_t* info, int64_t rows, int64_t width,
               int threads) {
    // A counting sort of the rows, largest systems first.
    int64_t words = ceil_div(width, kChunk);
    Workspace order_space((2 * rows + width + 2) * sizeof(int64_t) + rows * words * sizeof(uint16_t));
    int64_t* counts = reinterpret_cast<int64_t*>(order_space.data());
    int64_t* order = counts + rows;
    int64_t* starts = order + rows;
    uint16_t* bits = reinterpret_cast<uint16_t*>(starts + width + 2);
    parallel_for(threads, rows, maximum(1, 65536 / width), [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row)
            counts[row] = pack_mask(mask + row * mask_stride, width, bits + row * words);
    });
    std::memset(starts, 0, (width + 2) * sizeof(int64_t));
    for (int64_t row = 0; row < rows; ++row) ++starts[width - counts[row] + 1];
    for (int64_t k = 0; k <= width; ++k) starts[k + 1] += starts[k];
    for (int64_t row = 0; row < rows; ++row) order[starts[width - counts[row]]++] = row;

    int64_t padded_stride = gram_stride_of(width);
    Workspace gram_space((width + 1) * padded_stride * sizeof(float));  // a row more, for windows beyond the last
    float* padded = reinterpret_cast<float*>(gram_space.data());
    for (int64_t row = 0; row < width; ++row) {
        std::memcpy(padded + row * padded_stride, gram + row * gram_stride, width * sizeof(float));
        std::memset(padded + row * padded_stride + width, 0, (padded_stride - width) * sizeof(float));
    }
    int64_t largest = ceil_div(counts[order[0]], kT) * kT;
    size_t lower_bytes = (tile_row(largest / kT) + kT * kSpare) * sizeof(Vec);
    size_t vector_bytes = (largest + kSpare) * sizeof(Vec);
    size_t bytes = (lower_bytes + 2 * vector_bytes + Lists::bytes(largest) + 63) / 64 * 64;
    Workspace space(bytes * threads);
    parallel_for(threads, ceil_div(rows, kLanes), 1, [&](int64_t begin, int64_t end, int worker) {
        char* own = space.data() + worker * bytes;
        Group group;
        group.lower = reinterpret_cast<Vec*>(own);
        group.inverse = reinterpret_cast<Vec*>(own + lower_bytes);
        group.right = reinterpret_cast<Vec*>(own + lower_bytes + vector_bytes);
        Lists lists(own + lower_bytes + 2 * vector_bytes, largest);
        for (int64_t index = begin; index < end; ++index) {
            const int64_t* members = order + index * kLanes;
            int lanes = static_cast<int>(minimum(kLanes, rows - index * kLanes));
            group.size = ceil_div(counts[members[0]], kT) * kT;
            group.failed = IntVec{};
            for (int lane = 0; lane < kLanes; ++lane) {
                lists.counts[lane] = 0;
                std::memset(lists.rows + lane * lists.stride, 0, group.size * sizeof(float));
                if (lane >= lanes) continue;
                lists.fill(lane, bits + members[lane] * words, weights + members[lane] * weights_stride, width);
            }
            spread(lists, group.size, group.right);
            for (int64_t i = 0; i < group.size; ++i)
                gather_row(lists, padded, padded_stride, i, group.lower + tile_row(i / kT) + i % kT, kT);
            for (int64_t next = 0; next < kLanes && (index + 1) * kLanes + next < rows; ++next) {
                const float* row = weights + members[kLanes + next] * weights_stride;
                for (int64_t j = 0; j < width; j += 16) __builtin_prefetch(row + j);
            }
            factor(group);
            substitute(group);
            unspread(lists, group.size, group.right);
            for (int lane = 0; lane < lanes; ++lane) {
                int64_t row = members[lane];
                int32_t failed = group.failed[lane];
                info[row] = failed ? lists.columns[lane * lists.stride + failed - 1] + 1 : 0;
                if (failed)
                    std::memset(out + row * width, 0, width * sizeof(float));
                else
                    scatter(lists, lane, bits + row * words, out + row * width, width);
            }
        }
    });
}

}  // namespace thanos::THANOS_ISA
