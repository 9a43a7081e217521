// A group of kGroup columns of int8 weights and its product with int8 activations, in whole numbers: `expand` puts the
// kept values of a mask in their columns, `pick` says which activations 2:4 values meet. `multiply` leaves a sum in each
// lane, whose columns share an activation scale; `scale_add` makes a float32 of it.
#pragma once

#include "sparse_rows.h"

namespace thanos::THANOS_ISA {

constexpr int kGroup = 128;  // columns of a row that share a scale: 64 kept weights of 2:4

// Columns of a token that share a scale: kGroup / 4 of a group, not side by side but those that meet in the same lanes,
// however many columns a vector holds and whether weights are expanded or activations picked.
static inline int share_of(int64_t column) { return static_cast<int>(column % 32 / 8); }

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

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512VBMI2__)

// vpdpbusd takes one unsigned factor. Expanded weights become unsigned by 128, and what that adds, 128 times the sum of
// a lane's activations, is the same for every row: sums start from its negative, `offsets`. Which activations are picked
// depends on the row; they are stored plus 128, and a second product says what that adds. Some sixteen instructions for
// 82 bytes of weights, where expanding 2:4 codes, two products for each half and a sum for each took thirty.
struct Int8Lanes {
    static constexpr int kLanes = 16, kBias = 128;
    using Whole = __m512i;
    using Sum = __m512;
    struct Expanded {
        __m512i low, high;
    };
    struct Picked {
        __m512i values, places;
    };

    static int place(int column, bool) { return column; }
    static int column_of(int lane, bool picked) { return lane * (picked ? 8 : 4); }
    static Expanded expand(const uint64_t* masks, const int8_t*& next) {
        __m512i low = _mm512_maskz_expand_epi8(masks[0], _mm512_loadu_si512(next));
        next += __builtin_popcountll(masks[0]);
        __m512i high = _mm512_maskz_expand_epi8(masks[1], _mm512_loadu_si512(next));
        next += __builtin_popcountll(masks[1]);
        return {low, high};
    }
    static Expanded expand_codes(const uint8_t* codes, const int8_t* values) {
        uint64_t masks[2];
        masks_of_24(codes, masks);
        auto half = [&](int i) {
            __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 32 * i));
            return _mm512_maskz_expand_epi8(masks[i], _mm512_castsi256_si512(packed));
        };
        return {half(0), half(1)};
    }
    // Byte i of the places is 4 * (i / 2) + code i: eight codes of two bits are shifted into eight bytes.
    static Picked pick(const uint8_t* codes, const int8_t* values) {
        const __m512i shifts = _mm512_set1_epi64(0x0e0c0a0806040200);
        const __m512i first =
            _mm512_set_epi64(0x7c7c787874747070, 0x6c6c686864646060, 0x5c5c585854545050, 0x4c4c484844444040,
                             0x3c3c383834343030, 0x2c2c282824242020, 0x1c1c181814141010, 0x0c0c080804040000);
        __m512i words = _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        __m512i bits = _mm512_multishift_epi64_epi8(shifts, words);
        // 0xea: a & b | c
        return {_mm512_loadu_si512(values), _mm512_ternarylogic_epi64(bits, _mm512_set1_epi8(3), first, 0xea)};
    }
    static void store(int8_t* out, const Expanded& weights) {
        _mm512_storeu_si512(out, weights.low);
        _mm512_storeu_si512(out + 64, weights.high);
    }
    static Whole multiply(const Expanded& weights, const int8_t* inputs, const int32_t* offsets) {
        const __m512i sign = _mm512_set1_epi8(-128);
        __m512i sum = _mm512_load_si512(offsets);
        sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(weights.low, sign), _mm512_load_si512(inputs));
        return _mm512_dpbusd_epi32(sum, _mm512_xor_si512(weights.high, sign), _mm512_load_si512(inputs + 64));
    }
    static Whole multiply(const Picked& weights, const int8_t* inputs, const int32_t*) {
        const __m512i zero = _mm512_setzero_si512();
        __m512i low = _mm512_load_si512(inputs), high = _mm512_load_si512(inputs + 64);
        __m512i picked = _mm512_permutex2var_epi8(low, weights.places, high);
        __m512i added = _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(-128), weights.values);
        return _mm512_sub_epi32(_mm512_dpbusd_epi32(zero, picked, weights.values), added);
    }
    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum scale_add(Sum sum, Whole whole, const float* scales, uint16_t scale) {
        __m512 both = _mm512_mul_ps(_mm512_load_ps(scales), _mm512_cvtph_ps(_mm256_set1_epi16(scale)));
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), both, sum);
    }
    static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

