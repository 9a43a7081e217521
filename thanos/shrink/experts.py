"""Fewer experts in every mixture: which go, by REAP's score, and what is cut with them.

A mixture is found by how it runs: a module whose own parameters all lead with the number of experts and that is given
tokens, the experts chosen for each, and their weights; its router is the module that returned the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thanos.checkpoint import can_convert
from thanos.pattern import Axis
from thanos.shrink.configuration import Shape, smaller_config
from thanos.shrink.goals import whole_count
from thanos.shrink.rebuild import rebuilt
from thanos.walk.replay import run_model

_PROBE = 16


@dataclass
class Mixture:
    """The fused experts of one block.

    Attributes:
        name: of the module that holds them.
        experts: how many there are.
        cut: names of the parameters and buffers whose first axis counts experts, the router's among them.
        weighted: (experts,), the sum over its tokens of the router's weight times the norm of an expert's output.
        plain: (experts,), the sum of the norms alone.
        tokens: (experts,), how many tokens were sent to each.
    """

    name: str
    experts: int
    cut: list[str]
    weighted: Tensor
    plain: Tensor
    tokens: Tensor
    router: str = field(default="")

    def score(self, kind: str) -> Tensor:
        """(experts,): REAP's ``mean of g |f(x)|``, or the plain ``mean of |f(x)|`` for the importance ``forward``."""
        return (self.plain if kind == "forward" else self.weighted) / self.tokens.clamp(min=1)


def find_mixtures(model: nn.Module, samples: Tensor) -> list[Mixture]:
    """All mixtures of a model, by a short forward.

    Raises:
        ValueError: there is none, or one whose router is not found.
    """
    fused = {name: module for name, module in model.named_modules() if _leading(module) > 1}
    returned: dict[int, str] = {}  # of each tensor of integers: the module that returned it first
    given: dict[str, Tensor] = {}
    alive: list[Tensor] = []  # so that their ids stay their own

    def after(name: str) -> Callable[..., None]:
        def watch(_: nn.Module, __: Any, output: Any) -> None:
            for value in output if isinstance(output, tuple | list) else (output,):
                if isinstance(value, Tensor) and not value.is_floating_point():
                    returned.setdefault(id(value), name)
                    alive.append(value)

        return watch

    def before(name: str) -> Callable[..., None]:
        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[name] = _routing(args, kwargs)[1]

        return watch

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(after(name)).remove)
        for name, module in fused.items():
            stack.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
        run_model(model, samples[:1, :_PROBE])
    state = model.state_dict()
    found = []
    for name, module in fused.items():
        router = returned.get(id(given.get(name)))
        if router is None:
            raise ValueError(f"{name}: the router of these experts does not show in how they run; they stay")
        count = _leading(module)
        own = [full for full, tensor in state.items() if _counts_experts(full, tensor, count, name, router)]
        zeros = torch.zeros(count, dtype=torch.float64, device="cpu")
        found.append(Mixture(name, count, own, zeros, zeros.clone(), zeros.clone(), router))
    if not found:
        known = "" if can_convert() else ", which Transformers makes of experts from version 5 on"
        raise ValueError(f"{type(model).__name__} has no mixture of fused experts{known}")
    return found


def _counts_experts(full: str, tensor: Tensor, count: int, experts: str, router: str) -> bool:
    """Whether a tensor's first axis counts a mixture's experts: theirs, their router's, or a vector beside the two."""
    if not tensor.dim() or len(tensor) != count:
        return False
    place = full.rpartition(".")[0]
    return place == experts or f"{place}.".startswith(f"{router}.") or _beside(place, experts, tensor)


def _beside(place: str, experts: str, tensor: Tensor) -> bool:
    """A vector of the module that holds the experts, such as the bias that corrects their load."""
    return tensor.dim() == 1 and place == experts.rpartition(".")[0]


def _leading(module: nn.Module) -> int:
    """The number of experts that a module's own parameters lead with; 0 where it holds none."""
    own = [parameter for _, parameter in module.named_parameters(recurse=False)]
    if not any(parameter.dim() == 3 for parameter in own) or isinstance(module, nn.modules.conv._ConvNd):
        return 0
    sizes = {parameter.shape[0] for parameter in own}
    return sizes.pop() if len(sizes) == 1 else 0


