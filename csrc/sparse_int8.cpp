// Linear layers with compressed int8 weights: a float16 scale for each kGroup columns of a row. For few tokens the
// activations become int8 too, a quarter of such a group with a scale of its own, and products are whole numbers.
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

    // use(group, its weights, its scale); weights come expanded, or with kPicks as `multiply` likes them best
    template <bool kPicks, class Use>
    void walk(int64_t row, Use&& use) const {
        const uint16_t* scale = scales + row * groups_of(columns);
        if (bits)
            walk_bits(row, [&](int64_t group, const auto& weights) { use(group, weights, scale[group]); });
        else
            walk_codes(row, [&](int64_t group, const uint8_t* code, const int8_t* packed) {
                if constexpr (kPicks)
                    use(group, Int8Lanes::pick(code, packed), scale[group]);
                else
                    use(group, Int8Lanes::expand_codes(code, packed), scale[group]);
            });
    }

private:
    template <class Use>
    void walk_bits(int64_t row, Use&& use) const {
        const int8_t* next = row < tail ? values + starts[row] : padded + (starts[row] - starts[tail]);
        int64_t words = words_of(columns);
        const uint64_t* mask = bits + row * words;
        for (int64_t group = 0; group < words / 2; ++group) {
            prefetch(next, kGroup / 2);
            use(group, Int8Lanes::expand(mask + 2 * group, next));
        }
        if (words % 2) {
            uint64_t last[2] = {mask[words - 1], 0};
            use(words / 2, Int8Lanes::expand(last, next));
        }
    }

    template <class Use>
    void walk_codes(int64_t row, Use&& use) const {
        const int8_t* next = values + row * (columns / 2);
        const uint8_t* code = codes + row * (columns / 8);
        int64_t group = 0, left = columns % kGroup;
        for (; group < columns / kGroup; ++group, next += kGroup / 2, code += kGroup / 8) {
            prefetch(next, kGroup / 2);
            use(group, code, next);
        }
        if (left == 0) return;
        int8_t last[kGroup / 2] = {};
        uint8_t rest[kGroup / 8];
        std::memset(rest, 0xee, sizeof rest);  // any code: the values are zeros
        std::memcpy(last, next, left / 2);
        std::memcpy(rest, code, left / 8);
        use(group, rest, last);
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

// Tokens as int8, padded with zeros to whole groups: the largest of the columns that share a scale becomes 127.
class Int8Activations {
public:
    struct alignas(64) Group {
        int8_t values[kGroup];
        float scales[Int8Lanes::kLanes];     // of each lane that `multiply` gives
        int32_t offsets[Int8Lanes::kLanes];  // what kBias adds to it, negative
    };

    template <class Value>
    Int8Activations(const Value* inputs, int64_t tokens, int64_t columns, bool picked)
        : groups_(groups_of(columns)), memory_(tokens * groups_ * sizeof(Group)) {
        for (int64_t token = 0; token < tokens; ++token, inputs += columns)
            for (int64_t group = 0; group < groups_; ++group) {
                float x[kGroup] = {};
                int64_t begin = group * kGroup, count = std::min<int64_t>(kGroup, columns - begin);
                for (int64_t i = 0; i < count; ++i) x[i] = to_float(inputs[begin + i]);
                round(x, picked, this->token(token)[group]);
            }
    }

    Group* token(int64_t index) const { return reinterpret_cast<Group*>(memory_.data()) + index * groups_; }

private:
    static void round(const float* x, bool picked, Group& to) {
        constexpr int kRun = 32, kShares = 4, kOfShare = kRun / kShares;
        float most[kRun] = {}, inverse[kRun], scales[kShares];
        uint32_t infinite = 0;
        for (int begin = 0; begin < kGroup; begin += kRun)
            for (int i = 0; i < kRun; ++i) {
                float size = std::fabs(x[begin + i]);
                uint32_t bits;
                std::memcpy(&bits, &size, sizeof bits);
                infinite |= bits >= 0x7f800000;
                most[i] = size > most[i] ? size : most[i];
            }
        for (int share = 0; share < kShares; ++share) {  // what is not finite makes every output NaN
            scales[share] = infinite ? NAN : *std::max_element(most + kOfShare * share, most + kOfShare * (share + 1)) / 127;
            float factor = 1 / scales[share];
            std::fill_n(inverse + kOfShare * share, kOfShare, factor <= 3.4028234663852886e38f ? factor : 0.0f);
        }
        int32_t wholes[kGroup];
        for (int begin = 0; begin < kGroup; begin += kRun)
            for (int i = 0; i < kRun; ++i)
                wholes[begin + i] = infinite ? 0 : static_cast<int32_t>(std::nearbyint(x[begin + i] * inverse[i]));
        int32_t bias = picked ? Int8Lanes::kBias : 0;
        for (int i = 0; i < kGroup; ++i) to.values[Int8Lanes::place(i, picked)] = static_cast<int8_t>(wholes[i] + bias);
        std::memset(to.offsets, 0, sizeof to.offsets);
        if (Int8Lanes::kBias && !picked)
            for (int i = 0; i < kGroup; ++i) to.offsets[i / 4 % Int8Lanes::kLanes] -= Int8Lanes::kBias * wholes[i];
        for (int lane = 0; lane < Int8Lanes::kLanes; ++lane)
            to.scales[lane] = scales[share_of(Int8Lanes::column_of(lane, picked))];
    }

    const int64_t groups_;
    Workspace memory_;
};

template <int kTokens, class Finish>
void multiply(const Int8Rows& weights, const Int8Activations& inputs, int64_t token, int64_t row, Finish&& finish) {
    typename Int8Lanes::Sum sums[kTokens];
    for (auto& sum : sums) sum = Int8Lanes::zero();
    const Int8Activations::Group* of_token[kTokens];
    for (int t = 0; t < kTokens; ++t) of_token[t] = inputs.token(token + t);
    weights.walk<true>(row, [&](int64_t group, const auto& vectors, uint16_t scale) {
        for (int t = 0; t < kTokens; ++t) {
            const auto& x = of_token[t][group];
            sums[t] = Int8Lanes::scale_add(sums[t], Int8Lanes::multiply(vectors, x.values, x.offsets), x.scales, scale);
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
        Int8Activations x(static_cast<const Value*>(inputs), tokens, columns, bits == nullptr);
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
                weights.walk<false>(first + row, [&](int64_t group, const auto& vectors, uint16_t half) {
                    float scale = half_to_float(half);
                    int8_t whole[kGroup];
                    Int8Lanes::store(whole, vectors);
                    int64_t begin = group * kGroup, here = std::min<int64_t>(kGroup, columns - begin);
                    for (int64_t i = 0; i < here; ++i) from_float(scale * static_cast<float>(whole[i]), to + begin + i);
                });
            }
        });
    });
}

}  // namespace thanos::THANOS_ISA
