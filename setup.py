"""Build ``thanos_kernels._C`` from ``csrc/`` with ninja; everything else is in pyproject.toml.

A kernel source is compiled once per instruction set, each time into a namespace of its own, and the best is picked at
run time. To add a kernel: list its file in KERNELS and its signature in csrc/kernels.h.

csrc/*.cu is compiled as well where nvcc is found, with the CUDA runtime linked statically: the result imports on
machines without a GPU.

Environment: CXX names the compiler, THANOS_NO_EXTENSION=1 installs without the extension (pure PyTorch). THANOS_CUDA=0
leaves the CUDA sources out, THANOS_CUDA=1 insists on them; THANOS_CUDA_ARCHS lists the architectures ("80;90+PTX";
"+PTX" adds code that newer GPUs compile themselves); THANOS_WERROR=1 turns compiler warnings into errors;
THANOS_SANITIZE=1 builds the C++ sources alone with ASan and UBSan (CONTRIBUTING.md says how to run that).
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"
COMMON = ["bindings.cpp", "bindings_cuda.cpp", "parallel.cpp"]
KERNELS = [
    "table.cpp",
    "row_solve.cpp",
    "select.cpp",
    "select_n_of_m.cpp",
    "column_sweep.cpp",
    "hessian.cpp",
    "sparse_linear.cpp",
    "sparse_int8.cpp",
    "pack_24.cpp",
]
CUDA_KERNELS = ["pack_24.cu"]
CUDA_ARCHITECTURES = "80;90+PTX"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-Wno-maybe-uninitialized"]  # g++ 12 warns of its own headers
AVX512BF16 = [*AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni"]
AMX = [*AVX512BF16, "-mamx-tile", "-mamx-bf16"]
X86_TIERS = {"amx": AMX, "avx512bf16": AVX512BF16, "avx512": AVX512, "avx2": AVX2}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]


def switched_on(variable: str) -> bool:
    """Whether an environment variable is set, and not to 0."""
    return os.environ.get(variable, "0") not in ("", "0")


def find_compiler() -> list[str]:
    """The C++ compiler's command: CXX, or the first one found."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    raise SystemExit(
        f"error: no C++17 compiler found (looked for {', '.join(candidates)}): install one (for example "
        "'apt install g++') or name it in CXX; or set THANOS_NO_EXTENSION=1 to install without the C++ extension, "
        "which works on PyTorch alone, more slowly"
    )


def find_ninja() -> list[str]:
    return ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]


def find_tiers(compiler: list[str]) -> dict[str, list[str]]:
    """The instruction sets, best first, that this machine's kind has and the compiler knows."""
    tiers = X86_TIERS if platform.machine().lower() in ("x86_64", "amd64") else {}

    def compiles(flags: list[str]) -> bool:
        probe = [*compiler, *flags, "-x", "c++", "-E", os.devnull]
        return subprocess.run(probe, capture_output=True).returncode == 0

    return {**{name: flags for name, flags in tiers.items() if compiles(flags)}, "portable": []}


def find_nvcc() -> str | None:
    """The CUDA compiler, from CUDA_HOME or PATH; None where there is none or THANOS_CUDA=0."""
    wanted = os.environ.get("THANOS_CUDA")
    if wanted in ("", "0") or switched_on("THANOS_SANITIZE"):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None) or shutil.which("nvcc")
    if nvcc is None and wanted is not None:
        raise SystemExit("error: THANOS_CUDA asks for the CUDA kernels, but no nvcc is on PATH or under CUDA_HOME")
    return nvcc


def cuda_flags() -> list[str]:
    """nvcc's flags for the architectures of THANOS_CUDA_ARCHS."""
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    for entry in os.environ.get("THANOS_CUDA_ARCHS", CUDA_ARCHITECTURES).replace(",", ";").split(";"):
        number, ptx, rest = entry.strip().partition("+PTX")
        if not re.fullmatch(r"\d+[af]?", number) or rest:
            raise SystemExit(f"error: THANOS_CUDA_ARCHS must read like '80;90+PTX', and {entry!r} does not")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"] if ptx else []
    return flags


