"""Kept weights rounded to int8, each block's rounding made up for by the blocks behind it (docs/method.md, section 8).

One sweep of the refit in which a block's weights are rounded as soon as they are solved for: the next blocks are solved
for with the rounded ones in place. Rows where plain rounding is as good are rounded plainly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.engine.refine import ROWS_AT_ONCE, LayerProblem, Refined, check_layer
from thanos_kernels.sparse_int8 import GROUP, LARGEST, rounded


def round_weights(
    target: Tensor,
    pruned: Tensor,
    mask: Tensor,
    hessian: Tensor,
    damping: float,
    *,
    dtype: torch.dtype = torch.float32,
    largest: int = LARGEST,
    compensate: bool = True,
    backend: str = "auto",
) -> Refined:
    """Round the kept weights to whole numbers with a scale for each 128 columns of a row.

    Args:
        target, pruned, mask, hessian, damping, backend: as of :func:`thanos.engine.refine.refit`. Rows without a True
            in the mask stay as they are.
        dtype: in which the weights are kept: the scales are those of weights of that dtype, so that packing the result
            finds the same scales and the same int8 values.
        largest: of the whole numbers; 7 are those of four bits.
        compensate: whether later blocks make up for it; otherwise each weight is rounded where it stands.

    Returns:
        The rounded weight, ``mask`` itself, and each row's loss after plain rounding and of the result, which is
        never higher.

    The losses of rows with a weight too large for a float16 scale are no numbers.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_layer(target, pruned, mask, hessian)
    problem = LayerProblem(hessian, damping, GROUP, backend)

    def as_kept(weights: Tensor) -> Tensor:
        return rounded(weights.to(dtype), largest).to(weights.dtype)

    weight = pruned.clone()
    before, after = (pruned.new_zeros(len(pruned), dtype=torch.float64) for _ in range(2))
    for start in range(0, len(pruned), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        touched = mask[part].any(1, keepdim=True)
        plain = torch.where(touched, as_kept(pruned[part]), pruned[part])
        change = plain - target[part]
        before[part] = after[part] = problem.loss(change, problem.right(change))
        weight[part] = plain
        if not compensate:
            continue
        change, _, loss = problem.sweep(target[part], pruned[part], mask[part], 1, as_kept)
        better = touched[:, 0] & (loss < before[part])
        # Sums leave the grid by a rounding of float32.
        found = as_kept(torch.where(mask[part], 0, change.add_(target[part])))
        weight[part] = torch.where(better[:, None], found, plain)
        after[part] = torch.where(better, loss, before[part])
    return Refined(weight, mask, before, after)
