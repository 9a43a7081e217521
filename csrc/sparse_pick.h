// One token through compressed weights by picking the activations that kept values meet, instead of expanding values.
// Included by sparse_rows.h.
#pragma once

#include "sparse_lanes.h"

namespace thanos::THANOS_ISA {

// For each byte of a mask or of 2:4 codes: the positions of the kept columns among its eight, and how many they are.
struct Positions {
    uint8_t of_mask[256][8] = {}, count[256] = {}, of_codes[256][4] = {};
    constexpr Positions() {
        for (int byte = 0; byte < 256; ++byte) {
            for (int column = 0; column < 8; ++column)
                if (byte >> column & 1) of_mask[byte][count[byte]++] = static_cast<uint8_t>(column);
            for (int kept = 0; kept < 4; ++kept)
                of_codes[byte][kept] = static_cast<uint8_t>(4 * (kept / 2) + (byte >> 2 * kept & 3));
        }
    }
};
static constexpr Positions positions;

#if defined(__AVX2__)
constexpr int kPairs = 2;  // rows, at least, that share the reading of one token's activations
#else
constexpr int kPairs = 1;
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)

static inline __m256 widen(const float* values) { return _mm256_loadu_ps(values); }

static inline __m256 widen(const bfloat16* values) {
    __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Where the activations of a row lie for `dot24`: of sixteen, groups 0 and 2, then groups 1 and 3.
static inline int64_t place24(int64_t column) {
    int64_t group = column >> 2 & 3;
    return (column & ~15) | (group >> 1) << 2 | (group & 1) << 3 | (column & 3);
}

// The products of kRows rows, one after another in memory. vpermilps picks, in each 128-bit half, four of four floats by
// the lowest two bits of each 32-bit lane; eight indices of two bits are one word of metadata, so a shift by 0, 2, .. 14
// is all the decoding. A half holds one group, of which two results are wanted: those of groups 0 and 2 and those of
// groups 1 and 3 are blended. Seven vector instructions for sixteen weights, where expanding the values takes fourteen.
// Rows go together because the activations of a wide layer do not fit the L1 cache: one row at a time, reading them from
// L2 took longer than reading the values from memory.
template <int kRows, class Value>
void dot24(const Value* values, const uint16_t* metadata, const float* inputs, int64_t columns, float* totals) {
    const __m256i shifts[2] = {_mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14),
                               _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30)};
    constexpr int kSums = kRows == 1 ? 4 : 2;
    __m256 sums[kRows][kSums];
    for (auto& of_row : sums)
        for (auto& sum : of_row) sum = _mm256_setzero_ps();
    int64_t stride = columns / 2, column = 0;
    auto step = [&](__m256 left, __m256 right, __m256i codes, const Value* from, __m256& sum) {
        __m256 first = _mm256_permutevar_ps(left, codes), second = _mm256_permutevar_ps(right, codes);
        sum = _mm256_fmadd_ps(widen(from), _mm256_blend_ps(first, second, 0xcc), sum);
    };
    for (; column + 16 * kSums <= columns; column += 16 * kSums) {
        for (int row = 0; row < kRows; ++row) prefetch(values + row * stride + column / 2, 8 * kSums);
#pragma GCC unroll 4
        for (int part = 0; part < kSums; ++part) {
            const float* x = inputs + column + 16 * part;
            __m256 left = _mm256_load_ps(x), right = _mm256_load_ps(x + 8);
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
                int32_t words;  // two, which one broadcast from memory serves
                std::memcpy(&words, metadata + (row * columns + column) / 16 + (part & 2), sizeof words);
                __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(words), shifts[part & 1]);
                step(left, right, codes, values + row * stride + column / 2 + 8 * part, sums[row][part]);
            }
        }
    }
    for (; column < columns; column += 16)
        for (int row = 0; row < kRows; ++row) {
            __m256i codes = _mm256_set1_epi32(metadata[(row * columns + column) / 16]);
            step(_mm256_load_ps(inputs + column), _mm256_load_ps(inputs + column + 8),
                 _mm256_srlv_epi32(codes, shifts[0]), values + row * stride + column / 2, sums[row][0]);
        }
    for (int row = 0; row < kRows; ++row) {
        __m256 sum = _mm256_add_ps(sums[row][0], sums[row][1]);
        if (kSums == 4) sum = _mm256_add_ps(sum, _mm256_add_ps(sums[row][kSums - 2], sums[row][kSums - 1]));
        totals[row] = total_of(sum);
    }
}

#elif !defined(__AVX2__)

static inline int64_t place24(int64_t column) { return column; }

// Scalar: without shuffles by variable indices, a load of the activation that a value meets is the cheapest expansion.
template <int kRows, class Value>
void dot24(const Value* values, const uint16_t* metadata, const float* inputs, int64_t columns, float* total) {
    static_assert(kRows == 1);
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(metadata);
    float sums[4] = {};
    for (int64_t column = 0; column < columns; column += 8, values += 4) {
        const uint8_t* at = positions.of_codes[*codes++];
        for (int kept = 0; kept < 4; ++kept) sums[kept] += to_float(values[kept]) * inputs[column + at[kept]];
    }
    *total = sums[0] + sums[1] + sums[2] + sums[3];
}

#endif

}  // namespace thanos::THANOS_ISA
