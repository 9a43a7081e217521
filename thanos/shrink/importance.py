"""Which channels and heads matter least: the scores that ``--importance`` names, and the removal that follows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thanos.shrink.goals import HeadGoal
from thanos.shrink.removal import Removal, cheapest_columns, cheapest_groups, without_columns
from thanos.shrink.stream import Inputs
from thanos.shrink.structure import Site
from thanos.walk.replay import run_model


def column_scores(kind: str, weight: Tensor, inputs: Inputs) -> Tensor:
    """(b,), of the columns of a weight (c, b); those of a head are added up.

    ``magnitude``: ``|W_:j|^2``. ``wanda``: ``|W_:j|^2 H_jj``, the mean squared output of the column. ``forward``:
    ``mean|x_j| |W_:j|``, a bound on how far the block's output moves, in the manner of LLM-BIP.
    """
    norms = weight.square().sum(0)
    if kind == "magnitude":
        return norms
    if kind == "wanda":
        return norms * inputs.hessian.diagonal()
    if kind == "forward":
        return norms.sqrt() * inputs.absolute
    raise ValueError(f"importance {kind!r} has no score of single columns")


def remove_channels(
    site: Site, weight: Tensor, upper: Tensor, inputs: Inputs, count: int, kind: str, fisher: Tensor | None
) -> tuple[Removal, Tensor]:
    """Remove ``count`` channels: the updated weight, and which channels stay (b,), bool.

    Args:
        site: whose channels.
        weight: (c, b), in the dtype of ``upper``.
        upper: (b, b), the inverse factor of the damped Hessian.
        inputs: of the layer.
        count: less than b.
        kind: one of ``IMPORTANCES``.
        fisher: (b,), the Group Fisher score, where ``kind`` is that.
    """
    if kind == "obs":
        removal = without_columns(weight, upper, cheapest_columns(weight, upper, count))
    else:
        score = fisher if fisher is not None else column_scores(kind, weight, inputs)
        removal = without_columns(weight, upper, score.argsort(stable=True)[:count].to(weight.device))
    return removal, _staying(site.units, removal.removed)


def remove_heads(
    site: Site, weight: Tensor, upper: Tensor, inputs: Inputs, goal: HeadGoal, kind: str, fisher: Tensor | None
) -> tuple[Removal, Tensor]:
    """Remove query heads as ``goal`` says: the updated weight, and which heads stay (units,), bool.

    Arguments as :func:`remove_channels`, ``fisher`` (units,).
    """
    head_of = torch.arange(weight.shape[1], dtype=torch.int64, device=weight.device) // (weight.shape[1] // site.units)
    group = site.group.to(weight.device)
    if goal.even:
        units, rounds = head_of, goal.removed // site.groups
        allowed = [(group == one).nonzero()[:, 0].tolist() for one in range(site.groups)]
    else:
        units, rounds = group[head_of], goal.removed // (site.units // site.groups)
        allowed = [list(range(site.groups))]
    if kind == "obs":
        removed, _ = cheapest_groups(weight, upper, units, allowed, rounds)
    else:
        if fisher is not None:
            score = (
                fisher.to(weight.device)
                if goal.even
                else torch.zeros(site.groups, dtype=fisher.dtype, device=fisher.device).index_add_(
                    0, site.group, fisher
                )
            )
        else:
            columns = column_scores(kind, weight, inputs)
            score = columns.new_zeros(int(units.max()) + 1).index_add_(0, units, columns)
        removed = [index for some in allowed for index in sorted(some, key=lambda one: float(score[one]))[:rounds]]
    columns = torch.isin(units, torch.tensor(removed, dtype=torch.int64, device=units.device)).nonzero()[:, 0]
    return without_columns(weight, upper, columns), _staying(site.units, head_of[columns].unique())


def _staying(units: int, removed: Tensor) -> Tensor:
    stay = torch.ones(units, dtype=torch.bool, device="cpu")
    stay[removed.cpu()] = False
    return stay


@dataclass
class _Tally:
    total: Tensor
    tokens: int = 0


def fisher_scores(
    model: nn.Module,
    sinks: Sequence[tuple[Any, nn.Module, int]],
    samples: Tensor,
    seen: Callable[[], None] | None = None,
) -> dict[Any, Tensor]:
    """Group Fisher: ``mean over tokens of (sum over the group of x dL/dx)^2``, L the language-model loss of a sample.

    Args:
        model: the dense model.
        sinks: a key, the layer that reads the groups, and how many groups its input channels are.
        samples: (N, S), token ids; one after the other goes through the whole model, forward and backward.

    Returns:
        (groups,) for each key.
    """
    kept: dict[Any, Tensor] = {}
    tallies: dict[Any, _Tally] = {}

    def watcher(key: Any) -> Callable[..., Any]:
        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inputs = args[0] if args else next(iter(kwargs.values()))
            if not inputs.requires_grad:
                inputs = inputs.requires_grad_()
            inputs.retain_grad()
            kept[key] = inputs

        return watch

    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack, torch.enable_grad():
        for parameter in frozen:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_)
        for key, sink, _ in sinks:
            stack.callback(sink.register_forward_pre_hook(watcher(key), with_kwargs=True).remove)
        for sample in samples:
            logits = run_model(model, sample[None]).logits[0, :-1].float()
            nn.functional.cross_entropy(logits, sample[1:].to(logits.device), reduction="sum").backward()
            for key, _, groups in sinks:
                inputs = kept.pop(key)
                assert inputs.grad is not None
                product = (inputs.detach().float() * inputs.grad.float()).flatten(0, -2)
                score = product.unflatten(1, (groups, -1)).sum(2).square().sum(0)
                tally = tallies.setdefault(key, _Tally(torch.zeros_like(score)))
                tally.total += score
                tally.tokens += len(product)
    return {key: (tally.total / tally.tokens).cpu() for key, tally in tallies.items()}
