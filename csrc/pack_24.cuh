// 2:4 packing on NVIDIA GPUs, as seen by the host compiler. Pointers are device addresses; *offender (uint64) must hold
// the largest value and becomes the first bad group. Runs on `stream`; returns an error's text, or null.
#pragma once

#include <cstdint>

namespace thanos {

const char* cuda_pack_24(const void* weights, void* values, void* metadata, void* offender, int64_t rows,
                         int64_t columns, int item_size, bool pairs, int layout, void* stream);
const char* cuda_unpack_24(const void* values, const void* metadata, void* weights, void* offender, int64_t rows,
                           int64_t columns, int item_size, bool pairs, int layout, void* stream);

}  // namespace thanos
