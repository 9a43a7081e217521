// The compressed weights as sources of rows: `walk` hands the weights of one row, Lanes::kWidth at a time, to `use`. Where
// kPicks says up to how many tokens, `dot` multiplies kRows rows by one token's activations, which lie where `place` says.
// The portable kind has no walk: `each` hands every kept weight, with its column.
#pragma once

#include "sparse_pick.h"

namespace thanos::THANOS_ISA {

constexpr int kWord = 64;  // weights per mask word

static inline int64_t words_of(int64_t columns) { return (columns + kWord - 1) / kWord; }

// One bit per weight, rows padded with zeros to whole words, and the kept values; row r has values [starts[r], starts[r+1]).
template <class Value>
struct BitmaskRows {
    using Vectors = Lanes<Value>;
    static constexpr int kTogether = kPairs;
    const Value* values;
    const uint64_t* bits;
    const int64_t* starts;
    int64_t rows, columns;
#if defined(__AVX512F__)
    static constexpr int64_t kPicks = 0;
#elif defined(__AVX2__)
    static constexpr int64_t kPicks = 3;
#else
    static constexpr int64_t kPicks = INT64_MAX;
#endif

    int64_t bytes_per_row() const {
        return rows ? (starts[rows] * static_cast<int64_t>(sizeof(Value)) / rows + words_of(columns) * 8) : 0;
    }

#if !defined(__AVX2__)

    static int64_t place(int64_t column) { return column; }

    template <int kRows>
    void dot(int64_t row, const float* inputs, float* total) const {
        static_assert(kRows == 1);
        float sums[4] = {};
        words(row, [&](const uint8_t* at, int count, int64_t column, const Value* from) {
            const float* x = inputs + column;
            int k = 0;
            for (; k + 4 <= count; k += 4)
                for (int i = 0; i < 4; ++i) sums[i] += to_float(from[k + i]) * x[at[k + i]];
            for (; k < count; ++k) sums[0] += to_float(from[k]) * x[at[k]];
        });
        *total = sums[0] + sums[1] + sums[2] + sums[3];
    }

    template <class Use>
    void each(int64_t row, Use&& use) const {
        words(row, [&](const uint8_t* at, int count, int64_t column, const Value* from) {
            for (int k = 0; k < count; ++k) use(column + at[k], from[k]);
        });
    }

private:
    // For each word of 64 weights: where the kept ones stand in it, written without a branch, eight at a time.
    template <class Use>
    void words(int64_t row, Use&& use) const {
        const Value* next = values + starts[row];
        const uint64_t* mask = bits + row * words_of(columns);
        for (int64_t word = 0; word < words_of(columns); ++word) {
            uint8_t at[kWord + 8];
            int count = 0;
            for (int byte = 0; byte < 8; ++byte) {
                unsigned part = mask[word] >> 8 * byte & 255;
                uint64_t eight;
                std::memcpy(&eight, positions.of_mask[part], 8);
                eight += 0x0808080808080808 * byte;
                std::memcpy(at + count, &eight, 8);
                count += positions.count[part];
            }
            use(at, count, word * kWord, next);
            next += count;
        }
    }
};

#else

#if !defined(__AVX512F__)

    static int64_t place(int64_t column) { return Vectors::place(column); }

    // Rows together share the loads of activations, and the places of their next values are independent of each other.
    template <int kRows>
    void dot(int64_t row, const float* inputs, float* totals) const {
        typename Vectors::Sum sums[kRows][2];
        for (auto& of_row : sums)
            for (auto& sum : of_row) sum = Vectors::zero();
        if (starts[row + kRows] + Vectors::kWidth > starts[rows]) {
            for (int r = 0; r < kRows; ++r)
                walk(row + r, [&](int step, int64_t column, const auto& vector) {
                    sums[r][step & 1] = Vectors::multiply_add(sums[r][step & 1], vector, inputs + column);
                });
        } else {
            const uint64_t* masks = bits + row * words_of(columns);
            const Value* next[kRows];
            for (int r = 0; r < kRows; ++r) next[r] = values + starts[row + r];
            for (int64_t word = 0; word < words_of(columns); ++word, inputs += kWord) {
                uint64_t left[kRows];
                for (int r = 0; r < kRows; ++r) left[r] = masks[r * words_of(columns) + word];
                for (int r = 0; r < kRows; ++r) prefetch(next[r], kWord / 2);
#pragma GCC unroll 8
                for (int step = 0; step < kWord / Vectors::kWidth; ++step) {
                    auto x = Vectors::load_activations(inputs + step * Vectors::kWidth);
#pragma GCC unroll 4
                    for (int r = 0; r < kRows; ++r) {
                        auto& sum = sums[r][step & 1];
                        sum = Vectors::multiply_add(sum, Vectors::expand_next(left[r], next[r]), x);
                    }
                }
            }
        }
        for (int r = 0; r < kRows; ++r) totals[r] = total_of(_mm256_add_ps(sums[r][0], sums[r][1]));
    }

#endif

    template <class Use>
    void walk(int64_t row, Use&& use) const {
        if (starts[row + 1] + Vectors::kWidth <= starts[rows])
            walk_row<true>(row, use);
        else
            walk_row<false>(row, use);  // a whole vector could pass the end of the values
    }

private:
    template <bool kWhole, class Use>
    void walk_row(int64_t row, Use& use) const {
        const Value* next = values + starts[row];
        const uint64_t* mask = bits + row * words_of(columns);
        for (int64_t word = 0; word < words_of(columns); ++word) {
            prefetch(next, kWord / 2);
#pragma GCC unroll 8
            for (int step = 0; step < kWord / Vectors::kWidth; ++step) {
                uint64_t part = mask[word] >> step * Vectors::kWidth & ((uint64_t{1} << Vectors::kWidth) - 1);
                int count = __builtin_popcountll(part);
                use(step, word * kWord + step * Vectors::kWidth,
                    kWhole ? Vectors::expand_from(part, next)
                           : Vectors::expand(part, Vectors::load_first(next, count)));
                next += count;
            }
        }
    }
};

