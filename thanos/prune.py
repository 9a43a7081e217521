"""``python -m thanos.prune MODEL --output DIR``: prune a model from the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from thanos.commands.again import Again, recipe_of, recipe_option
from thanos.commands.cli import (
    DEVICE_OPTION,
    DTYPE_OPTION,
    STREAM_OPTION,
    TEXT,
    TRUST_OPTION,
    WINDOWS_OPTION,
    Command,
    default_device,
    default_of,
    parsed,
    read_bytes,
    source,
    start,
    text_options,
    usage_error,
)
from thanos.commands.first import refuse_by_files, too_long
from thanos.commands.hub import check_hub, hub_option, push
from thanos.commands.processes import joined, own_device, started_by_torchrun
from thanos.commands.quiet import silence_libraries
from thanos.commands.runs import Given, SmallerModel, make_smaller, prune_weights
from thanos.compact import VALUES
from thanos.engine.peers import Peers
from thanos.options import (
    ALLOCATIONS,
    AUTO,
    EXPERTS,
    METHODS,
    METRICS,
    QUALITIES,
    REFINEMENTS,
    TARGETS,
    WalkOptions,
    preset,
)
from thanos.pattern import IMPORTANCES, Shrink, check_axes, parse_any_pattern
from thanos_kernels import BACKENDS

_OF_WEIGHTS = (
    "method",
    "metric",
    "refine",
    "allocation",
    "search_evaluations",
    "block_size",
    "outlier_fraction",
    "passes",
    "memory_limit",
    "experts",
    "exclude",
)
_OF_VALUES = ("values",)  # set by --pack
_OF_SHAPES = ("importance", "multiple")
_OF_CUT_BLOCKS = ("targets", "correction", "reconstruct", "quality")


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
    trust_remote_code: bool
    evaluate: str | None
    windows: int | None
    allow_missing: bool
    stream: str
    resume: bool
    overwrite: bool
    pack: str | None
    push_to_hub: str | None

    def identity(self) -> dict[str, Any]:
        """The arguments that decide what comes out."""
        own = {"--evaluate": self.evaluate, "--windows": self.windows, "--dtype": self.dtype, "--pack": self.pack}
        return {**own, "MODEL": self.model}


_default = partial(default_of, WalkOptions)


@click.command(cls=Command, context_settings={"max_content_width": 100, "show_default": True})
@click.argument("model")
@click.option(
    "--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Where the pruned model goes."
)
@click.option(
    "--pattern",
    default="0.5",
    callback=parsed(parse_any_pattern),
    help="What to remove: a share of the weights (0.5 or 50%), n of every m (2:4), whole columns (structured:0.3), or "
    "for a smaller model channels:0.25, heads:0.25, kv-heads:1, depth:6, experts:0.5 and sums of them with +.",
)
@click.option(
    "--importance",
    default="obs",
    type=click.Choice(list(IMPORTANCES)),
    help="Which channels, heads and experts of a smaller model go: experts by obs (REAP's score) or forward.",
)
@click.option(
    "--multiple",
    default=64,
    type=click.IntRange(min=1),
    help="Widths of a smaller model are rounded to a multiple of it; 256 suits llama.cpp's K-quants.",
)
@click.option("--method", default=_default("method"), type=click.Choice(METHODS), help="How to choose and compensate.")
@click.option(
    "--quality",
    default=_default("quality"),
    type=click.Choice(list(QUALITIES)),
    help="How much time a better result is worth: sets refine, targets, reconstruct and allocation where not given.",
)
@click.option("--metric", type=click.Choice(METRICS), help="What Thanos chooses its mask by.  [default: wanda]")
@click.option(
    "--refine",
    default=_default("refine"),
    type=click.Choice(REFINEMENTS),
    help="After the method: solve for the kept weights once more, or search for a better mask as well.",
)
@click.option(
    "--targets",
    default=_default("targets"),
    type=click.Choice(TARGETS),
    help="Prune each layer's own weight, or one corrected for what pruning did to its input; that runs the dense model "
    "beside the pruned one.",
)
@click.option(
    "--correction",
    default=_default("correction"),
    type=click.FloatRange(0, 1),
    help="How much of the drift corrected targets take back.",
)
@click.option(
    "--allocation",
    default=_default("allocation"),
    type=click.Choice((*ALLOCATIONS, AUTO)),
    help="Remove the same share of each layer, or share the total out among them, for unstructured patterns; auto is "
    "search where it can be.",
)
@click.option(
    "--search-evaluations",
    default=_default("search_evaluations"),
    type=click.IntRange(min=1),
    help="How many allocations `--allocation search` may judge.",
)
@click.option(
    "--reconstruct",
    default=_default("reconstruct"),
    type=click.IntRange(min=0),
    metavar="EPOCHS",
    help="Train the kept weights of each block to give the dense model's output of the block; 0 does not.",
)
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
@TRUST_OPTION
@click.option("--backend", default=_default("backend"), type=click.Choice(BACKENDS), help="What runs the operations.")
@click.option("--exclude", metavar="REGEX", help="Leave layers with such names dense.")
@click.option("--evaluate", metavar=TEXT, callback=parsed(source), help="Text for perplexity before and after.")
@WINDOWS_OPTION
@click.option(
    "--allow-missing", is_flag=True, help="Take a checkpoint that lacks tensors, or holds some that its model does not."
)
@STREAM_OPTION
@click.option(
    "--pack",
    type=click.Choice(VALUES),
    help="Write the compact form, as thanos.pack does; the rounding to int8 is made up for while pruning.",
)
@click.option("--resume", is_flag=True, help="Go on with the same run, which was interrupted, from DIR.partial.")
@click.option("--overwrite", is_flag=True, help="Replace the model in DIR, if there is one.")
@recipe_option
@hub_option
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Prune the causal language model MODEL and save it in DIR.

    MODEL is a directory, a .gguf file, or a name on the Hugging Face hub. DIR can be loaded with from_pretrained; its
    report.html shows what was done to each layer, README.md is its model card, and recipe.yaml makes it again.

    \b
    Examples:
      python -m thanos.prune ./llama --output ./llama-50 --calibration my-text.jsonl
      python -m thanos.prune gpt2 --output ./gpt2-24 --pattern 2:4 --evaluate wikitext2
      python -m thanos.prune --recipe ./llama-50/recipe.yaml --output ./llama-50-again
    """
    own = {field.name: options.pop(field.name) for field in dataclasses.fields(_Run)}
    given = {name for name in options if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    default_length = context.get_parameter_source("sequence_length") is ParameterSource.DEFAULT
    options["device"] = own_device(default_device(options["device"]))
    if own["pack"] is not None and isinstance(options["pattern"], Shrink):
        raise click.UsageError(f"--pack is no option of the pattern {options['pattern']}: a smaller model has no zeros")
    options["values"] = "int8" if own["pack"] == "int8" else VALUES[0]
    run, job = _Run(**own), _job(options, given)
    if isinstance(job, SmallerModel) and run.resume:
        raise click.UsageError(f"--resume is no option of the pattern {job.pattern}: its work starts over")
    if isinstance(job, SmallerModel) and run.stream == "yes" and not job.blocks_alone:
        raise click.UsageError(
            f"--stream yes is no option of the pattern {job.pattern}, whose parts are cut in memory; depth by itself "
            "is streamed"
        )
    if isinstance(job, SmallerModel) and started_by_torchrun():
        raise click.UsageError(f"--pattern {job.pattern} is the work of one process; start it without torchrun")
    again = Again(recipe_of(context, job, run), context)
    with joined(options["device"]) as peers:
        _run(run, job, default_length, again, Console(quiet=peers.rank > 0), peers)


def _job(options: dict[str, Any], given: set[str]) -> WalkOptions | SmallerModel:
    """What is to be done to the model; options that do not belong to the pattern are refused."""
    pattern, smaller = options["pattern"], isinstance(options["pattern"], Shrink)
    for name in _OF_WEIGHTS if smaller else _OF_SHAPES:
        if name in given:
            why = "which takes whole parts out of the model" if smaller else "which leaves the model's shape as it is"
            raise click.UsageError(f"--{name.replace('_', '-')} is no option of the pattern {pattern}, {why}")
    chosen = {name: value for name, value in preset(options["quality"]).items() if name not in given}
    options = {**options, **chosen}
    if smaller:
        return _smaller(options, given)
    return _walk_options({name: value for name, value in options.items() if name not in _OF_SHAPES})


def _smaller(options: dict[str, Any], given: set[str]) -> SmallerModel:
    """A preset's refinement is of a mask, and there is none here; the rest of it adjusts the blocks that are cut."""
    pattern, own = options["pattern"], (*_OF_WEIGHTS, *_OF_VALUES, *_OF_CUT_BLOCKS)
    adjusted = options["reconstruct"] > 0 or options["targets"] == "corrected"
    if options["quality"] != "fast" and "quality" in given and not adjusted:
        raise click.UsageError(f"--quality {options['quality']} changes nothing of the pattern {pattern}")
    try:
        check_axes(pattern, options["importance"], adjusted)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    correction = options["correction"] if options["targets"] == "corrected" else 0.0
    return SmallerModel(
        **{name: value for name, value in options.items() if name not in own},
        reconstruct=options["reconstruct"],
        correction=correction,
        quality=options["quality"],
    )


def _walk_options(options: dict[str, Any]) -> WalkOptions:
    """The options of the walk; an error says an option's name as it is on the command line."""
    try:
        return WalkOptions(**options)
    except (ValueError, TypeError) as error:
        raise usage_error(error, {name: name for name in options}) from error


def _told(job: WalkOptions | SmallerModel) -> str:
    """What the preset switched on, or was switched on in its place."""
    values = vars(job)
    if isinstance(job, SmallerModel):
        values = {**values, "targets": "corrected" if job.correction else "own"}
    return ", ".join(f"--{name} {values[name]}" for name in preset(job.quality) if name in values)


def _run(
    run: _Run, job: WalkOptions | SmallerModel, default_length: bool, again: Again, console: Console, peers: Peers
) -> None:
    """Read and check what is cheap to refuse, then prune and write; the first process alone looks at DIR."""
    from thanos import checkpoint
    from thanos.compact import MANIFEST
    from thanos.scoring.windows import load_windows
    from thanos.text import load_samples
    from thanos.walk.model import check_model, check_samples

    unfinished = checkpoint.Partial(run.output)
    if peers.rank == 0:
        unfinished.check(run.resume)
    if peers.rank == 0 and not unfinished.moved:
        checkpoint.check_target(run.output, overwrite=run.overwrite, source=run.model)
    if (Path(run.model) / MANIFEST).is_file():
        raise ValueError(f"{run.model} is a compact checkpoint; restore it with thanos.unpack, and prune that")
    refuse_by_files(run.model, job, None if default_length else run.sequence_length)
    silence_libraries(run.model)
    if run.push_to_hub and peers.rank == 0:
        check_hub(run.push_to_hub)
    trusted: Any = {"trust_remote_code": run.trust_remote_code}
    config = checkpoint.load_config(run.model, **trusted)
    checkpoint.check_unquantised(config, run.model)
    length = _length(run, checkpoint.max_length(config), default_length)
    skeleton = checkpoint.empty_model(config, **trusted)
    if skeleton is not None and isinstance(job, WalkOptions):
        check_model(skeleton, job)
    own_files, dtype = checkpoint.source_folder(run.model), checkpoint.DTYPES.get(run.dtype)
    if own_files is not None:
        checkpoint.check_floating(own_files, config)
    saved_anew = dtype not in (None, config.dtype)
    if isinstance(job, SmallerModel):
        saved_anew = not any(axis.sets for axis in job.pattern.axes)
    if skeleton is not None and own_files is not None and saved_anew and not run.allow_missing:
        checkpoint.check_nothing_left_out(skeleton, own_files)
    tokenizer = checkpoint.load_tokenizer(run.model, **trusted)
    if job.quality != "fast":
        console.print(f"quality {job.quality}: {_told(job)}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"reading calibration text from {run.calibration}", highlight=False, markup=False, soft_wrap=True)
    reading: Any = {"bos": run.bos, "text_field": run.text_field}
    samples = load_samples(run.calibration, tokenizer, run.samples, length, run.seed, **reading)
    text = load_windows(run.evaluate, tokenizer, length, windows=run.windows, **reading) if run.evaluate else None
    if skeleton is not None:
        check_samples(skeleton, samples.tokens)
    said = again.command(run.output), again.recipe(length)
    given = Given(config, tokenizer, samples, text, own_files, console, *said, peers)
    if isinstance(job, SmallerModel):
        make_smaller(run, job, given)
    else:
        prune_weights(run, job, given, unfinished)
    if run.push_to_hub and peers.rank == 0:
        given.say(f"uploading {run.output} to {run.push_to_hub}")
        given.say(f"uploaded to {push(run.output, run.push_to_hub)}")


def _length(run: _Run, limit: int | None, default: bool) -> int:
    if limit is None or run.sequence_length <= limit:
        return run.sequence_length
    if default:
        return limit
    raise too_long(run.sequence_length, limit, run.model)


if __name__ == "__main__":
    start(main)
