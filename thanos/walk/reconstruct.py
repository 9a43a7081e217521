"""Train a pruned block's kept weights towards the dense model's output of the block (docs/method.md, section 14)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from thanos.engine.peers import ALONE, Peers
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
        peers: who train it together, each on its own steps; all come to the same weights.
    """

    index: int
    module: nn.Module
    steps: Sequence[Step]
    hidden: Hidden
    wanted: Hidden
    weights: Mapping[str, str]
    vectors: Mapping[str, str]
    peers: Peers = ALONE


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
    if not task.peers.total(len(used)):
        return replace(report, note="there are too few samples to hold one out")
    training = _Training(task, held, used)
    before, failure = _together(task.peers, lambda: training.squares_held_out(training.start))
    if failure is not None:
        return replace(report, note=failure)
    report = replace(report, before=before, after=before, best=0)
    best: dict[str, Tensor] | None = None
    for rate in _rates(earlier):
        found, failure = training.run(rate, epochs)
        if failure is not None:
            return replace(report, note=failure, seconds=time.perf_counter() - begin)
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


def _together(peers: Peers, squares: Callable[[], tuple[float, float]]) -> tuple[float, str | None]:
    """The relative loss over everybody's samples, and why one of them could not say, if one could not."""
    try:
        mine: tuple[float, float] | str = squares()
    except Exception as error:  # of a model's own code, such as of a forward that has no gradient
        mine = f"it cannot be trained ({type(error).__name__}: {first_line(error)})"
    found = peers.objects(mine)
    failure = next((one for one in found if isinstance(one, str)), None)
    sums = [one for one in found if not isinstance(one, str)]
    return sum(error for error, _ in sums) / max(sum(size for _, size in sums), 1e-30), failure


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

    def squares_held_out(self, values: Mapping[str, Tensor]) -> tuple[float, float]:
        """On the steps held out, the sums of squares of the error and of what is wanted."""
        with torch.no_grad():
            sums = [self._squares(step, values) for step in self._held]
        return sum(float(error) for error, _ in sums), sum(float(size) for _, size in sums)

    def run(self, rate: float, epochs: int) -> tuple[_Found | None, str | None]:
        """The best epoch's weights at one learning rate, None where a loss is not finite; and why it failed, if so."""
        values = {name: one.clone().requires_grad_() for name, one in self.start.items()}
        groups = [{"params": [one], "lr": rate * self._scale(name)} for name, one in values.items()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        peers, most = self._task.peers, max(self._task.peers.objects(len(self._used)))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(epochs * most))
        draw = torch.Generator(device="cpu").manual_seed(self._task.index)
        best: _Found | None = None
        for epoch in range(1, epochs + 1):
            order = torch.randperm(len(self._used), generator=draw, dtype=torch.int64, device="cpu").tolist()
            for number in range(most):  # one who has no step left still meets the others
                step, failure = self._used[order[number]] if number < len(order) else None, None
                try:
                    loss = self._gradients(step, values)
                except Exception as error:
                    failure, loss = error, math.nan
                if peers.size > 1:
                    loss = self._averaged(values, loss, step is not None)
                if failure is not None or not math.isfinite(loss):
                    return None, _together(peers, partial(_raise, failure))[1]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
            loss, _ = _together(peers, partial(self.squares_held_out, values))
            if not math.isfinite(loss):
                return None, None
            if best is None or loss < best.loss:
                best = _Found(loss, epoch, {name: one.detach().clone() for name, one in values.items()})
        return best, None

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Give the block these weights, in its own dtype."""
        for name, one in values.items():
            self._own[name].data.copy_(one)

    def _gradients(self, step: Step | None, values: Mapping[str, Tensor]) -> float:
        """Leave the gradients of a step, those of zeros zero, and return its loss; of no step, nothing and 0."""
        if step is None:
            return 0.0
        with torch.enable_grad():
            error, size = self._squares(step, values)
            loss = error / size.clamp(min=1e-30)
            loss.backward()
        for name, kept in self._kept.items():
            gradient = values[name].grad
            if gradient is not None:
                gradient.mul_(kept)
        return float(loss)

    def _averaged(self, values: Mapping[str, Tensor], loss: float, takes_part: bool) -> float:
        """Replace the gradients by the mean of those who take part in the step; the mean loss."""
        parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in values.values()]
        told = parts[0].new_tensor([loss, float(takes_part)])
        *sums, told = self._task.peers.sum(torch.cat([*map(torch.flatten, parts), told])).split(
            [*(one.numel() for one in parts), len(told)]
        )
        total, count = told.tolist()
        for one, summed in zip(values.values(), sums, strict=True):
            one.grad = (summed.view_as(one) / max(1.0, count)).to(one.dtype)
        return float(total / max(1.0, count))

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


def _raise(error: Exception | None) -> tuple[float, float]:
    """For :func:`_together`: what went wrong here, if anything did."""
    if error is not None:
        raise error
    return 0.0, 0.0


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
