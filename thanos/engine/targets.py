"""The best dense weight for the input that a layer of a pruned model really gets (docs/method.md, section 10)."""

from __future__ import annotations

import torch
from torch import Tensor

import thanos_kernels as kernels

CORRECTION = 0.5
_TOKENS = 2048  # of a product that is rounded to bfloat16


def check_correction(beta: float) -> None:
    """Raise ValueError unless beta lies from 0 to 1."""
    if not 0 <= beta <= 1:
        raise ValueError(f"correction must be from 0 (the layer's own weight) to 1 (all of the drift), not {beta}")


def accumulate_drift(drift: Tensor, dense: Tensor, inputs: Tensor, weight: float) -> Tensor:
    """``D <- (1 - t) D + t mean((x' - x) x.T)`` in place: how the dense model's inputs x' differ from x.

    Of bfloat16 inputs, where the processor multiplies those, ``x' - x`` is rounded to bfloat16, and so are sums over
    2048 tokens: D comes within 0.2%, what it makes of a target within some percent of the correction.

    Args:
        drift: (b, b), float32 or float64; with ``weight = 1`` its content is ignored.
        dense: (..., b), the layer's inputs in the dense model, of the same tokens in the same order.
        inputs: (..., b), those in the pruned model.
        weight: t, the share of the new tokens in all seen so far.

    Raises:
        ValueError: the two inputs differ in shape.
    """
    if dense.shape != inputs.shape:
        raise ValueError(
            f"the dense inputs {tuple(dense.shape)} must be of the shape {tuple(inputs.shape)} of the others"
        )
    own, there = (part.reshape(-1, len(drift)) for part in (inputs, dense))
    keep, scale = (0 if weight == 1 else 1 - weight), weight / len(own)
    if own.dtype == there.dtype == torch.bfloat16 and kernels.multiplies_bfloat16(drift):
        drift = drift.zero_() if keep == 0 else drift.mul_(keep)
        for part, others in zip(own.split(_TOKENS), there.split(_TOKENS), strict=True):
            drift.add_((others - part).T @ part, alpha=scale)
        return drift
    own = own.to(drift.dtype)
    return drift.addmm_((there.to(drift.dtype) - own).T, own, beta=keep, alpha=scale)


def correction_of(drift: Tensor, upper: Tensor) -> Tensor:
    """``C = D inverse(Hd) = (D U.T) U``, (b, b), which the layers of one input share.

    ``W + W C`` minimises ``mean |W' x - W x'|^2 + ridge |W' - W|^2`` over W': its derivative is zero where
    ``(W' - W) Hd = W D``.

    Args:
        drift: D, (b, b), of :func:`accumulate_drift`.
        upper: U, (b, b), with ``U.T U = inverse(Hd)``.
    """
    return (drift @ upper.T) @ upper


def corrected_target(weight: Tensor, correction: Tensor, beta: float = CORRECTION) -> Tensor:
    """``W* = W + beta W C``, (c, b): what to prune in the place of W (c, b).

    The whole correction, beta = 1, fits the calibration samples rather than the text.

    Raises:
        ValueError: beta is not from 0 to 1.
    """
    check_correction(beta)
    return weight.addmm(weight, correction, alpha=beta)
