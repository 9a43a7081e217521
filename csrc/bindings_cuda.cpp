// The CUDA kernels for Python; in a build without nvcc the module only says that it has none.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "pack_24.cuh"

namespace py = pybind11;

namespace thanos {

#if defined(THANOS_CUDA)

template <class First, class Second>
static void bind(py::module_& module, const char* name,
                 const char* (*kernel)(const void*, First, Second, void*, int64_t, int64_t, int, bool, int, void*)) {
    module.def(
        name,
        [kernel, name](std::uintptr_t a, std::uintptr_t b, std::uintptr_t c, std::uintptr_t offender, int64_t rows,
                       int64_t columns, int item_size, bool pairs, int layout, std::uintptr_t stream) {
            const char* error =
                kernel(reinterpret_cast<const void*>(a), reinterpret_cast<First>(b), reinterpret_cast<Second>(c),
                       reinterpret_cast<void*>(offender), rows, columns, item_size, pairs, layout,
                       reinterpret_cast<void*>(stream));
            if (error) throw std::runtime_error(std::string(name) + ": " + error);
        },
        py::call_guard<py::gil_scoped_release>());
}

#endif

void bind_cuda(py::module_& module) {
#if defined(THANOS_CUDA)
    module.attr("cuda") = true;
    bind(module, "cuda_pack_24", cuda_pack_24);
    bind(module, "cuda_unpack_24", cuda_unpack_24);
#else
    module.attr("cuda") = false;
#endif
}

}  // namespace thanos
