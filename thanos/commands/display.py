"""What a person sees while a model is pruned: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column

from thanos.walk.events import Progress

_BETWEEN_LINES = 60.0  # seconds, while a long text is scored


class Display(Protocol):
    """Shows how far the work is."""

    def layer_pruned(self, progress: Progress) -> None:
        """A layer is about to be pruned, or was."""
        ...

    def window_scored(self, done: int, windows: int) -> None:
        """A window of text was scored."""
        ...

    def documents_scored(self, task: str, done: int, documents: int) -> None:
        """Documents of a zero-shot task were scored."""
        ...


@contextmanager
def display(console: Console) -> Iterator[Display]:
    """A display for the body."""
    if not console.is_terminal:
        lines = _Lines(console)
        yield lines
        lines.end_block()
        return
    with Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
        TextColumn("{task.fields[what]}", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[left]}", justify="right", table_column=Column(no_wrap=True)),
        console=console,
        expand=True,
        transient=True,
        refresh_per_second=4,
    ) as bars:
        yield _Live(bars)


def short_name(layer: str) -> str:
    """A layer's name inside its block: ``model.layers.3.mlp.up_proj`` is ``mlp.up_proj``."""
    return re.split(r"\.\d+\.", layer, maxsplit=1)[-1]


def duration(seconds: float) -> str:
    """``75`` is ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _left(progress: Progress) -> float | None:
    if not progress.done:
        return None
    return progress.seconds / progress.done * (progress.layers - progress.done)


class _Live:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._begin = time.perf_counter()
        self._work = ""
        self._task: TaskID | None = None
        self._loss = ""
        self._width = 0

    def layer_pruned(self, progress: Progress) -> None:
        if progress.relative_loss is not None:
            self._loss = f"loss {progress.relative_loss:.1e}"
        left, name = _left(progress), short_name(progress.layer)
        self._width = max(self._width, len(name))  # so that the line does not jump
        self._show(
            f"block {progress.block + 1}/{progress.blocks}",
            f"{name:{self._width}}  {self._loss}",
            f"{duration(left)} left" if left is not None else "",
            progress.done,
            progress.layers,
        )

    def window_scored(self, done: int, windows: int) -> None:
        self._timed("perplexity", "window", done, windows)

    def documents_scored(self, task: str, done: int, documents: int) -> None:
        self._timed(task, "document", done, documents)

    def _timed(self, work: str, unit: str, done: int, total: int) -> None:
        if work != self._work:
            self._work, self._begin = work, time.perf_counter()
        passed = time.perf_counter() - self._begin
        left = f"{duration(passed / done * (total - done))} left" if done else ""
        self._show(work, f"{unit} {done}/{total}", left, done, total)

    def _show(self, description: str, what: str, left: str, done: int, total: int) -> None:
        if self._task is None:
            self._task = self._bars.add_task(description, total=total, what=what, left=left)
        self._bars.update(self._task, description=description, completed=done, total=total, what=what, left=left)


class _Lines:
    """One line a block."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._worst: tuple[float, str] = (-1.0, "")
        self._last: Progress | None = None
        self._work = ""
        self._scored, self._begin, self._said = 0, time.perf_counter(), time.perf_counter()

    def layer_pruned(self, progress: Progress) -> None:
        if self._last is not None and progress.block != self._last.block:
            self.end_block()
        if progress.relative_loss is not None:
            self._worst = max(self._worst, (progress.relative_loss, short_name(progress.layer)))
            self._last = progress

    def window_scored(self, done: int, windows: int) -> None:
        """Plain output says the result only, and how far it is once a minute."""
        now = time.perf_counter()
        if done <= self._scored:  # another text
            self._begin = self._said = now
        elif now - self._said >= _BETWEEN_LINES:
            self._said, passed = now, now - self._begin
            left = duration(passed / done * (windows - done))
            line = f"perplexity: window {done}/{windows}; {duration(passed)} passed, {left} left"
            self._console.print(line, highlight=False, soft_wrap=True)
        self._scored = done

    def documents_scored(self, task: str, done: int, documents: int) -> None:
        """Plain output says the results only, and which task is next."""
        if task != self._work:
            self._work = task
            self._console.print(f"scoring {documents} documents of {task}", highlight=False, soft_wrap=True)

    def end_block(self) -> None:
        """Say how the block at hand went, if one is."""
        if self._last is None:
            return
        (loss, name), last = self._worst, self._last
        self._worst, self._last = (-1.0, ""), None
        self._console.print(
            f"block {last.block + 1}/{last.blocks}: largest relative loss {loss:.1e} in {name}; "
            f"{duration(last.seconds)} passed, {duration(_left(last) or 0)} left",
            highlight=False,
            soft_wrap=True,
        )
