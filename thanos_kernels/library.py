"""The operations as ``torch.library`` operators, ``torch.ops.thanos.*``, with the shapes of their results.

So they compose with ``torch.compile`` and run under ``FakeTensorMode``, whichever backend is behind them. Arguments are
checked by ``ops.py``; ``backend`` is as there.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from thanos_kernels.dispatch import implementation


@custom_op("thanos::row_solve", mutates_args=("out", "info"))
def row_solve(
    gram: Tensor, weights: Tensor, mask: Tensor, out: Tensor, info: Tensor, workspace: int, backend: str
) -> None:
    """Fill ``out`` (c, B) and ``info`` (c,); ``workspace`` in bytes, 0 for the backend's own choice."""
    run = implementation("row_solve", backend, weights, gram, mask)
    if workspace and run.__module__.startswith("thanos_kernels.triton."):
        run(gram, weights, mask, out, info, workspace=workspace)
    else:
        run(gram, weights, mask, out, info)


@row_solve.register_fake
def _(gram: Tensor, weights: Tensor, mask: Tensor, out: Tensor, info: Tensor, workspace: int, backend: str) -> None:
    return None


@custom_op("thanos::select_smallest", mutates_args=())
def select_smallest(weights: Tensor, norms: Tensor, count: Tensor, width: int, backend: str) -> tuple[Tensor, Tensor]:
    """The mask (c, width) and how many of the ``count``, 0-d int64, it holds."""
    mask, taken = implementation("select_smallest", backend, weights, norms)(weights, norms, count, width)
    return mask, taken


@select_smallest.register_fake
def _(weights: Tensor, norms: Tensor, count: Tensor, width: int, backend: str) -> tuple[Tensor, Tensor]:
    return _mask(weights, width), weights.new_empty((), dtype=torch.int64)


@custom_op("thanos::select_per_row", mutates_args=())
def select_per_row(weights: Tensor, norms: Tensor, count: int, backend: str) -> Tensor:
    """The mask (c, b)."""
    mask: Tensor = implementation("select_per_row", backend, weights, norms)(weights, norms, count)
    return mask


@select_per_row.register_fake
def _(weights: Tensor, norms: Tensor, count: int, backend: str) -> Tensor:
    return _mask(weights, weights.shape[1])


@custom_op("thanos::select_n_of_m", mutates_args=())
def select_n_of_m(scores: Tensor, n: int, m: int, backend: str) -> Tensor:
    """The mask (c, b)."""
    mask: Tensor = implementation("select_n_of_m", backend, scores, group=m)(scores, n, m)
    return mask


@select_n_of_m.register_fake
def _(scores: Tensor, n: int, m: int, backend: str) -> Tensor:
    return _mask(scores, scores.shape[1])


@custom_op("thanos::column_sweep", mutates_args=())
def column_sweep(factor: Tensor, weights: Tensor, mask: Tensor, backend: str) -> Tensor:
    """The errors (c, B)."""
    errors: Tensor = implementation("column_sweep", backend, weights, factor, mask)(factor, weights, mask)
    return errors


@column_sweep.register_fake
def _(factor: Tensor, weights: Tensor, mask: Tensor, backend: str) -> Tensor:
    return weights.new_empty(weights.shape)


@custom_op("thanos::column_sweep_n_of_m", mutates_args=())
def column_sweep_n_of_m(factor: Tensor, weights: Tensor, n: int, m: int, backend: str) -> tuple[Tensor, Tensor]:
    """The errors and the mask, both (c, B)."""
    run = implementation("column_sweep_n_of_m", backend, weights, factor, group=m)
    errors, mask = run(factor, weights, n, m)
    return errors, mask


@column_sweep_n_of_m.register_fake
def _(factor: Tensor, weights: Tensor, n: int, m: int, backend: str) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), _mask(weights, weights.shape[1])


@custom_op("thanos::accumulate_hessian", mutates_args=("hessian",))
def accumulate_hessian(hessian: Tensor, inputs: Tensor, weight: float, backend: str) -> None:
    """Update ``hessian`` (b, b) by ``inputs`` (tokens, b)."""
    implementation("accumulate_hessian", backend, hessian, inputs)(hessian, inputs, weight)


@accumulate_hessian.register_fake
def _(hessian: Tensor, inputs: Tensor, weight: float, backend: str) -> None:
    return None


def _mask(like: Tensor, width: int) -> Tensor:
    return like.new_empty((like.shape[0], width), dtype=torch.bool)