def ninja_file(compiler: list[str], output: Path) -> str:
    """The text of build.ninja: common sources once, kernel sources once per tier, one link."""
    import pybind11

    tiers = find_tiers(compiler)
    includes = ["-I" + sysconfig.get_path("include"), "-I" + pybind11.get_include()]
    names = "".join(f"TIER({name})" for name in tiers)
    interface = runpy.run_path(str(CSRC.parent / "thanos_kernels" / "extension.py"))["interface"]()
    defines = [f"'-DTHANOS_TIERS={names}'", f"'-DTHANOS_INTERFACE=\"{interface}\"'"]
    nvcc = find_nvcc()
    if nvcc:
        includes.append("-DTHANOS_CUDA")
    strict, sanitize = switched_on("THANOS_WERROR"), SANITIZE * switched_on("THANOS_SANITIZE")
    objects = {}
    for source in COMMON:
        objects[f"{Path(source).stem}.o"] = (source, [*includes, *defines])
    for tier, flags in tiers.items():
        for source in KERNELS:
            objects[f"{Path(source).stem}.{tier}.o"] = (source, [*flags, f"-DTHANOS_ISA={tier}"])
    link = ["-undefined", "dynamic_lookup", "-bundle"] if sys.platform == "darwin" else ["-shared"]
    link += sanitize or ["-Wl,-s"] * (sys.platform != "darwin")
    linker = f"$cxx $in -o $out -pthread -ldl {' '.join(link)}"
    if nvcc:  # it knows where its static runtime is
        linker = f"$nvcc -ccbin {compiler[0]} $in -o $out -cudart static -shared -Xcompiler -pthread -Xlinker -s"
    lines = [
        f"cxx = {shlex.join(compiler)}",
        "rule compile",
        f"  command = $cxx {' '.join([*FLAGS, *sanitize])}{' -Werror' * strict} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {linker}",
    ]
    if nvcc:
        flags = cuda_flags() + (["-Werror", "all-warnings", "-Xcompiler", "-Werror"] if strict else [])
        lines += [
            f"nvcc = {shlex.quote(nvcc)}",
            "rule cuda",
            f"  command = $nvcc -ccbin {compiler[0]} {' '.join(flags)} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        cuda = {f"{Path(source).stem}.cuda.o": source for source in CUDA_KERNELS}
        lines += [f"build {target}: cuda {escape(CSRC / source)}" for target, source in cuda.items()]
    for target, (source, extra) in objects.items():
        lines += [f"build {target}: compile {escape(CSRC / source)}", f"  flags = {' '.join(extra)}"]
    lines += [
        f"build {escape(output)}: link {' '.join([*objects, *(cuda if nvcc else [])])}",
        f"default {escape(output)}",
        "",
    ]
    return "\n".join(lines)


def escape(path: Path) -> str:
    """A path as ninja writes it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        for needed in (output.parent, folder):
            needed.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(find_compiler(), output))
        build = subprocess.run([*find_ninja(), "-C", str(folder)])
        if build.returncode:
            raise SystemExit(
                "error: compiling csrc/ failed (messages above): it needs a C++17 compiler such as g++ 9 or clang 10; "
                "set THANOS_CUDA=0 to leave out the CUDA sources, THANOS_NO_EXTENSION=1 to install without any"
            )
        # `python -m thanos.prune`, run from a checkout, imports the checkout and not what was installed.
        beside = CSRC.parent / "thanos_kernels" / output.name
        if output != beside and os.access(beside.parent, os.W_OK):
            shutil.copy2(output, beside)


pure = switched_on("THANOS_NO_EXTENSION")
extension = Extension(
    "thanos_kernels._C",
    sources=[f"csrc/{name}" for name in [*COMMON, *KERNELS]],
    depends=[f"csrc/{header.name}" for header in sorted([*CSRC.glob("*.h"), *CSRC.glob("*.cu*")])],
)
setup(ext_modules=[] if pure else [extension], cmdclass={"build_ext": NinjaBuild})
