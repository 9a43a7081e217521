// How the row solve's systems get into lanes and its solutions out of them: with AVX-512, 16 of a row's masked entries are
// permuted together from a window of 32 columns or a few, and 16 rows transposed at a time.
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

constexpr int64_t kWindow = 32;  // columns that one permutation takes its entries from

// Columns of the copy of the Gram matrix: windows may reach beyond the last.
inline int64_t gram_stride_of(int64_t width) { return ceil_div(width + kWindow, kChunk) * kChunk; }

// The masked columns of kLanes rows, and a row of scratch for each. Columns go in runs of kChunk masked ones.
struct Lists {
    int32_t* columns;  // [kLanes][stride]
    float* rows;       // [kLanes][stride]
    int32_t* offsets;  // [stride / kChunk][kLanes][kChunk]: of a run's columns, from its first
    int32_t* firsts;   // [stride / kChunk][kLanes]: the first column of a run
    int32_t* lasts;    // [stride / kChunk][kLanes]: the last offset of a run
    int64_t counts[kLanes];
    int64_t stride;

    static int64_t row_stride(int64_t largest) { return ceil_div(largest + 2 * kChunk, kChunk) * kChunk; }
    static size_t bytes(int64_t largest) {
        return kLanes * (3 * row_stride(largest) + 2 * row_stride(largest) / kChunk) * sizeof(float);
    }
    Lists(char* space, int64_t largest) : stride(row_stride(largest)) {
        columns = reinterpret_cast<int32_t*>(space);
        rows = reinterpret_cast<float*>(columns + kLanes * stride);
        offsets = reinterpret_cast<int32_t*>(rows + kLanes * stride);
        firsts = offsets + kLanes * stride;
        lasts = firsts + kLanes * stride / kChunk;
        std::memset(offsets, 0, kLanes * (stride + 2 * stride / kChunk) * sizeof(int32_t));
    }

    // Lists the masked columns of `width` columns, and compresses the same entries of `values` into the scratch row.
    void fill(int lane, const uint16_t* bits, const float* values, int64_t width);
};

#if defined(__AVX512F__)