#elif defined(__AVX2__)

// For each mask of eight: which packed byte each lane takes of the lower or the upper eight, 0x80 (zero) for none.
struct ByteTables {
    uint64_t lower[256], upper[256];
    ByteTables() {
        for (int mask = 0; mask < 256; ++mask) {
            uint8_t lanes[8];
            for (int lane = 0, next = 0; lane < 8; ++lane) lanes[lane] = mask >> lane & 1 ? next++ : 0x80;
            std::memcpy(&lower[mask], lanes, 8);
            upper[mask] = lower[mask] | 0x0808080808080808;
        }
    }
};
static const ByteTables byte_tables;

// vpmaddubsw takes one unsigned factor, so the sign of the weight moves to the activation.
struct Int8Lanes {
    static constexpr int kLanes = 8, kBias = 0;
    using Whole = __m256i;
    using Sum = __m256;
    struct Expanded {
        __m256i part[4];
    };
    struct Picked {
        __m256i values[2], places[2];
    };

    // Where `pick` wants an activation: the first sixteen of each 32 columns in one vector, the others in the next.
    static int place(int column, bool picked) {
        return picked ? (column & ~48) | (column & 16) << 1 | (column & 32) >> 1 : column;
    }
    static int column_of(int lane, bool picked) { return lane * (picked ? 8 : 4); }

    static Expanded expand(const uint64_t* masks, const int8_t*& next) {
        Expanded result;
        for (int i = 0; i < 4; ++i) {
            const uint8_t* bytes = reinterpret_cast<const uint8_t*>(masks) + 4 * i;
            uint32_t mask;
            std::memcpy(&mask, bytes, 4);
            const int8_t* second = next + __builtin_popcount(bytes[0]);
            const int8_t* third = next + __builtin_popcount(mask & 0xffff);
            const int8_t* fourth = next + __builtin_popcount(mask & 0xffffff);
            __m256i packed = two(pair(next, second), pair(third, fourth));
            next += __builtin_popcount(mask);
            const auto &lower = byte_tables.lower, &upper = byte_tables.upper;
            __m256i order = two(pair(lower + bytes[0], upper + bytes[1]), pair(lower + bytes[2], upper + bytes[3]));
            result.part[i] = _mm256_shuffle_epi8(packed, order);
        }
        return result;
    }
    static Expanded expand_codes(const uint8_t* codes, const int8_t* values) {
        uint64_t masks[2];
        masks_of_24(codes, masks);
        int8_t copy[kGroup / 2 + 8];  // what is read past the values
        std::memcpy(copy, values, kGroup / 2);
        const int8_t* next = copy;
        return expand(masks, next);
    }
    // A byte holds four codes of two bits: shifted by 0, 6, 12 and 18 they stand in four bytes. Eight bytes of a result
    // choose among sixteen activations, the next eight among the next sixteen.
    static Picked pick(const uint8_t* codes, const int8_t* values) {
        const __m256i first = _mm256_set1_epi64x(0x0c0c080804040000);
        Picked result;
        for (int i = 0; i < 2; ++i) {
            __m256i bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * i)));
            bits = _mm256_or_si256(bits, _mm256_slli_epi32(bits, 12));
            bits = _mm256_or_si256(bits, _mm256_slli_epi32(bits, 6));
            // first: pairs of bytes 0, 4, 8, 12, for the lower and for the upper eight
            result.places[i] = _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi8(3)), first);
            result.values[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 32 * i));
        }
        return result;
    }
    static void store(int8_t* out, const Expanded& weights) {
        for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * i), weights.part[i]);
    }
    static Whole multiply(const Expanded& weights, const int8_t* inputs, const int32_t*) {
        __m256i part[4];
        for (int i = 0; i < 4; ++i) part[i] = product(weights.part[i], load(inputs + 32 * i));
        return _mm256_add_epi32(_mm256_add_epi32(part[0], part[1]), _mm256_add_epi32(part[2], part[3]));
    }
    static Whole multiply(const Picked& weights, const int8_t* inputs, const int32_t*) {
        __m256i part[2];
        for (int i = 0; i < 2; ++i) {
            __m256i lower = _mm256_shuffle_epi8(load(inputs + 64 * i), weights.places[i]);
            __m256i upper = _mm256_shuffle_epi8(load(inputs + 64 * i + 32), weights.places[i]);
            part[i] = product(weights.values[i], _mm256_blend_epi32(lower, upper, 0xcc));
        }
        return _mm256_add_epi32(part[0], part[1]);
    }
    static Sum zero() { return _mm256_setzero_ps(); }
    static Sum scale_add(Sum sum, Whole whole, const float* scales, uint16_t scale) {
        __m256 both = _mm256_mul_ps(_mm256_load_ps(scales), _mm256_cvtph_ps(_mm_set1_epi16(scale)));
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), both, sum);
    }
    static float total(Sum sum) { return total_of(sum); }

