// Linear layers with compressed weights for few tokens: y = x W^T + bias, reading the weights once, the sums in float32.
#include <algorithm>
#include <type_traits>

#include "pages.h"
#include "parallel.h"
#include "sparse_rows.h"

namespace thanos::THANOS_ISA {
namespace {

constexpr int64_t kGrainBytes = 128 << 10;  // weights a thread takes at a time: they stay in L2 for all blocks of tokens
constexpr int64_t kGatherGrain = 32 << 10;   // elements a thread gathers at a time
constexpr int kBlock = 8;                   // tokens that share one expansion of the weights

struct Linear {
    const void *inputs, *bias;
    const int64_t* targets;
    void* outputs;
    int64_t tokens, stride;
    int threads;
};

// The inputs as Lanes wants them: aligned, each token padded with zeros to whole words, column j at place(j).
template <class Activation>
class Activations {
public:
    template <class Value, class Place>
    Activations(const Value* inputs, int64_t tokens, int64_t columns, Place place)
        : stride((columns + kWord - 1) / kWord * kWord), memory_(tokens * stride * sizeof(Activation)) {
        for (int64_t token = 0; token < tokens; ++token) {
            Activation* row = data() + token * stride;
            std::memset(row + columns / kWord * kWord, 0, (stride - columns / kWord * kWord) * sizeof(Activation));
            for (int64_t i = 0; i < columns; ++i) convert(inputs[token * columns + i], row + place(i));
        }
    }
    Activation* data() const { return reinterpret_cast<Activation*>(memory_.data()); }

    const int64_t stride;

private:
    static void convert(Activation value, Activation* out) { *out = value; }
    template <class Value>
    static void convert(Value value, float* out) { *out = to_float(value); }

    Workspace memory_;
};

template <int kTokens, class Rows, class Activation, class Value>
void multiply(const Rows& weights, const Activation* inputs, int64_t stride, const Linear& call, int64_t token,
              int64_t begin, int64_t end, const Value* bias, Value* outputs) {
    using Vectors = typename Rows::Vectors;
    constexpr int kSums = kTokens == 1 ? 4 : 1;  // independent sums hide the latency of an addition
    for (int64_t row = begin; row < end; ++row) {
        typename Vectors::Sum sums[kTokens][kSums];
        for (auto& of_token : sums)
            for (auto& sum : of_token) sum = Vectors::zero();
        weights.walk(row, [&](int step, int64_t column, const auto& vector) {
            for (int t = 0; t < kTokens; ++t) {
                auto& sum = sums[t][step % kSums];
                sum = Vectors::multiply_add(sum, vector, inputs + t * stride + column);
            }
        });
        int64_t target = call.targets ? call.targets[row] : row;
        float offset = bias ? to_float(bias[target]) : 0.0f;
        for (int t = 0; t < kTokens; ++t) {
            float total = offset;
            for (auto& sum : sums[t]) total += Vectors::total(sum);
            from_float(total, outputs + (token + t) * call.stride + target);
        }
    }
}

template <class Value, class Rows>
void expand(const Rows& weights, const Linear& call) {
    using Activation = typename Lanes<Value>::Activation;
    Activations<Activation> inputs(static_cast<const Value*>(call.inputs), call.tokens, weights.columns,
                                   Lanes<Value>::place);
    auto bias = static_cast<const Value*>(call.bias);
    auto outputs = static_cast<Value*>(call.outputs);
    int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, weights.bytes_per_row()));
    parallel_for(call.threads, weights.rows, grain, [&](int64_t begin, int64_t end, int) {
        for (int64_t token = 0; token < call.tokens;) {
            auto* x = inputs.data() + token * inputs.stride;
            int64_t left = call.tokens - token;
            auto run = [&](auto block) {
                constexpr int kTokens = decltype(block)::value;
                multiply<kTokens>(weights, x, inputs.stride, call, token, begin, end, bias, outputs);
                token += kTokens;
            };
            if (left >= kBlock)
                run(std::integral_constant<int, kBlock>());
            else if (left >= kBlock / 2)
                run(std::integral_constant<int, kBlock / 2>());
            else
                run(std::integral_constant<int, 1>());
        }
    });
}

// Few enough tokens that the activations are picked, not the weights expanded.
template <class Value, class Rows>
void pick(const Rows& weights, const Linear& call) {
    Activations<float> inputs(static_cast<const Value*>(call.inputs), call.tokens, weights.columns, Rows::place);
    auto bias = static_cast<const Value*>(call.bias);
    auto outputs = static_cast<Value*>(call.outputs);
    int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, weights.bytes_per_row()));
    parallel_for(call.threads, weights.rows, grain, [&](int64_t begin, int64_t end, int) {
        constexpr int kTogether = Rows::kTogether;
        auto run = [&](auto together, int64_t row, int64_t token) {
            float totals[decltype(together)::value];
            weights.template dot<decltype(together)::value>(row, inputs.data() + token * inputs.stride, totals);
            for (float total : totals) {
                int64_t target = call.targets ? call.targets[row++] : row++;
                from_float(total + (bias ? to_float(bias[target]) : 0.0f), outputs + token * call.stride + target);
            }
        };
        for (int64_t token = 0; token < call.tokens; ++token) {
            int64_t row = begin;
            if constexpr (kTogether > 1)
                for (; row + kTogether <= end; row += kTogether) run(std::integral_constant<int, kTogether>(), row, token);
            for (; row < end; ++row) run(std::integral_constant<int, 1>(), row, token);
        }
    });
}