inline void Lists::fill(int lane, const uint16_t* bits, const float* values, int64_t width) {
    int32_t* list = columns + lane * stride;
    float* row = rows + lane * stride;
    int64_t count = 0;
    __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t start = 0; start < width; start += kChunk) {
        __mmask16 wanted = bits[start / kChunk];
        _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(wanted, index));
        _mm512_storeu_ps(row + count, _mm512_maskz_compress_ps(wanted, _mm512_maskz_loadu_ps(wanted, values + start)));
        index = _mm512_add_epi32(index, _mm512_set1_epi32(kChunk));
        count += __builtin_popcount(wanted);
    }
    counts[lane] = count;
    for (int64_t run = 0; run * kChunk < count; ++run) {
        int64_t left = count - run * kChunk;
        __mmask16 valid = left >= kChunk ? 0xffff : (1u << left) - 1;
        int32_t first = list[run * kChunk];
        __m512i here = _mm512_sub_epi32(_mm512_load_si512(list + run * kChunk), _mm512_set1_epi32(first));
        _mm512_store_si512(offsets + (run * kLanes + lane) * kChunk, _mm512_maskz_mov_epi32(valid, here));
        firsts[run * kLanes + lane] = first;
        lasts[run * kLanes + lane] = list[minimum(run * kChunk + kChunk, count) - 1] - first;
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

// Writes entries 0..count of the scratch rows as vectors; up to 15 more are written.
inline void spread(const Lists& lists, int64_t count, Vec* to) {
    for (int64_t k = 0; k < count; k += kChunk) {
        __m512 block[16];
        for (int lane = 0; lane < 16; ++lane) block[lane] = _mm512_loadu_ps(lists.rows + lane * lists.stride + k);
        transpose(block);
        for (int i = 0; i < 16; ++i) to[k + i] = reinterpret_cast<Vec>(block[i]);
    }
}

// Turns the first `count` vectors into the scratch rows of the lanes.
inline void unspread(Lists& lists, int64_t count, const Vec* from) {
    for (int64_t k = 0; k < count; k += kChunk) {
        __m512 block[16];
        for (int i = 0; i < 16; ++i) block[i] = reinterpret_cast<__m512>(from[k + i]);
        transpose(block);
        for (int lane = 0; lane < 16; ++lane) _mm512_storeu_ps(lists.rows + lane * lists.stride + k, block[lane]);
    }
}

// Writes a lane's scratch row to its masked columns of `width`, zeros to the others.
inline void scatter(const Lists& lists, int lane, const uint16_t* bits, float* to, int64_t width) {
    const float* row = lists.rows + lane * lists.stride;
    for (int64_t start = 0; start < width; start += kChunk) {
        __mmask16 valid = width - start >= kChunk ? 0xffff : (1u << (width - start)) - 1;
        __mmask16 wanted = bits[start / kChunk];
        _mm512_mask_storeu_ps(to + start, valid, _mm512_maskz_expand_ps(wanted, _mm512_loadu_ps(row)));
        row += __builtin_popcount(wanted);
    }
}

// Fills to[k * step] for k <= i with gram[q_i, q_k] in each lane, with the identity where the lane's system is smaller.
// Up to 15 more are written.
inline void gather_row(const Lists& lists, const float* gram, int64_t gram_stride, int64_t i, Vec* to, int64_t step) {
    const float* sources[16];
    bool all = true;
    for (int lane = 0; lane < 16; ++lane) {
        bool within = i < lists.counts[lane];
        sources[lane] = gram + (within ? lists.columns[lane * lists.stride + i] : 0) * gram_stride;
        all &= within;
    }
    const int32_t* first = lists.firsts;
    const int32_t* last = lists.lasts;
    const int32_t* offsets = lists.offsets;
    for (int64_t k = 0; k <= i; k += kChunk, first += 16, last += 16, offsets += 16 * kChunk, to += kChunk * step) {
        __m512 block[16];
#pragma GCC unroll 16
        for (int lane = 0; lane < 16; ++lane) {
            const float* from = sources[lane] + first[lane];
            __m512i offset = _mm512_load_si512(offsets + lane * kChunk);
            block[lane] = _mm512_permutex2var_ps(_mm512_loadu_ps(from), offset, _mm512_loadu_ps(from + 16));
            for (int32_t start = kWindow; start <= last[lane]; start += kWindow) {
                __mmask16 later = _mm512_cmpge_epi32_mask(offset, _mm512_set1_epi32(start));
                from += kWindow;
                __m512 more = _mm512_permutex2var_ps(_mm512_loadu_ps(from), offset, _mm512_loadu_ps(from + 16));
                block[lane] = _mm512_mask_mov_ps(block[lane], later, more);
            }
        }
        if (!all) {
            __m512 identity = _mm512_maskz_mov_ps(i - k < kChunk ? 1u << (i - k) : 0, _mm512_set1_ps(1.0f));
#pragma GCC unroll 16
            for (int lane = 0; lane < 16; ++lane)
                if (i >= lists.counts[lane]) block[lane] = identity;
        }
        transpose(block);
#pragma GCC unroll 16
        for (int c = 0; c < 16; ++c) to[c * step] = reinterpret_cast<Vec>(block[c]);
    }
}

#else

inline void Lists::fill(int lane, const uint16_t* bits, const float* values, int64_t width) {
    int32_t* list = columns + lane * stride;
    int32_t count = 0;
    for (int64_t start = 0; start < width; start += kChunk)
        for (uint32_t left = bits[start / kChunk]; left; left &= left - 1)
            list[count++] = static_cast<int32_t>(start) + __builtin_ctz(left);
    counts[lane] = count;
    for (int32_t k = 0; k < count; ++k) rows[lane * stride + k] = values[list[k]];
}

inline void spread(const Lists& lists, int64_t count, Vec* to) {
    for (int lane = 0; lane < kLanes; ++lane)
        for (int64_t k = 0; k < count; ++k) reinterpret_cast<float*>(to + k)[lane] = lists.rows[lane * lists.stride + k];
}

inline void unspread(Lists& lists, int64_t count, const Vec* from) {
    for (int lane = 0; lane < kLanes; ++lane)
        for (int64_t k = 0; k < count; ++k)
            lists.rows[lane * lists.stride + k] = reinterpret_cast<const float*>(from + k)[lane];
}

inline void scatter(const Lists& lists, int lane, const uint16_t*, float* to, int64_t width) {
    const int32_t* columns = lists.columns + lane * lists.stride;
    std::memset(to, 0, width * sizeof(float));
    for (int64_t k = 0; k < lists.counts[lane]; ++k) to[columns[k]] = lists.rows[lane * lists.stride + k];
}

inline void gather_row(const Lists& lists, const float* gram, int64_t gram_stride, int64_t i, Vec* to, int64_t step) {
    for (int lane = 0; lane < kLanes; ++lane) {
        const int32_t* columns = lists.columns + lane * lists.stride;
        bool within = i < lists.counts[lane];
        const float* from = gram + (within ? columns[i] : 0) * gram_stride;
        for (int64_t k = 0; k <= i; ++k) reinterpret_cast<float*>(to + k * step)[lane] = within ? from[columns[k]] : k == i;
    }
}

#endif

}  // namespace
}  // namespace thanos::THANOS_ISA
