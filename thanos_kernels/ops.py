"""The public operations: arguments are checked here, once.

``backend`` is ``"auto"`` (Triton for CUDA and ROCm tensors, native C++ for CPU tensors, the reference for anything
else), or the name of one; ``dispatch.py`` picks. A backend is a module with functions named as in ``reference.py``;
what it does not define, or cannot take (float64), ``"auto"`` leaves to the reference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from thanos_kernels import library
from thanos_kernels.arguments import INPUTS, WORKING, check_n_of_m, check_norms, matrix, output, square, whole_mask
from thanos_kernels.damping import damp, damped_diagonal, damping_schedule
from thanos_kernels.dispatch import check, implementation
from thanos_kernels.scope import plain_arithmetic, writing


@plain_arithmetic
def row_solve_ex(
    gram: Tensor,
    weights: Tensor,
    mask: Tensor,
    *,
    out: Tensor | None = None,
    info: Tensor | None = None,
    workspace: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """For each row i with masked columns q, solve ``gram[q, q] @ x = weights[i, q]``.

    This is the paper's equation for the multipliers of several weights of a row (its ``u R^-1``), by Cholesky.

    Args:
        gram: (B, B), symmetric positive definite, float32 or float64.
        weights: (c, B), same dtype.
        mask: (c, B), bool. Rows with nothing and rows with everything masked are both fine.
        out: (c, B), contiguous; overwritten.
        info: (c,) int32; overwritten.
        workspace: bytes of device memory the Triton backend may work in, rows being taken in chunks that fit; 0 for its
            own choice, 512 MiB. The others work in a few MiB.

    Returns:
        The multipliers (c, B), zero off the mask, and ``info``: 0 where a row was solved, else the 1-based column at
        which its system lost positive definiteness; such a row's multipliers are zero.
    """
    matrix("weights", weights, WORKING, (None, None))
    rows, width = weights.shape
    matrix("gram", gram, (weights.dtype,), (width, width))
    mask = whole_mask(mask, (rows, width))
    if workspace < 0:
        raise ValueError(f"workspace must be a number of bytes, or 0, not {workspace}")
    check("row_solve", backend, weights, gram, mask)
    out = output("out", out, (rows, width), weights, weights.dtype)
    info = output("info", info, (rows,), weights, torch.int32)
    if out.numel():
        library.row_solve(gram, weights, mask, out, info, workspace, backend)
    else:
        info.zero_()
    return out, info


@plain_arithmetic
def row_solve(
    gram: Tensor, weights: Tensor, mask: Tensor, *, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """As :func:`row_solve_ex`, raising ``torch.linalg.LinAlgError`` for a system that is not positive definite."""
    out, info = row_solve_ex(gram, weights, mask, out=out, backend=backend)
    if not isinstance(info, FakeTensor) and bool(info.any()):
        row = int(info.ne(0).nonzero()[0])
        raise torch.linalg.LinAlgError(
            f"row_solve: the system of row {row} is not positive definite (column {int(info[row]) - 1}); "
            "the gram matrix needs more damping"
        )
    return out


@plain_arithmetic
def select_smallest(
    weights: Tensor, norms: Tensor, count: int | Tensor, width: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The exact global residual mask: the ``count`` smallest ``abs(weights) * norms`` of the whole matrix.

    Args:
        weights: (c, b), float32 or float64, finite.
        norms: (b,), same dtype, non-negative.
        count: how many of all c*b weights to take, from 0 to c*b; an int or a 0-d integer tensor.
        width: the columns for which the mask is wanted, from 0 to b.

    Returns:
        The mask of the first ``width`` columns (c, width), bool, and how many of the ``count`` it holds, a 0-d int64
        tensor on the weights' device. Equal scores go to the lower flat index of the c x b matrix.
    """
    matrix("weights", weights, WORKING, (None, None))
    check_norms(norms, weights)
    if not 0 <= width <= weights.shape[1]:
        raise ValueError(f"width must be from 0 to {weights.shape[1]}, not {width}")
    if not isinstance(count, Tensor) and not 0 <= count <= weights.numel():
        raise ValueError(f"count must be from 0 to {weights.numel()}, not {count}")
    check("select_smallest", backend, weights, norms)
    if weights.numel() == 0 or width == 0:
        return weights.new_zeros((len(weights), width), dtype=torch.bool), weights.new_zeros((), dtype=torch.int64)
    if not isinstance(count, Tensor):
        count = torch.full((), count, dtype=torch.int64, device=weights.device)
    mask, taken = library.select_smallest(weights, norms, count, width, backend)
    return mask, taken


