"""``python -m thanos.recover``: train a pruned model from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from thanos.commands.again import command_of, recipe_of
from thanos.commands.cli import (
    DEVICE_OPTION,
    TEXT,
    TRUST_OPTION,
    WINDOWS_OPTION,
    Command,
    default_device,
    default_of,
    parsed,
    sentence,
    source,
    text_options,
    usage_error,
)
from thanos.commands.hub import check_hub, hub_option, push
from thanos.commands.keeping import same_for_all
from thanos.commands.processes import joined, own_device
from thanos.commands.quiet import silence_libraries
from thanos.commands.training import (
    RENAMED,
    Texts,
    check_accelerate,
    check_teacher,
    checked_config,
    identity_of,
    read_texts,
    record_of,
    write_record,
)
from thanos.engine.peers import Peers
from thanos.recover.options import COMPUTE, MASKS, RATES, TRAINED, RecoverOptions, trainable_pattern

_MINUTES = 20.0  # where nobody says how long


@dataclass(frozen=True)
class _Run:
    """The command's own arguments; those of the training are :class:`RecoverOptions`."""

    pruned: str
    output: Path
    train: str
    held_out: str | None
    held_out_windows: int
    sequence_length: int
    bos: str
    text_field: str | None
    teacher: str | None
    device: torch.device
    trust_remote_code: bool
    evaluate: str | None
    windows: int | None
    resume: bool
    overwrite: bool
    push_to_hub: str | None


_default = partial(default_of, RecoverOptions)


