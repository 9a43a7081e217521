// Linear layers with compressed int8 weights: a float16 scale for each kGroup columns of a row. For few tokens the
// activations become int8 too, each kShared columns of a token with a scale of their own, and products are whole numbers.
#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "sparse_int8.h"

namespace thanos::THANOS_ISA {
namespace {

constexpr int64_t kGrainBytes = 128 << 10;  // weights a thread takes at a time
constexpr int kSlack = 64;                  // bytes a vector may read past a row's last value

int64_t groups_of(int64_t columns) { return (columns + kGroup - 1) / kGroup; }

struct Int8Rows {
    const int8_t* values;
    const uint64_t* bits;  // a mask, or null where 2:4 codes tell
    const int64_t* starts;
    const uint8_t* codes;
    const uint16_t* scales;
    int64_t rows, columns;
    int64_t tail = 0;       // rows from here on have their values in `padded`, with room to read past them
    const int8_t* padded = nullptr;

    int64_t grain() const {
        return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, columns / 2 + columns / 8));
    }

    // use(column, vector, scale of its group)
    template <class Use>
    void walk(int64_t row, Use&& use) const {
        const uint16_t* scale = scales + row * groups_of(columns);
        if (bits)
            walk_bits(row, scale, use);
        else
            walk_codes(row, scale, use);
    }

private:
    static constexpr int kSteps = kGroup / Int8Lanes::kWidth;

    template <class Use>
    void walk_bits(int64_t row, const uint16_t* scale, Use& use) const {
        const int8_t* next = row < tail ? values + starts[row] : padded + (starts[row] - starts[tail]);
        int64_t words = words_of(columns);
        const uint64_t* mask = bits + row * words;
        for (int64_t word = 0; word < words; word += kGroup / kWord, ++scale) {
            uint64_t masks[2] = {mask[word], word + 1 < words ? mask[word + 1] : 0};
            group(word * kWord, *scale, use, [&](int step) {
                int bit = step * Int8Lanes::kWidth;
                uint64_t part = masks[bit / kWord] >> bit % kWord;
                if (Int8Lanes::kWidth < kWord) part &= 0xffffffff;
                return Int8Lanes::expand_bits(part, next);
            });
        }
    }

    template <class Use>
    void walk_codes(int64_t row, const uint16_t* scale, Use& use) const {
        const int8_t* next = values + row * (columns / 2);
        const uint8_t* code = codes + row * (columns / 8);
        int64_t column = 0;
        auto expand = [&](int) {
            auto result = Int8Lanes::expand_codes(code, next);
            code += Int8Lanes::kWidth / 8;
            return result;
        };
        for (; column + kGroup <= columns; column += kGroup, ++scale) group(column, *scale, use, expand);
        if (column == columns) return;
        int8_t last[kGroup / 2] = {};
        uint8_t rest[kGroup / 8];
        std::memset(rest, 0xee, sizeof rest);  // any code: the values are zeros
        std::memcpy(last, next, (columns - column) / 2);
        std::memcpy(rest, code, (columns - column) / 8);
        next = last;
        code = rest;
        group(column, *scale, use, expand);
    }

    template <class Use, class Expand>
    static void group(int64_t column, uint16_t scale, Use& use, Expand&& expand) {
        typename Int8Lanes::Vector vectors[kSteps];
#pragma GCC unroll 4
        for (int step = 0; step < kSteps; ++step) vectors[step] = expand(step);
        use(column, vectors, half_to_float(scale));
    }
};

// The values of the last rows, which a vector could read past, copied to where it may.
class Tail {
public:
    explicit Tail(Int8Rows& weights) : memory_(prepare(weights)) {
        if (!weights.bits) return;
        int64_t from = weights.starts[weights.tail], count = weights.starts[weights.rows] - from;
        std::memset(memory_.data(), 0, count + kSlack);
        if (count) std::memcpy(memory_.data(), weights.values + from, count);
        weights.padded = reinterpret_cast<const int8_t*>(memory_.data());
    }

private:
    static size_t prepare(Int8Rows& weights) {
        weights.tail = weights.rows;
        if (!weights.bits) return kSlack;
        int64_t total = weights.starts[weights.rows];
        while (weights.tail > 0 && weights.starts[weights.tail] + kSlack > total) --weights.tail;
        return total - weights.starts[weights.tail] + kSlack;
    }

    Workspace memory_;
};

