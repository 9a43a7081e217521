"""Each Triton kernel against the reference on the device at hand, on small inputs that reach all its branches.

Before ``auto`` first uses a kernel on a device it must pass here; one that does not is replaced by the reference, with
a warning that names it. The inputs fill every bucket of the row solve, so that the autotuner has work to time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thanos_kernels import reference, triton
from thanos_kernels.errors import first_line
from thanos_kernels.scope import plain_arithmetic

_OF_BITS = ("count_scores", "select_below")  # of float32: there is nothing to round
TOLERANCE = 1e-4  # of the largest value, in float32 against float64


def failure(operation: str, device: torch.device) -> str | None:
    """Why the kernel of ``operation`` is not trusted on ``device``, or None. Checked once a process and device."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return _failure(operation, str(torch.device(device.type, index)))


@cache
def _failure(operation: str, device: str) -> str | None:
    problem = None
    try:
        error = compare(operation, triton.function(operation), torch.device(device), small=True)
        if not error <= TOLERANCE:
            problem = f"it differs from the reference by {error:.1e}"
    except Exception as exception:  # whatever a compiler or driver raises, the reference still works
        problem = f"it fails with {type(exception).__name__}: {first_line(exception)}"
    if problem is not None:
        problem = f"the Triton kernel of {operation} is not used on {device}: {problem}"
        warnings.warn(f"{problem}; the slower reference takes its place", RuntimeWarning, stacklevel=2)
    return problem


@plain_arithmetic
def compare(operation: str, run: Callable[..., Any], device: torch.device, small: bool = False) -> float:
    """The largest difference of ``run`` from the reference in float64, relative to the largest value.

    NaN differs infinitely, and so do masks and counts that are not equal.
    """
    worst = 0.0
    for arguments in examples(operation, device, small):
        got = results(operation, run, arguments)
        exact = arguments if operation in _OF_BITS else [_wide(value) for value in arguments]
        wanted = results(operation, getattr(reference, operation), exact)
        for have, want in zip(got, wanted, strict=True):
            if have.is_floating_point():
                difference = (have.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)
                worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
            elif not torch.equal(have, want):
                return float("inf")
    return worst


def examples(operation: str, device: torch.device, small: bool = False) -> Iterator[list[Any]]:
    """Arguments for ``operation``, the same on every device; fewer rows where ``small``."""
    draw = torch.Generator("cpu").manual_seed(len(operation))
    rows = 10 if small else 512
    float32: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever this process takes by default

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, **float32).to(device)

    def share(rows: int, width: int, shares: Tensor | float) -> Tensor:
        return (torch.rand(rows, width, generator=draw, **float32) < shares).to(device)

    def ones(size: int) -> Tensor:
        return torch.ones(size, **float32).to(device)

    if operation == "row_solve":
        for width in (40, 160):
            inputs = normal(4 * width, width)
            gram = inputs.T @ inputs / len(inputs)
            mask = share(rows, width, torch.linspace(0, 1, rows, **float32)[:, None])
            yield [gram, normal(rows, width), mask]
    elif operation == "select_smallest":
        for weights in (normal(rows, 300), normal(rows, 70).mul(2).round()):
            count = torch.tensor(weights.numel() // 2, dtype=torch.int64, device=device)
            yield [weights, ones(weights.shape[1]), count, 64]
    elif operation in ("count_scores", "select_below"):
        for weights in (normal(rows, 300), normal(rows, 70).mul(2).round()):
            for shift, bits in ((15, 16), (0, 15)):
                norms, middle = ones(weights.shape[1]), weights.abs().median().view(torch.int32).long()
                if operation == "count_scores":
                    yield [weights, norms, middle >> (shift + bits), shift, bits]
                else:
                    yield [weights, norms, middle, torch.tensor(shift, dtype=torch.int64, device=device), 64]
    elif operation == "select_per_row":
        yield [normal(rows, 600), ones(600), 300]
        yield [normal(rows, 70).mul(2).round(), ones(70), 35]
    elif operation == "select_n_of_m":
        for n, m in ((2, 4), (3, 5)):
            yield [normal(rows, 20 * m).mul(4).round(), n, m]
    elif operation in ("column_sweep", "column_sweep_n_of_m"):
        for width in (80, 20):
            factor = torch.eye(width, dtype=torch.float32, device=device) + 0.2 * normal(width, width).triu(1)
            if operation == "column_sweep":
                yield [factor, normal(rows, width), share(rows, width, 0.5)]
            else:
                yield [factor, normal(rows, width), 2, 4]
    else:
        for dtype, width in ((torch.float32, 144), (torch.bfloat16, 144), (torch.float16, 35)):
            inputs = normal(3 * rows, width)
            yield [(inputs.T @ inputs) / len(inputs), inputs.to(dtype), 0.25]


def results(operation: str, run: Callable[..., Any], arguments: list[Any]) -> list[Tensor]:
    """What ``run`` computes, outputs filled with NaN beforehand."""
    if operation == "row_solve":
        weights = arguments[1]
        out = torch.full_like(weights, float("nan"))
        info = torch.full((len(weights),), -1, dtype=torch.int32, device=weights.device)
        run(*arguments, out, info)
        return [out, info]
    if operation == "accumulate_hessian":
        hessian = arguments[0].clone()
        run(hessian, *arguments[1:])
        return [hessian]
    results = run(*arguments)
    return list(results) if isinstance(results, tuple) else [results]


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
