// The n smallest of m values in each lane, by counting for each value those that come before it.
#pragma once

#include "simd.h"

namespace thanos::THANOS_ISA {
namespace {

// Integers that order as the floats do: -0.0 equals 0.0, NaN comes last.
inline IntVec order_keys(Vec value) {
    IntVec bits = reinterpret_cast<IntVec>(value + broadcast(0.0f));  // turns -0.0 into 0.0
    IntVec keys = bits < 0 ? bits ^ 0x7fffffff : bits;
    return value == value ? keys : (IntVec{} + 0x7fffffff);
}

// Sets taken[i] to -1 in the lanes where keys[i] is among the n smallest, ties to the lower index, and to 0 elsewhere.
inline void mark_smallest(const IntVec* keys, int64_t m, int64_t n, IntVec* taken) {
    for (int64_t i = 0; i < m; ++i) {
        IntVec key = keys[i], before = {};
        for (int64_t j = 0; j < i; ++j) before -= keys[j] <= key;
        for (int64_t j = i + 1; j < m; ++j) before -= keys[j] < key;
        taken[i] = before < static_cast<int32_t>(n);
    }
}

}  // namespace
}  // namespace thanos::THANOS_ISA
