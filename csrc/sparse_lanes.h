// Vectors for products with compressed weights: `Lanes<Value>` expands the next kWidth weights from packed values and
// a mask of kept positions, and accumulates their products with as many activations (64-byte aligned), which lie in
// their row where `place` says. One definition per instruction set; weights pass through unchanged, bit for bit.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace thanos::THANOS_ISA {

// Asks for the values that come kAhead bytes after these: a processor's own prefetching ends with a page of 4 KB.
template <class Value>
static inline void prefetch(const Value* values, int count) {
    constexpr int kAhead = 2048, kLine = 64;
    auto bytes = reinterpret_cast<const char*>(values) + kAhead;
    for (int at = 0; at < count * static_cast<int>(sizeof(Value)); at += kLine) __builtin_prefetch(bytes + at);
}

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

#if defined(__AVX2__)

static inline float total_of(__m256 sum) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#endif

#if defined(__AVX512F__)

// Sixteen float32 lanes; bfloat16 values are widened first.
template <class Value>
struct Lanes {
    static constexpr int kWidth = 16;
    using Activation = float;
    using Vector = __m512;
    using Sum = __m512;

    static int64_t place(int64_t column) { return column; }
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
    static Vector expand_from(uint64_t mask, const Value* values) { return expand(mask, load(values)); }
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

    static int64_t place(int64_t column) { return column; }
    static Vector load(const bfloat16* values) { return _mm512_loadu_si512(values); }
    static Vector load_first(const bfloat16* values, int count) {
        return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), values);
    }
    static Vector expand(uint64_t mask, Vector values) {
        return _mm512_maskz_expand_epi16(static_cast<__mmask32>(mask), values);
    }
    static Vector expand_from(uint64_t mask, const bfloat16* values) { return expand(mask, load(values)); }
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

// For each mask of eight: the packed value each lane takes (its sign bit set where the lane is kept), and the bytes
// that a shuffle of eight 16-bit values takes (0x80, which gives zero, where the lane is not kept).
struct ExpandTables {
    alignas(32) int32_t order[256][8];
    alignas(16) uint8_t bytes[256][16];
    ExpandTables() {
        for (int mask = 0; mask < 256; ++mask)
            for (int lane = 0, next = 0; lane < 8; ++lane) {
                bool kept = mask >> lane & 1;
                order[mask][lane] = kept ? next | INT32_MIN : 0;
                bytes[mask][2 * lane] = kept ? static_cast<uint8_t>(2 * next) : 0x80;
                bytes[mask][2 * lane + 1] = kept ? static_cast<uint8_t>(2 * next + 1) : 0x80;
                next += kept;
            }
    }
};
static const ExpandTables expand_tables;

// Eight float32 lanes: a permutation looked up by the mask (vpermps reads three bits of each entry), and the entry's
// sign spread over the lane to clear what is not kept: three instructions where comparing bits of the mask took six.
template <class Value>
struct Lanes {
    static constexpr int kWidth = 8;
    using Activation = float;
    using Vector = __m256;
    using Sum = __m256;

    static int64_t place(int64_t column) { return column; }
    static Vector load(const float* values) { return _mm256_loadu_ps(values); }
    static Vector load_first(const float* values, int count) {
        float copy[8] = {};
        std::memcpy(copy, values, count * sizeof(float));
        return load(copy);
    }
    static Vector expand(uint64_t mask, Vector values) {
        __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(expand_tables.order[mask & 255]));
        __m256 kept = _mm256_castsi256_ps(_mm256_srai_epi32(order, 31));
        return _mm256_and_ps(_mm256_permutevar8x32_ps(values, order), kept);
    }
    static Vector expand_from(uint64_t mask, const float* values) { return expand(mask, load(values)); }
    static void store(float* out, Vector weights) { _mm256_storeu_ps(out, weights); }
    static Sum zero() { return _mm256_setzero_ps(); }
    static Sum multiply_add(Sum sum, Vector weights, const float* activations) {
        return _mm256_fmadd_ps(weights, _mm256_load_ps(activations), sum);
    }
    static float total(Sum sum) { return total_of(sum); }

    static __m256 load_activations(const float* activations) { return _mm256_load_ps(activations); }
    static Sum multiply_add(Sum sum, Vector weights, __m256 activations) {
        return _mm256_fmadd_ps(weights, activations, sum);
    }
    static Vector expand_next(uint64_t& mask, const float*& values) {  // and moves both on
        unsigned low = mask & 255;
        Vector result = expand_from(low, values);
        mask >>= 8;
        values += __builtin_popcount(low);
        return result;
    }
};

