"""``python -m thanos.prune MODEL --output DIR``: prune a model from the command line."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich.console import Console

from thanos.commands.cli import DEVICE_OPTION, TEXT, Command, default_device, parsed, source, start
from thanos.commands.quiet import silence_libraries
from thanos.engine.layer import check_options
from thanos.engine.methods import METHODS
from thanos.pattern import IMPORTANCES, Pattern, Shrink, parse_any_pattern

DAMPING = 0.01


def _regex(text: str) -> str:
    re.compile(text)
    return text


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a finite number")
    return number


@dataclass(frozen=True)
class _Run:
    """The command's arguments, checked as far as they can be without the model."""

    model: str
    output: Path
    pattern: Pattern | Shrink
    importance: str
    multiple: int
    method: str
    block_size: int | None
    outlier_fraction: float
    damping: float | None
    calibration: str
    samples: int
    sequence_length: int
    passes: int | None
    seed: int
    device: torch.device | None
    dtype: str
    exclude: str | None
    evaluate: str | None
    overwrite: bool


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
    help="Which channels and heads of a smaller model go.",
)
@click.option(
    "--multiple",
    default=64,
    type=click.IntRange(min=1),
    help="Widths of a smaller model are rounded to a multiple of it; 256 suits llama.cpp's K-quants.",
)
@click.option("--method", default="thanos", type=click.Choice(list(METHODS)), help="How to choose and compensate.")
@click.option("--block-size", type=click.IntRange(min=1), help="Columns per block.  [default: 128; 512 for n:m]")
@click.option(
    "--outlier-fraction",
    default=0.0,
    type=click.FloatRange(0, 1, max_open=True),
    callback=parsed(_finite),
    help="Share of each layer's rows, those with the largest output, to leave untouched.",
)
@click.option(
    "--damping",
    type=click.FloatRange(min=0),
    callback=parsed(_finite),
    help="Added to the Hessian's diagonal, relative to its mean.  [default: 0.01; 0.1 for a smaller model]",
)
@click.option("--calibration", default="c4", metavar=TEXT, callback=parsed(source), help="Text to prune on.")
@click.option("--samples", default=128, type=click.IntRange(min=1), help="Calibration samples.")
@click.option(
    "--sequence-length",
    default=2048,
    type=click.IntRange(min=2),
    help="Tokens in a sample; the default is lowered to what the model takes.",
)
@click.option(
    "--passes",
    type=click.IntRange(1, 2),
    help="Forwards through each block: 1 needs memory for all samples at once.  [default: 1 if that fits, else 2]",
)
@click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="Of the choice of samples.")
@DEVICE_OPTION
@click.option(
    "--dtype",
    default="auto",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the weights, the forwards and the saved model; auto is the checkpoint's own, float32 for GGUF files.",
)
@click.option("--exclude", metavar="REGEX", callback=parsed(_regex), help="Leave layers with such names dense.")
@click.option("--evaluate", metavar=TEXT, callback=parsed(source), help="Text for perplexity before and after.")
@click.option("--overwrite", is_flag=True, help="Replace the model in DIR, if there is one.")
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Prune the causal language model MODEL and save it in DIR.

    MODEL is a directory, a .gguf file, or a name on the Hugging Face hub. DIR can be loaded with from_pretrained; its
    pruning.json tells what was done to each layer.

    \b
    Examples:
      python -m thanos.prune ./llama --output ./llama-50 --calibration my-text.jsonl
      python -m thanos.prune gpt2 --output ./gpt2-24 --pattern 2:4 --evaluate wikitext2
    """
    default_length = context.get_parameter_source("sequence_length") is ParameterSource.DEFAULT
    _run(_Run(**options), default_length, Console())


def _run(run: _Run, default_length: bool, console: Console) -> None:
    """Check, read, prune and write; what is cheap to refuse comes first."""
    silence_libraries()
    from thanos import checkpoint
    from thanos.commands.display import display
    from thanos.report.terminal import print_summary
    from thanos.scoring.perplexity import check_windows, load_tokens, perplexity
    from thanos.shrink import DAMPING as SHRINK_DAMPING
    from thanos.shrink import ShrinkPlan
    from thanos.text import load_samples
    from thanos.walk.model import prune_model

    usual = SHRINK_DAMPING if isinstance(run.pattern, Shrink) else DAMPING
    damping = usual if run.damping is None else run.damping
    if not isinstance(run.pattern, Shrink):
        check_options(run.pattern, run.method, run.block_size, run.outlier_fraction, damping)
    checkpoint.check_target(run.output, overwrite=run.overwrite, source=run.model)
    config = checkpoint.load_config(run.model)
    length = _length(run, checkpoint.max_length(config), default_length)
    tokenizer = checkpoint.load_tokenizer(run.model)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(f"reading calibration text from {run.calibration}")
    samples = load_samples(run.calibration, tokenizer, run.samples, length, run.seed)
    text = load_tokens(run.evaluate, tokenizer) if run.evaluate else None
    if text is not None:
        check_windows(text, length)
    say(f"reading the model {run.model}")
    device = default_device(run.device)
    # The model stays on the CPU unless its perplexity is asked for: the walk takes one block at a time to the device.
    model = checkpoint.load_model(run.model, checkpoint.DTYPES.get(run.dtype), config=config)

    scores: dict[str, Any] = {}

    def score(name: str) -> None:
        if text is None:
            return
        model.to(device)
        with display(console) as shown:
            value = perplexity(model, None, text, sequence_length=length, progress=shown.scored)
        say(f"perplexity of the {name} model on {run.evaluate}: {value:.2f}")
        scores.update({name: value, "source": run.evaluate, "sequence_length": length})

    plan, sets = None, None
    if isinstance(run.pattern, Shrink):
        plan = ShrinkPlan(
            model,
            samples.tokens,
            run.pattern,
            importance=run.importance,
            multiple=run.multiple,
            damping=damping,
            device=device,
        )
        for sentence in plan.became:
            say(sentence)
    score("dense")
    if plan is not None:
        with display(console) as shown:
            shrunk = plan.run(shown.walked)
        model, report, sets = shrunk.model, shrunk.report, shrunk.sets
    elif not isinstance(run.pattern, Shrink):
        with display(console) as shown:
            report = prune_model(
                model,
                samples.tokens,
                run.pattern,
                method=run.method,
                block_size=run.block_size,
                outlier_fraction=run.outlier_fraction,
                damping=damping,
                exclude=run.exclude,
                passes=run.passes,
                device=device,
                progress=shown.walked,
            )
    score("pruned")
    report = dataclasses.replace(
        report,
        options={**report.options, "model": run.model, "dtype": str(model.dtype).removeprefix("torch.")},
        calibration=samples.provenance(),
        perplexity=scores,
    )
    with checkpoint.staged(run.output, overwrite=run.overwrite) as folder:
        checkpoint.save_model(model, tokenizer, folder)
        report.write(folder)
        if sets is not None:
            sets.write(folder)
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
