// What both ways of accumulating a Hessian share. Included only by them.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace thanos::THANOS_ISA {
namespace {

constexpr int64_t kPackedBytes = 32 << 20;

enum Kind { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Problem {
    float* hessian;
    int64_t width;
    const char* inputs;
    int64_t stride, tokens;
    Kind kind;
    bool pairs;  // of tokens, multiplied at once
    float keep, scale;

    int64_t tokens_a_step() const { return pairs ? 2 : 1; }
};

// hessian[columns, rows] = hessian[rows, columns].T, for columns before rows.
void mirror(const Problem& problem, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end) {
    constexpr int64_t kSquare = 16;
    float block[kSquare][kSquare];
    float* hessian = problem.hessian;
    for (int64_t row = row_begin; row < row_end; row += kSquare)
        for (int64_t column = column_begin; column < column_end; column += kSquare) {
            int64_t rows = minimum(kSquare, row_end - row), columns = minimum(kSquare, column_end - column);
            for (int64_t i = 0; i < rows; ++i)
                std::memcpy(block[i], hessian + (row + i) * problem.width + column, columns * sizeof(float));
            for (int64_t j = 0; j < columns; ++j) {
                float* to = hessian + (column + j) * problem.width + row;
                for (int64_t i = 0; i < rows; ++i)
                    if (column + j < row + i) to[i] = block[i][j];
            }
        }
}

}  // namespace
}  // namespace thanos::THANOS_ISA
