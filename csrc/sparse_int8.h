// Vectors of int8 weights, expanded from packed values, and their products with int8 activations: sums of whole numbers
// over 32 columns, which share an activation scale, then float32. `multiply_add` takes kWidth columns.
#pragma once

#include "sparse_rows.h"

namespace thanos::THANOS_ISA {

constexpr int kShared = 32;    // columns of a token that share a scale
constexpr int kGroup = 128;    // columns of a row that share a scale: 64 kept weights of 2:4

static inline float half_to_float(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest < 0x400) {  // 2^-24 each
        float small = static_cast<float>(rest) * 5.9604644775390625e-8f;
        return sign ? -small : small;
    }
    uint32_t bits = sign | (rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : (rest << 13) + (112u << 23));
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
#endif
}

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI2__)

// Sixty-four at once. vpdpbusd takes unsigned activations: they are stored plus 128, and the same instruction with 128
// everywhere gives what that adds.
struct Int8Lanes {
    static constexpr int kWidth = 64, kScales = 16;  // scales stored for kWidth columns, as they meet the sums
    static constexpr int kBias = 128;
    using Vector = __m512i;
    using Sum = __m512;

    static Vector expand_bits(uint64_t mask, const int8_t*& next) {
        Vector result = _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(next));
        next += __builtin_popcountll(mask);
        return result;
    }
    static Vector expand_codes(const uint8_t* codes, const int8_t*& next) {  // eight bytes of codes
        uint64_t masks[2], both[2] = {};
        std::memcpy(both, codes, 8);
        masks_of_24(both, masks);
        __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(next));
        next += 32;
        return _mm512_maskz_expand_epi8(masks[0], _mm512_castsi256_si512(packed));
    }
    static void store(int8_t* out, Vector weights) { _mm512_storeu_si512(out, weights); }
    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum multiply_add(Sum sum, Vector weights, const uint8_t* inputs, const float* scales) {
        __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_load_si512(inputs), weights);
        __m512i added = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(-128), weights);
        __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(products, added));
        return _mm512_fmadd_ps(whole, _mm512_load_ps(scales), sum);
    }
    static Sum scale_add(Sum sum, Sum part, float scale) { return _mm512_fmadd_ps(part, _mm512_set1_ps(scale), sum); }
    static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

#elif defined(__AVX2__)

// For each mask of eight, or for the codes of two groups: which packed byte each lane takes, 0x80 (zero) for none.
struct ByteTables {
    uint64_t of_mask[256], of_codes[256];
    ByteTables() {
        for (int byte = 0; byte < 256; ++byte) {
            uint8_t lanes[8];
            for (int lane = 0, next = 0; lane < 8; ++lane) lanes[lane] = byte >> lane & 1 ? next++ : 0x80;
            std::memcpy(&of_mask[byte], lanes, 8);
            std::memset(lanes, 0x80, 8);
            for (int kept = 0; kept < 4; ++kept) lanes[positions.of_codes[byte][kept]] = kept;
            std::memcpy(&of_codes[byte], lanes, 8);
        }
    }
};
static const ByteTables byte_tables;

// Thirty-two: vpmaddubsw takes one unsigned factor, so the sign of the weight moves to the activation.
struct Int8Lanes {
    static constexpr int kWidth = 32, kScales = 1;
    static constexpr int kBias = 0;
    using Vector = __m256i;
    using Sum = __m256;

    static Vector expand_bits(uint64_t mask, const int8_t*& next) {
        int64_t packed[4], order[4];
        for (int i = 0; i < 4; ++i) {
            unsigned part = mask >> 8 * i & 255;
            std::memcpy(&packed[i], next, 8);
            order[i] = byte_tables.of_mask[part];
            next += __builtin_popcount(part);
        }
        const __m256i second = _mm256_setr_epi64x(0, 0x0808080808080808, 0, 0x0808080808080808);
        __m256i at = _mm256_or_si256(_mm256_setr_epi64x(order[0], order[1], order[2], order[3]), second);
        return _mm256_shuffle_epi8(_mm256_setr_epi64x(packed[0], packed[1], packed[2], packed[3]), at);
    }
    static Vector expand_codes(const uint8_t* codes, const int8_t*& next) {  // four bytes of codes
        const uint64_t* table = byte_tables.of_codes;
        __m256i order = _mm256_setr_epi64x(table[codes[0]], table[codes[1]], table[codes[2]], table[codes[3]]);
        const __m256i first = _mm256_setr_epi64x(0, 0x0404040404040404, 0x0808080808080808, 0x0c0c0c0c0c0c0c0c);
        __m256i packed = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(next)));
        next += 16;
        return _mm256_shuffle_epi8(packed, _mm256_add_epi8(order, first));
    }
    static void store(int8_t* out, Vector weights) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), weights); }
    static Sum zero() { return _mm256_setzero_ps(); }
    static Sum multiply_add(Sum sum, Vector weights, const uint8_t* inputs, const float* scales) {
        __m256i activations = _mm256_load_si256(reinterpret_cast<const __m256i*>(inputs));
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(activations, weights));
        __m256 whole = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        return _mm256_fmadd_ps(whole, _mm256_broadcast_ss(scales), sum);
    }
    static Sum scale_add(Sum sum, Sum part, float scale) { return _mm256_fmadd_ps(part, _mm256_set1_ps(scale), sum); }
    static float total(Sum sum) { return total_of(sum); }
};

#else

struct Int8Lanes {
    static constexpr int kWidth = 32, kScales = 1;
    static constexpr int kBias = 0;
    struct Vector {
        int8_t lane[kWidth];
    };
    using Sum = float;

    static Vector expand_bits(uint64_t mask, const int8_t*& next) {
        Vector result = {};
        for (uint32_t left = static_cast<uint32_t>(mask); left; left &= left - 1)
            result.lane[__builtin_ctz(left)] = *next++;
        return result;
    }
    static Vector expand_codes(const uint8_t* codes, const int8_t*& next) {
        Vector result = {};
        for (int i = 0; i < 4; ++i, next += 4)
            for (int kept = 0; kept < 4; ++kept) result.lane[8 * i + positions.of_codes[codes[i]][kept]] = next[kept];
        return result;
    }
    static void store(int8_t* out, const Vector& weights) { std::memcpy(out, weights.lane, kWidth); }
    static Sum zero() { return 0; }
    static Sum multiply_add(Sum sum, const Vector& weights, const uint8_t* inputs, const float* scales) {
        int32_t whole = 0;
        for (int i = 0; i < kWidth; ++i) whole += static_cast<int8_t>(inputs[i]) * weights.lane[i];
        return sum + static_cast<float>(whole) * *scales;
    }
    static Sum scale_add(Sum sum, Sum part, float scale) { return sum + part * scale; }
    static float total(Sum sum) { return sum; }
};

#endif

}  // namespace thanos::THANOS_ISA
