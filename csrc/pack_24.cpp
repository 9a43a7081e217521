// 2:4 packing on the CPU: loops around the inner functions of pack_24.h, and their twin for AVX-512.
#include "pack_24.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#if defined(__AVX512VBMI2__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "pages.h"
#include "parallel.h"

namespace thanos::THANOS_ISA {
namespace {

using namespace pack_24_detail;

constexpr int64_t kBand = 32;                // rows that share cache lines of reordered metadata
constexpr int64_t kPassWeights = 1024;       // of a row before the next row of its band
constexpr int64_t kGrainBytes = 256 << 10;   // of weights that a thread takes at a time

// Runs segment(row, begin, end) -> first bad group of the matrix or -1 over all words, in an order that suits `layout`;
// *offender becomes the first of them, or -1.
template <class Kind, class Segment>
void each_segment(int layout, int64_t rows, int64_t words, int64_t* offender, int threads, Segment&& segment) {
    const int64_t none = rows * words * Shape<Kind>::kGroups;
    const int64_t band = layout == kRowMajor ? 1 : kBand;
    const int64_t row_bytes = words * Shape<Kind>::kWeights * static_cast<int64_t>(sizeof(typename Kind::Value));
    const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, band * row_bytes));
    const int64_t pass = band == 1 ? std::max<int64_t>(1, words) : kPassWeights / Shape<Kind>::kWeights;
    std::atomic<int64_t> first{none};
    parallel_for(threads, (rows + band - 1) / band, grain, [&](int64_t begin, int64_t end, int) {
        int64_t mine = none;
        for (int64_t top = begin * band; top < std::min(rows, end * band); top += band)
            for (int64_t left = 0; left < words; left += pass)
                for (int64_t row = top; row < std::min(rows, top + band); ++row) {
                    int64_t bad = segment(row, left, std::min(words, left + pass));
                    if (bad >= 0) mine = std::min(mine, bad);
                }
        int64_t seen = first.load();
        while (mine < seen && !first.compare_exchange_weak(seen, mine)) {
        }
    });
    *offender = first.load() == none ? -1 : first.load();
}

#if defined(__AVX512VBMI2__)

constexpr bool kVectors = true;
constexpr int kUnit = 64;  // weights in a vector step: sixteen groups, eight bytes of metadata

// Flags of nonzero weights, and the kept ones packed together.
static inline uint64_t nonzero(const uint16_t* weights) {
    const __m512i mask = _mm512_set1_epi16(0x7fff);
    return _mm512_test_epi16_mask(_mm512_loadu_si512(weights), mask) |
           static_cast<uint64_t>(_mm512_test_epi16_mask(_mm512_loadu_si512(weights + 32), mask)) << 32;
}

static inline uint64_t nonzero(const uint8_t* weights) {
    __m512i all = _mm512_loadu_si512(weights);
    return _mm512_test_epi8_mask(all, all);
}

static inline uint64_t nonzero(const uint32_t* weights) {
    const __m512i mask = _mm512_set1_epi32(0x7fffffff);
    uint64_t flags = 0;
    for (int i = 0; i < 4; ++i)
        flags |= static_cast<uint64_t>(_mm512_test_epi32_mask(_mm512_loadu_si512(weights + 16 * i), mask)) << 16 * i;
    return flags;
}

static inline void compress(const uint16_t* weights, uint64_t keep, uint16_t* values) {
    for (int i = 0; i < 2; ++i, keep >>= 32) {
        __m512i kept = _mm512_maskz_compress_epi16(static_cast<__mmask32>(keep), _mm512_loadu_si512(weights + 32 * i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + 16 * i), _mm512_castsi512_si256(kept));
    }
}

static inline void compress(const uint8_t* weights, uint64_t keep, uint8_t* values) {
    __m512i kept = _mm512_maskz_compress_epi8(keep, _mm512_loadu_si512(weights));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm512_castsi512_si256(kept));
}

static inline void compress(const uint32_t* weights, uint64_t keep, uint32_t* values) {
    for (int i = 0; i < 4; ++i, keep >>= 16) {
        __m512i kept = _mm512_maskz_compress_epi32(static_cast<__mmask16>(keep), _mm512_loadu_si512(weights + 16 * i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + 8 * i), _mm512_castsi512_si256(kept));
    }
}

// The nibbles of kCodes, and for each code its two positions, as byte tables; looks sixteen nibbles up at once.
static inline uint64_t look_up(const uint8_t (&table)[16], uint64_t nibbles) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table)), low = _mm_set1_epi8(15);
    __m128i packed = _mm_cvtsi64_si128(static_cast<long long>(nibbles));
    __m128i even = _mm_shuffle_epi8(entries, _mm_and_si128(packed, low));
    __m128i odd = _mm_shuffle_epi8(entries, _mm_and_si128(_mm_srli_epi16(packed, 4), low));
    return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_or_si128(even, _mm_slli_epi16(odd, 4))));
}

