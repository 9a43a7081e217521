"""Better weights for a mask that is fixed: a refit that follows any pruning method (docs/method.md, section 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import thanos_kernels as kernels

SWEEPS = 2  # two more take two thirds longer and pay beyond 50% and 2:4 alone (docs/results.md)
BLOCK = 128
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Refined:
    """A layer after a refit or a mask search.

    Attributes:
        weight: (c, b), exactly zero where ``mask`` is True.
        mask: (c, b), bool, True where pruned.
        loss_before, loss_after: (c,), float64: each row's ``d H d.T``, d = weight - target, without damping.
    """

    weight: Tensor
    mask: Tensor
    loss_before: Tensor
    loss_after: Tensor


def refit(
    target: Tensor,
    pruned: Tensor,
    mask: Tensor,
    hessian: Tensor,
    damping: float,
    *,
    sweeps: int = SWEEPS,
    block_size: int = BLOCK,
    backend: str = "auto",
) -> Refined:
    """Lower the layer loss over the kept weights of a fixed mask, all rows at once.

    Sweeps over blocks of columns, back and forth. A block's kept weights become the best for all others as they are:
    with ``d = weight - target`` and ``g = -(d Hd)`` in the block, each row adds the solution of ``Hd[q, q] x = g[q]``,
    q its kept columns there (:func:`thanos_kernels.row_solve`). No step raises the damped loss. A sweep costs half a
    product c x b x b, because sums over the columns to the left, taken on the way right, serve the way back.

    Args:
        target: (c, b), float32 or float64: the dense weight, or the corrected one.
        pruned: (c, b), same dtype, zero at ``mask``: any method's result.
        mask: (c, b), bool, True where pruned; any pattern. A row without a True is returned as it is.
        hessian: (b, b), same dtype. Columns with a zero diagonal are dead: they stay zero in rows that are pruned.
        damping: as of :func:`thanos_kernels.damp`; the damping that the method used.
        sweeps: at most so many; each direction counts as one.
        block_size: columns solved for at a time.

    Returns:
        The weight, ``mask`` itself and the losses. Rows whose undamped loss would not be lower keep ``pruned``.

    Raises:
        ValueError: shapes, dtypes or numbers do not fit.
    """
    check_layer(target, pruned, mask, hessian)
    if sweeps < 0 or block_size < 1:
        raise ValueError(f"sweeps must be at least 0 and the block size at least 1, not {sweeps} and {block_size}")
    problem = LayerProblem(hessian, damping, block_size, backend)
    weight = pruned.clone()
    before, after = (pruned.new_zeros(len(pruned), dtype=torch.float64) for _ in range(2))
    for start in range(0, len(pruned), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        change, before[part], after[part] = problem.sweep(target[part], pruned[part], mask[part], sweeps)
        better = (after[part] < before[part]) & mask[part].any(1)
        better_weight = torch.where(mask[part], 0, change.add_(target[part]))
        weight[part] = torch.where(better[:, None], better_weight, pruned[part])
        after[part] = torch.where(better, after[part], before[part])
    return Refined(weight, mask, before, after)


def check_layer(target: Tensor, pruned: Tensor, mask: Tensor, hessian: Tensor) -> None:
    """Raise ValueError unless the tensors describe one pruned layer, in float32 or float64."""
    if target.dim() != 2 or target.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the target must be a float32 or float64 matrix, not {target.dtype} {tuple(target.shape)}")
    rows, columns = target.shape
    wanted = {
        "pruned weight": (pruned, (rows, columns), target.dtype),
        "mask": (mask, (rows, columns), torch.bool),
        "Hessian": (hessian, (columns, columns), target.dtype),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != target.device:
            raise ValueError(
                f"the {name} must be {dtype} of shape {shape} on {target.device} beside this target, "
                f"not {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )


class LayerProblem:
    """The layer problem cut into blocks of columns; Hd and H differ on the diagonal alone."""

    def __init__(self, hessian: Tensor, damping: float, block_size: int, backend: str) -> None:
        self.hessian, self.backend = hessian, backend
        self.blocks = [(at, min(at + block_size, len(hessian))) for at in range(0, len(hessian), block_size)]
        diagonal, self.dead, _ = kernels.damped_diagonal(hessian, damping)
        self.own: list[Tensor] = []
        for start, stop in self.blocks:
            block = hessian[start:stop, start:stop].clone()
            block.diagonal().copy_(diagonal[start:stop])
            self.own.append(block)

    def sweep(
        self,
        target: Tensor,
        pruned: Tensor,
        mask: Tensor,
        sweeps: int,
        rounded: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The new ``weight - target`` of some rows, and their undamped losses before and after.

        With ``rounded``, each block's weights are what it makes of them before the next block is solved for.
        """
        change = pruned - target
        kept = (mask | self.dead).logical_not_()
        right = self.right(change)  # each block's sum over the blocks to its right
        before = self.loss(change, right)
        left = torch.empty_like(right)
        for index in range(sweeps):
            forward = index % 2 == 0
            for (start, stop), own in self._in_order(forward):
                here = change[:, start:stop]
                if forward:
                    torch.mm(change[:, :start], self.hessian[:start, start:stop], out=left[:, start:stop])
                else:
                    torch.mm(change[:, stop:], self.hessian[stop:, start:stop], out=right[:, start:stop])
                gradient = (here @ own).add_(left[:, start:stop]).add_(right[:, start:stop]).neg_()
                step, _ = kernels.row_solve_ex(own, gradient, kept[:, start:stop].contiguous(), backend=self.backend)
                here += step
                if rounded is not None:
                    wanted = target[:, start:stop]
                    torch.sub(rounded(here + wanted), wanted, out=here)
        if sweeps % 2:
            right = self.right(change)
        return change, before, self.loss(change, right)

    def _in_order(self, forward: bool) -> Iterator[tuple[tuple[int, int], Tensor]]:
        pairs = list(zip(self.blocks, self.own, strict=True))
        return iter(pairs if forward else reversed(pairs))

    def right(self, change: Tensor) -> Tensor:
        """(n, b): each block's sum of ``d H`` over the blocks to its right."""
        right = torch.empty_like(change)
        for start, stop in self.blocks:
            torch.mm(change[:, stop:], self.hessian[stop:, start:stop], out=right[:, start:stop])
        return right

    def loss(self, change: Tensor, right: Tensor) -> Tensor:
        """``d H d.T`` by symmetry: the diagonal blocks, and twice what each has with those to its right."""
        total = change.new_zeros(len(change), dtype=torch.float64)
        for start, stop in self.blocks:
            here = change[:, start:stop]
            product = (here @ self.hessian[start:stop, start:stop]).add_(right[:, start:stop], alpha=2)
            total += torch.linalg.vecdot(product, here)
        return total
