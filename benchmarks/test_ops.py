"""The CPU operations on a 4096 x 4096 layer: milliseconds, GFLOP/s or ratios, and GE for the whole layer.

``THANOS_BENCH_SIZE`` takes another size.
"""

from __future__ import annotations

import os

import pytest
import torch

import thanos_kernels as kernels
from benchmarks.ge import best_of, gemm_seconds, layer

SIZE = int(os.environ.get("THANOS_BENCH_SIZE", "4096"))
TOKENS = 2048


@pytest.fixture(scope="module")
def case():
    """The weight, its Hessian and the seconds of one GE."""
    weight, hessian = layer(SIZE, SIZE)
    return weight, hessian, gemm_seconds(weight, hessian)


def measure(benchmark, function, calls: int = 1, rounds: int = 5) -> float:
    """Seconds of a layer's ``calls`` of the function, each the fastest of ``rounds``."""
    benchmark.pedantic(function, rounds=rounds, warmup_rounds=1)
    return benchmark.stats.stats.min * calls


@pytest.mark.parametrize(("block", "pattern"), [(128, "0.5"), (512, "2:4")])
def test_row_solve(benchmark, ge_row, case, block, pattern) -> None:
    weight, hessian, unit = case
    weights, gram = weight[:, :block], hessian[:block, :block]
    mask = torch.rand(weights.shape) < 0.5 if pattern == "0.5" else kernels.select_n_of_m(weights, 2, 4)
    seconds = measure(benchmark, lambda: kernels.row_solve_ex(gram, weights, mask), SIZE // block)
    flops = float((mask.sum(1).double() ** 3 / 3).sum()) * (SIZE // block)
    benchmark.extra_info["gflops"] = flops / seconds / 1e9
    ge_row(f"row_solve {pattern}, B = {block} ({flops / seconds / 1e9:.0f} GFLOP/s)", seconds / unit)


def test_select_smallest(benchmark, ge_row, case) -> None:
    weight, hessian, unit = case
    norms = hessian.diagonal().sqrt()
    half = SIZE // 2  # the mean width of what remains

    def select():
        return kernels.select_smallest(weight[:, half:], norms[half:], SIZE * half // 2, 128)

    ge_row("select_smallest 0.5, B = 128", measure(benchmark, select, SIZE // 128) / unit)


def test_select_n_of_m(benchmark, ge_row, case) -> None:
    weight, _, unit = case
    ge_row("select_n_of_m 2:4", measure(benchmark, lambda: kernels.select_n_of_m(weight, 2, 4)) / unit)


@pytest.mark.parametrize("block", [128, 512])
def test_column_sweep(benchmark, ge_row, case, block) -> None:
    weight, hessian, unit = case
    factor, _, _ = kernels.inverse_factor(hessian[:block, :block])
    mask = torch.rand(SIZE, block) < 0.5

    def sweep():
        if block == 128:
            return kernels.column_sweep(factor, weight[:, :block], mask)
        return kernels.column_sweep_n_of_m(factor, weight[:, :block], 2, 4)

    name = "column_sweep 0.5, B = 128" if block == 128 else "column_sweep_n_of_m 2:4, B = 512"
    ge_row(name, measure(benchmark, sweep, SIZE // block) / unit)


@pytest.mark.parametrize(("dtype", "times"), [(torch.bfloat16, 3.0), (torch.float32, 1.5)])
def test_accumulate_hessian(benchmark, ge_row, case, dtype, times) -> None:
    _, hessian, unit = case
    inputs = torch.randn(TOKENS, SIZE)
    product = best_of(lambda: inputs.T @ inputs, 5)
    inputs, result = inputs.to(dtype), hessian.clone()
    seconds = measure(benchmark, lambda: kernels.accumulate_hessian(result, inputs, 0.5))
    product = min(product, best_of(lambda: inputs.float().T @ inputs.float(), 5))
    benchmark.extra_info["times_float32_product"] = product / seconds
    name = str(dtype).removeprefix("torch.")
    ge_row(f"accumulate_hessian {name} ({product / seconds:.1f} x product)", seconds / unit, product / times / unit)


def test_inverse_factor(benchmark, ge_row, case) -> None:
    _, hessian, unit = case
    out = torch.empty_like(hessian)
    ge_row("inverse_factor", measure(benchmark, lambda: kernels.inverse_factor(hessian, out=out), rounds=3) / unit)


def test_row_energy(benchmark, ge_row, case) -> None:
    weight, hessian, unit = case
    ge_row("row_energy", measure(benchmark, lambda: kernels.row_energy(weight, hessian), rounds=3) / unit)
