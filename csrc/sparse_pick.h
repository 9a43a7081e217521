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

// The product of one row. vpermilps picks, in each 128-bit half, four of four floats by the lowest two bits of each
// 32-bit lane; eight indices of two bits are one word of metadata, so a shift by 0, 2, .. 14 is all the decoding. A half
// holds one group, of which two results are wanted: those of groups 0 and 2 and those of groups 1 and 3 are blended.
// Seven vector instructions for sixteen weights of float32 and nine for bfloat16, where expanding the values takes
// about fourteen: two cores then read the values as fast as memory gives them.
template <class Value>
float dot24(const Value* values, const uint16_t* metadata, const float* inputs, int64_t columns) {
    const __m256i shifts[2] = {_mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14),
                               _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30)};
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    auto step = [&](__m256i codes, int64_t column, __m256& sum) {
        __m256 first = _mm256_permutevar_ps(_mm256_load_ps(inputs + column), codes);
        __m256 second = _mm256_permutevar_ps(_mm256_load_ps(inputs + column + 8), codes);
        sum = _mm256_fmadd_ps(widen(values + column / 2), _mm256_blend_ps(first, second, 0xcc), sum);
    };
    int64_t column = 0;
    for (; column + 64 <= columns; column += 64) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
            int32_t words;  // two, which one broadcast from memory serves
            std::memcpy(&words, metadata + column / 16 + (part & 2), sizeof words);
            step(_mm256_srlv_epi32(_mm256_set1_epi32(words), shifts[part & 1]), column + 16 * part, sums[part]);
        }
    }
    for (; column < columns; column += 16)
        step(_mm256_srlv_epi32(_mm256_set1_epi32(metadata[column / 16]), shifts[0]), column, sums[0]);
    return total_of(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}

#elif !defined(__AVX2__)

static inline int64_t place24(int64_t column) { return column; }

// Scalar: without shuffles by variable indices, a load of the activation that a value meets is the cheapest expansion.
template <class Value>
float dot24(const Value* values, const uint16_t* metadata, const float* inputs, int64_t columns) {
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(metadata);
    float sums[4] = {};
    for (int64_t column = 0; column < columns; column += 8, values += 4) {
        const uint8_t* at = positions.of_codes[*codes++];
        for (int kept = 0; kept < 4; ++kept) sums[kept] += to_float(values[kept]) * inputs[column + at[kept]];
    }
    return sums[0] + sums[1] + sums[2] + sums[3];
}

#endif

}  // namespace thanos::THANOS_ISA
