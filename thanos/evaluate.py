"""``python -m thanos.evaluate MODEL``: perplexity and zero-shot accuracy of a model, pruned, compact or neither."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from thanos.commands.cli import (
    DEVICE_OPTION,
    STREAM_OPTION,
    TEXT,
    TRUST_OPTION,
    WINDOWS_OPTION,
    Command,
    default_device,
    parsed,
    source,
    start,
    text_options,
)
from thanos.commands.quiet import silence_libraries
from thanos.scoring.perplexity import load_tokens, perplexity, score_windows
from thanos.scoring.streamed import score_streamed
from thanos.scoring.windows import Windows, load_windows, window_length
from thanos.scoring.zeroshot import TASKS, LoadedTasks, ZeroShot, load_tasks, zero_shot

__all__ = ["load_tokens", "main", "perplexity"]

_NONE = "none"
_STREAMED_SEQUENCES = 64  # of tasks, run together: each block is read for every batch


def _text(name: str) -> str:
    return name if name == _NONE else source(name)


def _tasks(names: str) -> tuple[str, ...]:
    if names in ("all", _NONE):
        return TASKS if names == "all" else ()
    chosen = tuple(name.strip() for name in names.split(","))
    if unknown := [name for name in chosen if name not in TASKS]:
        raise ValueError(f"there is no task {unknown[0]!r}; the tasks are {', '.join(TASKS)}")
    return chosen


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or not int(text):
        raise ValueError(f"the batch size is 'auto' or a number from 1 on, not {text!r}")
    return int(text)


@dataclass(frozen=True)
class _Run:
    """The command's arguments, checked as far as they can be without the model."""

    model: str
    perplexity: tuple[str, ...]
    sequence_length: int | None
    windows: int | None
    bos: str
    text_field: str | None
    tasks: tuple[str, ...]
    tasks_data: Path | None
    limit: int | None
    batch_size: int | None
    output: Path | None
    device: torch.device | None
    dtype: str
    trust_remote_code: bool
    stream: str
    overwrite: bool


@dataclass(frozen=True)
class _TextScore:
    """The perplexity on one text, and what it was measured on."""

    text: Windows
    perplexity: float


@click.command(name="python -m thanos.evaluate", cls=Command, context_settings={"max_content_width": 100})
@click.argument("model")
@click.option(
    "--perplexity",
    multiple=True,
    default=("wikitext2",),
    show_default="wikitext2",
    metavar=f"{TEXT}|none",
    callback=parsed(_text),
    help="Text for perplexity; may be given several times.",
)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=2),
    help="Tokens in a window of text.  [default: 2048, or what the model takes]",
)
@WINDOWS_OPTION
@text_options
@click.option(
    "--tasks",
    default="all",
    show_default=True,
    metavar="all|none|NAME,NAME,...",
    callback=parsed(_tasks),
    help=f"Zero-shot tasks: {', '.join(TASKS)}.",
)
@click.option(
    "--tasks-data",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Read the tasks from local copies, such as DIR/piqa.jsonl, in the datasets' own columns, not from the hub.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Score the first N documents of each task only.")
@click.option(
    "--batch-size",
    default="auto",
    show_default=True,
    metavar="auto|N",
    callback=parsed(_batch_size),
    help="Sequences that run together in the tasks.",
)
@click.option(
    "--output", metavar="FILE", type=click.Path(path_type=Path), help="Write the results to this file, as JSON."
)
@DEVICE_OPTION
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the weights and the forwards; auto is the checkpoint's own, float32 for GGUF files.",
)
@TRUST_OPTION
@STREAM_OPTION
@click.option("--overwrite", is_flag=True, help="Replace the output file, if there is one.")
def main(**options: Any) -> None:
    """Measure the perplexity and the zero-shot accuracy of the causal language model MODEL.

    MODEL is a directory, ordinary or compact, a .gguf file, or a name on the Hugging Face hub. Accuracy is what lm-eval
    calls acc; the average counts each task once.

    \b
    Examples:
      python -m thanos.evaluate ./llama-50
      python -m thanos.evaluate ./llama-50 --perplexity my-text.txt --tasks piqa,boolq --output scores.json
    """
    _run(_Run(**options), Console())


def _run(run: _Run, console: Console) -> None:
    """Check, read, score and write; what is cheap to refuse comes first."""
    silence_libraries(run.model)
    from thanos import checkpoint
    from thanos.commands.display import display

    texts = tuple(dict.fromkeys(name for name in run.perplexity if name != _NONE))
    if not texts and not run.tasks:
        raise ValueError("there is nothing to evaluate: choose a text with --perplexity or tasks with --tasks")
    if run.output is not None:
        _check_output(run.output, run.overwrite)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    trusted: Any = {"trust_remote_code": run.trust_remote_code}
    config = checkpoint.load_config(run.model, **trusted)
    length = window_length(config, run.sequence_length)
    loaded = load_tasks(run.tasks, run.tasks_data) if run.tasks else LoadedTasks({}, {}, ())
    for name in loaded.left_out:
        say(f"{name}: no file in {run.tasks_data}, left out")
    tokenizer = checkpoint.load_tokenizer(run.model, **trusted)
    reading: Any = {"bos": run.bos, "text_field": run.text_field}
    cut = [load_windows(name, tokenizer, length, windows=run.windows, **reading) for name in texts]
    device = default_device(run.device)
    streaming, why = _streaming(run)
    say(f"{'streaming' if streaming else 'reading'} the model {run.model} ({why})")
    model, files = _load(run.model, checkpoint.DTYPES.get(run.dtype), device, config, streaming, run.trust_remote_code)

    scores = []
    for text in cut:
        with display(console) as shown:
            if files is None:
                value = score_windows(model, text, progress=shown.window_scored)
            else:
                value = score_streamed(model, files, text, device, progress=shown.window_scored)
        scores.append(_TextScore(text, value))
        say(f"perplexity on {text.source}: {value:.2f}")
    answers = None
    if loaded.tasks:
        size = run.batch_size or (_STREAMED_SEQUENCES if streaming else None)
        with display(console) as shown, _running(model, files, device):
            answers = zero_shot(
                model, tokenizer, loaded, limit=run.limit, batch_size=size, progress=shown.documents_scored
            )
    for table in _tables(scores, answers):
        console.print(table)
    if run.output is not None:
        dtype = str(model.dtype).removeprefix("torch.")
        _write(run.output, _record(run, str(device), dtype, loaded, scores, answers), run.overwrite)
        say(f"written to {run.output}")


