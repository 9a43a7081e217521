"""Records and compiles the launches of all operations and of the engine for the chips named; prints a report as JSON.

A program of its own: the interpreter, which the tests run kernels in, must be off.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from elsewhere import two_devices
from triton.runtime import JITFunction, driver

from benchmarks import kernel_resources
from thanos import prune_weight
from thanos_kernels import reference, selfcheck
from thanos_kernels import triton as backend
from thanos_kernels.triton import launches, recorder

METHODS = ("thanos", "sparsegpt", "wanda", "magnitude")
PATTERNS = ("0.5", "2:4", "4:8", "structured:0.3")
SIZES: tuple[tuple[tuple[int, int], int | None], ...] = (
    ((24, 96), None),
    ((24, 96), 16),
    ((21, 88), 24),
    ((1, 8), 8),
    ((3, 320), 160),
)


@contextmanager
def values_of_the_reference() -> Iterator[None]:
    """Kernels are launched on CPU tensors, which the recorder makes nothing of, and the reference computes."""
    launching = backend.function

    def function(operation: str) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            launching(operation)(*arguments, **options)
            return getattr(reference, operation)(*arguments)

        return run

    with patch.object(backend, "function", function), patch.object(backend, "refusal", lambda *_, **__: None):
        yield


def engine(chip: str) -> dict[str, list[recorder.Launch]]:
    """The launches of ``prune_weight`` by method, pattern and outlier fraction."""
    found = {}
    draw = torch.Generator().manual_seed(0)
    for method, pattern, alpha in product(METHODS, PATTERNS, (0.0, 0.1)):
        with recorder.recording(chip) as made, values_of_the_reference():
            for (rows, columns), block in SIZES:
                if alpha and rows == 1:
                    continue
                inputs, weight = torch.randn(64, columns, generator=draw), torch.randn(rows, columns, generator=draw)
                options: dict[str, Any] = {"method": method, "block_size": block, "outlier_fraction": alpha}
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    prune_weight(weight.to(dtype), inputs.T @ inputs / 64, pattern, backend="triton", **options)
        found[f"{method} {pattern} {alpha}"] = list(dict.fromkeys(made))
    return found


def places() -> dict[str, list[list[Any]]]:
    """For each operation on tensors of device 1: the device each launch went to, and those its tensors say."""
    found: dict[str, list[list[Any]]] = {}
    bind = JITFunction.run
    with recorder.recording("sm_90"), two_devices() as (current, moved):

        def run(self: Any, *arguments: Any, **options: Any) -> Any:
            driver.active.device = current.index
            tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
            launched.append([driver.active.get_current_device()[1], sorted({str(one.device) for one in tensors})])
            return bind(self, *arguments, **options)

        for operation in backend.OPERATIONS:
            launched = found.setdefault(operation, [])
            with patch.object(JITFunction, "run", run):
                for given in selfcheck.examples(operation, torch.device("cpu"), small=True):
                    there = [moved(value) if isinstance(value, torch.Tensor) else value for value in given]
                    selfcheck.results(operation, backend.function(operation), there)
    return found


def products() -> dict[str, list[str]]:
    """The 32-bit products in the intermediate code of the sweeps."""
    found = {}
    for operation in ("column_sweep", "column_sweep_n_of_m"):
        with recorder.recording("sm_90") as made:
            next(iter(launches.calls(operation)))()
        code = re.sub(r" loc\(.*", "", recorder.compiled(made[0]).asm["ttir"])
        found[made[0].name] = re.findall(r".*arith\.muli.*i32>?$", code, re.MULTILINE)
    return found


def described(launch: recorder.Launch) -> dict[str, Any]:
    known = ("name", "types", "constants", "warps", "stages")
    return {name: getattr(launch, name) for name in known} | {"divisible": sorted(launch.divisible)}


def main() -> None:
    operations = {chip: kernel_resources.recorded(chip) for chip in sys.argv[1:]}
    pruning = {chip: engine(chip) for chip in operations}
    of_operations = [one for by_name in operations.values() for made in by_name.values() for one in made]
    of_the_engine = [one for by_name in pruning.values() for made in by_name.values() for one in made]
    number = {one: index for index, one in enumerate(dict.fromkeys(of_operations + of_the_engine))}

    def numbered(made: dict[str, dict[str, list[recorder.Launch]]]) -> dict[str, dict[str, list[int]]]:
        return {
            chip: {name: [number[one] for one in of_name] for name, of_name in by_name.items()}
            for chip, by_name in made.items()
        }

    resources = kernel_resources.measure_all(number, os.cpu_count() or 1)
    report = {
        "operations": numbered(operations),
        "engine": numbered(pruning),
        "places": places(),
        "products": products(),
        "launches": [asdict(one) | described(launch) for one, launch in zip(resources, number, strict=True)],
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