def score_digits(dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """The digits that :func:`count_scores` tells apart, from the first: how many bits lie below one, and its own."""
    return ((15, 16), (0, 15)) if dtype == torch.float32 else ((47, 16), (32, 15), (16, 16), (0, 16))


@plain_arithmetic
def count_scores(weights: Tensor, norms: Tensor, prefix: Tensor, digit: int, *, backend: str = "auto") -> Tensor:
    """How many scores ``abs(weights) * norms`` have each value of one digit of their bits.

    The bits of a non-negative float order as the float does. Counts of parts of a matrix add up, so a threshold for
    all of it is found digit by digit without bringing the parts together (:func:`thanos.engine.peers.select_smallest`).

    Args:
        weights, norms: as for :func:`select_smallest`.
        prefix: 0-d int64, on the weights' device: scores count whose bits before the digit are these; 0 for the first.
        digit: which of :func:`score_digits`.

    Returns:
        (2^bits of the digit,), int64.
    """
    matrix("weights", weights, WORKING, (None, None))
    check_norms(norms, weights)
    digits = score_digits(weights.dtype)
    if not 0 <= digit < len(digits):
        raise ValueError(f"digit must be from 0 to {len(digits) - 1}, not {digit}")
    check("count_scores", backend, weights, norms)
    counts: Tensor = library.count_scores(weights, norms, prefix, *digits[digit], backend)
    return counts


@plain_arithmetic
def select_below(
    weights: Tensor, norms: Tensor, threshold: Tensor, ties: Tensor, width: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The mask of the scores ``abs(weights) * norms`` up to a threshold: what :func:`select_smallest` does at its end.

    Args:
        weights, norms, width: as for :func:`select_smallest`.
        threshold: 0-d int64, on the weights' device: the bits of a score.
        ties: 0-d int64: how many of the scores equal to it are taken, the first in flat order.

    Returns:
        As :func:`select_smallest`.
    """
    matrix("weights", weights, WORKING, (None, None))
    check_norms(norms, weights)
    if not 0 <= width <= weights.shape[1]:
        raise ValueError(f"width must be from 0 to {weights.shape[1]}, not {width}")
    check("select_below", backend, weights, norms)
    mask, taken = library.select_below(weights, norms, threshold, ties, width, backend)
    return mask, taken


@plain_arithmetic
def select_per_row(weights: Tensor, norms: Tensor, count: int, *, backend: str = "auto") -> Tensor:
    """In each row, the ``count`` smallest ``abs(weights) * norms`` (Wanda's comparison group).

    Arguments as :func:`select_smallest`, ``count`` from 0 to b. Returns the mask (c, b), bool; ties to the lower index.
    """
    matrix("weights", weights, WORKING, (None, None))
    check_norms(norms, weights)
    if not 0 <= count <= weights.shape[1]:
        raise ValueError(f"count must be from 0 to {weights.shape[1]}, not {count}")
    check("select_per_row", backend, weights, norms)
    mask: Tensor = library.select_per_row(weights, norms, count, backend)
    return mask


@plain_arithmetic
def select_n_of_m(scores: Tensor, n: int, m: int, *, backend: str = "auto") -> Tensor:
    """In each group of m consecutive columns, the n smallest scores.

    Args:
        scores: (c, b), float32 or float64, m dividing b.

    Returns:
        The mask (c, b), bool; ties to the lower index.
    """
    matrix("scores", scores, WORKING, (None, None))
    check_n_of_m(n, m, scores.shape[1])
    check("select_n_of_m", backend, scores, group=m)
    mask: Tensor = library.select_n_of_m(scores, n, m, backend)
    return mask


def _sweep_arguments(factor: Tensor, weights: Tensor) -> None:
    matrix("weights", weights, WORKING, (None, None))
    matrix("factor", factor, (weights.dtype,), (weights.shape[1], weights.shape[1]))


@plain_arithmetic
def column_sweep(factor: Tensor, weights: Tensor, mask: Tensor, *, backend: str = "auto") -> Tensor:
    """SparseGPT's compensation inside a block, the triangular solve ``factor[q, q].T @ e[q] = weights[q]`` per row.

    Args:
        factor: (B, B), upper triangular: the block of :func:`inverse_factor`'s U. Float32 or float64.
        weights: (c, B), same dtype.
        mask: (c, B), bool.

    Returns:
        e (c, B), zero off the mask.
    """
    _sweep_arguments(factor, weights)
    mask = whole_mask(mask, (weights.shape[0], weights.shape[1]))
    check("column_sweep", backend, weights, factor, mask)
    errors: Tensor = library.column_sweep(factor, weights, mask, backend)
    return errors


@plain_arithmetic
def column_sweep_n_of_m(
    factor: Tensor, weights: Tensor, n: int, m: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The same for n:m: each group's mask is chosen by ``(w / diag)^2`` when the sweep reaches the group.

    Returns e (c, B) and the mask (c, B), bool. m must divide B.
    """
    _sweep_arguments(factor, weights)
    check_n_of_m(n, m, weights.shape[1])
    check("column_sweep_n_of_m", backend, weights, factor, group=m)
    errors, mask = library.column_sweep_n_of_m(factor, weights, n, m, backend)
    return errors, mask


@plain_arithmetic
def accumulate_hessian(hessian: Tensor, inputs: Tensor, weight: float, *, backend: str = "auto") -> Tensor:
    """``H <- (1 - t) H + t mean(x x.T)`` in place, accumulated in float32 (float64 for a float64 ``hessian``).

    Args:
        hessian: (b, b), float32 or float64, contiguous, symmetric; with ``weight = 1`` its content is ignored.
        inputs: (..., b), float32, bfloat16, float16 or float64: one row per token.
        weight: t, from 0 to 1: the share of the new tokens in all seen so far.

    Returns:
        ``hessian``.
    """
    matrix("hessian", hessian, WORKING, (None, None))
    width = hessian.shape[0]
    if inputs.dim() < 1 or inputs.shape[-1] != width or hessian.shape[1] != width:
        raise ValueError(
            f"hessian ({' x '.join(map(str, hessian.shape))}) must be b x b for inputs of width b, "
            f"not {tuple(inputs.shape)}"
        )
    if not hessian.is_contiguous():
        raise ValueError("hessian must be contiguous: it is updated in place")
    flat = inputs.reshape(math.prod(inputs.shape[:-1]), width)
    matrix("inputs", flat, INPUTS, (None, width))
    if len(flat) == 0:
        raise ValueError("inputs hold no tokens: their mean is undefined")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be from 0 to 1, not {weight}")
    check("accumulate_hessian", backend, hessian, flat)
    if hessian.numel():
        library.accumulate_hessian(hessian, flat, float(weight), backend)
    return hessian


@plain_arithmetic
def inverse_factor_ex(
    hessian: Tensor, damping: float, *, out: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """One attempt of :func:`inverse_factor`, unchecked: U, dead and the 0-d ``info`` (zero where it succeeded)."""
    square("hessian", hessian)
    out = output("out", out, tuple(hessian.shape), hessian, hessian.dtype)
    check("inverse_factor", backend, hessian)
    run = implementation("inverse_factor", backend, hessian)
    _, dead, _ = damp(hessian, damping, out=out)
    with writing(out):
        return out, dead, run(out)


@plain_arithmetic
def inverse_factor(
    hessian: Tensor, damping: float = 0.01, *, out: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor, float]:
    """Upper triangular U with ``inverse(Hd) = U.T @ U``, Hd the damped Hessian (see :func:`damp`).

    One factor gives every trailing inverse: ``inverse(Hd[j:, j:]) = U[j:, j:].T @ U[j:, j:]``.

    Args:
        hessian: (b, b), symmetric, float32 or float64.
        damping: tried first; where the factorisation fails, ten times as much, up to 1.0.
        out: (b, b), contiguous; overwritten.

    Returns:
        U (b, b), the dead columns (b,), and the damping used.

    Raises:
        torch.linalg.LinAlgError: no damping up to 1.0 makes the Hessian positive definite.
    """
    for attempt in damping_schedule(damping):
        out, dead, info = inverse_factor_ex(hessian, attempt, out=out, backend=backend)
        if int(info) == 0:
            return out, dead, attempt
    raise torch.linalg.LinAlgError("the Hessian is not positive definite with any damping up to 1.0")


@plain_arithmetic
def eliminate(
    hessian: Tensor, damping: float, kept: Tensor, removed: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """What removing columns S and solving for the kept ones, T, takes from the damped Hessian Hd (see :func:`damp`).

    Args:
        hessian: (b, b), symmetric, float32 or float64.
        damping: relative to the mean of the live diagonal.
        kept, removed: (t,) and (s,), int64: T and S, which hold each column once.

    Returns:
        ``Hd[T,T]^-1 Hd[T,S]`` (t, s); the Schur complement ``Hd[S,S] - Hd[S,T] Hd[T,T]^-1 Hd[T,S]`` (s, s), symmetric;
        and the 0-d ``info``, non-zero where ``Hd[T,T]`` is not positive definite.
    """
    square("hessian", hessian)
    for name, columns in (("kept", kept), ("removed", removed)):
        if columns.dim() != 1 or columns.dtype != torch.int64:
            raise ValueError(f"{name} must be (n,) of int64, not {columns.dtype} {tuple(columns.shape)}")
    if len(kept) + len(removed) != len(hessian):
        raise ValueError(
            f"kept ({len(kept)}) and removed ({len(removed)}) must hold each of the {len(hessian)} columns once"
        )
    check("eliminate", backend, hessian, kept, removed)
    diagonal, _, _ = damped_diagonal(hessian, damping)
    result: tuple[Tensor, Tensor, Tensor] = implementation("eliminate", backend, hessian)(
        hessian, diagonal, kept, removed
    )
    return result


@plain_arithmetic
def row_energy(weights: Tensor, hessian: Tensor, *, backend: str = "auto") -> Tensor:
    """``h_i = (W H W.T)_ii``, each row's mean squared output per token: the paper's row loss for outlier rows.

    Args:
        weights: (c, b), float32 or float64.
        hessian: (b, b), same dtype, symmetric.

    Returns:
        h (c,).
    """
    _check_energy("row_energy", weights, hessian, backend)
    energy: Tensor = implementation("row_energy", backend, weights, hessian)(weights, hessian)
    return energy


@plain_arithmetic
def outlier_rows(weights: Tensor, hessian: Tensor, count: int, *, backend: str = "auto") -> Tensor:
    """The rows with the largest :func:`row_energy`: what the outlier fraction leaves untouched.

    Args:
        weights, hessian: as in :func:`row_energy`.
        count: how many, from 0 to c.

    Returns:
        mask (c,), bool, of ``count`` rows; ties go to the lower index.
    """
    _check_energy("outlier_rows", weights, hessian, backend)
    if not 0 <= count <= len(weights):
        raise ValueError(f"count must be from 0 to {len(weights)}, not {count}")
    mask: Tensor = implementation("outlier_rows", backend, weights, hessian)(weights, hessian, count)
    return mask


def _check_energy(operation: str, weights: Tensor, hessian: Tensor, backend: str) -> None:
    matrix("weights", weights, WORKING, (None, None))
    matrix("hessian", hessian, (weights.dtype,), (weights.shape[1], weights.shape[1]))
    check(operation, backend, weights, hessian)
