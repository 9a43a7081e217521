"""Every launch that the operations and the engine make compiles for every chip, within the chip's means."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from benchmarks import kernel_resources
from thanos_kernels import triton as backend
from thanos_kernels.triton import hessian, row_solve, row_solve_blocked, sweep

ROOT = Path(__file__).parents[3]
VERSION = backend.version() or (0,)
# Triton 3.4 links AMD's code with the linker of ROCm; later ones bring their own.
LINKS_AMD = VERSION >= (3, 5) or Path("/opt/rocm/llvm/bin/ld.lld").exists()
# What is pinned; the compilers of Triton 3.4 and 3.5 spill here and there.
SPARES_REGISTERS = VERSION >= (3, 9)
CHIPS = ["sm_80", "sm_90", "sm_100", *(["gfx942"] if LINKS_AMD else [])]
KERNELS = {
    "row_solve": {"row_solve.plan", "row_solve.pairs", "row_solve_blocked.blocked"},
    "select_smallest": {"select.exponents", "select.mantissas", "select.ties", "select.residual_mask"},
    "count_scores": {"select_shared.digits"},
    "select_below": {"select_shared.equals", "select.residual_mask"},
    "select_per_row": {"select_groups.per_row"},
    "select_n_of_m": {"select_groups.n_of_m"},
    "column_sweep": {"sweep.sweep"},
    "column_sweep_n_of_m": {"sweep.sweep_n_of_m"},
    "accumulate_hessian": {"hessian.lower_tiles"},
}
HAVE_AN_ALIGNED_FORM = set[str]().union(
    *(
        KERNELS[name]
        for name in ("select_smallest", "count_scores", "select_below", "select_per_row", "accumulate_hessian")
    )
)
MULTIPLY = {"row_solve_blocked.blocked", "sweep.sweep", "sweep.sweep_n_of_m", "hessian.lower_tiles"}


def told_by(folder: Path, *arguments: str) -> Any:
    """The JSON that Python prints in a process of its own: the interpreter of kernels is on in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = told_by(tmp_path_factory.mktemp("triton"), "-m", "launch_report", *CHIPS)
    return found


def made_by(report: dict[str, Any], operation: str, chip: str) -> list[dict[str, Any]]:
    """The launches of an operation, each with its resources."""
    return [report["launches"][number] for number in report["operations"][chip][operation]]


@pytest.mark.parametrize("chip", CHIPS)
def test_every_launch_compiles_fits_and_spills_nothing(report: dict[str, Any], chip: str) -> None:
    mine = [one for one in report["launches"] if one["chip"] == chip]
    problems = [f"{one['kernel']} ({one['form']}): {one['problem']}" for one in mine if one["problem"]]
    assert [one for one in problems if SPARES_REGISTERS or "spills" not in one] == []
    assert all(one["binary"] > 1000 and one["registers"] > 0 for one in mine)
    assert len(mine) > 80


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("operation", backend.OPERATIONS)
def test_every_operation_was_recorded_in_all_its_forms(report: dict[str, Any], operation: str, chip: str) -> None:
    launches = made_by(report, operation, chip)
    assert {one["name"] for one in launches} == KERNELS[operation]
    for name in KERNELS[operation]:
        forms = [one for one in launches if one["name"] == name]
        if "stride_column" in forms[0]["types"]:
            assert {"stride_column" in one["constants"] for one in forms} == {True, False}
        aligned = {"stride_row" in one["divisible"] or "stride_token" in one["divisible"] for one in forms}
        assert aligned == ({True, False} if name in HAVE_AN_ALIGNED_FORM else {False})


@pytest.mark.parametrize("chip", CHIPS)
def test_every_configuration_of_the_tuners_was_recorded(report: dict[str, Any], chip: str) -> None:
    def launched(operation: str, name: str, *constants: str) -> set[tuple[Any, ...]]:
        return {
            (*(one["constants"][constant] for constant in constants), one["warps"], one["stages"])
            for one in made_by(report, operation, chip)
            if one["name"] == name
        }

    pairs = {(*pair, one.num_warps, one.num_stages) for pair in row_solve.PAIRS for one in row_solve._configs(pair)}
    assert launched("row_solve", "row_solve.pairs", "FIRST", "SECOND") == pairs
    plain = {(one.num_warps, one.num_stages) for one in row_solve_blocked._CONFIGS}
    assert launched("row_solve", "row_solve_blocked.blocked") == plain
    for operation, name in (("column_sweep", "sweep.sweep"), ("column_sweep_n_of_m", "sweep.sweep_n_of_m")):
        assert launched(operation, name) == {(one.num_warps, one.num_stages) for one in sweep._CONFIGS}
    tiles = {(one.kwargs["SIZE"], one.num_warps, one.num_stages) for one in hessian._CONFIGS + hessian._CONFIGS_32}
    assert launched("accumulate_hessian", "hessian.lower_tiles", "SIZE") == tiles
    inputs = {one["types"]["inputs"] for one in made_by(report, "accumulate_hessian", chip)}
    assert inputs == {"*fp32", "*bf16", "*fp16"}