// Sixteen bfloat16 lanes, expanded as 16-bit words by one byte shuffle for eight. Two of them in a 32-bit lane become
// float32 by a shift (the even one) and a mask (the odd one), cheaper than widening; the activations lie accordingly.
template <>
struct Lanes<bfloat16> {
    static constexpr int kWidth = 16;
    using Activation = float;
    using Vector = __m256i;
    using Sum = __m256;

    static int64_t place(int64_t column) { return (column & ~15) | (column & 1) << 3 | (column & 14) >> 1; }
    static Vector load(const bfloat16* values) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)); }
    static Vector load_first(const bfloat16* values, int count) {
        bfloat16 copy[16] = {};
        std::memcpy(copy, values, count * sizeof(bfloat16));
        return load(copy);
    }
    static Vector expand(uint64_t mask, Vector values) {
        alignas(32) bfloat16 copy[24] = {};
        _mm256_store_si256(reinterpret_cast<__m256i*>(copy), values);
        return expand_from(mask, copy);
    }
    static Vector expand_from(uint64_t mask, const bfloat16* values) {
        unsigned low = mask & 255, high = mask >> 8 & 255;
        return _mm256_inserti128_si256(_mm256_castsi128_si256(expand_eight(low, values)),
                                       expand_eight(high, values + __builtin_popcount(low)), 1);
    }
    static void store(bfloat16* out, Vector weights) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), weights); }
    static Sum zero() { return _mm256_setzero_ps(); }
    static Sum multiply_add(Sum sum, Vector weights, const float* activations) {
        __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(weights, 16));
        __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(weights, _mm256_set1_epi32(-65536)));
        sum = _mm256_fmadd_ps(even, _mm256_load_ps(activations), sum);
        return _mm256_fmadd_ps(odd, _mm256_load_ps(activations + 8), sum);
    }
    static float total(Sum sum) { return total_of(sum); }

    struct Activations {
        __m256 even, odd;
    };
    static Activations load_activations(const float* activations) {
        return {_mm256_load_ps(activations), _mm256_load_ps(activations + 8)};
    }
    static Sum multiply_add(Sum sum, Vector weights, const Activations& activations) {
        __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(weights, 16));
        __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(weights, _mm256_set1_epi32(-65536)));
        return _mm256_fmadd_ps(odd, activations.odd, _mm256_fmadd_ps(even, activations.even, sum));
    }
    static Vector expand_next(uint64_t& mask, const bfloat16*& values) {  // and moves both on
        unsigned low = mask & 255, high = mask >> 8 & 255;
        const bfloat16* middle = values + __builtin_popcount(low);
        auto at = [](const void* address) { return reinterpret_cast<const __m128i*>(address); };
        __m256i packed = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(at(values))),
                                                 _mm_loadu_si128(at(middle)), 1);
        __m256i order = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_load_si128(at(expand_tables.bytes[low]))),
                                                _mm_load_si128(at(expand_tables.bytes[high])), 1);
        values = middle + __builtin_popcount(high);
        mask >>= 16;
        return _mm256_shuffle_epi8(packed, order);
    }

private:
    static __m128i expand_eight(unsigned mask, const bfloat16* values) {
        __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(expand_tables.bytes[mask]));
        return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), order);
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

    static int64_t place(int64_t column) { return column; }
    static Vector load(const Value* values) { return load_first(values, kWidth); }
    static Vector load_first(const Value* values, int count) {
        Vector result = {};
        for (int i = 0; i < count; ++i) result.lane[i] = to_float(values[i]);
        return result;
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