private:
    static __m256i load(const int8_t* inputs) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(inputs)); }
    static __m128i pair(const void* first, const void* second) {  // eight bytes each
        __m128 low = _mm_castsi128_ps(_mm_loadl_epi64(static_cast<const __m128i*>(first)));
        return _mm_castps_si128(_mm_loadh_pi(low, static_cast<const __m64*>(second)));
    }
    static __m256i two(__m128i low, __m128i high) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    static __m256i product(__m256i weights, __m256i inputs) {
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(inputs, weights));
        return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
};

#else

struct Int8Lanes {
    static constexpr int kLanes = 4, kBias = 0;
    struct Whole {
        int32_t lane[kLanes];
    };
    using Sum = float;
    struct Expanded {
        int8_t column[kGroup];
    };

    static int place(int column, bool) { return column; }
    static int column_of(int lane, bool) { return 8 * lane; }
    static Expanded expand(const uint64_t* masks, const int8_t*& next) {
        Expanded result = {};
        for (int word = 0; word < 2; ++word)
            for (uint64_t left = masks[word]; left; left &= left - 1)
                result.column[64 * word + __builtin_ctzll(left)] = *next++;
        return result;
    }
    static Expanded expand_codes(const uint8_t* codes, const int8_t* values) {
        Expanded result = {};
        for (int i = 0; i < kGroup / 8; ++i, values += 4)
            for (int kept = 0; kept < 4; ++kept)
                result.column[8 * i + positions.of_codes[codes[i]][kept]] = values[kept];
        return result;
    }
    static Expanded pick(const uint8_t* codes, const int8_t* values) { return expand_codes(codes, values); }
    static void store(int8_t* out, const Expanded& weights) { std::memcpy(out, weights.column, kGroup); }
    static Whole multiply(const Expanded& weights, const int8_t* inputs, const int32_t*) {
        Whole whole = {};
        for (int column = 0; column < kGroup; ++column)
            whole.lane[share_of(column)] += inputs[column] * weights.column[column];
        return whole;
    }
    static Sum zero() { return 0; }
    static Sum scale_add(Sum sum, const Whole& whole, const float* scales, uint16_t scale) {
        float factor = half_to_float(scale);
        for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<float>(whole.lane[lane]) * (scales[lane] * factor);
        return sum;
    }
    static float total(Sum sum) { return sum; }
};

#endif

}  // namespace thanos::THANOS_ISA