def test_no_number_becomes_a_constant_but_the_stride_of_columns(report: dict[str, Any]) -> None:
    """A method of a constant does not compile: ``bucket`` and ``tokens`` were 1 on every GPU that somebody had."""
    undeclared = {(one["name"], name) for one in report["launches"] for name in one["constants"] if name.islower()}
    assert {name for _, name in undeclared} == {"stride_column"}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("method", ["thanos", "sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("pattern", ["0.5", "2:4", "4:8", "structured:0.3"])
def test_the_engine_launches_what_was_recorded_alone(
    report: dict[str, Any], pattern: str, method: str, chip: str
) -> None:
    known = {number for numbers in report["operations"][chip].values() for number in numbers}
    for alpha in (0.0, 0.1):
        launched = set(report["engine"][chip][f"{method} {pattern} {alpha}"])
        assert bool(launched) == (pattern != "structured:0.3" or method == "sparsegpt")
        assert launched <= known


@pytest.mark.parametrize("operation", backend.OPERATIONS)
def test_launches_go_to_the_device_of_their_tensors(report: dict[str, Any], operation: str) -> None:
    """Tensors on device 1 while device 0 is current; what an operation allocates lies beside them."""
    places = report["places"][operation]
    assert len(places) > 1
    assert all(place == [1, ["cuda:1"]] for place in places)


def test_products_run_on_the_matrix_units(report: dict[str, Any]) -> None:
    found: dict[str, dict[str, set[str]]] = {}
    for one in report["launches"]:
        found.setdefault(one["chip"], {}).setdefault(one["name"], set()).add(one["matrix"])
    best = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for chip, instructions in found.items():
        assert instructions["hessian.lower_tiles"] == {best[chip]}
        assert {name for name, used in instructions.items() if used != {""}} == MULTIPLY


@pytest.mark.parametrize("kernel", ["sweep.sweep", "sweep.sweep_n_of_m"])
def test_a_sweep_multiplies_in_64_bits(report: dict[str, Any], kernel: str) -> None:
    """The factor of a block of 46341 columns or more has more than 2^31 elements."""
    assert report["products"][kernel] == []


def test_the_table_in_the_docs_is_of_these_launches(report: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    numbers = {number for by_name in report["operations"].values() for made in by_name.values() for number in made}
    fields = kernel_resources.Resources.__dataclass_fields__
    launches = [report["launches"][number] for number in sorted(numbers)]
    table = kernel_resources.markdown(
        kernel_resources.Resources(**{name: one[name] for name in fields}) for one in launches
    )
    of_version = re.search(r"with Triton (\d+\.\d+\.\d+)", text)
    assert of_version is not None
    if of_version[1] == triton.__version__ and LINKS_AMD:
        assert table in text
    else:
        assert [line.split("|")[1] for line in table.splitlines()] == re.findall(
            r"^\|([^|]*)\|", text[text.index("| kernel |") :].split("\n\n")[0], re.MULTILINE
        )


def test_a_launch_that_cannot_compile_is_reported_as_such(tmp_path: Path) -> None:
    """The recorder on kernels with the faults that it is there to find."""
    one, other, spilled = told_by(tmp_path, "-c", FAULTY)
    assert "has no attribute 'to'" in one["problem"]
    assert one["binary"] == 0
    assert other["problem"] == ""
    assert other["binary"] > 0
    assert "spills" in spilled["problem"]


FAULTY = """
import json
from dataclasses import asdict
import torch
import faulty_kernels
from benchmarks import kernel_resources
from thanos_kernels.triton import recorder

with recorder.recording("sm_90") as made:
    out = torch.empty(4, dtype=torch.float32, device="meta")
    faulty_kernels.method_of_a_number[(1,)](out, 1)
    faulty_kernels.method_of_a_number[(1,)](out, 2)
    faulty_kernels.too_large[(1,)](out, num_warps=1)
print(json.dumps([asdict(kernel_resources.measure(one, one.name)) for one in made]))
"""
