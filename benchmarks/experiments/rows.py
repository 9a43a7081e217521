"""Where the outlier rows are: how much of a layer's output and of its loss they carry."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import thanos_kernels as kernels
from thanos import prune_weight
from thanos.walk.decoder import Layer, find_decoder
from thanos.walk.hessians import Collector


def outlier_layers(model: nn.Module, samples: Tensor, pattern: str, alpha: float) -> list[dict[str, Any]]:
    """For each linear layer of the dense model, the shares of its ``ceil(alpha c)`` outlier rows.

    ``energy_share`` is of the output energy ``tr(W H W.T)``, ``loss_share`` of the layer loss at alpha = 0.
    """
    layers = [layer for block in find_decoder(model).layers for layer in block]
    collector = Collector("auto")

    with torch.no_grad(), collector.watching(layers, collector.add):
        for batch in samples.split(8):
            model(batch, use_cache=False)
    return [_shares(layer, collector, pattern, alpha) for layer in layers]


def _shares(layer: Layer, collector: Collector, pattern: str, alpha: float) -> dict[str, Any]:
    inputs = collector.take(layer)
    assert inputs is not None, f"no token reached {layer.name}"
    weight = layer.weight.float()
    assert inputs.hessian is not None
    pruned = prune_weight(weight, inputs.hessian, pattern)
    energy = kernels.row_energy(weight, inputs.hessian).double()
    loss = kernels.row_energy(pruned.weight - weight, inputs.hessian).double()
    outliers = energy.argsort(descending=True)[: math.ceil(alpha * len(energy))]
    return {
        "name": layer.name,
        "rows": len(energy),
        "outliers": len(outliers),
        "energy_share": round(float(energy[outliers].sum() / energy.sum()), 5),
        "loss_share": round(float(loss[outliers].sum() / loss.sum()), 5),
        "relative_loss": round(float(loss.sum() / energy.sum()), 6),
    }
