"""The cost model against what it must agree with."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu, kernel_cost
from thanos_kernels.triton import row_solve, row_solve_blocked


def test_describes_the_kernels_as_they_are() -> None:
    assert kernel_cost.PAIRS == row_solve.PAIRS
    assert kernel_cost.TILE == row_solve_blocked.TILE


def test_selection_reads_what_is_left_three_times() -> None:
    assert kernel_cost.selection(10, 256, 128).memory == 10 * (12 * (256 + 128) + 5 * 256)


def test_a_bound_is_the_longest_of_its_resources() -> None:
    chip = kernel_cost.Chip(memory=1.0, half=1.0, tf32=1.0, lanes=1.0)
    assert kernel_cost.Cost(memory=1, half=2, tf32=3, lanes=4).bound(chip) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_refuses_a_machine_without_one() -> None:
    done = CliRunner().invoke(gpu.main)
    assert done.exit_code == 1
    assert "needs a CUDA or ROCm device" in str(done.exception)


def test_the_gpu_benchmark_prunes_by_every_method() -> None:
    results = gpu.prune_layers([(16, 32)], torch.device("cpu"), runs=1)
    assert [(one["method"], one["pattern"]) for one in results] == gpu.CASES
