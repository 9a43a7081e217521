"""Build ``thanos_kernels._C`` from ``csrc/`` with ninja; everything else is in pyproject.toml.

A kernel source is compiled once per instruction set, each time into a namespace of its own, and the best is picked at
run time. To add a kernel: list its file in KERNELS and its signature in csrc/kernels.h.

Environment: CXX names the compiler, THANOS_NO_EXTENSION=1 installs without the extension (pure PyTorch).
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"
COMMON = ["bindings.cpp", "parallel.cpp"]
KERNELS = [
    "table.cpp",
    "row_solve.cpp",
    "select.cpp",
    "select_n_of_m.cpp",
    "column_sweep.cpp",
    "hessian.cpp",
    "sparse_linear.cpp",
]
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-Wno-maybe-uninitialized"]  # g++ 12 warns of its own headers
X86_TIERS = {"avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vbmi2"], "avx512": AVX512, "avx2": AVX2}


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


def ninja_file(compiler: list[str], output: Path) -> str:
    """The text of build.ninja: common sources once, kernel sources once per tier, one link."""
    import pybind11

    tiers = find_tiers(compiler)
    includes = ["-I" + sysconfig.get_path("include"), "-I" + pybind11.get_include()]
    names = "".join(f"TIER({name})" for name in tiers)
    objects = {}
    for source in COMMON:
        objects[f"{Path(source).stem}.o"] = (source, [*includes, f"'-DTHANOS_TIERS={names}'"])
    for tier, flags in tiers.items():
        for source in KERNELS:
            objects[f"{Path(source).stem}.{tier}.o"] = (source, [*flags, f"-DTHANOS_ISA={tier}"])
    link = ["-undefined", "dynamic_lookup", "-bundle"] if sys.platform == "darwin" else ["-shared", "-Wl,-s"]
    lines = [
        f"cxx = {shlex.join(compiler)}",
        "rule compile",
        f"  command = $cxx {' '.join(FLAGS)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in -o $out -pthread {' '.join(link)}",
    ]
    for target, (source, extra) in objects.items():
        lines += [f"build {target}: compile {escape(CSRC / source)}", f"  flags = {' '.join(extra)}"]
    lines += [f"build {escape(output)}: link {' '.join(objects)}", f"default {escape(output)}", ""]
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
                "set THANOS_NO_EXTENSION=1 to install without the C++ extension"
            )


pure = os.environ.get("THANOS_NO_EXTENSION", "0") not in ("", "0")
extension = Extension(
    "thanos_kernels._C",
    sources=[f"csrc/{name}" for name in [*COMMON, *KERNELS]],
    depends=[f"csrc/{header.name}" for header in sorted(CSRC.glob("*.h"))],
)
setup(ext_modules=[] if pure else [extension], cmdclass={"build_ext": NinjaBuild})
