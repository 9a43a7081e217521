"""How many of a block's weights are zero."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from thanos.report import LayerReport
from thanos.walk.decoder import Layer


def count_zeros(block: nn.Module, layers: list[Layer], reports: Mapping[str, LayerReport]) -> tuple[int, int]:
    """Of a block's weights, all parameters but vectors: those that are zero, and all.

    Args:
        layers: its linear layers.
        reports: the pruned ones by name, in which they are counted already.
    """
    counted = {id(one) for one in block.parameters() if sum(size > 1 for size in one.shape) < 2}
    total = zeros = 0
    for layer in layers:
        report = reports.get(layer.name)
        total += layer.weight.numel()
        zeros += report.zeros if report else layer.weight.numel() - int(layer.weight.count_nonzero())
        counted |= {id(parameter) for parameter in layer.holder.parameters(recurse=False)}
    for parameter in block.parameters():
        if id(parameter) not in counted:
            counted.add(id(parameter))
            total += parameter.numel()
            zeros += parameter.numel() - int(parameter.count_nonzero())
    return zeros, total
