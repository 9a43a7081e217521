"""The operations on each backend at hand: seconds, GE for a whole layer, and the share of the machine's peak.

Peaks are measured in the same run: a float32 and a bfloat16 product of the layer's size, and a copy larger than the
cache. Work is what the operation needs at least: one triangle of a symmetric result, each operand moved once. The
reference takes an eighth of the rows. Triton runs on a GPU only, never in its interpreter.

``THANOS_BENCH_SIZE`` replaces 4096 by another size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import thanos_kernels as kernels
from benchmarks.ge import SIZE, best_of, layer
from thanos_kernels import native

TOKENS = 2048
COPIED = 1 << 26  # floats
DEVICES = {"reference": "cpu"}
if native.available():
    DEVICES = {"native": "cpu"} | DEVICES
if torch.cuda.is_available() and "triton" in kernels.backends():
    DEVICES["triton"] = "cuda"


def waited(function: Callable[[], object], device: str) -> Callable[[], None]:
    """The function, finished on its device when it returns."""

    def run() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


@dataclass(frozen=True)
class Machine:
    """A device, the layer on it, seconds of one GE, and peaks in flops or bytes a second."""

    device: str
    weight: Tensor
    hessian: Tensor
    unit: float
    peaks: dict[str, float]

    @staticmethod
    def measured(device: str) -> Machine:
        weight, hessian = (tensor.to(device) for tensor in layer(SIZE, SIZE))
        half, other = weight.bfloat16(), hessian.bfloat16()
        source = torch.ones(COPIED, device=device)
        target = torch.empty_like(source)
        unit, short, copy = (
            best_of(waited(function, device), runs)
            for function, runs in (
                (lambda: weight @ hessian, 5),
                (lambda: half @ other, 5),
                (lambda: target.copy_(source), 9),
            )
        )
        flops = 2 * SIZE**3
        peaks = {"float32 product": flops / unit, "bfloat16 product": flops / short, "copy": 8 * COPIED / copy}
        return Machine(device, weight, hessian, unit, peaks)


@pytest.fixture(scope="session")
def machines() -> dict[str, Machine]:
    return {device: Machine.measured(device) for device in set(DEVICES.values())}


@dataclass
class Meter:
    """Measures one operation on one backend."""

    benchmark: Any
    ge_row: Callable[..., None]
    backend: str
    machine: Machine

    @property
    def rows(self) -> int:
        return max(1, SIZE // 8) if self.backend == "reference" else SIZE

    @property
    def weight(self) -> Tensor:
        return self.machine.weight[: self.rows]

    def random_mask(self, width: int) -> Tensor:
        return torch.rand(self.rows, width, device=self.machine.device) < 0.5

    def __call__(
        self,
        op: str,
        function: Callable[[], object],
        columns: int,
        work: float,
        peak: str,
        *,
        detail: str = "",
        rows: int | None = None,
        calls: int = 1,
        dtype: str = "float32",
        limit: float | None = None,
    ) -> float:
        """Record the fastest of a few calls and return its seconds.

        Args:
            columns: of what one call works on; ``rows`` are the backend's own where not given.
            work: of one call, in flops, or in bytes where the peak is ``copy``.
            calls: how many a layer takes.
            limit: GE to reach.
        """
        rounds = 2 if self.backend == "reference" else 5
        self.benchmark.pedantic(waited(function, self.machine.device), rounds=rounds, warmup_rounds=1)
        seconds: float = self.benchmark.stats.stats.min
        part = 1.0 if rows else self.rows / SIZE
        ge, rate = seconds * calls / (self.machine.unit * part), work / seconds
        share = rate / self.machine.peaks[peak]
        self.benchmark.extra_info |= {
            "kind": "op",
            "op": f"{op} {detail}".strip(),
            "backend": self.backend,
            "dtype": dtype,
            "rows": rows or self.rows,
            "columns": columns,
            "calls": calls,
            "seconds": seconds,
            "ge": ge,
            "gbytes_per_second" if peak == "copy" else "gflops": rate / 1e9,
            "peak_share": share,
            "peak": peak,
        }
        unit = "GB/s" if peak == "copy" else "GFLOP/s"
        size = f"{rows or self.rows} x {columns}"
        name = f"{self.backend} {op} {detail}".strip()
        self.ge_row(f"{name}, {dtype}, {size}: {rate / 1e9:.0f} {unit}, {share:.0%} of {peak}", ge, limit)
        return seconds


@pytest.fixture(params=DEVICES)
def meter(
    request: pytest.FixtureRequest, benchmark: Any, ge_row: Callable[..., None], machines: dict[str, Machine]
) -> Meter:
    torch.manual_seed(0)
    return Meter(benchmark, ge_row, request.param, machines[DEVICES[request.param]])


@pytest.mark.parametrize(("block", "pattern"), [(128, "0.5"), (512, "2:4")])
def test_row_solve(meter: Meter, block: int, pattern: str) -> None:
    block = min(block, SIZE)
    weights, gram = meter.weight[:, :block], meter.machine.hessian[:block, :block]
    mask = meter.random_mask(block) if pattern == "0.5" else kernels.select_n_of_m(weights, 2, 4)
    flops = float((mask.sum(1).double() ** 3 / 3).sum())
    meter(
        "row_solve",
        lambda: kernels.row_solve_ex(gram, weights, mask, backend=meter.backend),
        block,
        flops,
        "float32 product",
        detail=pattern,
        calls=SIZE // block,
    )


def test_select_smallest(meter: Meter) -> None:
    half, width = SIZE // 2, min(128, SIZE // 2)  # half is the mean width of what remains
    weights, norms = meter.weight[:, half:], meter.machine.hessian.diagonal().sqrt()[half:]
    count = weights.numel() // 2
    meter(
        "select_smallest",
        lambda: kernels.select_smallest(weights, norms, count, width, backend=meter.backend),
        half,
        meter.rows * (4 * half + width),
        "copy",
        calls=SIZE // width,
    )


def test_select_per_row(meter: Meter) -> None:
    weights, norms = meter.weight, meter.machine.hessian.diagonal().sqrt()
    meter(
        "select_per_row",
        lambda: kernels.select_per_row(weights, norms, SIZE // 2, backend=meter.backend),
        SIZE,
        5 * weights.numel(),
        "copy",
    )


def test_select_n_of_m(meter: Meter) -> None:
    scores = meter.weight.abs()
    meter(
        "select_n_of_m",
        lambda: kernels.select_n_of_m(scores, 2, 4, backend=meter.backend),
        SIZE,
        5 * scores.numel(),
        "copy",
        detail="2:4",
    )


def test_column_sweep(meter: Meter) -> None:
    block = min(128, SIZE)
    factor, _, _ = kernels.inverse_factor(meter.machine.hessian[:block, :block])
    weights, mask = meter.weight[:, :block], meter.random_mask(block)
    meter(
        "column_sweep",
        lambda: kernels.column_sweep(factor, weights, mask, backend=meter.backend),
        block,
        float((mask.sum(1).double() ** 2).sum()),
        "float32 product",
        detail="0.5",
        calls=SIZE // block,
    )


def test_column_sweep_n_of_m(meter: Meter) -> None:
    block = min(512, SIZE)
    factor, _, _ = kernels.inverse_factor(meter.machine.hessian[:block, :block])
    weights = meter.weight[:, :block]
    meter(
        "column_sweep_n_of_m",
        lambda: kernels.column_sweep_n_of_m(factor, weights, 2, 4, backend=meter.backend),
        block,
        meter.rows * block**2 / 2,  # half of the columns are removed, and each changes all that follow
        "float32 product",
        detail="2:4",
        calls=SIZE // block,
    )


@pytest.mark.parametrize(("dtype", "times"), [(torch.bfloat16, 3.0), (torch.float32, 1.5)])
def test_accumulate_hessian(meter: Meter, dtype: torch.dtype, times: float) -> None:
    """To reach: ``times`` as fast as the float32 product of the inputs with themselves."""
    device = meter.machine.device
    inputs, name = torch.randn(TOKENS, SIZE, device=device), str(dtype).removeprefix("torch.")
    product = best_of(waited(lambda: inputs.T @ inputs, device), 3)
    low, result = inputs.to(dtype), meter.machine.hessian.clone()
    seconds = meter(
        "accumulate_hessian",
        lambda: kernels.accumulate_hessian(result, low, 0.5, backend=meter.backend),
        SIZE,
        TOKENS * SIZE * (SIZE + 1),
        f"{name} product",
        rows=TOKENS,
        dtype=name,
        limit=None if meter.backend == "reference" else product / times / meter.machine.unit,
    )
    meter.benchmark.extra_info["times_float32_product"] = product / seconds


def test_inverse_factor(meter: Meter) -> None:
    hessian = meter.machine.hessian
    out = torch.empty_like(hessian)
    meter(
        "inverse_factor",
        lambda: kernels.inverse_factor(hessian, out=out, backend=meter.backend),
        SIZE,
        2 / 3 * SIZE**3,
        "float32 product",
        rows=SIZE,
    )


def test_row_energy(meter: Meter) -> None:
    weights, hessian = meter.weight, meter.machine.hessian
    meter(
        "row_energy",
        lambda: kernels.row_energy(weights, hessian, backend=meter.backend),
        SIZE,
        meter.rows * SIZE * (SIZE + 1),
        "float32 product",
    )


@pytest.mark.parametrize("op", ["pack_24", "unpack_24"])
def test_packing(meter: Meter, op: str) -> None:
    backend = "cuda" if meter.backend == "triton" else meter.backend
    weight = meter.weight.masked_fill(kernels.select_n_of_m(meter.weight, 2, 4), 0).bfloat16()
    try:
        packed = kernels.pack_24(weight, backend=backend)
    except ValueError as error:
        pytest.skip(str(error))
    moved = weight.nbytes + packed.values.nbytes + packed.metadata.nbytes
    function, operand = (kernels.pack_24, weight) if op == "pack_24" else (kernels.unpack_24, packed)
    meter(op, lambda: function(operand, backend=backend), SIZE, moved, "copy", dtype="bfloat16")
