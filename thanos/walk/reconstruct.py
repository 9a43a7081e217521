"""Train a pruned block's kept weights towards the dense model's output of the block (docs/method.md, section 14)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from thanos.report import BlockReport
from thanos.walk.plan import Step
from thanos.walk.spool import Hidden
from thanos_kernels.errors import first_line

RATES = (0.001, 0.003, 0.01)
"""Learning rates of Adam that are tried, relative to the root mean square of each parameter's kept numbers."""
TRIED = 2  # the first blocks, on which all rates are tried
_HELD_OUT = 8  # one step of so many
_WARM_UP = 0.1  # of the steps


@dataclass(frozen=True)
class Task:
    """One block to reconstruct.

    Attributes:
        index: of the block.
        module: the pruned block.
        steps: the parts of the samples.
        hidden: what the pruned model gives the block.
        wanted: the dense model's output of the block, in the same batches.
        weights, vectors: the full names of what is trained, by the names that the block has for them; zeros of weights
            stay.
    """

    index: int
    module: nn.Module
    steps: Sequence[Step]
    hidden: Hidden
    wanted: Hidden
    weights: Mapping[str, str]
    vectors: Mapping[str, str]


def reconstruct(task: Task, epochs: int, earlier: Sequence[BlockReport]) -> BlockReport:
    """Minimise ``mean |y - y'|^2`` over the kept weights, norm gains and biases by Adam, and keep the best of them.

    An eighth of the samples is held out. What is kept are the weights after the epoch that is best on it, and those of
    the start where none is better. All :data:`RATES` are tried on the first blocks; later ones take the rate that was
    best in the last of these. Training is in float32; a block in 16 bits is judged as it will be stored.

    Args:
        epochs: over the samples that are not held out, at least 1.
        earlier: the reports of the blocks before.
    """
    begin = time.perf_counter()
    report = BlockReport(task.index, math.nan, math.nan, epochs, 0, 0.0, None, (), 0.0)
    held = [step for number, step in enumerate(task.steps) if number % _HELD_OUT == _HELD_OUT - 1] or [task.steps[-1]]
    used = [step for step in task.steps if not any(step is other for other in held)]
    if not used:
        return replace(report, note="there are too few samples to hold one out")
    training = _Training(task, held, used)
    try:
        before = training.held_out(training.start)
    except Exception as error:  # of a model's own code
        return replace(report, note=_failure(error))
    report = replace(report, before=before, after=before, best=0)
    best: dict[str, Tensor] | None = None
    for rate in _rates(earlier):
        try:
            found = training.run(rate, epochs)
        except Exception as error:  # such as of a forward that has no gradient
            return replace(report, note=_failure(error), seconds=time.perf_counter() - begin)
        if found is None:
            report = replace(report, note=f"the loss was no number at a learning rate of {rate:g}")
        elif found.loss < report.after:
            best = found.values
            report = replace(report, after=found.loss, best=found.epoch, learning_rate=rate)
    if best is not None:
        training.write(best)
        names = {**task.weights, **task.vectors}
        report = replace(report, parameters=tuple(sorted(names[name] for name in best)))
    return replace(report, seconds=time.perf_counter() - begin)


def _rates(earlier: Sequence[BlockReport]) -> tuple[float, ...]:
    known = [report.learning_rate for report in earlier[:TRIED] if report.learning_rate]
    if len(earlier) < TRIED or not known:
        return RATES
    return (known[-1],)


def _failure(error: Exception) -> str:
    return f"it cannot be trained ({type(error).__name__}: {first_line(error)})"


@dataclass(frozen=True)
class _Found:
    loss: float
    epoch: int
    values: dict[str, Tensor]


class _Training:
    """A block in training: its parameters in float32, apart from the module."""

    def __init__(self, task: Task, held: Sequence[Step], used: Sequence[Step]) -> None:
        self._task, self._held, self._used = task, held, used
        own = dict(task.module.named_parameters())
        self._own = {name: own[name] for name in (*task.weights, *task.vectors)}
        wide = {name: torch.promote_types(one.dtype, torch.float32) for name, one in self._own.items()}
        self.start = {name: one.detach().to(wide[name]) for name, one in self._own.items()}
        self._kept = {name: self.start[name] != 0 for name in task.weights}

    def held_out(self, values: Mapping[str, Tensor]) -> float:
        """The loss on the steps held out, relative to the mean square of what is wanted."""
        with torch.no_grad():
            sums = [self._squares(step, values) for step in self._held]
        return sum(float(error) for error, _ in sums) / max(sum(float(size) for _, size in sums), 1e-30)

    def run(self, rate: float, epochs: int) -> _Found | None:
        """The best epoch's weights at one learning rate; None where a loss is not finite."""
        values = {name: one.clone().requires_grad_() for name, one in self.start.items()}
        groups = [{"params": [one], "lr": rate * self._scale(name)} for name, one in values.items()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        steps = epochs * len(self._used)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(steps))
        draw = torch.Generator(device="cpu").manual_seed(self._task.index)
        best: _Found | None = None
        for epoch in range(1, epochs + 1):
            for number in torch.randperm(len(self._used), generator=draw, dtype=torch.int64, device="cpu").tolist():
                if not self._step(self._used[number], values):
                    return None
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
            loss = self.held_out(values)
            if not math.isfinite(loss):
                return None
            if best is None or loss < best.loss:
                best = _Found(loss, epoch, {name: one.detach().clone() for name, one in values.items()})
        return best

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Give the block these weights, in its own dtype."""
        for name, one in values.items():
            self._own[name].data.copy_(one)

    def _step(self, step: Step, values: Mapping[str, Tensor]) -> bool:
        with torch.enable_grad():
            error, size = self._squares(step, values)
            loss = error / size.clamp(min=1e-30)
            loss.backward()
        for name, kept in self._kept.items():
            gradient = values[name].grad
            if gradient is not None:
                gradient.mul_(kept)
        return bool(loss.isfinite())

    def _squares(self, step: Step, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sums of squares: of the error, and of what is wanted."""
        task = self._task
        placed = {name: one.to(self._own[name].dtype) for name, one in values.items()}

        def block(*args: object, **kwargs: object) -> object:
            return functional_call(task.module, placed, args, kwargs)

        output = step.calls[task.index](block, task.hidden[step.batch][step.part]).float()
        wanted = task.wanted[step.batch][step.part].to(output.dtype)
        return (output - wanted).square().sum(), wanted.square().sum()

    def _scale(self, name: str) -> float:
        value = self.start[name]
        kept = int(self._kept[name].sum()) if name in self._kept else value.numel()
        return max(1e-3, float(value.square().sum() / max(1, kept)) ** 0.5)


def _cosine(steps: int) -> Callable[[int], float]:
    """A share of the learning rate by step: up over the first tenth, then down to nothing along a cosine."""
    rise = max(1, round(_WARM_UP * steps))

    def share(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return share


def local_names(module: nn.Module, full: Sequence[str]) -> dict[str, str]:
    """Full names of a block's parameters by the names that the block has for them."""
    own = sorted((name for name, _ in module.named_parameters()), key=len, reverse=True)
    found = {}
    for name in full:
        local = next((one for one in own if name == one or name.endswith(f".{one}")), None)
        if local is not None:
            found[local] = name
    return found