def _routing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (T, d), the experts chosen (T, k), and their weights (T, k), among the arguments of fused experts."""
    values = [value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
    chosen = next((value for value in values if not value.is_floating_point() and value.dim() == 2), None)
    floats = [value for value in values if value.is_floating_point()]
    if chosen is None or len(floats) < 2 or floats[1].shape != chosen.shape:
        raise ValueError(
            "these experts are not given tokens, the experts chosen for each, and their weights; they stay"
        )
    return floats[0].flatten(0, -2), chosen, floats[1]


def score_mixtures(model: nn.Module, mixtures: list[Mixture], samples: Tensor) -> None:
    """Run the samples, one after the other, and add up what the scores need."""

    def watcher(mixture: Mixture) -> Callable[..., None]:
        busy = False

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal busy
            if busy:
                return
            busy = True
            tokens, chosen, weights = _routing(args, kwargs)
            for expert in chosen.unique().tolist():
                rows, place = (chosen == expert).nonzero(as_tuple=True)
                one = torch.full((len(rows), 1), expert, dtype=chosen.dtype, device=chosen.device)
                output = module(tokens[rows], one, torch.ones_like(one, dtype=weights.dtype))
                norms = output.flatten(0, -2).float().norm(dim=1).double().cpu()
                mixture.weighted[expert] += (norms * weights[rows, place].double().cpu()).sum()
                mixture.plain[expert] += norms.sum()
                mixture.tokens[expert] += len(rows)
            busy = False

        return watch

    with ExitStack() as stack, torch.no_grad():
        for mixture in mixtures:
            module = model.get_submodule(mixture.name)
            stack.callback(module.register_forward_pre_hook(watcher(mixture), with_kwargs=True).remove)
        for sample in samples:
            run_model(model, sample[None])


@dataclass(frozen=True)
class ExpertGoal:
    """How many experts every mixture loses, and the mixtures.

    Attributes:
        count: experts that go from each mixture.
        classes: groups of experts among which a router chooses first; each loses equally many.
        config: of the smaller model.
    """

    mixtures: list[Mixture]
    count: int
    classes: int
    config: Any

    def became(self, axis: Axis) -> str:
        total = self.mixtures[0].experts
        return f"{axis}: {total} experts become {total - self.count} in {len(self.mixtures)} mixtures"


def expert_goal(model: Any, axis: Axis, samples: Tensor) -> ExpertGoal:
    """Check that experts can go as asked.

    Raises:
        ValueError: no mixture, mixtures of different sizes, or a number that cannot be shared out or said.
    """
    mixtures = find_mixtures(model, samples)
    sizes = sorted({mixture.experts for mixture in mixtures})
    if len(sizes) > 1:
        raise ValueError(f"the mixtures of {type(model).__name__} hold {', '.join(map(str, sizes))} experts; they stay")
    count = whole_count(axis, sizes[0], "expert")
    text = model.config.get_text_config()
    classes = getattr(text, "n_group", None) or 1
    if count % classes:
        raise ValueError(f"{axis} removes {count} experts, which {classes} groups of experts cannot share out evenly")
    kept = sizes[0] - count
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
    each = next((getattr(text, name) for name in names if isinstance(getattr(text, name, None), int)), None)
    fewer = kept if each is not None and each > kept else None
    cut = {name for mixture in mixtures for name in mixture.cut}
    expected = {
        name: torch.Size((kept, *tensor.shape[1:])) if name in cut else tensor.shape
        for name, tensor in model.state_dict().items()
    }
    config = smaller_config(model, Shape(experts=(sizes[0], kept), experts_per_token=fewer), expected)
    return ExpertGoal(mixtures, count, classes, config)


def without_experts(model: Any, goal: ExpertGoal, samples: Tensor, importance: str) -> tuple[Any, dict[str, list[int]]]:
    """The smaller model, and which experts went from each mixture; the fewest points go, ties by the lower number."""
    score_mixtures(model, goal.mixtures, samples)
    kept: dict[str, Tensor] = {}
    removed: dict[str, list[int]] = {}
    for mixture in goal.mixtures:
        score = mixture.score(importance).view(goal.classes, -1)
        order = score.argsort(dim=1, stable=True)[:, : goal.count // goal.classes]
        first = torch.arange(goal.classes, dtype=torch.int64, device=score.device)[:, None] * score.shape[1]
        removed[mixture.name] = sorted((order + first).flatten().tolist())
        indices = [index for index in range(mixture.experts) if index not in removed[mixture.name]]
        staying = torch.tensor(indices, dtype=torch.int64, device="cpu")
        kept.update(dict.fromkeys(mixture.cut, staying))
    tensors = {
        name: tensor.index_select(0, kept[name].to(tensor.device)) if name in kept else tensor
        for name, tensor in model.state_dict().items()
    }
    return rebuilt(model, goal.config, tensors), removed
