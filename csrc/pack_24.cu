// 2:4 packing on NVIDIA GPUs: one thread packs or unpacks one word of metadata with the inner functions of pack_24.h.
#include <cuda_runtime.h>

#include "pack_24.cuh"
#include "pack_24.h"

namespace thanos {
namespace {

using namespace pack_24_detail;

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;

__device__ void report(unsigned long long* offender, int64_t group) {
    atomicMin(offender, static_cast<unsigned long long>(group));  // starts at the largest value: none
}

template <class Kind>
__global__ void pack_kernel(const typename Kind::Value* __restrict__ weights, typename Kind::Value* __restrict__ values,
                            typename Kind::Word* __restrict__ metadata, unsigned long long* offender, int64_t rows,
                            int64_t words, int layout) {
    constexpr int64_t kWeights = Shape<Kind>::kWeights;
    int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rows * words; i += stride) {
        int64_t to = word_offset<typename Kind::Word>(layout, i / words, i % words, rows, words);
        int bad = pack_word<Kind>(weights + i * kWeights, values + i * kWeights / 2, metadata + to);
        if (bad >= 0) report(offender, i * Shape<Kind>::kGroups + bad);
    }
}

template <class Kind>
__global__ void unpack_kernel(const typename Kind::Value* __restrict__ values,
                              const typename Kind::Word* __restrict__ metadata,
                              typename Kind::Value* __restrict__ weights, unsigned long long* offender, int64_t rows,
                              int64_t words, int layout) {
    constexpr int64_t kWeights = Shape<Kind>::kWeights;
    int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rows * words; i += stride) {
        int64_t from = word_offset<typename Kind::Word>(layout, i / words, i % words, rows, words);
        int bad = unpack_word<Kind>(values + i * kWeights / 2, metadata[from], weights + i * kWeights);
        if (bad >= 0) report(offender, i * Shape<Kind>::kGroups + bad);
    }
}

unsigned blocks_for(int64_t words) {
    int64_t blocks = (words + kThreads - 1) / kThreads;
    return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

template <class Kind>
void pack(const void* weights, void* values, void* metadata, void* offender, int64_t rows, int64_t columns, int layout,
          cudaStream_t stream) {
    using Value = typename Kind::Value;
    int64_t words = columns / Shape<Kind>::kWeights;
    pack_kernel<Kind><<<blocks_for(rows * words), kThreads, 0, stream>>>(
        static_cast<const Value*>(weights), static_cast<Value*>(values), static_cast<typename Kind::Word*>(metadata),
        static_cast<unsigned long long*>(offender), rows, words, layout);
}

template <class Kind>
void unpack(const void* values, const void* metadata, void* weights, void* offender, int64_t rows, int64_t columns,
            int layout, cudaStream_t stream) {
    using Value = typename Kind::Value;
    int64_t words = columns / Shape<Kind>::kWeights;
    unpack_kernel<Kind><<<blocks_for(rows * words), kThreads, 0, stream>>>(
        static_cast<const Value*>(values), static_cast<const typename Kind::Word*>(metadata),
        static_cast<Value*>(weights), static_cast<unsigned long long*>(offender), rows, words, layout);
}

}  // namespace

const char* cuda_pack_24(const void* weights, void* values, void* metadata, void* offender, int64_t rows,
                         int64_t columns, int item_size, bool pairs, int layout, void* stream) {
    auto run = item_size == 1 ? pack<Byte> : item_size == 2 ? pack<Half> : pairs ? pack<SinglePairs> : pack<Single>;
    run(weights, values, metadata, offender, rows, columns, layout, static_cast<cudaStream_t>(stream));
    cudaError_t status = cudaGetLastError();
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

const char* cuda_unpack_24(const void* values, const void* metadata, void* weights, void* offender, int64_t rows,
                           int64_t columns, int item_size, bool pairs, int layout, void* stream) {
    auto run =
        item_size == 1 ? unpack<Byte> : item_size == 2 ? unpack<Half> : pairs ? unpack<SinglePairs> : unpack<Single>;
    run(values, metadata, weights, offender, rows, columns, layout, static_cast<cudaStream_t>(stream));
    cudaError_t status = cudaGetLastError();
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace thanos