#endif

#if defined(__AVX2__)

// Turns row-major 2:4 metadata, one nibble i0 | i1 << 2 per group, into masks, one nibble per group; unused codes give 0.
static inline void masks_of_24(const void* metadata, uint64_t masks[2]) {
    const __m128i table = _mm_setr_epi8(0, 0, 0, 0, 3, 0, 0, 0, 5, 6, 0, 0, 9, 10, 12, 0), low = _mm_set1_epi8(15);
    __m128i codes = _mm_loadu_si128(static_cast<const __m128i*>(metadata));
    __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(codes, low));
    __m128i odd = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(codes, 4), low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(masks), _mm_or_si128(even, _mm_slli_epi16(odd, 4)));
}

#endif

// Row-major 2:4 of a 16-bit kind: columns / 2 values and columns / 16 words of metadata a row.
template <class Value>
struct Rows24 {
    using Vectors = Lanes<Value>;
    static constexpr int kTogether = kPairs * kPairs;
    const Value* values;
    const uint16_t* metadata;
    int64_t rows, columns;
#if defined(__AVX512F__)
    static constexpr int64_t kPicks = 0;
#elif defined(__AVX2__)
    static constexpr int64_t kPicks = 3;
#else
    static constexpr int64_t kPicks = INT64_MAX;
#endif

    int64_t bytes_per_row() const { return columns / 2 * static_cast<int64_t>(sizeof(Value)) + columns / 8; }

#if !defined(__AVX512F__)

    static int64_t place(int64_t column) { return place24(column); }

    template <int kRows>
    void dot(int64_t row, const float* inputs, float* totals) const {
        dot24<kRows>(values + row * (columns / 2), metadata + row * (columns / 16), inputs, columns, totals);
    }

#endif
#if !defined(__AVX2__)

    template <class Use>
    void each(int64_t row, Use&& use) const {
        const Value* from = values + row * (columns / 2);
        const uint8_t* codes = reinterpret_cast<const uint8_t*>(metadata + row * (columns / 16));
        for (int64_t column = 0; column < columns; column += 8, from += 4) {
            const uint8_t* at = positions.of_codes[*codes++];
            for (int kept = 0; kept < 4; ++kept) use(column + at[kept], from[kept]);
        }
    }
};

#else

    template <class Use>
    void walk(int64_t row, Use&& use) const {
        if ((row + 1) * (columns / 2) + 2 * kWord <= rows * (columns / 2))
            walk_row<true>(row, use);
        else
            walk_row<false>(row, use);
    }

private:
    static constexpr int kBlock = 2 * kWord;  // weights in sixteen bytes of metadata

    template <bool kWhole, class Use>
    void walk_row(int64_t row, Use& use) const {
        const Value* next = values + row * (columns / 2);
        const uint16_t* codes = metadata + row * (columns / 16);
        uint64_t masks[2];
        int64_t column = 0;
        for (; column + kBlock <= columns; column += kBlock, next += kBlock / 2) {
            masks_of_24(codes + column / 16, masks);
            prefetch(next, kBlock / 2);
            walk_block<kWhole>(masks, column, kBlock / Vectors::kWidth, next, use);
        }
        if (column == columns) return;
        uint16_t rest[kBlock / 16] = {};
        std::memcpy(rest, codes + column / 16, (columns - column) / 16 * sizeof(uint16_t));
        masks_of_24(rest, masks);
        int steps = static_cast<int>((columns - column + Vectors::kWidth - 1) / Vectors::kWidth);
        walk_block<false>(masks, column, steps, next, use);
    }

    template <bool kWhole, class Use>
    static void walk_block(const uint64_t* masks, int64_t column, int steps, const Value* next, Use& use) {
#pragma GCC unroll 16
        for (int step = 0; step < kBlock / Vectors::kWidth; ++step) {
            if (!kWhole && step >= steps) return;
            int bit = step * Vectors::kWidth;
            uint64_t part = masks[bit / kWord] >> bit % kWord & ((uint64_t{1} << Vectors::kWidth) - 1);
            const Value* from = next + bit / 2;
            use(step % (kWord / Vectors::kWidth), column + bit,
                kWhole ? Vectors::expand_from(part, from)
                       : Vectors::expand(part, Vectors::load_first(from, __builtin_popcountll(part))));
        }
    }
};

#endif

// Plain rows, for what was kept dense.
template <class Value>
struct DenseRows {
    using Vectors = Lanes<Value>;
    const Value* values;
    int64_t rows, columns;
    static constexpr int64_t kPicks = 0;  // its values are not compressed

    int64_t bytes_per_row() const { return columns * static_cast<int64_t>(sizeof(Value)); }

    template <class Use>
    void walk(int64_t row, Use&& use) const {
        const Value* from = values + row * columns;
        int64_t column = 0;
        for (; column + 4 * Vectors::kWidth <= columns; column += 4 * Vectors::kWidth) {
#pragma GCC unroll 4
            for (int step = 0; step < 4; ++step) {
                int64_t at = column + step * Vectors::kWidth;
                use(step, at, Vectors::load(from + at));
            }
        }
        for (; column + Vectors::kWidth <= columns; column += Vectors::kWidth) use(0, column, Vectors::load(from + column));
        if (column < columns) use(0, column, Vectors::load_first(from + column, static_cast<int>(columns - column)));
    }
};

}  // namespace thanos::THANOS_ISA
