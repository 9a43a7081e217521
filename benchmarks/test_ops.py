"""The operations on each backend at hand: seconds, GE for a whole layer, and the share of the machine's peak.

Peaks are measured in the same run: a float32 and a bfloat16 product of the layer's size, and a copy larger than the
cache. Work is what the operation needs at least: one triangle of a symmetric result, each operand moved once. The
reference takes an eighth of the rows. Triton runs on a GPU only, never in its interpreter.

``THANOS_BENCH_SIZE`` replaces 4096 by another size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import thanos_kernels as kernels
from benchmarks.clock import best_of, waited
from benchmarks.ge import SIZE, layer
from thanos_kernels import native

TOKENS = 2048
COPIED = 1 << 26  # floats
DEVICES = {"reference": "cpu"}
if native.available():
    DEVICES = {"native": "cpu"} | DEVICES
if torch.cuda.is_available() and "triton" in kernels.backends():
    DEVICES["triton"] = "cuda"


@lru_cache
def layer_on(device: str) -> tuple[Tensor, Tensor]:
    weight, hessian = layer(SIZE, SIZE)
    return weight.to(device), hessian.to(device)


@lru_cache
def peaks(device: str) -> dict[str, float]:
    """Of the device, in flops or bytes a second."""
    weight, hessian = layer_on(device)
    half, other = weight.bfloat16(), hessian.bfloat16()
    source = torch.ones(COPIED, device=device)
    target = torch.empty_like(source)
    return {
        "float32 product": 2 * SIZE**3 / best_of(waited(lambda: weight @ hessian, device), 5),
        "bfloat16 product": 2 * SIZE**3 / best_of(waited(lambda: half @ other, device), 5),
        "copy": 8 * COPIED / best_of(waited(lambda: target.copy_(source), device), 9),
    }


class Place:
    """A backend, and the layer on its device, with as many rows as the backend takes."""

    def __init__(self, backend: str) -> None:
        self.backend, self.device = backend, DEVICES[backend]
        self.rows = max(1, SIZE // 8) if backend == "reference" else SIZE
        self.weight, self.hessian = layer_on(self.device)[0][: self.rows], layer_on(self.device)[1]
        self.norms = self.hessian.diagonal().sqrt()

    def random_mask(self, width: int) -> Tensor:
        return torch.rand(self.rows, width, device=self.device) < 0.5


@dataclass(frozen=True)
class Call:
    """One call of an operation.

    Attributes:
        run: the call; it takes ``backend``.
        columns: of what it works on; ``rows`` are the place's own where not given.
        work: in flops, or in bytes where the peak is ``copy``.
        peak: what its rate is compared with.
        calls: how many a layer takes.
        dtype: of its operands.
        product, times: seconds of a float32 product, and how many times as fast the call is to be.
    """

    run: Callable[..., object]
    columns: int
    work: float
    peak: str = "float32 product"
    rows: int | None = None
    calls: int = 1
    dtype: str = "float32"
    product: float | None = None
    times: float | None = None


def row_solve(at: Place, block: int, pattern: str) -> Call:
    block = min(block, SIZE)
    weights, gram = at.weight[:, :block], at.hessian[:block, :block]
    mask = at.random_mask(block) if pattern == "0.5" else kernels.select_n_of_m(weights, 2, 4)
    flops = float((mask.sum(1).double() ** 3 / 3).sum())
    return Call(partial(kernels.row_solve_ex, gram, weights, mask), block, flops, calls=SIZE // block)


def select_smallest(at: Place) -> Call:
    half, width = SIZE // 2, min(128, SIZE // 2)  # half is the mean width of what remains
    weights = at.weight[:, half:]
    run = partial(kernels.select_smallest, weights, at.norms[half:], weights.numel() // 2, width)
    return Call(run, half, at.rows * (4 * half + width), "copy", calls=SIZE // width)


def select_per_row(at: Place) -> Call:
    run = partial(kernels.select_per_row, at.weight, at.norms, SIZE // 2)
    return Call(run, SIZE, 5 * at.weight.numel(), "copy")


def select_n_of_m(at: Place) -> Call:
    return Call(partial(kernels.select_n_of_m, at.weight.abs(), 2, 4), SIZE, 5 * at.weight.numel(), "copy")


def column_sweep(at: Place) -> Call:
    block = min(128, SIZE)
    factor, _, _ = kernels.inverse_factor(at.hessian[:block, :block])
    mask = at.random_mask(block)
    flops = float((mask.sum(1).double() ** 2).sum())
    return Call(partial(kernels.column_sweep, factor, at.weight[:, :block], mask), block, flops, calls=SIZE // block)


def column_sweep_n_of_m(at: Place) -> Call:
    block = min(512, SIZE)
    factor, _, _ = kernels.inverse_factor(at.hessian[:block, :block])
    flops = at.rows * block**2 / 2  # half of the columns are removed, and each changes all that follow
    run = partial(kernels.column_sweep_n_of_m, factor, at.weight[:, :block], 2, 4)
    return Call(run, block, flops, calls=SIZE // block)


def accumulate_hessian(at: Place, dtype: torch.dtype, times: float) -> Call:
    """To reach: ``times`` as fast as the float32 product of the inputs with themselves."""
    inputs, name = torch.randn(TOKENS, SIZE, device=at.device), str(dtype).removeprefix("torch.")
    product = best_of(waited(lambda: inputs.T @ inputs, at.device), 3)
    run = partial(kernels.accumulate_hessian, at.hessian.clone(), inputs.to(dtype), 0.5)
    return Call(run, SIZE, TOKENS * SIZE * (SIZE + 1), f"{name} product", TOKENS, 1, name, product, times)


def inverse_factor(at: Place) -> Call:
    run = partial(kernels.inverse_factor, at.hessian, out=torch.empty_like(at.hessian))
    return Call(run, SIZE, 2 / 3 * SIZE**3, rows=SIZE)


def row_energy(at: Place) -> Call:
    return Call(partial(kernels.row_energy, at.weight, at.hessian), SIZE, at.rows * SIZE * (SIZE + 1))


def packing(at: Place, op: str) -> Call:
    weight = at.weight.masked_fill(kernels.select_n_of_m(at.weight, 2, 4), 0).bfloat16()
    backend = "cuda" if at.backend == "triton" else at.backend  # there is no Triton kernel
    try:
        packed = kernels.pack_24(weight, backend=backend)
    except ValueError as error:
        pytest.skip(str(error))
    moved = weight.nbytes + packed.values.nbytes + packed.metadata.nbytes
    function, operand = (kernels.pack_24, weight) if op == "pack_24" else (kernels.unpack_24, packed)
    return Call(lambda **_: function(operand, backend=backend), SIZE, moved, "copy", dtype="bfloat16")


OPERATIONS: list[tuple[str, Callable[[Place], Call]]] = [
    ("row_solve 0.5", partial(row_solve, block=128, pattern="0.5")),
    ("row_solve 2:4", partial(row_solve, block=512, pattern="2:4")),
    ("select_smallest", select_smallest),
    ("select_per_row", select_per_row),
    ("select_n_of_m 2:4", select_n_of_m),
    ("column_sweep 0.5", column_sweep),
    ("column_sweep_n_of_m 2:4", column_sweep_n_of_m),
    ("accumulate_hessian", partial(accumulate_hessian, dtype=torch.bfloat16, times=3.0)),
    ("accumulate_hessian", partial(accumulate_hessian, dtype=torch.float32, times=1.5)),
    ("inverse_factor", inverse_factor),
    ("row_energy", row_energy),
    ("pack_24", partial(packing, op="pack_24")),
    ("unpack_24", partial(packing, op="unpack_24")),
]


@pytest.mark.parametrize("backend", DEVICES)
@pytest.mark.parametrize(("op", "prepare"), OPERATIONS, ids=[op for op, _ in OPERATIONS])
def test_operation(
    benchmark: Any, record: Callable[..., None], op: str, prepare: Callable[[Place], Call], backend: str
) -> None:
    """The fastest of a few calls."""
    torch.manual_seed(0)
    at = Place(backend)
    call = prepare(at)
    run = waited(partial(call.run, backend=backend), at.device)
    benchmark.pedantic(run, rounds=2 if backend == "reference" else 5, warmup_rounds=1)
    seconds = benchmark.stats.stats.min
    rows, rate, peak = call.rows or at.rows, call.work / seconds, peaks(at.device)[call.peak]
    unit = 2 * SIZE**3 / peaks(at.device)["float32 product"]  # seconds of one GE
    limit = call.product / call.times / unit if call.product and call.times and backend != "reference" else None
    told = "GB/s" if call.peak == "copy" else "GFLOP/s"
    fields = {
        "op": op,
        "backend": backend,
        "dtype": call.dtype,
        "rows": rows,
        "columns": call.columns,
        "calls": call.calls,
        "seconds": seconds,
        "ge": seconds * call.calls / unit / (1 if call.rows else at.rows / SIZE),
        "gbytes_per_second" if call.peak == "copy" else "gflops": rate / 1e9,
        "peak_share": rate / peak,
        "peak": call.peak,
        "limit_ge": limit,
    }
    if call.product:
        fields["times_float32_product"] = call.product / seconds
    note = f": {rate / 1e9:.0f} {told}, {rate / peak:.0%} of {call.peak}"
    record(f"{backend} {op}, {call.dtype}, {rows} x {call.columns}", note=note, kind="op", **fields)
