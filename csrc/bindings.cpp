// thanos_kernels._C: picks the instruction set and exposes the kernels of kernels.h to Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace py = pybind11;

namespace thanos {

void bind_cuda(py::module_& module);

#define TIER(name) namespace name { extern const Kernels table; }
THANOS_TIERS
#undef TIER

namespace {

struct Tier {
    const char* name;
    const Kernels* table;
};

const Tier kTiers[] = {  // best first
#define TIER(name) {#name, &name::table},
    THANOS_TIERS
#undef TIER
};

// Whether there are AMX tiles of bfloat16, and the system lets this process use them; it has to be asked.
bool tiles_granted() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
    unsigned a, b, c, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBFloat16 | kTiles)) != (kBFloat16 | kTiles)) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool supported(const char* tier) {
    if (!std::strcmp(tier, "portable")) return true;
#if defined(__x86_64__)
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!std::strcmp(tier, "avx2")) return avx2;
    if (!std::strcmp(tier, "avx512")) return avx512;
    bool bfloat16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
                    __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
    if (!std::strcmp(tier, "avx512bf16")) return bfloat16;
    if (!std::strcmp(tier, "amx")) return bfloat16 && tiles_granted();
#endif
    return false;
}

const Tier* best() {
    const Tier* tier = kTiers;
    while (!supported(tier->name)) ++tier;  // the last is portable
    return tier;
}

std::atomic<const Tier*> active{best()};  // kernels run without the GIL

std::vector<std::string> supported_names() {
    std::vector<std::string> names;
    for (const Tier& tier : kTiers)
        if (supported(tier.name)) names.push_back(tier.name);
    return names;
}

void use_isa(const std::string& name) {
    std::string have;
    for (const Tier& tier : kTiers) {
        if (!supported(tier.name)) continue;
        if (name == tier.name) {
            active = &tier;
            return;
        }
        have += (have.empty() ? "" : ", ") + std::string(tier.name);
    }
    throw std::invalid_argument("instruction set '" + name + "' is not available on this machine: choose from " + have);
}

template <class T>
using Plain = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T restore(Plain<T> value) {
    if constexpr (std::is_pointer_v<T>)
        return reinterpret_cast<T>(value);
    else
        return value;
}

template <class... Arguments>
void bind(py::module_& module, const char* name, void (*Kernels::*kernel)(Arguments...)) {
    module.def(
        name, [kernel](Plain<Arguments>... arguments) { (active.load()->table->*kernel)(restore<Arguments>(arguments)...); },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace
}  // namespace thanos

PYBIND11_MODULE(_C, module) {
    module.doc() = "C++ kernels; arguments are unchecked addresses: call them through thanos_kernels.ops";
    module.attr("interface") = THANOS_INTERFACE;  // thanos_kernels/extension.py says what of
    module.def("isa", [] { return thanos::active.load()->name; }, "The instruction set in use.");
    module.def("isas", &thanos::supported_names, "The instruction sets this machine can use, best first.");
    module.def("use_isa", &thanos::use_isa, "Use this instruction set; ValueError if the machine lacks it.");
#define KERNEL(name, ...) thanos::bind(module, #name, &thanos::Kernels::name);
    THANOS_KERNELS(KERNEL)
#undef KERNEL
    thanos::bind_cuda(module);
}
