"""``python -m thanos.doctor``: what this machine runs, and whether every kernel here agrees with the reference.

On a GPU the Triton kernels run on it; elsewhere in Triton's interpreter, which tests their arithmetic and not their
speed. The exit code is 1 where a kernel fails.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from thanos.report.machine import machine
from thanos_kernels import dispatch, native, reference, selfcheck, triton

_REPEATS = 3


@dataclass(frozen=True)
class Check:
    """One kernel against the reference.

    Attributes:
        error: as :func:`thanos_kernels.selfcheck.compare` measures it; None where the kernel could not run.
        seconds, reference_seconds: the best of three runs of the same work.
        problem: empty where the check passed.
    """

    operation: str
    backend: str
    where: str
    error: float | None
    seconds: float | None
    reference_seconds: float | None
    problem: str


def check_backend(backend: str, device: torch.device, small: bool) -> list[Check]:
    """Check every kernel of ``native`` or ``triton`` on ``device``."""
    where = "interpreter" if backend == "triton" and device.type == "cpu" else str(device)
    return [_check(operation, backend, device, where, small) for operation in triton.OPERATIONS]


def _check(operation: str, backend: str, device: torch.device, where: str, small: bool) -> Check:
    try:
        run = triton.function(operation) if backend == "triton" else getattr(native, operation)
        error = selfcheck.compare(operation, run, device, small)
        seconds, slow = (
            _best_time(operation, function, device, small) for function in (run, getattr(reference, operation))
        )
    except Exception as exception:  # a broken kernel is what this program is there to name
        return Check(operation, backend, where, None, None, None, f"{type(exception).__name__}: {exception}")
    if error <= selfcheck.TOLERANCE:
        return Check(operation, backend, where, error, seconds, slow, "")
    finite = error if math.isfinite(error) else None
    return Check(operation, backend, where, finite, seconds, slow, "differs from the reference")


def _best_time(operation: str, run: Callable[..., Any], device: torch.device, small: bool) -> float:
    examples = list(selfcheck.examples(operation, device, small))
    times = []
    for _ in range(1 if small else _REPEATS):
        begin = time.perf_counter()
        for arguments in examples:
            selfcheck.results(operation, run, arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def _interpreted() -> list[Check]:
    """The Triton kernels in the interpreter, which must be asked for before Triton is imported: in another process."""
    done = subprocess.run(
        [sys.executable, "-m", "thanos.doctor", "--json"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        entries = json.loads(done.stdout)["checks"]
        return [Check(**entry) for entry in entries if entry["backend"] == "triton"]
    except (ValueError, KeyError):
        lines = done.stderr.strip().splitlines() or ["it printed nothing"]
        return [Check("all", "triton", "interpreter", None, None, None, f"the interpreter did not start: {lines[-1]}")]


def examine() -> list[Check]:
    """Every kernel that can run on this machine."""
    checks = check_backend("native", torch.device("cpu"), small=False) if native.available() else []
    installed = triton.version()
    if installed is None or installed < triton.MINIMUM:
        return checks
    if triton.interpreted():
        return checks + check_backend("triton", torch.device("cpu"), small=True)
    if not torch.cuda.is_available():
        return checks + _interpreted()
    for index in range(torch.cuda.device_count()):
        checks += check_backend("triton", torch.device("cuda", index), small=False)
    return checks


def choices() -> Iterator[tuple[str, str, str, str]]:
    """For each device and operation: device, operation, the backend that ``auto`` takes, and why."""
    devices = ["cpu"] + [
        f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    for device in devices:
        tensor = torch.zeros(1, 1, dtype=torch.float32, device=device)
        for operation in (*triton.OPERATIONS, "inverse_factor", "row_energy"):
            chosen, why = dispatch.choose(operation, "auto", tensor)
            yield device, operation, chosen, why


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f}"


def _print(checks: list[Check]) -> None:
    console = Console()
    facts = Table("this machine", "", show_header=False)
    for name, value in machine().items():
        facts.add_row(name, value)
    console.print(facts)
    taken = Table("device", "operation", "auto takes", "because", title="Which backend runs what (float32)")
    for row in choices():
        taken.add_row(*row)
    console.print(taken)
    table = Table(
        title="Kernels against the reference",
        caption="times in ms, for the same work",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name in ("operation", "backend", "where", "error", "time", "reference", "result"):
        table.add_column(name, justify="right" if name in ("error", "time", "reference") else "left", no_wrap=True)
    for one in checks:
        error = "" if one.error is None else f"{one.error:.1e}"
        result = "[red]FAIL[/red]" if one.problem else "[green]pass[/green]"
        times = _milliseconds(one.seconds), _milliseconds(one.reference_seconds)
        table.add_row(one.operation, one.backend, one.where, error, *times, result)
    console.print(table)
    failed = [one for one in checks if one.problem]
    if failed:
        names = ", ".join(f"{one.operation} ({one.backend})" for one in failed)
        console.print(f"[red]{len(failed)} of {len(checks)} checks failed[/red]: {names}")
        for one in failed:
            console.print(f"{one.operation} ({one.backend}): {one.problem}", markup=False)
    else:
        console.print(f"all {len(checks)} checks passed")
    if not torch.cuda.is_available():
        console.print("No GPU here: the Triton kernels ran in the interpreter, so their times say nothing.")


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def main(as_json: bool) -> None:
    checks = examine()
    if as_json:
        click.echo(json.dumps({"machine": machine(), "checks": [asdict(one) for one in checks]}, indent=1))
    else:
        _print(checks)
    sys.exit(1 if any(one.problem for one in checks) else 0)


if __name__ == "__main__":
    main()
