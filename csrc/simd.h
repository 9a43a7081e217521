// Vectors of the widest kind this instruction set has, in GCC's and Clang's vector extension. Included only by kernels.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace thanos::THANOS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));  // also the type of comparisons: 0 or -1 a lane

inline Vec load(const float* from) {
    Vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

inline Vec broadcast(float value) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec>(_mm512_set1_ps(value));
#elif defined(__AVX2__)
    return reinterpret_cast<Vec>(_mm256_set1_ps(value));
#else
    return Vec{value, value, value, value};
#endif
}

inline Vec choose(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }

inline Vec square_root(Vec value) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec>(_mm512_sqrt_ps(reinterpret_cast<__m512>(value)));
#elif defined(__AVX2__)
    return reinterpret_cast<Vec>(_mm256_sqrt_ps(reinterpret_cast<__m256>(value)));
#else
    for (int lane = 0; lane < kLanes; ++lane) value[lane] = __builtin_sqrtf(value[lane]);
    return value;
#endif
}

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace thanos::THANOS_ISA