// Tokens as int8, padded with zeros to whole groups: the largest of kShared columns becomes 127.
class Int8Activations {
public:
    template <class Value>
    Int8Activations(const Value* inputs, int64_t tokens, int64_t columns)
        : stride(groups_of(columns) * kGroup),
          scale_stride(stride / Int8Lanes::kWidth * Int8Lanes::kScales),
          values_(tokens * stride),
          scales_(tokens * scale_stride * sizeof(float)) {
        constexpr int kRepeat = Int8Lanes::kScales * kShared / Int8Lanes::kWidth;
        for (int64_t token = 0; token < tokens; ++token) {
            auto* row = reinterpret_cast<uint8_t*>(values_.data()) + token * stride;
            auto* scales = reinterpret_cast<float*>(scales_.data()) + token * scale_stride;
            for (int64_t column = 0; column < stride; column += kShared) {
                float x[kShared] = {}, largest = 0;
                int64_t count = std::max<int64_t>(0, std::min<int64_t>(kShared, columns - column));
                for (int64_t i = 0; i < count; ++i) x[i] = to_float(inputs[token * columns + column + i]);
                bool finite = true;
                for (float value : x) {
                    largest = std::max(largest, std::fabs(value));
                    finite &= std::fabs(value) <= 3.4028234663852886e38f;
                }
                float scale = finite ? largest / 127 : NAN;  // what is not finite makes every output NaN
                float inverse = finite && scale > 0 ? 1 / scale : 0;
                if (!(inverse <= 3.4028234663852886e38f)) inverse = 0;
                for (int i = 0; i < kShared; ++i)
                    row[column + i] = static_cast<uint8_t>(
                        static_cast<int>(std::nearbyint(inverse > 0 ? x[i] * inverse : 0.0f)) + Int8Lanes::kBias);
                for (int i = 0; i < kRepeat; ++i) *scales++ = scale;
            }
        }
    }
    const uint8_t* values(int64_t token) const { return reinterpret_cast<uint8_t*>(values_.data()) + token * stride; }
    const float* scales(int64_t token) const { return reinterpret_cast<float*>(scales_.data()) + token * scale_stride; }

    const int64_t stride, scale_stride;

private:
    Workspace values_, scales_;
};

template <int kTokens, class Finish>
void multiply(const Int8Rows& weights, const Int8Activations& inputs, int64_t token, int64_t row, Finish&& finish) {
    using Sum = typename Int8Lanes::Sum;
    constexpr int kSteps = kGroup / Int8Lanes::kWidth;
    Sum sums[kTokens];
    for (auto& sum : sums) sum = Int8Lanes::zero();
    const uint8_t* values = inputs.values(token);
    const float* scales = inputs.scales(token);
    weights.walk(row, [&](int64_t column, const auto& vectors, float scale) {
        for (int t = 0; t < kTokens; ++t) {
            Sum part = Int8Lanes::zero();
#pragma GCC unroll 4
            for (int step = 0; step < kSteps; ++step) {
                int64_t at = column + step * Int8Lanes::kWidth;
                part = Int8Lanes::multiply_add(part, vectors[step], values + t * inputs.stride + at,
                                               scales + t * inputs.scale_stride +
                                                   at / Int8Lanes::kWidth * Int8Lanes::kScales);
            }
            sums[t] = Int8Lanes::scale_add(sums[t], part, scale);
        }
    });
    for (int t = 0; t < kTokens; ++t) finish(token + t, Int8Lanes::total(sums[t]));
}

template <class Run>
void by_size(int item_size, Run&& run) {
    if (item_size == 4)
        run(float());
    else
        run(bfloat16());
}

}  // namespace

void int8_linear(const int8_t* values, const uint64_t* bits, const int64_t* starts, const void* metadata,
                 const uint16_t* scales, const void* inputs, const void* bias, const int64_t* targets, void* outputs,
                 int64_t rows, int64_t columns, int64_t tokens, int64_t stride, int item_size, int threads) {
    Int8Rows weights{values, bits, starts, static_cast<const uint8_t*>(metadata), scales, rows, columns};
    Tail tail(weights);
    by_size(item_size, [&](auto kind) {
        using Value = decltype(kind);
        Int8Activations x(static_cast<const Value*>(inputs), tokens, columns);
        parallel_for(threads, rows, weights.grain(), [&](int64_t begin, int64_t end, int) {
            for (int64_t token = 0; token < tokens;) {
                int64_t together = tokens - token >= 4 ? 4 : 1;
                for (int64_t row = begin; row < end; ++row) {
                    int64_t target = targets ? targets[row] : row;
                    float offset = bias ? to_float(static_cast<const Value*>(bias)[target]) : 0.0f;
                    auto finish = [&](int64_t of, float total) {
                        from_float(total + offset, static_cast<Value*>(outputs) + of * stride + target);
                    };
                    if (together == 4)
                        multiply<4>(weights, x, token, row, finish);
                    else
                        multiply<1>(weights, x, token, row, finish);
                }
                token += together;
            }
        });
    });
}

void int8_decode(const int8_t* values, const uint64_t* bits, const int64_t* starts, const void* metadata,
                 const uint16_t* scales, int64_t rows, int64_t columns, int64_t first, int64_t count, void* out,
                 int item_size, int threads) {
    Int8Rows weights{values, bits, starts, static_cast<const uint8_t*>(metadata), scales, rows, columns};
    Tail tail(weights);
    by_size(item_size, [&](auto kind) {
        using Value = decltype(kind);
        parallel_for(threads, count, weights.grain(), [&](int64_t begin, int64_t end, int) {
            for (int64_t row = begin; row < end; ++row) {
                Value* to = static_cast<Value*>(out) + row * columns;
                weights.walk(first + row, [&](int64_t column, const auto& vectors, float scale) {
                    int8_t group[kGroup];
                    for (int step = 0; step < kGroup / Int8Lanes::kWidth; ++step)
                        Int8Lanes::store(group + step * Int8Lanes::kWidth, vectors[step]);
                    int64_t here = std::min<int64_t>(kGroup, columns - column);
                    for (int64_t i = 0; i < here; ++i) from_float(scale * static_cast<float>(group[i]), to + column + i);
                });
            }
        });
    });
}

}  // namespace thanos::THANOS_ISA
