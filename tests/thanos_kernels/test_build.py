"""The choice of an instruction set, an installation without the extension, and a machine without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from thanos_kernels import extension, native

ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(not native.available(), reason="the extension is not built")
SELECTS = """
import torch, thanos_kernels
for _ in range(2):
    print(int(thanos_kernels.select_n_of_m(torch.rand(3, 8), 2, 4).sum()))
print("native" in thanos_kernels.backends())
"""
FILE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

IN_A_FORKED_CHILD = """
import os, torch
from thanos_kernels import extension, native
scores = torch.randn(2000, 512)
before = native.select_n_of_m(scores, 2, 4)
child = os.fork()
if child == 0:
    mask = native.select_n_of_m(scores, 2, 4)
    torch.set_num_threads(1)  # PyTorch's own parallel operations hang in a forked child
    os._exit(0 if mask.equal(before) else 1)
print(os.waitpid(child, 0)[1])
"""


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder that holds ``thanos_kernels`` without the extension; Python started there imports it."""
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "thanos_kernels", tmp_path / "thanos_kernels", ignore=ignored)
    return tmp_path


def selects(folder: Path, code: str = SELECTS, **environment: str) -> tuple[list[str], str]:
    """The lines that ``code`` prints in ``folder``, and what stands on stderr."""
    result = run(sys.executable, "-c", code, cwd=folder, **{"THANOS_NO_EXTENSION": "0", **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines(), result.stderr


@built
def test_an_environment_variable_forces_an_instruction_set() -> None:
    code = "from thanos_kernels import native; print(native._C.isa())"
    assert run(sys.executable, "-c", code, THANOS_ISA="portable").stdout.strip() == "portable"
    assert run(sys.executable, "-c", code, THANOS_ISA="").returncode == 0
    refused = run(sys.executable, "-c", code, THANOS_ISA="sse9")
    assert refused.returncode != 0
    assert "'sse9' is not available on this machine: choose from" in refused.stderr


@built
def test_an_unknown_instruction_set_leaves_the_one_in_use() -> None:
    before = native._C.isa()
    with pytest.raises(ValueError, match=r"choose from .*portable"):
        native._C.use_isa("sse9")
    assert native._C.isa() == before
    assert native._C.isas()[-1] == "portable"


@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_kernels_run_in_a_forked_child() -> None:
    result = run(sys.executable, "-c", IN_A_FORKED_CHILD)
    assert result.stdout.strip() == "0", result.stderr


@pytest.mark.skipif(not (ROOT / "thanos_kernels" / FILE).exists(), reason="the extension is not built")
@pytest.mark.skipif(extension.unwanted(), reason="the extension is not wanted")
def test_an_extension_that_was_built_is_used() -> None:
    assert native.available(), native.ABSENCE


def test_a_missing_extension_is_said_once_with_what_to_do(bare: Path) -> None:
    printed, said = selects(bare)
    assert printed == ["12", "12", "False"]
    assert said.count("RuntimeWarning") == 1
    assert "the C++ extension is not built" in said
    assert "many times slower" in said
    assert "python setup.py build_ext --inplace" in said


def test_it_is_not_said_where_the_extension_would_not_be_used(bare: Path) -> None:
    code = """
import torch, thanos_kernels
thanos_kernels.select_n_of_m(torch.rand(3, 8), 2, 4, backend="reference")
thanos_kernels.select_n_of_m(torch.rand(3, 8).double(), 2, 4)
thanos_kernels.pack_24(torch.eye(4, 32).half(), backend="reference")
"""
    assert selects(bare, code) == ([], "")


def test_every_kind_of_operation_says_it(bare: Path) -> None:
    code = """
import torch, warnings, thanos_kernels
from thanos_kernels import native, sparse
warnings.simplefilter("always")
thanos_kernels.pack_24(torch.eye(4, 32).half())
native._say_absence.cache_clear()
thanos_kernels.accumulate_hessian(torch.zeros(8, 8), torch.rand(4, 8).half(), 1.0)
native._say_absence.cache_clear()
sparse.bitmask_of(torch.rand(4, 8)).decode()
"""
    assert selects(bare, code)[1].count("is not built") == 3


def test_an_environment_variable_does_without_the_extension_and_silences_that(bare: Path) -> None:
    for folder in (bare, ROOT):
        assert selects(folder, THANOS_NO_EXTENSION="1") == (["12", "12", "False"], "")


def test_the_commands_say_it_in_one_plain_line(bare: Path) -> None:
    shutil.copytree(ROOT / "thanos", bare / "thanos", ignore=shutil.ignore_patterns("__pycache__"))
    _, said = selects(bare, f"from thanos.commands.quiet import silence_libraries; silence_libraries(){SELECTS}")
    assert said.startswith("Warning: the C++ extension is not built, so ")
    assert said.count("\n") == 1


def test_an_extension_for_another_python_or_machine_is_named(bare: Path) -> None:
    (bare / "thanos_kernels" / "_C.cpython-39-riscv64-linux-gnu.so").touch()
    printed, said = selects(bare)
    assert printed == ["12", "12", "False"]
    assert "built for another Python or machine (_C.cpython-39-riscv64-linux-gnu.so)" in said


def test_an_extension_that_does_not_load_is_said(bare: Path) -> None:
    (bare / "thanos_kernels" / FILE).write_bytes(b"no shared object")
    printed, said = selects(bare)
    assert printed == ["12", "12", "False"]
    assert "the C++ extension does not load (" in said


@built
def test_an_extension_of_other_sources_is_not_used(bare: Path) -> None:
    shutil.copy(ROOT / "thanos_kernels" / FILE, bare / "thanos_kernels")
    assert selects(bare) == (["12", "12", "True"], "")  # as installed, where there are no sources
    shutil.copytree(ROOT / "csrc", bare / "csrc")
    assert selects(bare) == (["12", "12", "True"], "")
    with (bare / "csrc" / "kernels.h").open("a") as header:
        header.write("// a kernel takes one more argument\n")
    printed, said = selects(bare)
    assert printed == ["12", "12", "False"]
    assert f"was not built from the sources in {bare / 'csrc'}" in said


def test_the_native_backend_is_refused_without_the_extension(bare: Path) -> None:
    code = "import torch, thanos_kernels; thanos_kernels.select_n_of_m(torch.rand(3, 8), 2, 4, backend='native')"
    refused = run(sys.executable, "-c", code, cwd=bare, THANOS_NO_EXTENSION="0")
    assert "backend='native' needs the C++ extension, but the C++ extension is not built" in refused.stderr


def test_a_missing_compiler_is_reported_with_the_way_out(tmp_path: Path) -> None:
    command = (sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path))
    failed = run(*command, CXX="/nonexistent/c++")
    assert failed.returncode != 0
    assert "no C++17 compiler found" in failed.stderr
    assert "THANOS_NO_EXTENSION=1" in failed.stderr
    assert run(*command, CXX="/nonexistent/c++", THANOS_NO_EXTENSION="1").returncode == 0
