"""One layer that reads channels or heads: choose which go, update the others, and say what that cost."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import thanos_kernels as kernels
from thanos.report import LayerReport
from thanos.shrink.goals import HeadGoal
from thanos.shrink.importance import remove_channels, remove_heads
from thanos.shrink.options import ShrinkOptions
from thanos.shrink.stream import Inputs
from thanos.shrink.structure import Site
from thanos.walk.decoder import Layer


@dataclass(frozen=True)
class Cutter:
    """What is to be cut from every block.

    Attributes:
        channels: how many of them go.
        heads: which of them go.
    """

    options: ShrinkOptions
    channels: int = 0
    heads: HeadGoal | None = None

    def __call__(self, sink: nn.Module, site: Site, name: str, inputs: Inputs, fisher: Tensor | None) -> Cut:
        """Zero the columns of ``sink`` that go and update the others.

        Args:
            sink: the layer of ``site``.
            name: its full name.
            inputs: what is known of its input.
            fisher: the units' score where that decides.

        Raises:
            ValueError: the activations hold NaN or infinity.
        """
        begin, backend = time.perf_counter(), self.options.backend
        stored, hessian = Layer(name, sink).weight, inputs.hessian
        if not bool(hessian.diagonal().isfinite().all()):
            raise ValueError(f"{name}: the activations that reach it hold NaN or infinity")
        weight = stored.to(hessian.dtype)
        energy = float(kernels.row_energy(weight.contiguous(), hessian, backend=backend).double().sum())
        try:
            upper, dead, damping = kernels.inverse_factor(hessian, self.options.damping, backend=backend)
        except torch.linalg.LinAlgError as error:
            raise type(error)(f"{name}: {error}") from error
        target = weight.masked_fill(dead, 0)
        if inputs.error is not None:
            target = target + self.options.correction * (inputs.error.to(hessian.dtype) @ upper.T) @ upper
        kind = self.options.importance
        if site.kind == "channels":
            removal, units = remove_channels(site, target, upper, inputs, self.channels, kind, fisher)
        else:
            assert self.heads is not None
            removal, units = remove_heads(site, target, upper, inputs, self.heads, kind, fisher)
        change = removal.weight.to(stored.dtype).to(weight.dtype) - weight
        loss = float(kernels.row_energy(change, hessian, backend=backend).double().sum())
        stored.copy_(removal.weight)
        report = LayerReport(
            name=name,
            shape=(weight.shape[0], weight.shape[1]),
            zeros=len(removal.removed) * weight.shape[0],
            sparsity=len(removal.removed) / weight.shape[1],
            loss=loss,
            relative_loss=loss / energy if energy > 0 else 0.0,
            damping=damping,
            shared_with=None,
            tokens=inputs.tokens,
            seconds={"prune": time.perf_counter() - begin},
        )
        return Cut(report, units, change)


@dataclass(frozen=True)
class Cut:
    """What became of a layer.

    Attributes:
        units: (units,), bool: which channels or heads stay.
        change: (c, b), of the weight as it is stored.
    """

    report: LayerReport
    units: Tensor
    change: Tensor
