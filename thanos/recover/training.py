"""The training itself: Transformers' ``Trainer``, and the parts around it that are ours."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from thanos.checkpoint import sync_tree
from thanos.checkpoint.durable import sync, write_json
from thanos.engine.peers import ALONE, Peers
from thanos.recover.budget import Budget
from thanos.recover.masks import FixedMask
from thanos.recover.options import RecoverOptions
from thanos.recover.student import Student
from thanos.recover.windows import Windows

_BETAS = (0.9, 0.99)
_FAR = 1.0  # a loss held out that is so much above the best is no longer on its way down
_STATE = "training.json"
_ENDLESS = 10**9


@dataclass(frozen=True)
class Point:
    """How far training was at one time.

    Attributes:
        step, seconds, tokens: done by then.
        loss: the mean of what was minimised since the point before; None at the start.
        held_out: the mean loss per token of the windows held out.
        sparse: whether the weights had the zeros that they have in the end.
    """

    step: int
    seconds: float
    tokens: int
    loss: float | None
    held_out: float
    sparse: bool


@dataclass
class Training:
    """How training went.

    Attributes:
        curve: from the start on.
        best: the step whose weights were kept; 0 is the start.
        seconds: that it took, measuring the loss held out included.
        steps, tokens: done in all, by all processes.
        note: why it ended early, if it did.
    """

    curve: list[Point] = field(default_factory=list)
    best: int | None = None
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    note: str | None = None

    @property
    def least(self) -> float:
        """The loss held out of what was kept; infinity where nothing was."""
        return min((one.held_out for one in self.curve if one.step == self.best and one.sparse), default=math.inf)


class _Watch(TrainerCallback):
    """Measures, keeps the best, and ends the training."""

    def __init__(
        self,
        student: Student,
        mask: FixedMask,
        options: RecoverOptions,
        budget: Budget,
        found: Training,
        folder: Path,
        tokens: int,
        progress: Callable[[Point, float], None] | None,
        peers: Peers,
    ) -> None:
        self._peers = peers
        self._student, self._mask, self._options, self._budget = student, mask, options, budget
        self.found, self._folder, self._tokens, self._progress = found, folder, tokens, progress
        self._losses: list[float] = []
        self._done = 0.0
        self._saved = budget.seconds

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self._losses.append(loss)
        self.found.steps, self.found.tokens = state.global_step, state.global_step * self._tokens
        if not math.isfinite(loss):
            self._stop(control, f"the loss was no number after {state.global_step} steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        before, now = self._done, self._budget.progress(state.global_step)
        self._mask.after_step(now)
        self._done = now
        parts = self._options.evaluations
        control.should_evaluate = math.floor(now * parts) > math.floor(before * parts)
        if self._budget.seconds_at(state.global_step) - self._saved >= 60 * self._options.save_minutes:
            control.should_save = True
        if now >= 1:
            control.should_evaluate = control.should_training_stop = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        loss = (metrics or {}).get("eval_loss", math.nan)
        mean = sum(self._losses) / len(self._losses) if self._losses else None
        step, seconds = state.global_step, self._budget.seconds_at(state.global_step)
        point = Point(step, seconds, step * self._tokens, mean, loss, self._mask.final)
        best = self.found.least
        self.found.curve.append(point)
        self._losses = []
        if point.sparse and loss < best:
            self.found.best = step
            if step and self._peers.rank == 0:
                write_values(self._folder / f"best-{step}.safetensors", self._student)
        elif self._mask.steady and not loss < best + _FAR and math.isfinite(best):
            self._stop(control, f"the loss held out rose from {best:.3f} to {loss:.3f} in {step} steps")
        if self._progress is not None:
            self._progress(point, self._budget.progress(step))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint was written: say so, and then remove what it replaces."""
        self._saved = self.found.seconds = self._budget.seconds_at(state.global_step)
        self._peers.object(None)  # all have written their part
        if self._peers.rank == 0:
            self._replace(state)
        self._peers.object(None)

    def _replace(self, state: Any) -> None:
        last = self._folder / f"checkpoint-{state.global_step}"
        self._mask.save(last)
        sync_tree(last)
        value = {**dataclasses.asdict(self.found), "checkpoint": last.name, "losses": self._losses, "done": self._done}
        write_json(self._folder / _STATE, value)
        keep = {last.name, f"best-{self.found.best}.safetensors", _STATE}
        for path in self._folder.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`on_save` wrote down."""
        self._losses, self._done = list(state["losses"]), float(state["done"])

    def _stop(self, control: Any, why: str) -> None:
        self.found.note = f"{why}; the learning rate of {self._options.rate:g} may be too high"
        control.should_training_stop = True


def train(
    student: Student,
    mask: FixedMask,
    windows: Tensor,
    held_out: Tensor,
    options: RecoverOptions,
    folder: Path,
    *,
    progress: Callable[[Point, float], None] | None = None,
    peers: Peers = ALONE,
) -> Training:
    """Train, and leave the values of the best step in ``student``; those of step 0 are the model's own.

    Args:
        windows: (N, S), int64, to train on; N is at least the options' batch size.
        held_out: (n, S), to measure on.
        folder: for checkpoints; one that an earlier part of the same run left there is gone on from.
        progress: called at every measurement with how far it is, from 0 to 1.
        peers: the processes that torchrun started, among whom :class:`Trainer` shares out the windows of a step; all
            see the same ``folder``.
    """
    known = _earlier(folder)
    found = Training() if known is None else _training(known)
    budget = Budget(options.minutes, options.steps, found.seconds, peers)
    device = next(student.parameters()).device
    arguments = _arguments(options, folder, len(held_out), device, from_start=known is None)
    # Created before the trainer, so that its order of steps is ours: gradients masked, the step, weights masked.
    optimizer = torch.optim.Adam(student.parameters(), lr=options.rate, betas=_BETAS, fused=True)
    optimizer.register_step_pre_hook(lambda *_: mask.before_step())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, budget.rate)
    tokens = options.batch_size * windows.shape[1] * arguments.world_size
    watch = _Watch(student, mask, options, budget, found, folder, tokens, progress, peers)
    if known is not None:
        watch.take_up(known)
        mask.load(folder / known["checkpoint"])
    trainer = Trainer(
        model=student,
        args=arguments,
        train_dataset=Windows(windows),
        eval_dataset=Windows(held_out),
        callbacks=[watch],
        optimizers=(optimizer, schedule),
    )
    trainer.remove_callback(PrinterCallback)
    budget.start()
    trainer.train(resume_from_checkpoint=None if known is None else str(folder / known["checkpoint"]))
    found.seconds = budget.seconds
    peers.object(None)  # the first has written what was best
    _keep_best(student, found, folder)
    mask.settle()
    return found


def _arguments(
    options: RecoverOptions, folder: Path, held_out: int, device: torch.device, from_start: bool
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=min(options.batch_size, held_out),
        max_steps=options.steps or _ENDLESS,
        learning_rate=options.rate,
        max_grad_norm=1.0,
        eval_strategy="no",
        # By the trainer: a model that was evaluated in front of it is never shared among processes.
        eval_on_start=from_start,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        prediction_loss_only=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=device.type == "cuda",
        seed=options.seed,
        use_cpu=device.type == "cpu",
    )
    if device.type == "cuda":
        arguments._n_gpu = 1  # several are the work of several processes
    return arguments


def _keep_best(student: Student, found: Training, folder: Path) -> None:
    """Put the values of the best step into the student; the last ones stay where no step was measured."""
    if not found.best:
        return
    held = load_file(folder / f"best-{found.best}.safetensors")
    with torch.no_grad():
        for name, one in student.values.items():
            one.copy_(held[name.replace(".", "/")])


def write_values(file: Path, student: Student) -> None:
    """Write what is trained, all of it or nothing."""
    new = file.with_name(file.name + ".new")
    save_file({name: one.cpu() for name, one in student.state_dict().items()}, new)
    sync(new)
    new.replace(file)


def _earlier(folder: Path) -> dict[str, Any] | None:
    """What an earlier part of the run wrote down; None where there was none."""
    file = folder / _STATE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _training(state: dict[str, Any]) -> Training:
    names = {one.name for one in dataclasses.fields(Training)}
    values = {name: value for name, value in state.items() if name in names}
    return Training(**{**values, "curve": [Point(**one) for one in state["curve"]]})
