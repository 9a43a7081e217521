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

// The inputs as Lanes wants them: aligned, each token padded with zeros to whole words.
template <class Value>
class Activations {
public:
    using Activation = typename Lanes<Value>::Activation;

    Activations(const Value* inputs, int64_t tokens, int64_t columns)
        : stride((columns + kWord - 1) / kWord * kWord), memory_(tokens * stride * sizeof(Activation)) {
        for (int64_t token = 0; token < tokens; ++token) {
            Activation* row = data() + token * stride;
            for (int64_t i = 0; i < columns; ++i) convert(inputs[token * columns + i], row + i);
            std::memset(row + columns, 0, (stride - columns) * sizeof(Activation));
        }
    }
    Activation* data() const { return reinterpret_cast<Activation*>(memory_.data()); }

    const int64_t stride;

private:
    static void convert(Value value, Value* out) { *out = value; }
    template <class Other>
    static void convert(Value value, Other* out) { *out = to_float(value); }

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
void linear(const Rows& weights, const Linear& call) {
    Activations<Value> inputs(static_cast<const Value*>(call.inputs), call.tokens, weights.columns);
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
    using Vectors = typename Rows::Vectors;
    expect_writes(out, count * weights.columns * static_cast<int64_t>(sizeof(Value)));
    int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, weights.bytes_per_row()));
    parallel_for(threads, count, grain, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            Value* to = out + row * weights.columns;
            weights.walk(first + row, [&](int, int64_t column, const auto& vector) {
                if (column + Vectors::kWidth <= weights.columns) {
                    Vectors::store(to + column, vector);
                } else if (column < weights.columns) {
                    Value rest[Vectors::kWidth];
                    Vectors::store(rest, vector);
                    std::memcpy(to + column, rest, (weights.columns - column) * sizeof(Value));
                }
            });
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
