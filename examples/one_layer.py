"""Prune one layer, without a model: what each method loses of its output, at each pattern. Takes a few seconds.

python examples/one_layer.py
"""

from __future__ import annotations

import torch

import thanos

METHODS = ("magnitude", "wanda", "sparsegpt", "thanos")
PATTERNS = ("0.5", "4:8", "2:4", "structured:0.3")


def main() -> None:
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(512, 512, generator=draw) / 512**0.5 + torch.eye(512)
    inputs = torch.randn(8192, 512, generator=draw) @ mixing  # inputs that move together, as those of real layers do
    weight = torch.randn(1024, 512, generator=draw)
    hessian = inputs.T @ inputs / len(inputs)
    energy = float((weight @ hessian * weight).sum())

    factor = thanos.factorise(hessian)  # once, for every method and pattern
    print(f"{'share of the output lost':26}" + "".join(f"{pattern:>16}" for pattern in PATTERNS))
    for method in METHODS:
        losses = [thanos.prune_weight(weight, factor, pattern, method=method).loss for pattern in PATTERNS]
        print(f"{method:26}" + "".join(f"{loss / energy:16.2%}" for loss in losses))


if __name__ == "__main__":
    main()
