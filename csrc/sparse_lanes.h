// Vectors for products with compressed weights: `Lanes<Value>` expands the next kWidth weights from packed values and
// a mask of kept positions, and accumulates their products with as many activations (64-byte aligned). One definition
// per instruction set; weights pass through unchanged, bit for bit.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace thanos::THANOS_ISA {

struct bfloat16 {
    uint16_t bits;
};

static inline float to_float(float value) { return value; }

static inline float to_float(bfloat16 value) {
    uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

static inline void from_float(float value, float* out) { *out = value; }

static inline void from_float(float value, bfloat16* out) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    out->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__AVX512F__)

// Sixteen float32 lanes; bfloat16 values are widened first.
template <class Value>
struct Lanes {
    static constexpr int kWidth = 16;
    using Activation = float;
    using Vector = __m512;
    using Sum = __m512;

    static __m512 load(const float* values) { return _mm512_loadu_ps(values); }
    static __m512 load(const bfloat16* values) {
        __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static __m512 load_first(const float* values, int count) {
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), values);
    }
    static __m512 load_first(const bfloat16* values, int count) {
        __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), values);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static Vector expand(uint64_t mask, Vector values) {
        return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), values);
    }
    static void store(float* out, Vector weights) { _mm512_storeu_ps(out, weights); }
    static void store(bfloat16* out, Vector weights) {
        __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(weights), 16);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(bits));
    }
    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum multiply_add(Sum sum, Vector weights, const float* activations) {
        return _mm512_fmadd_ps(weights, _mm512_load_ps(activations), sum);
    }
    static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)

// Thirty-two bfloat16 lanes and the bfloat16 dot product, which sums pairs in float32.
template <>
struct Lanes<bfloat16> {
    static constexpr int kWidth = 32;
    using Activation = bfloat16;
    using Vector = __m512i;
    using Sum = __m512;

    static Vector load(const bfloat16* values) { return _mm512_loadu_si512(values); }
    static Vector load_first(const bfloat16* values, int count) {
        return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), values);
    }
    static Vector expand(uint64_t mask, Vector values) {
        return _mm512_maskz_expand_epi16(static_cast<__mmask32>(mask), values);
    }
    static void store(bfloat16* out, Vector weights) { _mm512_storeu_si512(out, weights); }
    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum multiply_add(Sum sum, Vector weights, const bfloat16* activations) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights),
                                reinterpret_cast<__m512bh>(_mm512_load_si512(activations)));
    }
    static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

#endif

#elif defined(__AVX2__)

// expand_order[mask]: for each of eight lanes, which packed value it takes.
struct ExpandTable {
    alignas(32) int32_t order[256][8];
    ExpandTable() {
        for (int mask = 0; mask < 256; ++mask)
            for (int lane = 0, next = 0; lane < 8; ++lane) order[mask][lane] = mask >> lane & 1 ? next++ : 0;
    }
};
static const ExpandTable expand_table;

// Eight float32 lanes; expansion is a permutation looked up by the mask.
template <class Value>
struct Lanes {
    static constexpr int kWidth = 8;
    using Activation = float;
    using Vector = __m256;
    using Sum = __m256;

    static __m256 load(const float* values) { return _mm256_loadu_ps(values); }
    static __m256 load(const bfloat16* values) {
        __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static __m256 load_first(const Value* values, int count) {
        Value copy[8] = {};
        std::memcpy(copy, values, count * sizeof(Value));
        return load(copy);
    }
    static Vector expand(uint64_t mask, Vector values) {
        const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        int byte = static_cast<int>(mask & 255);
        __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(expand_table.order[byte]));
        __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(byte), bit), bit);
        return _mm256_and_ps(_mm256_permutevar8x32_ps(values, order), _mm256_castsi256_ps(kept));
    }
    static void store(float* out, Vector weights) { _mm256_storeu_ps(out, weights); }
    static void store(bfloat16* out, Vector weights) {
        __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(weights), 16);
        __m128i low = _mm256_castsi256_si128(bits), high = _mm256_extracti128_si256(bits, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packus_epi32(low, high));
    }
    static Sum zero() { return _mm256_setzero_ps(); }
    static Sum multiply_add(Sum sum, Vector weights, const float* activations) {
        return _mm256_fmadd_ps(weights, _mm256_load_ps(activations), sum);
    }
    static float total(Sum sum) {
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
};

#else

// Plain loops, which compilers for other processors turn into what vectors they have.
template <class Value>
struct Lanes {
    static constexpr int kWidth = 32;
    using Activation = float;
    struct Vector {
        float lane[kWidth];
    };
    using Sum = Vector;

    static Vector load(const Value* values) { return load_first(values, kWidth); }
    static Vector load_first(const Value* values, int count) {
        Vector result = {};
        for (int i = 0; i < count; ++i) result.lane[i] = to_float(values[i]);
        return result;
    }
    static Vector expand(uint64_t mask, const Vector& values) {
        Vector result;
        for (int i = 0, next = 0; i < kWidth; ++i) {
            bool kept = mask >> i & 1;
            result.lane[i] = kept ? values.lane[next] : 0.0f;
            next += kept;
        }
        return result;
    }
    static void store(float* out, const Vector& weights) { std::memcpy(out, weights.lane, sizeof weights.lane); }
    static void store(bfloat16* out, const Vector& weights) {
        for (int i = 0; i < kWidth; ++i) {
            uint32_t bits;
            std::memcpy(&bits, &weights.lane[i], sizeof bits);
            out[i].bits = static_cast<uint16_t>(bits >> 16);
        }
    }
    static Sum zero() { return {}; }
    static Sum multiply_add(Sum sum, const Vector& weights, const float* activations) {
        for (int i = 0; i < kWidth; ++i) sum.lane[i] += weights.lane[i] * activations[i];
        return sum;
    }
    static float total(const Sum& sum) {
        float result = 0;
        for (float lane : sum.lane) result += lane;
        return result;
    }
};

#endif

}  // namespace thanos::THANOS_ISA
