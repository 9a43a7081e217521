"""A quarter of the input channels of real layers, removed one at a time with the exact update of the others, in GE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import thanos_kernels as kernels
from benchmarks import ge
from benchmarks.clock import seconds_of
from benchmarks.ge import SIZE
from benchmarks.test_layer import TFLOP
from thanos.shrink.removal import cheapest_columns, without_columns

LAYERS = [  # model, layer, rows, columns
    ("SmolLM2-135M", "down_proj", 576, 1536),
    ("TinyLlama-1.1B", "down_proj", 2048, 5632),
    ("LLaMA-2 7B", "down_proj", 4096, 11008),
]
SHARE = 4  # one column of so many goes
LIMIT = 3.0  # GE to reach at 4096 x 11008


@pytest.mark.parametrize(("model", "layer", "rows", "columns"), LAYERS, ids=lambda value: str(value))
def test_channels(benchmark: Any, record: Callable[..., None], model: str, layer: str, rows: int, columns: int) -> None:
    tflop = 2e-12 * rows * columns**2
    if tflop > max(TFLOP, 1.0 * (SIZE / 4096) ** 3):
        pytest.skip(f"its product takes {tflop:.3g} TFLOP: set THANOS_BENCH_TFLOP to more to run it")
    weight, hessian = ge.layer(rows, columns)
    steps: dict[str, float] = {}
    units = []

    def run() -> None:
        found: list[Any] = []
        steps["factor"] = seconds_of(lambda: found.append(kernels.inverse_factor(hessian, 0.01)[0]))
        steps["remove"] = seconds_of(
            lambda: without_columns(weight, found[0], cheapest_columns(weight, found[0], columns // SHARE))
        )

    def unit() -> None:
        units.append(seconds_of(lambda: weight @ hessian))

    unit()
    units.clear()
    benchmark.pedantic(run, setup=unit, rounds=1)
    unit()
    seconds, around = benchmark.stats.stats.data[0], sum(units) / len(units)
    record(
        f"{model} {layer} {rows}x{columns} channels:0.25", kind="removal", model=model, layer=layer, rows=rows,
        columns=columns, removed=columns // SHARE, seconds=seconds, ge=seconds / around, ge_seconds=around,
        steps=steps, limit_ge=LIMIT if (rows, columns) == (4096, 11008) else None,
    )  # fmt: skip
