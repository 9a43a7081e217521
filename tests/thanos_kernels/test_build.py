"""The choice of an instruction set, an installation without the extension, and a machine without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from thanos_kernels import native

ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(not native.available(), reason="the extension is not built")
WITHOUT_EXTENSION = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "thanos_kernels._C" else find(name, *rest)
import torch, thanos_kernels
assert "native" not in thanos_kernels.backends()
print(int(thanos_kernels.select_n_of_m(torch.rand(3, 8), 2, 4).sum()))
try:
    thanos_kernels.select_n_of_m(torch.rand(3, 8), 2, 4, backend="native")
except RuntimeError as error:
    print(error)
"""

IN_A_FORKED_CHILD = """
import os, torch
from thanos_kernels import native
scores = torch.randn(2000, 512)
before = native.select_n_of_m(scores, 2, 4)
child = os.fork()
if child == 0:
    mask = native.select_n_of_m(scores, 2, 4)
    torch.set_num_threads(1)  # PyTorch's own parallel operations hang in a forked child
    os._exit(0 if mask.equal(before) else 1)
print(os.waitpid(child, 0)[1])
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@built
def test_an_environment_variable_forces_an_instruction_set() -> None:
    code = "from thanos_kernels import native; print(native._C.isa())"
    assert run(sys.executable, "-c", code, THANOS_ISA="portable").stdout.strip() == "portable"
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


def test_the_operations_work_without_the_extension() -> None:
    result = run(sys.executable, "-c", WITHOUT_EXTENSION)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "12"
    assert "backend='native' needs the C++ extension" in result.stdout


def test_a_missing_compiler_is_reported_with_the_way_out(tmp_path: Path) -> None:
    command = (sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path))
    failed = run(*command, CXX="/nonexistent/c++")
    assert failed.returncode != 0
    assert "no C++17 compiler found" in failed.stderr
    assert "THANOS_NO_EXTENSION=1" in failed.stderr
    assert run(*command, CXX="/nonexistent/c++", THANOS_NO_EXTENSION="1").returncode == 0
