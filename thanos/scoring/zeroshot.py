"""Zero-shot accuracy: the tasks, prompts and metrics of lm-eval, scored in batches sized by tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from torch import nn

from thanos.scoring.task_files import TaskFile, find_file, read_file

TASKS = ("winogrande", "openbookqa", "boolq", "piqa", "hellaswag", "arc_easy", "arc_challenge")
_FOLDERS = {"boolq": "super_glue/boolq", "arc_easy": "arc", "arc_challenge": "arc"}  # of lm-eval, where not the name
_METRIC = "acc"


@dataclass(frozen=True)
class TaskScore:
    """How often a model prefers the right answer.

    Attributes:
        accuracy: share of documents whose most likely answer, by summed log-likelihood, is right.
        stderr: standard error of ``accuracy``, ``sqrt(a (1 - a) / (documents - 1))``; None for a single document.
        metric: lm-eval's name of it, ``acc``.
        documents: how many were scored.
        accuracy_norm, stderr_norm: lm-eval's ``acc_norm``, by log-likelihood per character; None for tasks without it.
    """

    accuracy: float
    stderr: float | None
    metric: str
    documents: int
    accuracy_norm: float | None = None
    stderr_norm: float | None = None


class Average(NamedTuple):
    """The mean accuracy over tasks and its standard error, the tasks taken as independent."""

    accuracy: float
    stderr: float | None


@dataclass(frozen=True)
class ZeroShot:
    """Accuracies of one model, by task."""

    tasks: dict[str, TaskScore]

    @property
    def average(self) -> Average:
        """The unweighted mean, and ``sqrt(sum of squared standard errors) / tasks``."""
        scores, count = list(self.tasks.values()), len(self.tasks)
        errors = [score.stderr for score in scores if score.stderr is not None]
        stderr = math.sqrt(sum(error**2 for error in errors)) / count if len(errors) == count else None
        return Average(sum(score.accuracy for score in scores) / count, stderr)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; what a task does not have is left out."""
        tasks = {
            name: {key: value for key, value in vars(score).items() if value is not None or key == "stderr"}
            for name, score in self.tasks.items()
        }
        return {"tasks": tasks, "average": self.average._asdict()}


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks of lm-eval with their documents.

    Attributes:
        tasks: name to lm-eval's task.
        files: name to the local file; empty where the documents come from the hub.
        left_out: tasks for which there was no file.
    """

    tasks: dict[str, Any]
    files: dict[str, TaskFile]
    left_out: tuple[str, ...]


def load_tasks(tasks: Sequence[str] = TASKS, data: str | Path | None = None) -> LoadedTasks:
    """Read the documents of tasks, from the Hugging Face hub or from local files, which needs no network.

    Args:
        tasks: of :data:`TASKS`. Where all of them are asked for, those without a file are left out.
        data: a directory of JSONL files in the columns of the datasets on the hub, named as
            :func:`thanos.scoring.task_files.find_file` finds them; None reads the hub.

    Raises:
        ValueError: lm-eval is not installed; a task is unknown, has no file, or a damaged one; the hub cannot be read.
    """
    tasks = tuple(dict.fromkeys(tasks))
    if unknown := [name for name in tasks if name not in TASKS]:
        raise ValueError(f"there is no task {unknown[0]!r}; the tasks are {', '.join(TASKS)}")
    if not tasks:
        raise ValueError(f"no tasks were asked for; the tasks are {', '.join(TASKS)}")
    _check_installed()
    folder = Path(data) if data is not None else None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"there is no directory {folder} to read tasks from")
    if folder is None:
        with _quiet():
            return LoadedTasks(_from_hub(tasks), {}, ())
    paths = {name: find_file(name, folder) for name in tasks}
    missing = tuple(name for name, path in paths.items() if path is None)
    if missing and (set(tasks) != set(TASKS) or len(missing) == len(tasks)):
        raise ValueError(f"{folder} holds no file {missing[0]}.jsonl for the task {missing[0]}")
    files = {name: read_file(name, path) for name, path in paths.items() if path is not None}
    with _quiet():
        return LoadedTasks(_from_files(files), files, missing)


def zero_shot(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str] | LoadedTasks = TASKS,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ZeroShot:
    """Accuracy on multiple-choice tasks without examples in the prompt.

    Args:
        model: a Hugging Face causal language model, ordinary or compact, on the device to use.
        tokenizer: its tokenizer.
        tasks: names, or what :func:`load_tasks` returned.
        data: as for :func:`load_tasks`.
        limit: score only the first so many documents of each task.
        batch_size: sequences run together; None takes what fits a budget of tokens.
        progress: called with the task, its documents done, first none, and their number.

    Raises:
        ValueError: as :func:`load_tasks`, or a number is below 1.
    """
    for name, number in (("limit", limit), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    loaded = tasks if isinstance(tasks, LoadedTasks) else load_tasks(tasks, data)
    from lm_eval import evaluate

    from thanos.scoring.likelihood import Scorer

    scorer = Scorer(model, tokenizer, batch_size)
    scores = {}
    training = model.training
    model.eval()
    try:
        with _quiet():
            for name, task in loaded.tasks.items():
                documents = min(len(task.eval_docs), limit or len(task.eval_docs))
                if progress is not None:
                    progress(name, 0, documents)
                    scorer.progress = partial(_report, progress, name, documents)
                found = evaluate(scorer, {"tasks": {name: task}}, limit=limit, log_samples=False)["results"][name]
                scores[name] = _score(found, documents)
    finally:
        model.train(training)
    return ZeroShot(scores)


def _report(progress: Callable[[str, int, int], None], name: str, documents: int, done: int, requests: int) -> None:
    progress(name, done * documents // requests, documents)


def _score(found: dict[str, Any], documents: int) -> TaskScore:
    def number(key: str) -> float | None:
        value = found.get(f"{key},none")
        return float(value) if isinstance(value, int | float) else None  # lm-eval says "N/A" of one document's error

    return TaskScore(
        float(found[f"{_METRIC},none"]),
        number(f"{_METRIC}_stderr"),
        _METRIC,
        documents,
        number("acc_norm"),
        number("acc_norm_stderr"),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, lm-eval logs errors only and shows no bars."""
    import datasets
    import lm_eval.api.task

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with mock.patch.object(lm_eval.api.task, "tqdm", partial(lm_eval.api.task.tqdm, disable=True)):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _check_installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(f"zero-shot tasks need lm-eval ({error}); install it with: pip install '.[eval]'") from error


