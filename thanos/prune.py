"""``python -m thanos.prune MODEL --output DIR``: prune a model from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich.console import Console

from thanos.commands.cli import (
    DEVICE_OPTION,
    DTYPE_OPTION,
    STREAM_OPTION,
    TEXT,
    WINDOWS_OPTION,
    Command,
    default_device,
    parsed,
    read_bytes,
    source,
    start,
    text_options,
)
from thanos.commands.quiet import silence_libraries
from thanos.options import EXPERTS, METHODS, METRICS, WalkOptions
from thanos.pattern import parse_pattern
from thanos_kernels import BACKENDS


@dataclass(frozen=True)
class _Run:
    """The command's own arguments; those of the walk are :class:`WalkOptions`."""

    model: str
    output: Path
    calibration: str
    samples: int
    sequence_length: int
    bos: str
    text_field: str | None
    seed: int
    dtype: str
    evaluate: str | None
    windows: int | None
    allow_missing: bool
    stream: str
    resume: bool
    overwrite: bool

    def identity(self) -> dict[str, Any]:
        """The arguments that decide what comes out."""
        return {"--evaluate": self.evaluate, "--windows": self.windows, "--dtype": self.dtype, "MODEL": self.model}


def _default(name: str) -> Any:
    """The default of an option of the walk."""
    return next(field.default for field in dataclasses.fields(WalkOptions) if field.name == name)


@click.command(cls=Command, context_settings={"max_content_width": 100, "show_default": True})
@click.argument("model")
@click.option(
    "--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Where the pruned model goes."
)
@click.option(
    "--pattern",
    default="0.5",
    callback=parsed(parse_pattern),
    help="What to remove: a share of the weights (0.5 or 50%), n of every m (2:4), or whole columns (structured:0.3).",
)
@click.option("--method", default=_default("method"), type=click.Choice(METHODS), help="How to choose and compensate.")
@click.option("--metric", type=click.Choice(METRICS), help="What Thanos chooses its mask by.  [default: wanda]")
@click.option("--block-size", type=click.IntRange(min=1), help="Columns per block.  [default: 128; 512 for n:m]")
@click.option(
    "--outlier-fraction",
    default=_default("outlier_fraction"),
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of each layer's rows, those with the largest output, to leave untouched.",
)
@click.option(
    "--damping",
    default=_default("damping"),
    type=click.FloatRange(min=0),
    help="Added to the Hessian's diagonal, relative to its mean.",
)
@click.option("--calibration", default="c4", metavar=TEXT, callback=parsed(source), help="Text to prune on.")
@click.option("--samples", default=128, type=click.IntRange(min=1), help="Calibration samples.")
@click.option(
    "--sequence-length",
    default=2048,
    type=click.IntRange(min=2),
    help="Tokens in a sample; the default is lowered to what the model takes.",
)
@text_options
@click.option(
    "--passes",
    type=click.IntRange(1, 2),
    help="Forwards through each block: 1 needs memory for all samples at once.  [default: 1 if that fits, else 2]",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Samples in a batch of two passes.  [default: some 4096 tokens]"
)
@click.option(
    "--memory-limit",
    metavar="BYTES",
    callback=parsed(read_bytes),
    help="For activations, such as 8GiB.  [default: half of what is free]",
)
@click.option(
    "--experts",
    default=_default("experts"),
    type=click.Choice(EXPERTS),
    help="Tokens that each expert of a mixture is pruned on: those routed to it, or all.",
)
@click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="Of the choice of samples.")
@DEVICE_OPTION
@DTYPE_OPTION
@click.option("--backend", default=_default("backend"), type=click.Choice(BACKENDS), help="What runs the operations.")
@click.option("--exclude", metavar="REGEX", help="Leave layers with such names dense.")
@click.option("--evaluate", metavar=TEXT, callback=parsed(source), help="Text for perplexity before and after.")
@WINDOWS_OPTION
@click.option(
    "--allow-missing", is_flag=True, help="Take a checkpoint that lacks tensors, or holds some that its model does not."
)
@STREAM_OPTION
@click.option("--resume", is_flag=True, help="Go on with the same run, which was interrupted, from DIR.partial.")
@click.option("--overwrite", is_flag=True, help="Replace the model in DIR, if there is one.")
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Prune the causal language model MODEL and save it in DIR.

    MODEL is a directory, a .gguf file, or a name on the Hugging Face hub. DIR can be loaded with from_pretrained; its
    pruning.json says what was done to each layer.

    \b
    Examples:
      python -m thanos.prune ./llama --output ./llama-50 --calibration my-text.jsonl
      python -m thanos.prune gpt2 --output ./gpt2-24 --pattern 2:4 --evaluate wikitext2
    """
    own = {field.name: options.pop(field.name) for field in dataclasses.fields(_Run)}
    default_length = context.get_parameter_source("sequence_length") is ParameterSource.DEFAULT
    options["device"] = default_device(options["device"])
    _run(_Run(**own), _walk_options(options), default_length, Console())


def _walk_options(options: dict[str, Any]) -> WalkOptions:
    """The options of the walk; an error says an option's name as it is on the command line."""
    try:
        return WalkOptions(**options)
    except (ValueError, TypeError) as error:
        words = {name.replace("_", " "): "--" + name.replace("_", "-") for name in options}
        said = next((name for name in words if str(error).startswith(name)), "")
        raise click.UsageError(words.get(said, "") + str(error).removeprefix(said)) from error


