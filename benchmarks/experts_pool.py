"""``python -m benchmarks.experts_pool``: how much an expert's Hessian should lean on the tokens of all experts.

A feed-forward of SmolLM2-135M cut into experts, with clusters of its inputs for a router. For each weight κ of the pool
the loss of pruned experts on tokens that calibration did not see, relative to their output's energy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.smollm2 import load_smollm2
from thanos import load_samples, prune_weight

_EXPERTS, _CHANNELS, _EACH, _HELD_OUT = 32, 192, 4, 8192
_WEIGHTS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 1e9)


class _Stopped(Exception):  # noqa: N818
    pass


def mlp_inputs(model: Any, block: int, samples: Tensor) -> Tensor:
    """What enters the feed-forward of a block, (tokens, d)."""
    found: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].flatten(0, 1))
        raise _Stopped

    handle = model.model.layers[block].mlp.register_forward_pre_hook(keep)
    for batch in samples.split(4):
        with suppress(_Stopped):
            model(batch)
    handle.remove()
    return torch.cat(found)


class Mixture:
    """Experts of some channels of a feed-forward, and a router by the nearest centres."""

    def __init__(self, mlp: Any, tokens: Tensor, draw: torch.Generator) -> None:
        self._mean = tokens.mean(0)
        self._centres = self._direction(tokens[torch.randperm(len(tokens), generator=draw)[:_EXPERTS]])
        for _ in range(5):
            nearest = (self._direction(tokens) @ self._centres.T).argmax(1)
            groups = [self._direction(tokens)[nearest == expert] for expert in range(_EXPERTS)]
            new = [group.mean(0) if len(group) else self._centres[e] for e, group in enumerate(groups)]
            self._centres = torch.nn.functional.normalize(torch.stack(new))
        width = mlp.gate_proj.out_features
        parts = [torch.randperm(width, generator=draw)[:_CHANNELS] for _ in range(_EXPERTS)]
        self.into = [torch.cat([mlp.gate_proj.weight[part], mlp.up_proj.weight[part]]) for part in parts]
        self.out = [mlp.down_proj.weight[:, part] for part in parts]

    def _direction(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.normalize(tokens - self._mean)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores, chosen = (8 * self._direction(tokens) @ self._centres.T).topk(_EACH, 1)
        return chosen, scores.softmax(1)

    def inner(self, expert: int, tokens: Tensor) -> Tensor:
        gate, up = (tokens @ self.into[expert].T).chunk(2, dim=1)
        return silu(gate) * up

    def routed(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each expert its tokens, and what enters its last projection, scaled by the router's weights."""
        chosen, weights = self.route(tokens)
        for expert in range(_EXPERTS):
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            yield tokens[rows], self.inner(expert, tokens[rows]) * weights[rows, slots][:, None]


def losses(mixture: Mixture, calibration: Tensor, held_out: Tensor, weight: float) -> tuple[float, float]:
    """The relative loss of the projections in and out on ``held_out``, every fourth expert."""
    chosen, scales = mixture.route(calibration)
    parts, unseen = list(mixture.routed(calibration)), list(mixture.routed(held_out))
    mass = [float(scales[chosen == expert].square().sum()) for expert in range(_EXPERTS)]
    pools = calibration.T @ calibration / len(calibration), sum(a.T @ a for _, a in parts) / sum(mass)
    loss, energy = [0.0, 0.0], [0.0, 0.0]
    for expert in range(0, _EXPERTS, 4):
        count = len(parts[expert][0])
        for stage, matrix in enumerate((mixture.into[expert], mixture.out[expert])):
            inputs = parts[expert][stage]
            own = inputs.T @ inputs / max(1e-9, mass[expert] if stage else count)
            pool_tokens = weight * len(own)
            hessian = (count * own + pool_tokens * pools[stage]) / max(1e-9, count + pool_tokens)
            change = prune_weight(matrix, hessian, "0.5").weight - matrix
            loss[stage] += float((unseen[expert][stage] @ change.T).square().sum())
            energy[stage] += float((unseen[expert][stage] @ matrix.T).square().sum())
    return loss[0] / energy[0], loss[1] / energy[1]


@click.command(help=__doc__)
@click.option("--block", default=12, show_default=True, help="Of SmolLM2.")
@click.option("--calibration", default="../shared/data/c4-sample.jsonl", show_default=True, help="Text.")
@torch.no_grad()
def main(block: int, calibration: str) -> None:
    model, tokenizer = load_smollm2(torch.float32)
    tokens = mlp_inputs(model, block, load_samples(calibration, tokenizer, 48, 512, 0).tokens)
    draw = torch.Generator().manual_seed(0)
    mixture = Mixture(model.model.layers[block].mlp, tokens[:-_HELD_OUT], draw)
    for count in (2048, 8192):
        for weight in _WEIGHTS:
            inner, outer = losses(mixture, tokens[:count], tokens[-_HELD_OUT:], weight)
            click.echo(f"{count} tokens, pool weight {weight:g} b: in {inner:.5f}, out {outer:.5f}")


if __name__ == "__main__":
    main()