def _build(tasks: Sequence[str], download: Callable[[Any], dict[str, Any]] | None = None) -> dict[str, Any]:
    """lm-eval's tasks; ``download`` takes one and returns its datasets by split, where not those of the hub."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask

    root = Path(lm_eval.tasks.__file__).parent  # an index of all its tasks would take long, so only these folders
    folders = sorted({str(root / _FOLDERS.get(name, name)) for name in tasks})
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)

    def fill(task: Any, *_: Any, **__: Any) -> None:
        assert download is not None
        task.dataset = download(task)

    with mock.patch.object(ConfigurableTask, "download", fill) if download else nullcontext():
        return {name: manager.load([name])["tasks"][name] for name in tasks}


def _from_hub(tasks: Sequence[str]) -> dict[str, Any]:
    try:
        return _build(tasks)
    except Exception as error:  # from the network, the hub or the cache
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"cannot read the tasks from the Hugging Face hub ({reason}); pass a directory of local copies instead "
            "(--tasks-data)"
        ) from error


def _from_files(files: dict[str, TaskFile]) -> dict[str, Any]:
    from datasets import Dataset

    def download(task: Any) -> dict[str, Any]:
        rows = Dataset.from_list(files[task.config.task].documents)
        return {"train": rows, "validation": rows, "test": rows}  # prompts would take examples from "train", if any

    return _build(list(files), download)