@click.command(
    name="python -m thanos.recover", cls=Command, context_settings={"max_content_width": 100, "show_default": True}
)
@click.argument("pruned")
@click.option(
    "--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Where the trained model goes."
)
@click.option("--train", default="c4", metavar=TEXT, callback=parsed(source), help="Text to train on.")
@click.option(
    "--held-out",
    metavar=TEXT,
    callback=parsed(source),
    help="Text to measure on while training.  [default: the last windows of the training text]",
)
@click.option("--held-out-windows", default=8, type=click.IntRange(min=1), help="How many windows are measured on.")
@click.option("--sequence-length", default=512, type=click.IntRange(min=2), help="Tokens in a window.")
@text_options
@click.option("--teacher", metavar="MODEL", help="The dense model, whose predictions the training aims at as well.")
@click.option(
    "--teacher-share",
    default=_default("share"),
    type=click.FloatRange(0, 1),
    help="Of the distance to the teacher in the loss; the rest is the language model's own loss.",
)
@click.option(
    "--repeats",
    default=_default("repeats"),
    type=click.FloatRange(0, 0.5),
    help="Of windows, added to the text's own, whose second half repeats the first: they keep copying from context.",
)
@click.option(
    "--train-what",
    default=_default("train"),
    type=click.Choice(TRAINED),
    help="All kept weights with norms and biases; norms and biases alone; or low-rank updates with them.",
)
@click.option(
    "--mask",
    default=_default("mask"),
    type=click.Choice(MASKS),
    help="Keep the zeros that there are; fade the weights outside the pattern; or dense and sparse phases in turn.",
)
@click.option(
    "--pattern", callback=parsed(trainable_pattern), help="What the zeros must be, such as 2:4.  [default: as they are]"
)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="How long to train.  [default: 20]")
@click.option("--steps", type=click.IntRange(min=1), help="How long to train, in steps.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    help=f"Of Adam, its highest.  [default: {', '.join(f'{rate:g} for {what}' for what, rate in RATES.items())}]",
)
@click.option("--rank", default=_default("rank"), type=click.IntRange(min=1), help="Of low-rank updates.")
@click.option("--batch-size", default=_default("batch_size"), type=click.IntRange(min=1), help="Windows in a step.")
@click.option(
    "--evaluations",
    default=_default("evaluations"),
    type=click.IntRange(min=1),
    help="How often the loss held out is measured, beside the start.",
)
@click.option(
    "--save-minutes",
    default=_default("save_minutes"),
    type=click.FloatRange(min=0),
    help="Between checkpoints that --resume goes on from.",
)
@click.option(
    "--compute",
    default=_default("compute"),
    type=click.Choice(COMPUTE),
    help="Of forwards and backwards; auto is bfloat16 where the hardware multiplies it. Weights train in float32.",
)
@click.option("--seed", default=0, type=click.IntRange(0, 2**31 - 1), help="Of the order of the windows.")
@DEVICE_OPTION
@TRUST_OPTION
@click.option("--evaluate", metavar=TEXT, callback=parsed(source), help="Text for perplexity before and after.")
@WINDOWS_OPTION
@click.option("--resume", is_flag=True, help="Go on with the same run, which was interrupted, from DIR.partial.")
@click.option("--overwrite", is_flag=True, help="Replace the model in DIR, if there is one.")
@hub_option
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Train the pruned model PRUNED, its zeros kept, and save it in DIR.

    PRUNED is a directory that thanos.prune wrote, or another model with zeros in its layers. What is kept are the
    weights that were best on text held out.

    \b
    Examples:
      python -m thanos.recover ./llama-50 --output ./llama-50-trained --teacher ./llama --train my-text.jsonl
      python -m thanos.recover ./llama-24 --output ./better --train-what norms --minutes 5 --evaluate wikitext2
    """
    if options["minutes"] is None and options["steps"] is None:
        options["minutes"] = _MINUTES
    options["device"] = own_device(default_device(options["device"]))
    run = _Run(**{field.name: options[field.name] for field in dataclasses.fields(_Run)})
    names = {field.name: RENAMED.get(field.name, field.name) for field in dataclasses.fields(RecoverOptions)}
    try:
        job = RecoverOptions(**{name: options[told] for name, told in names.items()})
    except ValueError as error:
        raise usage_error(error, names) from error
    said = {**recipe_of(context, run), **{told: getattr(job, name) for name, told in names.items()}}
    plain = {name: str(value) if name == "pattern" else value for name, value in said.items() if value is not None}
    command = command_of(context, "thanos.recover", {**plain, "output": str(run.output)})
    with joined(options["device"]) as peers:
        _run(run, job, command, Console(quiet=peers.rank > 0), peers)


def _run(run: _Run, job: RecoverOptions, command: str, console: Console, peers: Peers) -> None:
    """Read and check what is cheap to refuse, then train and write; the first process alone looks at DIR."""
    silence_libraries()
    from thanos import checkpoint
    from thanos.checkpoint.partial import FINISHED, WALKING
    from thanos.recover.masks import find_sparse

    check_accelerate()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    first = peers.rank == 0
    unfinished = checkpoint.Partial(run.output)
    if first:
        unfinished.check(run.resume)
    if first and not unfinished.moved:
        checkpoint.check_target(run.output, overwrite=run.overwrite, source=run.pruned)
    if run.push_to_hub and first:
        check_hub(run.push_to_hub)
    record = record_of(run.pruned)
    trusted: Any = {"trust_remote_code": run.trust_remote_code}
    config = checked_config(run.pruned, trusted)
    tokenizer = checkpoint.load_tokenizer(run.pruned, **trusted)
    if run.teacher is not None:
        check_teacher(run.teacher, config, tokenizer, trusted)
    texts = read_texts(run, job, config, tokenizer, say, peers.size)
    folder = checkpoint.source_folder(run.pruned)
    identity = identity_of(run, job, texts, checkpoint.fingerprint(run.pruned, folder), peers.size)
    same_for_all(identity, peers)
    unfinished.compare(identity)
    if peers.object(unfinished.phase) == FINISHED:
        if first:
            unfinished.finish()
        say(f"saved in {run.output}")
        return
    say(f"reading the model {run.pruned}")
    model = checkpoint.load_model(run.pruned, config=config, **trusted)
    sparse = find_sparse(model, record, job)
    say(_kept(sparse, job))
    teacher = None
    if run.teacher is not None:
        say(f"reading the teacher {run.teacher}")
        teacher = checkpoint.load_model(run.teacher, **trusted)
    with _keeping(unfinished, first):
        scores = peers.object(dict(unfinished.state.get("perplexity") or {}))
        if first:
            unfinished.begin(identity)
        if texts.scored is not None and "before" not in scores:
            scores = {"before": _score(model, run, texts.scored, console, peers), "source": run.evaluate}
            say(f"perplexity of the pruned model on {run.evaluate}: {scores['before']:.2f}")
        if first:
            unfinished.save(phase=WALKING, perplexity=scores)
        done = _train(run, job, model, teacher, texts, record, unfinished.folder / "training", say, peers)
        if texts.scored is not None:
            scores |= {"after": _score(model, run, texts.scored, console, peers), **texts.scored.record()}
            say(f"perplexity of the trained model on {run.evaluate}: {scores['after']:.2f}")
        if not first:
            return
        with checkpoint.room_for(unfinished.folder):
            unfinished.empty()
            checkpoint.save_pruned(model, tokenizer, folder, done.parameters, unfinished.model)
            write_record(run, job, model, record, done, texts, scores, command, unfinished.model)
            unfinished.finish()
    say(f"saved in {run.output}")
    if run.push_to_hub and first:
        say(f"uploading {run.output} to {run.push_to_hub}")
        say(f"uploaded to {push(run.output, run.push_to_hub)}")


def _kept(sparse: list[Any], job: RecoverOptions) -> str:
    if not sparse:
        return "the model is smaller and dense: it is trained without a mask"
    zeros, weights = sum(int(one.gone.sum()) for one in sparse), sum(one.gone.numel() for one in sparse)
    if job.mask != "fixed":
        return f"{zeros:,} of {weights:,} weights in {len(sparse):,} layers are zero now"
    return f"{zeros:,} of {weights:,} weights in {len(sparse):,} layers are zero and stay so"


def _score(model: Any, run: _Run, text: Any, console: Console, peers: Peers) -> float:
    from thanos.commands.display import display
    from thanos.scoring.perplexity import score_windows

    with display(console) as shown:
        return score_windows(model.to(run.device), text, progress=shown.window_scored, peers=peers)


def _train(
    run: _Run,
    job: RecoverOptions,
    model: Any,
    teacher: Any,
    texts: Texts,
    record: Mapping[str, Any],
    folder: Path,
    say: Any,
    peers: Peers,
) -> Any:
    from thanos.commands.display import duration
    from thanos.recover.model import recover_model

    def measured(point: Any, share: float) -> None:
        loss = "" if point.loss is None else f", trained on {point.loss:.3f}"
        say(
            f"step {point.step:,}, {point.tokens:,} tokens, {duration(point.seconds)} passed ({share:.0%}): "
            f"loss {point.held_out:.3f} on text held out{loss}"
        )

    if peers.rank == 0:
        folder.mkdir(exist_ok=True)
    peers.object(None)
    done = recover_model(
        model,
        texts.windows,
        texts.held_out,
        job,
        teacher=teacher,
        record=record,
        device=run.device,
        folder=folder,
        progress=measured,
        peers=peers,
    )
    training = done.training
    if training.note is not None:
        say(f"training was stopped: {training.note}")
    say(f"kept: the weights of step {training.best}" + ("" if training.best else ", the start; nothing was better"))
    speed = training.tokens / training.seconds if training.seconds else 0.0
    times = training.tokens * (1 - job.repeats) / texts.windows.numel()
    say(f"{training.tokens:,} tokens in {duration(training.seconds)}, {speed:.0f} a second, in {done.dtype}")
    say(f"the text was gone through {times:.1f} times")
    return done


@contextmanager
def _keeping(unfinished: Any, first: bool) -> Iterator[None]:
    """Where the body fails, say how to go on, or remove the directory of the run if there is no checkpoint."""
    try:
        yield
    except BaseException as error:
        if not (unfinished.folder / "training" / "training.json").is_file():
            with suppress(OSError):
                if unfinished.state and first:
                    unfinished.remove()
            raise
        where = f"its last checkpoint is kept in {unfinished.folder}: the same command with --resume goes on"
        if isinstance(error, Exception):
            raise ValueError(f"{sentence(error)}; {where}") from error
        raise KeyboardInterrupt(where) from error
