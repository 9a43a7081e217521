"""A Hessian and what is derived from it, computed once for all the layers that share it."""

from __future__ import annotations

import torch
from torch import Tensor

import thanos_kernels as kernels


class Factor:
    """The Hessian of one input, its damping, and its inverse factor U when somebody first asks for it.

    Layers with the same input share one: pass it where :func:`thanos.prune_weight` takes a Hessian.

    Args:
        hessian: (b, b), ``mean(x x.T)`` over tokens, any floating type; used in float32, or float64 if it is that.
            It must not change while the factor is in use.
        damping: relative to the mean of the live diagonal. A factorisation that fails raises it tenfold, up to 1.0.
        backend: of :func:`thanos_kernels.inverse_factor`.

    Attributes:
        dead: (b,), bool: the columns whose input is always zero.
        norms: (b,), the root mean square of each column's input, ``sqrt(H_jj)``.
        damping: the damping in use.
        info: 0-d tensors, non-zero where a factorisation in use failed.

    Raises:
        ValueError: the Hessian is not a square floating matrix, or the damping is negative.
    """

    def __init__(self, hessian: Tensor, damping: float = 0.01, backend: str = "auto") -> None:
        if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1] or not hessian.is_floating_point():
            raise ValueError(
                f"the Hessian must be a square floating matrix, not {hessian.dtype} {tuple(hessian.shape)}"
            )
        self.hessian = hessian.to(torch.promote_types(hessian.dtype, torch.float32))
        self.dead = self.hessian.diagonal() == 0
        self.norms = self.hessian.diagonal().clamp(min=0).sqrt()
        self._backend = backend
        self._schedule = kernels.damping_schedule(damping)
        self.damping = next(self._schedule)
        self._upper: Tensor | None = None
        self.info: list[Tensor] = []

    @property
    def upper(self) -> Tensor:
        """U (b, b), upper triangular, ``inverse(Hd) = U.T @ U``."""
        if self._upper is None:
            self._upper, _, info = kernels.inverse_factor_ex(self.hessian, self.damping, backend=self._backend)
            self.info.append(info)
            if info.device.type == "cpu" and int(info):  # on a device nobody waits: `info` says it in the end
                self.raise_damping()
                return self.upper
        return self._upper

    def without_dead_(self, weights: Tensor) -> Tensor:
        """``weights`` (n, b), set to zero in the dead columns."""
        if self.dead.device.type == "cpu" and not bool(self.dead.any()):
            return weights
        return weights.masked_fill_(self.dead, 0)

    @property
    def ridge(self) -> Tensor:
        """What the damping adds to the diagonal, 0-d float64."""
        return kernels.damped_diagonal(self.hessian, self.damping)[2].double()

    def to(self, dtype: torch.dtype) -> Factor:
        """This factor, or a new one in another dtype."""
        if dtype == self.hessian.dtype:
            return self
        return Factor(self.hessian.to(dtype), self.damping, self._backend)

    def raise_damping(self) -> None:
        """Go on with ten times the damping; ``torch.linalg.LinAlgError`` beyond 1.0."""
        self._upper, self.info = None, []
        try:
            self.damping = next(self._schedule)
        except StopIteration:
            raise torch.linalg.LinAlgError(
                f"the Hessian is not positive definite with any damping up to {kernels.MAX_DAMPING}"
            ) from None
