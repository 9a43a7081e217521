// 2:4 packing, one word of metadata at a time: the same functions run in the host loop and in the CUDA kernel.
//
// A group of four weights keeps two values; their positions i0 < i1 make a code i0 | i1 << 2, and codes fill a word from
// its low bits. Where fewer than two weights are nonzero, the choice of positions is that of PyTorch's
// sparse_semi_structured_from_dense_cutlass, so that packed data are equal bit for bit.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define THANOS_SHARED __host__ __device__ __forceinline__
#else
#define THANOS_SHARED inline
#endif

namespace thanos {
namespace pack_24_detail {

enum Layout : int { kRowMajor = 0, kCutlass = 1, kCusparselt = 2 };

// Indexed by four flags, the first weight's in the lowest bit: the code, and whether at most two are set.
constexpr uint64_t kCodes = 0x4dce4dce498e498e;
constexpr uint32_t kFits = 0x177f;

struct Half {  // float16 and bfloat16
    using Value = uint16_t;
    using Word = uint16_t;
    static constexpr int kGroup = 4;
    THANOS_SHARED static uint32_t flags(const Value* weights) {  // all four at once
        constexpr uint64_t kAbs = 0x7fff7fff7fff7fff, kGather = 0x0001000200040008;
        uint64_t four;
        __builtin_memcpy(&four, __builtin_assume_aligned(weights, 8), sizeof four);
        uint64_t signs = (((four & kAbs) + kAbs) & ~kAbs) >> 15;
        return static_cast<uint32_t>(signs * kGather >> 48) & 15;
    }
};

struct Byte {  // int8
    using Value = uint8_t;
    using Word = uint32_t;
    static constexpr int kGroup = 4;
    THANOS_SHARED static uint32_t flags(const Value* weights) {
        constexpr uint32_t kLow = 0x7f7f7f7f, kGather = 0x01020408;
        uint32_t four;
        __builtin_memcpy(&four, __builtin_assume_aligned(weights, 4), sizeof four);
        uint32_t signs = ((((four & kLow) + kLow) | four) & ~kLow) >> 7;
        return signs * kGather >> 24 & 15;
    }
};

struct Single {  // float32, metadata as for the 16-bit types
    using Value = uint32_t;
    using Word = uint16_t;
    static constexpr int kGroup = 4;
    THANOS_SHARED static uint32_t flags(const Value* weights) {
        uint32_t result = 0;
        for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>((weights[i] & 0x7fffffff) != 0) << i;
        return result;
    }
};

struct SinglePairs : Single {  // float32 1:2, as the tensor cores take it: a pair counts as a group of four halves
    static constexpr int kGroup = 2;
    THANOS_SHARED static uint32_t flags(const Value* weights) {
        return static_cast<uint32_t>((weights[0] & 0x7fffffff) != 0) |
               static_cast<uint32_t>((weights[1] & 0x7fffffff) != 0) << 1;
    }
};

template <class Kind>
struct Shape {
    static constexpr int kGroups = static_cast<int>(sizeof(typename Kind::Word)) * 2;  // groups in a word
    static constexpr int kWeights = kGroups * Kind::kGroup;                            // weights in a word
};

// Packs the weights of one word, aligned to 8 bytes; -1, or the first group that keeps too many.
template <class Kind>
THANOS_SHARED int pack_word(const typename Kind::Value* weights, typename Kind::Value* values,
                            typename Kind::Word* word) {
    typename Kind::Word codes = 0;
    uint32_t misfits = 0;
    for (int group = 0; group < Shape<Kind>::kGroups; ++group, weights += Kind::kGroup) {
        uint32_t flags = Kind::flags(weights), code;
        if (Kind::kGroup == 4) {
            code = static_cast<uint32_t>(kCodes >> flags * 4) & 15;
            misfits |= (~kFits >> flags & 1) << group;
            values[2 * group] = weights[code & 3];
            values[2 * group + 1] = weights[code >> 2];
        } else {
            code = flags & 1 ? 4 : 14;
            misfits |= static_cast<uint32_t>(flags == 3) << group;
            values[group] = weights[code >> 1 & 1];
        }
        codes = static_cast<typename Kind::Word>(codes | code << group * 4);
    }
    *word = codes;
    int first = 0;
    if (!misfits) return -1;
    while (!(misfits >> first & 1)) ++first;
    return first;
}

// The reverse; -1, or the first group whose code no packer writes.
template <class Kind>
THANOS_SHARED int unpack_word(const typename Kind::Value* values, typename Kind::Word word,
                              typename Kind::Value* weights) {
    constexpr uint32_t kKnown = Kind::kGroup == 4 ? 0x7310 : 0x4010;  // bit `code` is set for the codes in use
    for (int group = 0; group < Shape<Kind>::kGroups; ++group, weights += Kind::kGroup) {
        uint32_t code = static_cast<uint32_t>(word) >> group * 4 & 15;
        if (!(kKnown >> code & 1)) return group;
        for (int i = 0; i < Kind::kGroup; ++i) weights[i] = 0;
        if (Kind::kGroup == 4) {
            weights[code & 3] = values[2 * group];
            weights[code >> 2] = values[2 * group + 1];
        } else {
            weights[code >> 1 & 1] = values[group];
        }
    }
    return -1;
}

// Where a layout keeps a word. `cutlass` interleaves the rows of a band of 32 (16 for 32-bit words), swaps the corners of
// its 2 x 2 blocks and stores pairs of columns; `cusparselt` is that within tiles of 32 rows x 2 words, the tiles in
// turn in blocks of 4 x 2.
template <class Word>
THANOS_SHARED int64_t word_offset(int layout, int64_t row, int64_t column, int64_t rows, int64_t columns) {
    if (layout == kRowMajor) return row * columns + column;
    constexpr int64_t kBand = sizeof(Word) == 2 ? 32 : 16, kWeave = sizeof(Word) == 2 ? 4 : 2;
    const int64_t band = row / kBand, woven = row % 8 * kWeave + row % kBand / 8, pair = column / 2;
    const int64_t inside = (woven / 2 * 2 + column % 2) * 2 + woven % 2;  // the corners swapped
    if (layout == kCutlass) return (pair * rows + band * kBand) * 2 + inside;
    const int64_t tile = band / 4 * 8 + pair / 2 * (rows / 128 * 8) + band % 4 + pair % 2 * 4;
    return tile * (kBand * 2) + inside;
}

}  // namespace pack_24_detail
}  // namespace thanos