def _run(run: _Run, options: WalkOptions, default_length: bool, console: Console) -> None:
    """Read, prune and write; what is cheap to refuse comes first."""
    silence_libraries()
    from thanos import checkpoint
    from thanos.checkpoint.partial import FINISHED
    from thanos.commands.display import display
    from thanos.commands.keeping import identify, keeping
    from thanos.report.terminal import print_summary
    from thanos.scoring.perplexity import score_windows
    from thanos.scoring.streamed import score_streamed
    from thanos.scoring.windows import load_windows
    from thanos.text import load_samples
    from thanos.walk.model import prune_model
    from thanos.walk.resume import Keeper
    from thanos.walk.store import from_files, in_memory
    from thanos.walk.stream import choose_stream, load_streamed

    unfinished = checkpoint.Partial(run.output)
    unfinished.check(run.resume)
    if unfinished.phase != FINISHED or unfinished.model.exists():
        checkpoint.check_target(run.output, overwrite=run.overwrite, source=run.model)
    config = checkpoint.load_config(run.model)
    length = _length(run, checkpoint.max_length(config), default_length)
    tokenizer = checkpoint.load_tokenizer(run.model)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(f"reading calibration text from {run.calibration}")
    reading: Any = {"bos": run.bos, "text_field": run.text_field}
    samples = load_samples(run.calibration, tokenizer, run.samples, length, run.seed, **reading)
    text = load_windows(run.evaluate, tokenizer, length, windows=run.windows, **reading) if run.evaluate else None
    source = checkpoint.source_folder(run.model)
    identity = identify(run.identity(), options, samples.tokens, checkpoint.fingerprint(run.model, source))
    unfinished.compare(identity)
    if unfinished.phase == FINISHED:
        unfinished.finish()
        say(f"saved in {run.output}")
        return
    if unfinished.state:
        say(f"going on from {unfinished.folder}; blocks that are done: {unfinished.state.get('block', 0)}")
    streaming, why = choose_stream(run.stream, source)
    say(f"{'streaming' if streaming else 'reading'} the model {run.model} ({why})")
    # The model stays on the CPU unless its perplexity is asked for: the walk takes one block at a time to the device.
    how: Any = {"config": config, "allow_missing": run.allow_missing}
    dtype, files = checkpoint.DTYPES.get(run.dtype), None
    if streaming:
        model, files = load_streamed(run.model, dtype, **how)
    else:
        model = checkpoint.load_model(run.model, dtype, **how)

    def score(name: str) -> None:
        if text is None or name in keeper.notes:
            return
        with display(console) as shown:
            if files is None:
                value = score_windows(model.to(options.device), text, progress=shown.window_scored)
            else:
                pruned = name == "pruned"
                scored = load_streamed(str(unfinished.model), allow_missing=True) if pruned else (model, files)
                value = score_streamed(
                    *scored, text, torch.device(options.device or "cpu"), progress=shown.window_scored
                )
        say(f"perplexity of the {name} model on {run.evaluate}: {value:.2f}")
        keeper.notes.update({name: value, "source": run.evaluate, **text.record()})

    def prepare(names: Iterable[str], folder: Path) -> None:
        if files is not None and not checkpoint.updates_source(model, source, names):
            raise ValueError(
                f"a streamed model keeps its layout and its dtype, and {run.model} cannot be saved so with "
                f"--dtype {run.dtype}; pass --stream no"
            )
        checkpoint.prepare(model, tokenizer, source, names, folder)

    def restored(folder: Path) -> Any:
        return checkpoint.load_model(str(folder), model.dtype, allow_missing=True)

    keeper = Keeper(unfinished, identity, prepare, None if streaming else restored, notes={})
    stores = in_memory if files is None else from_files(files)
    with keeping(unfinished):
        score("dense")
        with display(console) as shown:
            walk = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
            report = prune_model(
                model, samples.tokens, **walk, progress=shown.layer_pruned, keeper=keeper, stores=stores
            )
        score("pruned")
        report = dataclasses.replace(
            report,
            options={**report.options, "model": run.model, "dtype": str(model.dtype).removeprefix("torch.")},
            calibration=samples.provenance(),
            perplexity=keeper.notes,
        )
        with checkpoint.room_for(unfinished.folder):
            report.write(unfinished.model)
            unfinished.finish()
    print_summary(report, console)
    say(f"saved in {run.output}")


def _length(run: _Run, limit: int | None, default: bool) -> int:
    if limit is None or run.sequence_length <= limit:
        return run.sequence_length
    if default:
        return limit
    raise ValueError(
        f"--sequence-length {run.sequence_length} is longer than the {limit} tokens that {run.model} takes"
    )


if __name__ == "__main__":
    start(main)
