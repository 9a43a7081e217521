"""A Hessian and what is derived from it, computed once for all the layers that share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos.engine.timing import immediate
from thanos.options import real_number
from thanos_kernels.scope import plain_arithmetic


class HessianNotFiniteError(ValueError):
    """The Hessian holds NaN or infinity."""

    def __init__(self) -> None:
        super().__init__("the Hessian holds NaN or infinity")


@dataclass(frozen=True)
class Factor:
    """The Hessian of one input, damped, and the factor of its inverse. A value: :func:`factorise` makes it.

    Layers with the same input share one: pass it where :func:`thanos.prune_weight` takes a Hessian.

    Attributes:
        hessian: (b, b), float32 or float64, ``mean(x x.T)`` over tokens.
        damping: relative to the mean of the live diagonal.
        dead: (b,), bool: the columns whose input is always zero.
        norms: (b,), the root mean square of each column's input, ``sqrt(H_jj)``.
        ridge: 0-d float64, what the damping adds to the diagonal.
        upper: U (b, b), upper triangular, ``inverse(Hd) = U.T @ U``; None where it was not asked for.
        failed: 0-d, non-zero where the factorisation failed: only on a device, which was not waited for.
    """

    hessian: Tensor
    damping: float
    dead: Tensor
    norms: Tensor
    ridge: Tensor
    upper: Tensor | None
    failed: Tensor

    def without_dead_(self, weights: Tensor) -> Tensor:
        """``weights`` (n, b), set to zero in the dead columns."""
        if immediate(self.dead) and not bool(self.dead.any()):
            return weights
        return weights.masked_fill_(self.dead, 0)


@plain_arithmetic
def factorise(hessian: Tensor, damping: float = 0.01, backend: str = "auto", *, inverse: bool = True) -> Factor:
    """Damp a Hessian and factor its inverse (docs/method.md, section 2).

    Args:
        hessian: (b, b), ``mean(x x.T)`` over tokens, any floating type; used in float32, or float64 if it is that. It
            must not change while the factor is in use.
        damping: relative to the mean of the live diagonal. A factorisation that fails raises it tenfold, up to 1.0: at
            once on the CPU; on a device where ``failed`` is read, by :func:`more_damped`.
        backend: of :func:`thanos_kernels.inverse_factor`.
        inverse: whether U is wanted.

    Raises:
        ValueError: the Hessian is not a square floating matrix or holds NaN, or the damping is negative.
        torch.linalg.LinAlgError: it is not positive definite with any damping up to 1.0.
    """
    check_hessian(hessian)
    damping = next(kernels.damping_schedule(real_number("damping", damping)))
    hessian = hessian.detach().to(torch.promote_types(hessian.dtype, torch.float32))
    diagonal = hessian.diagonal()
    upper, failed = None, torch.zeros((), dtype=torch.int32, device=hessian.device)
    if inverse:
        upper, _, failed = kernels.inverse_factor_ex(hessian, damping, backend=backend)
        while immediate(failed) and int(failed):
            if not finite(hessian):
                raise HessianNotFiniteError
            damping = _more(damping)
            upper, _, failed = kernels.inverse_factor_ex(hessian, damping, out=upper, backend=backend)
    ridge = kernels.damped_diagonal(hessian, damping)[2].double()
    return Factor(hessian, damping, diagonal == 0, diagonal.clamp(min=0).sqrt(), ridge, upper, failed)


def check_hessian(hessian: object) -> None:
    """Raise ValueError or TypeError unless it is a square floating matrix."""
    if not isinstance(hessian, Tensor):
        raise TypeError(f"the Hessian must be a tensor or a Factor, not {type(hessian).__name__}")
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1] or not hessian.is_floating_point():
        raise ValueError(f"the Hessian must be a square floating matrix, not {hessian.dtype} {tuple(hessian.shape)}")


def finite(tensor: Tensor) -> Tensor:
    """0-d bool: no NaN and no infinity, in one pass and without a temporary."""
    low, high = torch.aminmax(tensor)
    return low.isfinite() & high.isfinite()


def more_damped(factor: Factor, backend: str = "auto") -> Factor:
    """The same Hessian's factor with ten times the damping; ``torch.linalg.LinAlgError`` beyond 1.0."""
    return factorise(factor.hessian, _more(factor.damping), backend, inverse=factor.upper is not None)


def _more(damping: float) -> float:
    for more in kernels.damping_schedule(damping):
        if more > damping:
            return more
    raise torch.linalg.LinAlgError(f"the Hessian is not positive definite with any damping up to {kernels.MAX_DAMPING}")


def converted(factor: Factor, dtype: torch.dtype, inverse: bool, backend: str = "auto") -> Factor:
    """The factor, or a new one where it is of another dtype or lacks the inverse that is wanted."""
    if factor.hessian.dtype == dtype and (factor.upper is not None or not inverse):
        return factor
    return factorise(factor.hessian.to(dtype), factor.damping, backend, inverse=inverse)