template <class Value, class Rows>
void linear(const Rows& weights, const Linear& call) {
    if constexpr (Rows::kPicks > 0)
        if (call.tokens <= Rows::kPicks) return pick<Value>(weights, call);
    if constexpr (Rows::kPicks < INT64_MAX) expand<Value>(weights, call);
}

// Calls run(Value()) with the kind of 4-byte or 2-byte float.
template <class Run>
void by_size(int item_size, Run&& run) {
    if (item_size == 4)
        run(float());
    else
        run(bfloat16());
}

template <class Value, class Rows>
void decode(const Rows& weights, int64_t first, int64_t count, Value* out, int threads) {
    expect_writes(out, count * weights.columns * static_cast<int64_t>(sizeof(Value)));
    int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, weights.bytes_per_row()));
    parallel_for(threads, count, grain, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            Value* to = out + row * weights.columns;
#if defined(__AVX2__)
            weights.walk(first + row, [&](int, int64_t column, const auto& vector) {
                using Vectors = typename Rows::Vectors;
                if (column + Vectors::kWidth <= weights.columns) {
                    Vectors::store(to + column, vector);
                } else if (column < weights.columns) {
                    Value rest[Vectors::kWidth];
                    Vectors::store(rest, vector);
                    std::memcpy(to + column, rest, (weights.columns - column) * sizeof(Value));
                }
            });
#else
            std::memset(to, 0, weights.columns * sizeof(Value));
            weights.each(first + row, [&](int64_t column, Value value) { to[column] = value; });
#endif
        }
    });
}

}  // namespace

void bitmask_linear(const void* values, const uint64_t* bits, const int64_t* starts, const void* inputs,
                    const void* bias, const int64_t* targets, void* outputs, int64_t rows, int64_t columns,
                    int64_t tokens, int64_t stride, int item_size, int threads) {
    by_size(item_size, [&](auto value) {
        using Value = decltype(value);
        BitmaskRows<Value> weights{static_cast<const Value*>(values), bits, starts, rows, columns};
        linear<Value>(weights, {inputs, bias, targets, outputs, tokens, stride, threads});
    });
}

void sparse24_linear(const void* values, const uint16_t* metadata, const void* inputs, const void* bias,
                     const int64_t* targets, void* outputs, int64_t rows, int64_t columns, int64_t tokens,
                     int64_t stride, int item_size, int threads) {
    by_size(item_size, [&](auto value) {
        using Value = decltype(value);
        Rows24<Value> weights{static_cast<const Value*>(values), metadata, rows, columns};
        linear<Value>(weights, {inputs, bias, targets, outputs, tokens, stride, threads});
    });
}

void dense_linear(const void* values, const void* inputs, const void* bias, const int64_t* targets, void* outputs,
                  int64_t rows, int64_t columns, int64_t tokens, int64_t stride, int item_size, int threads) {
    by_size(item_size, [&](auto value) {
        using Value = decltype(value);
        DenseRows<Value> weights{static_cast<const Value*>(values), rows, columns};
        linear<Value>(weights, {inputs, bias, targets, outputs, tokens, stride, threads});
    });
}

void bitmask_decode(const void* values, const uint64_t* bits, const int64_t* starts, int64_t rows, int64_t columns,
                    int64_t first, int64_t count, void* out, int item_size, int threads) {
    by_size(item_size, [&](auto value) {
        using Value = decltype(value);
        BitmaskRows<Value> weights{static_cast<const Value*>(values), bits, starts, rows, columns};
        decode(weights, first, count, static_cast<Value*>(out), threads);
    });
}

void sparse24_decode(const void* values, const uint16_t* metadata, int64_t rows, int64_t columns, int64_t first,
                     int64_t count, void* out, int item_size, int threads) {
    by_size(item_size, [&](auto value) {
        using Value = decltype(value);
        Rows24<Value> weights{static_cast<const Value*>(values), metadata, rows, columns};
        decode(weights, first, count, static_cast<Value*>(out), threads);
    });
}

void gather_columns(const void* inputs, const int64_t* index, void* outputs, int64_t rows, int64_t columns,
                    int64_t count, int item_size, int threads) {
    by_size(item_size, [&](auto value) {
        using Value = decltype(value);
        parallel_for(threads, rows, std::max<int64_t>(1, kGatherGrain / std::max<int64_t>(1, count)),
                     [&](int64_t begin, int64_t end, int) {
                         for (int64_t row = begin; row < end; ++row) {
                             const Value* from = static_cast<const Value*>(inputs) + row * columns;
                             Value* to = static_cast<Value*>(outputs) + row * count;
                             for (int64_t i = 0; i < count; ++i) to[i] = from[index[i]];
                         }
                     });
    });
}

}  // namespace thanos::THANOS_ISA
