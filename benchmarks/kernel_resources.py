"""Compile every launch of every GPU kernel for chips not at hand and read what it takes from the result.

``python -m benchmarks.kernel_resources`` prints a table; ``--json`` prints the same as JSON, ``--markdown`` as in
docs/kernels.md. The launches are recorded as the operations make them, for the shapes of real layers and odd ones, in
every configuration of the autotuner (``thanos_kernels/triton/recorder.py`` and ``launches.py``). No GPU is needed: the
compilers for the chips come with Triton. Exits with an error where a launch does not compile, spills registers, takes
more shared memory than the chip has, or lacks the matrix instructions it is written for.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from thanos_kernels.triton.recorder import Launch

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory (LDS) that one program may take on each chip."""
_MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)\w*")


@dataclass(frozen=True)
class Resources:
    """What a launch takes on a chip: registers a thread, bytes spilled a thread, bytes of shared memory.

    Attributes:
        kernel: its file, name and configuration, as in the table.
        form: the types of its arguments, which are constants, and which are multiples of 16.
        binary: bytes of machine code; 0 where it did not compile.
        matrix: the matrix instruction found in the code.
        problem: why the launch is not as it should be, or empty.
    """

    kernel: str
    chip: str
    form: str
    binary: int = 0
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    matrix: str = ""
    problem: str = ""


def recorded(chip: str) -> dict[str, list[Launch]]:
    """The distinct launches of each operation on a chip."""
    from thanos_kernels.triton import OPERATIONS, launches, recorder

    found = {}
    for operation in OPERATIONS:
        with recorder.recording(chip) as made:
            for call in launches.calls(operation):
                call()
        found[operation] = list(dict.fromkeys(made))
    return found


def measure(launch: Launch, kernel: str) -> Resources:
    """Compile a launch; ``kernel`` is what the table calls it."""
    from thanos_kernels.triton import recorder

    form = describe(launch)
    try:
        compiled = recorder.compiled(launch)
    except Exception as error:  # whatever a compiler raises
        return Resources(kernel, launch.chip, form, problem=f"does not compile: {type(error).__name__}: {error}"[:2000])
    amd = launch.chip.startswith("gfx")
    registers, spilled, text = _amd(compiled) if amd else _nvidia(compiled)
    found = _MATRIX.search(text)
    matrix = re.split(r"[._]", found[0])[1 if amd else 0] if found else ""
    shared = int(compiled.metadata.shared)
    problems = [f"spills {spilled} bytes a thread"] if spilled else []
    if shared > SHARED[launch.chip]:
        problems.append(f"takes {shared} bytes of shared memory where {launch.chip} has {SHARED[launch.chip]}")
    if "PRECISION" in launch.constants and not matrix:  # it multiplies by tl.dot
        problems.append("holds no matrix instruction")
    binary = len(compiled.asm["hsaco" if amd else "cubin"])
    return Resources(kernel, launch.chip, form, binary, registers, spilled, shared, matrix, "; ".join(problems))


def describe(launch: Launch) -> str:
    """The form of a launch in one line."""
    marks = dict.fromkeys(launch.divisible, ":16")
    types = [f"{name}: {kind}{marks.get(name, '')}" for name, kind in launch.types.items() if kind != "constexpr"]
    constants = [f"{name}={value}" for name, value in launch.constants.items()]
    return ", ".join([*types, *constants, f"warps={launch.warps}", f"stages={launch.stages}"])


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


def labels(launches: Iterable[Launch]) -> dict[Launch, str]:
    """What the table calls each launch: its kernel and, of its configuration, what its kernel's launches differ in."""
    configurations = {launch: _configuration(launch) for launch in launches}
    seen: dict[tuple[str, str], set[str]] = {}
    for launch, configuration in configurations.items():
        for part, value in configuration.items():
            seen.setdefault((launch.name, part), set()).add(value)
    named = {}
    for launch, configuration in configurations.items():
        told = [value for part, value in configuration.items() if value and len(seen[launch.name, part]) > 1]
        named[launch] = launch.name + (f"[{', '.join(told)}]" if told else "")
    return named


def _configuration(launch: Launch) -> dict[str, str]:
    """The dtypes, the declared constants, whether arguments are known to be aligned, and the warps."""
    parts = {name: kind.removeprefix("*") for name, kind in launch.types.items() if kind.startswith("*")}
    constants = {name: value for name, value in launch.constants.items() if name.isupper() and name != "PRECISION"}
    parts |= {name: f"{name} {value}" for name, value in constants.items()}
    parts["aligned"] = "aligned" if launch.divisible else ""
    parts["warps"] = f"{launch.warps} warp{'s' if launch.warps > 1 else ''}"
    return parts


def measure_all(launches: Iterable[Launch], workers: int) -> list[Resources]:
    """Each distinct launch, in processes of their own, with a compile cache of their own."""
    named = labels(launches)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_cache_in, initargs=(folder,)
    ) as pool:  # fmt: skip
        return list(pool.map(measure, named, named.values()))


def _cache_in(folder: str) -> None:
    import triton

    triton.knobs.cache.dir = folder


def markdown(results: Iterable[Resources]) -> str:
    """A row a configuration, a column a chip: registers / shared KiB / matrix instruction, the most of its forms."""
    cells: dict[str, dict[str, list[Resources]]] = {}
    for one in results:
        cells.setdefault(one.kernel, {}).setdefault(one.chip, []).append(one)
    lines = ["| kernel | " + " | ".join(SHARED) + " |", "|---" * (len(SHARED) + 1) + "|"]
    names = list(dict.fromkeys(kernel.partition("[")[0] for kernel in cells))
    for kernel, row in sorted(cells.items(), key=lambda item: names.index(item[0].partition("[")[0])):
        lines.append(f"| {kernel} | " + " | ".join(_cell(row.get(chip, [])) for chip in SHARED) + " |")
    return "\n".join(lines)


def _cell(forms: list[Resources]) -> str:
    if not forms:
        return ""
    problems = sorted({one.problem for one in forms if one.problem})
    registers, shared = max(one.registers for one in forms), max(one.shared for one in forms)
    matrix = "/".join(sorted({one.matrix or "-" for one in forms}))
    return f"{registers} / {shared / 1024:.1f} / {matrix}" + "".join(f" **{problem}**" for problem in problems)


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print a Markdown table.")
@click.option("--workers", default=os.cpu_count() or 1, show_default=True, help="Compilations at a time.")
@click.option("--only", default="", help="Compile the kernels whose name holds this.")
def main(as_json: bool, as_markdown: bool, workers: int, only: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    launches = [one for chip in SHARED for made in recorded(chip).values() for one in made if only in one.name]
    results = measure_all(launches, workers)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in results], indent=1))
    elif as_markdown:
        click.echo(markdown(results))
    else:
        table = Table("kernel", "chip", "registers", "spilled", "shared", "matrix", "problem")
        for one in results:
            values = one.kernel, one.chip, one.registers, one.spilled, one.shared, one.matrix, one.problem
            table.add_row(*map(str, values))
        Console().print(table)
    if any(one.problem for one in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
