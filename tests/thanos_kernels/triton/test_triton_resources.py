"""Every kernel compiles for every chip, in every configuration, within the chip's means."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from thanos_kernels import triton

ROOT = Path(__file__).parents[3]
# Triton 3.4 links AMD's code with the linker of ROCm; later ones bring their own.
LINKS_AMD = (triton.version() or (0,)) >= (3, 5) or Path("/opt/rocm/llvm/bin/ld.lld").exists()
# The compilers of Triton 3.4 to 3.7 spill here and there.
SPARES_REGISTERS = (triton.version() or (0,)) >= (3, 9)
CHIPS = ["sm_80", "sm_90", "sm_100", *(["gfx942"] if LINKS_AMD else [])]


@pytest.fixture(scope="module")
def report() -> list[dict[str, str | int]]:
    """Compiled in processes of its own: the interpreter is on in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--json", *(f"--chip={chip}" for chip in CHIPS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("["), done.stderr
    found: list[dict[str, str | int]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("chip", CHIPS)
def test_nothing_spills_and_everything_fits(report: list[dict[str, str | int]], chip: str) -> None:
    mine = [one for one in report if one["chip"] == chip]
    assert len(mine) > 30
    problems = [f"{one['kernel']}: {one['problem']}" for one in mine if one["problem"]]
    assert [one for one in problems if SPARES_REGISTERS or "spills" not in one] == []
    assert all(int(one["registers"]) > 0 for one in mine)


def test_products_run_on_the_matrix_units(report: list[dict[str, str | int]]) -> None:
    found = {str(one["chip"]): set() for one in report}
    for one in report:
        if str(one["kernel"]).startswith("hessian"):
            found[str(one["chip"])].add(one["matrix"])
    wanted = {"sm_80": {"mma"}, "sm_90": {"wgmma"}, "sm_100": {"tcgen05"}, "gfx942": {"mfma"}}
    assert found == {chip: wanted[chip] for chip in CHIPS}
