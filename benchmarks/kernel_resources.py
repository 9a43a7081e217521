"""Compile every GPU kernel in every configuration ahead of time and read what it takes from the result.

``python -m benchmarks.kernel_resources`` prints a table; ``--json`` prints the same as JSON, ``--markdown`` as in
docs/kernels.md. No GPU is needed: the compilers for the chips come with Triton. Exits with an error where a kernel
spills registers, takes more shared memory than the chip has, or lacks the matrix instructions it is written for.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Chip:
    """A compilation target, and the shared memory (LDS) one program may take there, in bytes."""

    backend: str
    architecture: int | str
    warp: int
    shared: int


CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 163 << 10),
    "sm_90": Chip("cuda", 90, 32, 227 << 10),
    "sm_100": Chip("cuda", 100, 32, 227 << 10),
    "gfx942": Chip("hip", "gfx942", 64, 64 << 10),
}
_MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)\w*")


@dataclass(frozen=True)
class Resources:
    """What one configuration takes on one chip: registers a thread, bytes spilled a thread, bytes of shared memory."""

    kernel: str
    chip: str
    registers: int
    spilled: int
    shared: int
    matrix: str
    problem: str


def measure(chip_name: str, index: int) -> Resources:
    """Compile the ``index``-th variant for a chip."""
    import triton
    from triton.backends.compiler import GPUTarget

    chip = CHIPS[chip_name]
    variant = _variants(chip)[index]
    arguments = variant.kernel.arg_names
    types = dict(zip((name for name in arguments if name not in variant.constants), variant.types.split(), strict=True))
    signature = {name: types.get(name, "constexpr").removesuffix(":16") for name in arguments}
    aligned = {
        (arguments.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind[0] == "*" or ":" in kind
    }
    source = triton.compiler.ASTSource(variant.kernel, signature, variant.constants, aligned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = triton.compile(
            source,
            target=GPUTarget(chip.backend, chip.architecture, chip.warp),
            options={"num_warps": variant.warps, "num_stages": variant.stages},
        )
    registers, spilled, text = _amd(compiled) if chip.backend == "hip" else _nvidia(compiled)
    found = _MATRIX.search(text)
    matrix = re.split(r"[._]", found[0])[1 if chip.backend == "hip" else 0] if found else ""
    shared = int(compiled.metadata.shared)
    problems = [f"spills {spilled} bytes a thread"] if spilled else []
    if shared > chip.shared:
        problems.append(f"takes {shared} bytes of shared memory where {chip_name} has {chip.shared}")
    if variant.matrix and not matrix:
        problems.append("holds no matrix instruction")
    return Resources(variant.name, chip_name, registers, spilled, shared, matrix, "; ".join(problems))


def _variants(chip: Chip) -> list[Any]:
    from thanos_kernels.triton import catalog

    return catalog.variants(hip=chip.backend == "hip")


def _nvidia(compiled: Any) -> tuple[int, int, str]:
    """Registers and spilled bytes as cuobjdump reports them, and the PTX.

    A stack frame alone is no spill: only one that the machine code stores to is counted.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = _output(tool, "-res-usage", file.name)
        frame = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", report)
        spilled = int(frame[1]) + int(frame[2]) if frame else 0
        if spilled and not re.search(r"\bSTL\b", _output(tool, "-sass", file.name)):
            spilled = 0
    registers = re.search(r"REG:(\d+)", report)
    if registers is None or frame is None:
        raise RuntimeError(f"cuobjdump reports no resource usage: {report!r}")
    return int(registers[1]), spilled, compiled.asm["ptx"]


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(compiled: Any) -> tuple[int, int, str]:
    """Vector registers and spilled bytes from the metadata of the assembly, and the assembly."""
    text: str = compiled.asm["amdgcn"]
    registers, spills, scratch = (
        int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # type: ignore[index]
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return registers, max(4 * spills, scratch), text


def measure_all(workers: int, only: str = "", chips: Iterable[str] = CHIPS) -> list[Resources]:
    """Every variant whose name holds ``only``, on these chips, in processes of their own, the interpreter off."""
    os.environ.pop("TRITON_INTERPRET", None)
    jobs = [
        (name, index) for name in chips for index, variant in enumerate(_variants(CHIPS[name])) if only in variant.name
    ]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(measure, *zip(*jobs, strict=True)))


def _markdown(results: list[Resources]) -> str:
    """One row a variant, one column a chip: registers / shared KiB / matrix instruction."""
    rows: dict[str, dict[str, str]] = {}
    for one in results:
        cell = f"{one.registers} / {one.shared / 1024:.1f} / {one.matrix or '-'}"
        rows.setdefault(one.kernel, {})[one.chip] = cell + (f" **{one.problem}**" if one.problem else "")
    lines = ["| kernel | " + " | ".join(CHIPS) + " |", "|---" * (len(CHIPS) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(row.get(chip, "") for chip in CHIPS) + " |" for name, row in rows.items()]
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@click.option("--workers", default=os.cpu_count() or 1, show_default=True, help="Compilations at a time.")
@click.option("--only", default="", help="Compile the kernels whose name holds this.")
@click.option(
    "--chip", "chips", multiple=True, type=click.Choice(list(CHIPS)), help="Compile for this; may be repeated."
)
def main(as_json: bool, markdown: bool, workers: int, only: str, chips: tuple[str, ...]) -> None:
    results = measure_all(workers, only, chips or CHIPS)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in results], indent=1))
    elif markdown:
        click.echo(_markdown(results))
    else:
        table = Table("kernel", "chip", "registers", "spilled", "shared", "matrix", "problem")
        for one in results:
            table.add_row(*(str(value) for value in asdict(one).values()))
        Console().print(table)
    if any(one.problem for one in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
