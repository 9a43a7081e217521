"""Search for an allocation: layers are pruned anew in place, and the model is compared with the dense one.

Layers are pruned on the Hessians of the dense model, by the method alone; what pruned layers before them change is
seen by the judge, not by the pruning. What a layer's next weights are worth is told by one gradient of the judgement
(docs/method.md, section 11).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from thanos.allocate import SearchState, search_counts, uniform
from thanos.engine.factor import Factor
from thanos.engine.layer import factor_for, prune_layer
from thanos.engine.timing import StepTimer
from thanos.pattern import Unstructured
from thanos.walk.decoder import Layer
from thanos.walk.divergence import divergence
from thanos.walk.hessians import InputHessian
from thanos.walk.memory import available_memory
from thanos.walk.replay import run_model
from thanos.walk.walk import State, Walk
from thanos_kernels.errors import first_line

_TOKENS = 4096  # of the samples that judge
_LOGITS = 1 << 26  # numbers of the dense model's output that are kept
_FEWER = 0.05  # of a layer's weights: what a gain is measured on
_COPIES = 4  # of the weights at most: dense, of the trial before, gradients, and those of one sample


@dataclass(frozen=True)
class Judge:
    """What a search needs beside the walk.

    Attributes:
        model: in memory.
        samples: (N, S), token ids; the last so many as make 4096 tokens judge.
        found: where an earlier search stopped.
        saved: called with the state after each evaluation.
    """

    model: nn.Module
    samples: Tensor
    found: SearchState | None = None
    saved: Callable[[SearchState], None] | None = None


def search(walk: Walk, judge: Judge, inputs: Mapping[str, InputHessian], sparsity: float) -> dict[str, int]:
    """The counts that the model is nearest to the dense one with, of those that were tried.

    Args:
        inputs: of each layer in the dense model.
        sparsity: of the whole.
    """
    layers = {layer.name: layer for block in walk.plan.decoder.layers for layer in block if layer.name in inputs}
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    state = judge.found or SearchState(uniform(sizes, sparsity))
    trials, budget = _Trials(walk, judge, layers, inputs), walk.options.search_evaluations

    def saved(state: SearchState) -> None:
        walk.say(State([]), f"allocation {state.evaluations} of {budget}", state.score)
        if judge.saved is not None:
            judge.saved(state)

    groups = {name: name.rpartition(".")[0] for name in sizes}  # attention, feed-forward
    with trials.restored():
        state = search_counts(state, sizes, sparsity, trials, budget, gains=trials.gains, groups=groups, saved=saved)
    return dict(state.counts)


class _Trials:
    """The model with some counts removed: each call prunes the layers anew whose counts have changed.

    Those of the call before are kept, as most trials are taken back.
    """

    def __init__(
        self, walk: Walk, judge: Judge, layers: Mapping[str, Layer], inputs: Mapping[str, InputHessian]
    ) -> None:
        self._walk, self._model, self._layers, self._inputs = walk, judge.model, layers, inputs
        self._dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        self._now: dict[str, int] = {}
        self._before: dict[str, tuple[int, Tensor]] = {}
        self._factor: tuple[Tensor, Factor] | None = None
        self._judging = judge.samples[-max(1, _TOKENS // judge.samples.shape[1]) :]
        vocabulary = len(judge.model.get_input_embeddings().weight)  # type: ignore[operator]
        self._every = -(-self._judging.numel() * vocabulary // _LOGITS)
        self._wanted = [self._output(sample) for sample in self._judging]

    def _output(self, sample: Tensor) -> Tensor:
        return run_model(self._model, sample[None]).logits[0, :: self._every].float().log_softmax(-1)

    def __call__(self, counts: Mapping[str, int]) -> float:
        """The mean divergence from the dense model's output."""
        self._set(counts)
        scores = [
            divergence(wanted, self._output(one)) for one, wanted in zip(self._judging, self._wanted, strict=True)
        ]
        return sum(scores) / len(scores)

    def gains(self, counts: Mapping[str, int]) -> dict[str, float] | None:
        """By how much the divergence falls for a weight fewer removed, by layer, to first order.

        That is ``<gradient, W - W'> / k``, where W' has k weights more than W. None where there is no gradient.
        """
        self._set(counts)
        gradients = self._gradients()
        if gradients is None:
            return None
        found = {}
        for name, count in counts.items():
            layer = self._layers[name]
            fewer = max(0, count - max(1, int(_FEWER * layer.weight.numel())))
            change = layer.weight.float() - self._pruned(name, fewer)
            parameter = self._model.get_parameter(layer.parameter_name)
            with _data(parameter, gradients[layer.parameter_name]):
                along = float((layer.weight.float() * change).sum(dtype=torch.float64))
            found[name] = along / max(1, count - fewer)
        return found

    def _gradients(self) -> dict[str, Tensor] | None:
        """Of the mean divergence, by the parameters that hold the layers; None, and a warning, where it has none."""
        names = list(dict.fromkeys(layer.parameter_name for layer in self._layers.values()))
        chosen = [self._model.get_parameter(name) for name in names]
        every = {one: one.requires_grad for one in self._model.parameters()}
        sums = [torch.zeros_like(one) for one in chosen]
        try:
            for one in every:
                one.requires_grad_(False)
            for one in chosen:
                one.requires_grad_(True)
            for sample, wanted in zip(self._judging, self._wanted, strict=True):
                with torch.enable_grad():
                    score = (wanted.exp() * (wanted - self._output(sample))).sum()
                    score = score / (len(wanted) * len(self._judging))
                parts = torch.autograd.grad(score, chosen, allow_unused=True)
                for total, part in zip(sums, parts, strict=True):
                    if part is not None:
                        total += part
        except Exception as error:  # of a model's own code, such as of a forward that has no gradient
            warnings.warn(
                f"the model has no gradient ({type(error).__name__}: {first_line(error)}), so its allocation is "
                "searched by exchanges alone",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        finally:
            for one, flag in every.items():
                one.requires_grad_(flag)
        return dict(zip(names, sums, strict=True))

    def _set(self, counts: Mapping[str, int]) -> None:
        """Give the layers these counts."""
        last, self._before = self._before, {}
        for name, count in counts.items():
            if self._now.get(name) == count:
                continue
            weight = self._layers[name].weight
            if name in self._now:
                self._before[name] = self._now[name], weight.clone()
            known, pruned = last.pop(name, (None, weight))
            weight.copy_(pruned if known == count else self._pruned(name, count))
            self._now[name] = count

    def _pruned(self, name: str, count: int) -> Tensor:
        hessian, weight = self._inputs[name].hessian, self._dense[name].to(self._walk.plan.device)
        assert hessian is not None
        options = replace(
            self._walk.options,
            refine="none",
            values="plain",
            pattern=Unstructured((count + 0.5) / weight.numel()),
        )
        if self._factor is None or self._factor[0] is not hessian:  # layers with one input come one after the other
            dtype = torch.promote_types(weight.dtype, hessian.dtype)
            self._factor = None
            self._factor = hessian, factor_for(hessian, dtype, options)
        return prune_layer(weight, self._factor[1], options, StepTimer(hessian.device)).weight

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Behind the body, the model is dense again."""
        try:
            yield
        finally:
            for name, weight in self._dense.items():
                self._layers[name].weight.copy_(weight)


@contextmanager
def _data(parameter: nn.Parameter, data: Tensor) -> Iterator[None]:
    """In the body the parameter holds ``data``, so that layers are views of it."""
    own, parameter.data = parameter.data, data
    try:
        yield
    finally:
        parameter.data = own


def no_room(walk: Walk) -> str:
    """Why what a search keeps does not fit, or nothing: the layers' Hessians, and copies of their weights."""
    if not walk.plan.store.resident:
        return "allocation search needs the model in memory; choose another, or --stream no"
    layers = [layer for block in walk.plan.decoder.layers for layer in block if layer.name in walk.chosen]
    copies = _COPIES * sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    inputs = {(layer.name.rpartition(".")[0], layer.expert, layer.weight.shape[1]) for layer in layers}
    needed, free = copies + sum(4 * width**2 for _, _, width in inputs), available_memory(walk.plan.device)
    if needed <= free:
        return ""
    return (
        f"allocation search keeps the Hessians of all layers and {_COPIES} copies of their weights, "
        f"{needed / 2**30:.1f} GiB where {free / 2**30:.1f} are free; choose another allocation"
    )