struct Tables {
    uint8_t code[16], keep[16], misfit[16];  // by flags
    constexpr Tables() : code(), keep(), misfit() {
        for (int flags = 0; flags < 16; ++flags) {
            code[flags] = kCodes >> flags * 4 & 15;
            keep[flags] = static_cast<uint8_t>(1 << (code[flags] & 3) | 1 << (code[flags] >> 2));
            misfit[flags] = ~kFits >> flags & 1;
        }
    }
};
constexpr Tables kTables;

// As pack_word for kUnit weights at once; -1, or the first bad group.
template <class Value>
int pack_unit(const Value* weights, Value* values, uint64_t* codes) {
    uint64_t flags = nonzero(weights);
    *codes = look_up(kTables.code, flags);
    compress(weights, look_up(kTables.keep, flags), values);
    uint64_t misfits = look_up(kTables.misfit, flags);
    return misfits ? __builtin_ctzll(misfits) / 4 : -1;
}

#else

constexpr bool kVectors = false;
constexpr int kUnit = 64;

template <class Value>
int pack_unit(const Value*, Value*, uint64_t*) {
    return -1;
}

#endif

template <class Run>
void by_kind(int item_size, bool pairs, Run&& run) {
    if (item_size == 1)
        run(Byte());
    else if (item_size == 2)
        run(Half());
    else if (pairs)
        run(SinglePairs());
    else
        run(Single());
}

}  // namespace

void pack_24(const void* weights, void* values, void* metadata, int64_t* offender, int64_t rows, int64_t columns,
             int item_size, bool pairs, int layout, int threads) {
    by_kind(item_size, pairs, [&](auto kind) {
        using Kind = decltype(kind);
        using Value = typename Kind::Value;
        using Word = typename Kind::Word;
        constexpr int64_t kWeights = Shape<Kind>::kWeights, kGroups = Shape<Kind>::kGroups;
        constexpr int64_t kUnitWords = kVectors && Kind::kGroup == 4 ? kUnit / kWeights : 0;
        auto codes = static_cast<Word*>(metadata);
        const int64_t words = columns / kWeights;
        expect_writes(values, rows * columns / 2 * item_size);
        each_segment<Kind>(layout, rows, words, offender, threads, [=](int64_t row, int64_t word, int64_t end) {
            auto from = static_cast<const Value*>(weights) + row * columns;
            auto to = static_cast<Value*>(values) + row * columns / 2;
            for (; kUnitWords && word + kUnitWords <= end; word += kUnitWords) {
                uint64_t packed;
                int bad = pack_unit(from + word * kWeights, to + word * kWeights / 2, &packed);
                if (bad >= 0) return (row * words + word) * kGroups + bad;
                if (layout == kRowMajor) {
                    std::memcpy(codes + row * words + word, &packed, sizeof packed);
                    continue;
                }
                for (int64_t i = 0; i < kUnitWords; ++i, packed >>= 8 * sizeof(Word) % 64)
                    codes[word_offset<Word>(layout, row, word + i, rows, words)] = static_cast<Word>(packed);
            }
            for (; word < end; ++word) {
                Word* code = codes + word_offset<Word>(layout, row, word, rows, words);
                int bad = pack_word<Kind>(from + word * kWeights, to + word * kWeights / 2, code);
                if (bad >= 0) return (row * words + word) * kGroups + bad;
            }
            return int64_t{-1};
        });
    });
}

void unpack_24(const void* values, const void* metadata, void* weights, int64_t* offender, int64_t rows,
               int64_t columns, int item_size, bool pairs, int layout, int threads) {
    by_kind(item_size, pairs, [&](auto kind) {
        using Kind = decltype(kind);
        using Value = typename Kind::Value;
        using Word = typename Kind::Word;
        constexpr int64_t kWeights = Shape<Kind>::kWeights;
        auto codes = static_cast<const Word*>(metadata);
        const int64_t words = columns / kWeights;
        expect_writes(weights, rows * columns * item_size);
        each_segment<Kind>(layout, rows, words, offender, threads, [=](int64_t row, int64_t word, int64_t end) {
            auto from = static_cast<const Value*>(values) + row * columns / 2;
            auto to = static_cast<Value*>(weights) + row * columns;
            for (; word < end; ++word) {
                Word code = codes[word_offset<Word>(layout, row, word, rows, words)];
                int bad = unpack_word<Kind>(from + word * kWeights / 2, code, to + word * kWeights);
                if (bad >= 0) return (row * words + word) * Shape<Kind>::kGroups + bad;
            }
            return int64_t{-1};
        });
    });
}

}  // namespace thanos::THANOS_ISA
