"""`prune_weight` on the layers of real models: seconds, GE, seconds per step, peak memory, and SparseGPT beside it.

Every method and pattern runs on a 4096 x 4096 layer and on OPT-125M's; the other layers take Thanos and SparseGPT at
50%, and ``THANOS_BENCH_GRID=1`` gives them everything. What has a number to reach runs seven rounds. Layers whose dense
product takes more than ``THANOS_BENCH_TFLOP`` (0.4 for the default size) are skipped. ``THANOS_BENCH_SIZE`` replaces
4096 by another size.

At 50% on the square layer stand two baselines: SparseGPT by the reference operations, and the paper's own algorithm
(benchmarks/paper.py), which runs once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
from torch import Tensor

from benchmarks import ge, paper
from benchmarks.clock import best_of
from benchmarks.ge import SIZE
from thanos import prune_weight

TFLOP = float(os.environ.get("THANOS_BENCH_TFLOP", 0.4 * (SIZE / 4096) ** 3))
GRID = bool(int(os.environ.get("THANOS_BENCH_GRID", "0")))

SQUARE = ("LLaMA-2 7B", "q_proj", SIZE, SIZE) if SIZE == 4096 else ("square", f"{SIZE}", SIZE, SIZE)
LAYERS = [  # model, layer, rows, columns; each shape of a model once
    SQUARE,
    ("OPT-125M", "q_proj", 768, 768),
    ("OPT-125M", "fc1", 3072, 768),
    ("OPT-125M", "fc2", 768, 3072),
    ("SmolLM2-135M", "q_proj", 576, 576),
    ("SmolLM2-135M", "gate_proj", 1536, 576),
    ("SmolLM2-135M", "down_proj", 576, 1536),
    ("TinyLlama-1.1B", "q_proj", 2048, 2048),
    ("TinyLlama-1.1B", "gate_proj", 5632, 2048),
    ("TinyLlama-1.1B", "down_proj", 2048, 5632),
    ("LLaMA-2 7B", "gate_proj", 11008, 4096),
    ("LLaMA-2 7B", "down_proj", 4096, 11008),
    ("LLaMA-3 8B", "k_proj", 1024, 4096),
    ("LLaMA-3 8B", "gate_proj", 14336, 4096),
    ("LLaMA-3 8B", "down_proj", 4096, 14336),
    ("LLaMA-3 70B", "k_proj", 1024, 8192),
    ("LLaMA-3 70B", "q_proj", 8192, 8192),
    ("LLaMA-3 70B", "gate_proj", 28672, 8192),
    ("LLaMA-3 70B", "down_proj", 8192, 28672),
]
METHODS = ["sparsegpt", "thanos", "wanda", "magnitude"]  # SparseGPT first: the others are compared with it
PATTERNS = [("0.5", 0.0), ("2:4", 0.0), ("4:8", 0.0), ("structured:0.3", 0.0), ("structured:0.3", 0.1)]
LIMITS = {  # GE to reach at 4096 x 4096: method, pattern, outlier fraction
    ("thanos", "0.5", 0.0): 2.0,
    ("thanos", "2:4", 0.0): 3.5,
    ("thanos", "structured:0.3", 0.1): 1.2,
    ("sparsegpt", "0.5", 0.0): 3.0,
    ("sparsegpt", "2:4", 0.0): 3.0,
}
BASELINES = {  # method and backend: what Thanos' time times this may not exceed at 50%
    ("sparsegpt", "reference"): 2,
    ("paper", "reference"): 50,
}


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    model: str
    layer: str
    rows: int
    columns: int
    method: str
    pattern: str
    alpha: float
    backend: str = "auto"

    def __str__(self) -> str:
        name = f"{self.model} {self.layer} {self.rows}x{self.columns} {self.method} {self.pattern}"
        name += f" alpha={self.alpha:g}" if self.alpha else ""
        return name if self.backend == "auto" else f"{name} ({self.backend})"

    @property
    def limit(self) -> float | None:
        square = (self.rows, self.columns, self.backend) == (4096, 4096, "auto")
        return LIMITS.get((self.method, self.pattern, self.alpha)) if square else None

    def run(self) -> Any:
        weight, hessian = shared_layer(self.rows, self.columns)
        if self.method == "paper":
            return paper.prune(weight, hessian, float(self.pattern))
        options: Any = {"method": self.method, "outlier_fraction": self.alpha, "backend": self.backend}
        return prune_weight(weight, hessian, self.pattern, **options)


def cases() -> list[Case]:
    found = []
    for where in LAYERS:
        everything = GRID or where == SQUARE or where[0] == "OPT-125M"
        for pattern, alpha in PATTERNS if everything else PATTERNS[:1]:
            found += [Case(*where, method, pattern, alpha) for method in (METHODS if everything else METHODS[:2])]
        if where == SQUARE:
            found += [Case(*where, method, "0.5", 0.0, backend) for method, backend in BASELINES]
    return found


@lru_cache(maxsize=1)
def shared_layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return ge.layer(rows, columns)


@pytest.fixture(scope="session")
def measured() -> dict[Case, float]:
    """GE of what has been measured in this run."""
    return {}


@pytest.mark.parametrize("case", cases(), ids=str)
def test_prune_weight(
    benchmark: Any, record: Callable[..., None], finding: Callable[[str], None], measured: dict[Case, float], case: Case
) -> None:
    tflop = 2e-12 * case.rows * case.columns**2
    if tflop > TFLOP:
        pytest.skip(f"its product takes {tflop:.3g} TFLOP: set THANOS_BENCH_TFLOP above {TFLOP:.3g} to run it")
    wanted = BASELINES.get((case.method, case.backend))
    rounds = 1 if case.method == "paper" else 7 if case.limit or wanted else None
    rival = replace(case, method="thanos", backend="auto").run if wanted else None
    found = ge.time_layer(benchmark, case.run, *shared_layer(case.rows, case.columns), rounds=rounds, rival=rival)
    measured[case] = found["ge"]
    peer = replace(case, method="sparsegpt", backend="auto")
    if peer not in measured:  # its own test was not selected
        measured[peer] = best_of(peer.run, 2) / found["ge_seconds"]
    ratio = found["ge"] / measured[peer]
    fields = asdict(case) | found | {"ratio_to_sparsegpt": ratio, "limit_ge": case.limit}
    record(str(case), kind="layer", **fields)
    if case.limit:
        steps = (f"{step} {seconds / found['ge_seconds']:.2f}" for step, seconds in found["steps"].items())
        finding(f"{case}: {found['ge']:.2f} GE, of it {', '.join(steps)}")
    if wanted:
        name = "the paper's algorithm" if case.method == "paper" else "SparseGPT by the reference"
        shape = f"{case.rows} x {case.columns}"
        finding(f"Thanos, 50%, {shape}: {found['times_of_rival']:.1f} times as fast as {name} (to reach: {wanted})")
