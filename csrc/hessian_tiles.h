// The Hessian by AMX: tiles of 16 x 16 sums of products of bfloat16, exact products accumulated in float32.
//
// A tile's left factor holds 16 columns of the inputs as rows of 32 tokens, the right one 16 pairs of tokens as rows of 16
// columns; each is the other's transpose in 32-bit words. Columns go in blocks of two tiles, whose product with another
// block is four tiles of sums; both forms of each block are packed once.
#pragma once

#include "hessian.h"

#if defined(__AMX_BF16__)

namespace thanos::THANOS_ISA {
namespace {

constexpr int64_t kTile = 16;                    // rows, and 32-bit words a row
constexpr int64_t kTileWords = kTile * kTile;    // 32 tokens of 16 columns
constexpr int64_t kBlock = 2 * kTile;            // columns
constexpr int64_t kTokens = 2 * kTile;           // of a step
constexpr int64_t kStepWords = 2 * kTileWords;   // of a block in one form
constexpr int64_t kSteps = 32;                   // that sums stay in tiles for
constexpr int64_t kSide = 4;                     // blocks along each side of a task: both forms of them, kSteps deep, fit in L2

typedef int32_t Words __attribute__((vector_size(64)));

// Rows of 16 words and their transpose.
inline void transpose(const Words (&rows)[kTile], uint32_t* to) {
    __m512i a[kTile], b[kTile];
    for (int i = 0; i < kTile; i += 2) {
        __m512i low = reinterpret_cast<__m512i>(rows[i]), high = reinterpret_cast<__m512i>(rows[i + 1]);
        a[i] = _mm512_unpacklo_epi32(low, high);
        a[i + 1] = _mm512_unpackhi_epi32(low, high);
    }
    for (int i = 0; i < kTile; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    for (int i = 0; i < kTile; i += 8)
        for (int j = 0; j < 4; ++j) {
            a[i + j] = _mm512_shuffle_i32x4(b[i + j], b[i + 4 + j], 0x88);
            a[i + 4 + j] = _mm512_shuffle_i32x4(b[i + j], b[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        _mm512_store_si512(to + j * kTile, _mm512_shuffle_i32x4(a[j], a[8 + j], 0x88));
        _mm512_store_si512(to + (8 + j) * kTile, _mm512_shuffle_i32x4(a[j], a[8 + j], 0xdd));
    }
}

// Packs both forms of a block for tokens [begin, end): `steps` times two tiles each, zero beyond the data.
void pack_tiles(const Problem& problem, int64_t block, int64_t begin, int64_t end, uint32_t* left, uint32_t* right) {
    const uint16_t* inputs = reinterpret_cast<const uint16_t*>(problem.inputs);
    for (int64_t token = begin; token < end; token += kTokens, left += kStepWords, right += kStepWords)
        for (int64_t tile = 0; tile < 2; ++tile) {
            int64_t first = block * kBlock + tile * kTile, columns = minimum(kTile, problem.width - first);
            Words rows[kTile];
            for (int64_t pair = 0; pair < kTile; ++pair) {
                uint32_t words[kTile] = {};
                for (int64_t half = 0; half < 2; ++half) {
                    int64_t at = token + 2 * pair + half;
                    if (at >= end) break;
                    const uint16_t* row = inputs + at * problem.stride + first;
                    if (columns == kTile)
                        for (int64_t j = 0; j < kTile; ++j) words[j] |= static_cast<uint32_t>(row[j]) << 16 * half;
                    else
                        for (int64_t j = 0; j < columns; ++j) words[j] |= static_cast<uint32_t>(row[j]) << 16 * half;
                }
                std::memcpy(&rows[pair], words, sizeof words);
            }
            std::memcpy(right + tile * kTileWords, rows, sizeof rows);
            transpose(rows, left + tile * kTileWords);
        }
}

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// sums = left.T right over some steps of two blocks.
inline void multiply_tiles(const uint32_t* left, const uint32_t* right, int64_t steps, float* sums) {
    constexpr int64_t kRowBytes = kTile * 4, kSumBytes = kBlock * 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step, left += kStepWords, right += kStepWords) {
        _tile_loadd(4, left, kRowBytes);
        _tile_loadd(6, right, kRowBytes);
        _tile_loadd(7, right + kTileWords, kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + kTileWords, kRowBytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, kSumBytes);
    _tile_stored(1, sums + kTile, kSumBytes);
    _tile_stored(2, sums + kTile * kBlock, kSumBytes);
    _tile_stored(3, sums + kTile * kBlock + kTile, kSumBytes);
}

// to = keep * to + scale * sums; with keep = 0 its old content is not read.
inline void flush_vector(const Problem& problem, float* to, int64_t room, float keep, const float* sums) {
    Vec value = load(sums) * broadcast(problem.scale);
    if (room >= kLanes) {
        if (keep != 0) value += broadcast(keep) * load(to);
        store(to, value);
    } else if (room > 0) {
        Vec before = {};
        if (keep != 0) std::memcpy(&before, to, room * sizeof(float));
        value += broadcast(keep) * before;
        std::memcpy(to, &value, room * sizeof(float));
    }
}

// As flush(), of a block's sums.
inline void flush_tiles(const Problem& problem, int64_t row, int64_t column, float keep, const float* sums) {
    int64_t rows = minimum(kBlock, problem.width - row), columns = problem.width - column;
    for (int64_t r = 0; r < rows; ++r, sums += kBlock) {
        float* to = problem.hessian + (row + r) * problem.width + column;
        for (int64_t j = 0; j < kBlock; j += kLanes) flush_vector(problem, to + j, columns - j, keep, sums + j);
    }
}

// Blocks [row_begin, row_end) against blocks [column_begin, column_end), those not right of the diagonal.
void multiply_blocks(const Problem& problem, const uint32_t* left, const uint32_t* right, int64_t steps,
                     int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end, float keep) {
    alignas(64) float sums[kBlock * kBlock];
    for (int64_t start = 0; start < steps; start += kSteps) {
        int64_t depth = minimum(kSteps, steps - start);
        for (int64_t row = row_begin; row < row_end; ++row)
            for (int64_t column = column_begin; column < minimum(column_end, row + 1); ++column) {
                multiply_tiles(left + (row * steps + start) * kStepWords, right + (column * steps + start) * kStepWords,
                               depth, sums);
                flush_tiles(problem, row * kBlock, column * kBlock, start == 0 ? keep : 1.0f, sums);
            }
    }
}

void accumulate_by_tiles(const Problem& problem, int threads) {
    int64_t blocks = ceil_div(problem.width, kBlock), sides = ceil_div(blocks, kSide), tasks = sides * (sides + 1) / 2;
    int64_t most = maximum(1, kPackedBytes / (blocks * 2 * kStepWords * 4));
    int64_t capacity = minimum(most, ceil_div(problem.tokens, kTokens));
    Workspace space(2 * blocks * capacity * kStepWords * sizeof(uint32_t));
    uint32_t* left = reinterpret_cast<uint32_t*>(space.data());
    uint32_t* right = left + blocks * capacity * kStepWords;
    for (int64_t begin = 0; begin < problem.tokens; begin += capacity * kTokens) {
        int64_t end = minimum(begin + capacity * kTokens, problem.tokens), steps = ceil_div(end - begin, kTokens);
        parallel_for(threads, blocks, 1, [&](int64_t first, int64_t stop, int) {
            for (int64_t block = first; block < stop; ++block) {
                int64_t offset = block * steps * kStepWords;
                pack_tiles(problem, block, begin, end, left + offset, right + offset);
            }
        });
        parallel_for(threads, tasks, 1, [&](int64_t first, int64_t stop, int) {
            TileShapes shapes;
            _tile_loadconfig(&shapes);
            for (int64_t index = first; index < stop; ++index) {
                int64_t side = 0, other = tasks - 1 - index;  // longest rows first
                while (other > side) other -= ++side;
                int64_t row = side * kSide, column = other * kSide;
                int64_t row_end = minimum(row + kSide, blocks), column_end = minimum(column + kSide, blocks);
                multiply_blocks(problem, left, right, steps, row, row_end, column, column_end,
                                begin == 0 ? problem.keep : 1.0f);
                if (end == problem.tokens)
                    mirror(problem, row * kBlock, minimum(row_end * kBlock, problem.width), column * kBlock,
                           minimum(column_end * kBlock, problem.width));
            }
            _tile_release();
        });
    }
}

}  // namespace
}  // namespace thanos::THANOS_ISA

#endif
