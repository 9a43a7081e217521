// How the row solve's systems get into lanes and its solutions out of them: with AVX-512 a row's masked entries are
// compressed together and 16 rows transposed at a time, three times as fast as gathering them one by one.
#pragma once

#include "simd.h"

namespace thanos::THANOS_ISA {
namespace {

constexpr int64_t kChunk = 16;  // columns a mask word covers

// Packs a row of the mask 16 columns a word and counts its set columns.
inline int64_t pack_mask(const uint8_t* mask, int64_t width, uint16_t* bits) {
    int64_t count = 0;
    for (int64_t start = 0; start < width; start += kChunk) {
        int64_t valid = minimum(kChunk, width - start);
        uint32_t word = 0;
#if defined(__AVX512F__)
        word = _mm_cmpneq_epi8_mask(_mm_maskz_loadu_epi8((1u << valid) - 1, mask + start), _mm_setzero_si128());
#else
        for (int64_t j = 0; j < valid; ++j) word |= static_cast<uint32_t>(mask[start + j] & 1) << j;
#endif
        *bits++ = static_cast<uint16_t>(word);
        count += __builtin_popcount(word);
    }
    return count;
}

// The masked columns of kLanes rows, and a row of scratch for each.
struct Lists {
    int32_t* columns;   // [kLanes][stride]
    float* rows;        // [kLanes][stride]
    int32_t* offsets;   // [kLanes][chunks]: masked columns before each chunk
    const uint16_t* bits[kLanes];  // packed masks
    int64_t counts[kLanes];
    int64_t stride, chunks;

    static int64_t row_stride(int64_t largest) { return ceil_div(largest + 2 * kChunk, kChunk) * kChunk; }
    static size_t bytes(int64_t largest, int64_t width) {
        return kLanes * (2 * row_stride(largest) + ceil_div(width, kChunk)) * sizeof(float);
    }
    Lists(char* space, int64_t largest, int64_t width) : stride(row_stride(largest)), chunks(ceil_div(width, kChunk)) {
        columns = reinterpret_cast<int32_t*>(space);
        rows = reinterpret_cast<float*>(columns + kLanes * stride);
        offsets = reinterpret_cast<int32_t*>(rows + kLanes * stride);
    }

    void fill(int lane, const uint16_t* mask_bits) {
        bits[lane] = mask_bits;
        int32_t* list = columns + lane * stride;
        int32_t count = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            offsets[lane * chunks + chunk] = count;
            int32_t first = static_cast<int32_t>(chunk * kChunk);
#if defined(__AVX512F__)
            __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            index = _mm512_add_epi32(index, _mm512_set1_epi32(first));
            _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(mask_bits[chunk], index));
            count += __builtin_popcount(mask_bits[chunk]);
#else
            for (uint32_t left = mask_bits[chunk]; left; left &= left - 1)
                list[count++] = first + __builtin_ctz(left);
#endif
        }
        counts[lane] = count;
    }
};

#if defined(__AVX512F__)

// Compresses the masked ones among the columns of the first `chunks` chunks into the lane's scratch row.
inline void compress(Lists& lists, int lane, const float* from, int64_t chunks) {
    float* to = lists.rows + lane * lists.stride;
    const int32_t* offsets = lists.offsets + lane * lists.chunks;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        __mmask16 wanted = lists.bits[lane][chunk];
        __m512 values = _mm512_maskz_loadu_ps(wanted, from + chunk * kChunk);
        _mm512_storeu_ps(to + offsets[chunk], _mm512_maskz_compress_ps(wanted, values));
    }
}

inline void transpose(__m512 (&v)[16]) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int h = 0; h < 2; ++h) {
            __m512d low = _mm512_castps_pd(t[i + h]), high = _mm512_castps_pd(t[i + h + 2]);
            v[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            v[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    for (int j = 0; j < 4; ++j) {  // v[4 a + j] holds, in its 128-bit part p, column 4 p + j of rows 4 a..4 a + 3
        __m512 low01 = _mm512_shuffle_f32x4(v[j], v[4 + j], 0x88), high01 = _mm512_shuffle_f32x4(v[j], v[4 + j], 0xdd);
        __m512 low23 = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0x88),
               high23 = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0xdd);
        t[j] = _mm512_shuffle_f32x4(low01, low23, 0x88);
        t[8 + j] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
        t[4 + j] = _mm512_shuffle_f32x4(high01, high23, 0x88);
        t[12 + j] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
    }
    for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// Writes entries 0..count of the scratch rows as vectors, `step` apart; up to 15 more are written.
inline void spread(const Lists& lists, int64_t count, Vec* to, int64_t step) {
    for (int64_t k = 0; k < count; k += 16) {
        __m512 block[16];
        for (int lane = 0; lane < 16; ++lane) block[lane] = _mm512_loadu_ps(lists.rows + lane * lists.stride + k);
        transpose(block);
        for (int i = 0; i < 16; ++i) to[(k + i) * step] = reinterpret_cast<Vec>(block[i]);
    }
}

#else

inline void compress(Lists& lists, int lane, const float* from, int64_t chunks) {
    const int32_t* columns = lists.columns + lane * lists.stride;
    float* to = lists.rows + lane * lists.stride;
    for (int64_t k = 0; k < lists.counts[lane] && columns[k] < chunks * kChunk; ++k) to[k] = from[columns[k]];
}

inline void spread(const Lists& lists, int64_t count, Vec* to, int64_t step) {
    for (int lane = 0; lane < kLanes; ++lane)
        for (int64_t k = 0; k < count; ++k)
            reinterpret_cast<float*>(to + k * step)[lane] = lists.rows[lane * lists.stride + k];
}

#endif

// Fills to[k * step] for k <= i with gram[q_i, q_k] in each lane, with the identity where the lane's system is smaller.
inline void gather_row(Lists& lists, const float* gram, int64_t gram_stride, int64_t i, Vec* to, int64_t step) {
    // One length for all lanes, because a loop's end that differs from lane to lane is mispredicted in each.
    int64_t last = 0;
    for (int lane = 0; lane < kLanes; ++lane)
        if (i < lists.counts[lane]) last = maximum(last, lists.columns[lane * lists.stride + i]);
    for (int lane = 0; lane < kLanes; ++lane) {
        if (i < lists.counts[lane]) {
            compress(lists, lane, gram + lists.columns[lane * lists.stride + i] * gram_stride, last / kChunk + 1);
        } else {
            float* row = lists.rows + lane * lists.stride;
            std::memset(row, 0, i * sizeof(float));
            row[i] = 1.0f;
        }
    }
    spread(lists, i + 1, to, step);
}

}  // namespace
}  // namespace thanos::THANOS_ISA