def _streaming(run: _Run) -> tuple[bool, str]:
    """Whether the model is streamed, and why."""
    from thanos import checkpoint
    from thanos.compact import MANIFEST
    from thanos.walk.stream import choose_stream

    if (Path(run.model) / MANIFEST).is_file():
        if run.stream == "yes":
            raise ValueError(f"{run.model} is compact, and only ordinary checkpoints can be streamed; pass --stream no")
        return False, "it is compact"
    return choose_stream(run.stream, checkpoint.source_folder(run.model))


def _running(model: Any, files: Any, device: torch.device) -> AbstractContextManager[None]:
    """Within the body, the model can run as a whole; a streamed one reads each block when its turn comes."""
    from thanos.walk.decoder import find_decoder
    from thanos.walk.store import DiskStore, move_loaded

    if files is None:
        return nullcontext()
    move_loaded(model, device)
    return DiskStore(files, find_decoder(model).blocks, device).running()


def _load(
    model: str, dtype: torch.dtype | None, device: torch.device, config: Any, streaming: bool, trusted: bool
) -> tuple[Any, Any]:
    """The model, compact or ordinary, on the device; of a streamed one also the files of its blocks."""
    from thanos import checkpoint, compact
    from thanos.compact import MANIFEST
    from thanos.walk.stream import load_streamed

    if streaming:
        return load_streamed(model, dtype, config=config)
    if (Path(model) / MANIFEST).is_file():
        loaded = compact.load(model)
        return loaded.to(device=device, dtype=dtype or loaded.dtype), None
    return checkpoint.load_model(model, dtype, device, config=config, trust_remote_code=trusted), None


def _tables(scores: list[_TextScore], answers: ZeroShot | None) -> Iterator[Table]:
    if scores:
        table = Table("text", title="Perplexity")
        for heading in ("perplexity", "windows", "tokens each"):
            table.add_column(heading, justify="right")
        for one in scores:
            table.add_row(one.text.source, f"{one.perplexity:.2f}", *map(str, one.text.tokens.shape))
        yield table
    if answers is None:
        return
    table = Table("task", "metric", title="Zero-shot accuracy")
    for heading in ("accuracy", "documents", "acc_norm"):
        table.add_column(heading, justify="right")
    for name, score in answers.tasks.items():
        other = "" if score.accuracy_norm is None else _with_error(score.accuracy_norm, score.stderr_norm)
        table.add_row(name, score.metric, _with_error(score.accuracy, score.stderr), str(score.documents), other)
    table.add_section()
    table.add_row(f"average of {len(answers.tasks)}", "", _with_error(*answers.average), "", "")
    yield table


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.2%}" if error is None else f"{value:.2%} ± {error:.2%}"


def _record(
    run: _Run, device: str, dtype: str, loaded: LoadedTasks, scores: list[_TextScore], answers: ZeroShot | None
) -> dict[str, Any]:
    """What the output file holds."""
    from thanos.report import versions

    texts = {one.text.source: {**one.text.record(), "perplexity": one.perplexity} for one in scores}
    settings = {
        "device": device,
        "dtype": dtype,
        "limit": run.limit,
        "batch_size": run.batch_size or "auto",
        "tasks_data": None if run.tasks_data is None else str(run.tasks_data),
        "tasks_sha256": {name: file.sha256 for name, file in loaded.files.items()},
        "left_out": list(loaded.left_out),
    }
    known = {**versions(), **({"lm-eval": version("lm-eval")} if answers else {})}
    results = {"perplexity": texts, "zero_shot": answers.to_dict() if answers else None}
    return {"model": run.model, "settings": settings, "versions": known, "results": results}


def _check_output(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise ValueError(f"the output {path} is a directory; name a file")
    if path.exists() and not overwrite:
        raise ValueError(f"the output {path} exists; choose another or pass --overwrite")
    if not path.parent.is_dir():
        raise ValueError(f"the directory of the output {path} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"the output {path} cannot be written there")


def _write(path: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Write JSON, all of it or nothing."""
    from thanos.report import json_numbers

    text = json.dumps(json_numbers(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    _check_output(path, overwrite)
    partial_file = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial_file.write_text(text, encoding="utf-8")
        partial_file.replace(path)
    finally:
        partial_file.unlink(missing_ok=True)


if __name__ == "__main__":
    start(main)
