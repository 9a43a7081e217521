"""Run dense and smaller models in llama.cpp: ``python -m benchmarks.llama_cpp DENSE SMALLER...``.

Each model is converted by llama.cpp's converter, quantised by llama.cpp itself, and run by ``node-llama-cpp``: bytes,
tokens a second, and the first greedy tokens, which must be Transformers' in float32 until the first near-tie. A model
is a directory, or ``random:tinyllama-1.1b``: those shapes with random weights, some changed where they are named, as in
``random:tinyllama-1.1b,intermediate_size=3840``. Models take turns, so that ratios hold on a machine that is not idle.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Column, Table

from benchmarks import records
from benchmarks.llama_tools import FILE_TYPES, PROMPT_TOKENS, Tools, cache_folder, convert, quantise, run_file
from benchmarks.machine import describe
from benchmarks.records import Row
from benchmarks.smollm2 import model_file
from thanos.bench_inference import random_tinyllama
from thanos.checkpoint import load_model, load_tokenizer
from thanos.commands.quiet import silence_libraries
from thanos.walk.replay import run_model

PROMPT = "The capital of France is Paris. The capital of Germany is"
KINDS = ("f16", "Q8_0", "Q4_K_M")
NEAR_TIE = 0.25  # nats between two tokens that rounding may exchange
_RANDOM = "random:tinyllama-1.1b"


def compared(model: Any, prompt: list[int], tokens: list[int]) -> tuple[int, float | None]:
    """How many greedy ``tokens`` are Transformers' too, and how far the two likeliest were apart where they part.

    Args:
        model: of Transformers, in float32.
        prompt, tokens: ids.

    Returns:
        The number, and nats; None where all are the same.
    """
    with torch.inference_mode():
        logits = run_model(model, torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    best = logits.argmax(-1).tolist()
    for place, (own, other) in enumerate(zip(best, tokens, strict=True)):
        if own != other:
            return place, float(logits[place, own] - logits[place, other])
    return len(tokens), None


def told(agree: int, gap: float | None) -> str:
    """What :func:`compared` found, in words."""
    if gap is None:
        return f"all {agree} agree"
    kind = "a near-tie" if gap <= NEAR_TIE else "NOT a near-tie"
    return f"{agree} agree, then {kind} of {gap:.3f} nats"


def named_model(name: str, folder: Path) -> Path:
    """The directory of a model: itself, or one made in ``folder`` for a random model.

    Raises:
        ValueError: there is no such model.
    """
    kind, *changes = name.split(",")
    if kind != _RANDOM:
        if not Path(name).is_dir():
            raise ValueError(f"there is no model directory {name}, and the only random model is {_RANDOM}")
        return Path(name)
    tokenizer = load_tokenizer(model_file())
    shapes: dict[str, int] = {}
    for change in changes:
        key, _, value = change.partition("=")
        if not value.isdigit():
            raise ValueError(f"{name}: {change!r} is no shape such as intermediate_size=3840")
        shapes[key] = int(value)
    target = folder / name.replace(":", "-").replace(",", "-").replace("=", "-")
    random_tinyllama(vocab_size=len(tokenizer), **shapes).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def measure(
    kit: Tools, models: tuple[str, ...], kinds: tuple[str, ...], rounds: int, threads: int, kept: Path | None = None
) -> list[Row]:
    """A row for each file type and model; ratios are to the first model at the same type, run in turns with it.

    Args:
        kept: a folder for the GGUF files of these types; None keeps none.

    Raises:
        ValueError: llama.cpp does not take a model.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = [named_model(name, Path(scratch)) for name in models]
        base = [Path(scratch, f"{number}-f16.gguf") for number in range(len(models))]
        for folder, target in zip(folders, base, strict=True):
            convert(kit, folder, target)
        for kind in kinds:
            files = [Path(scratch, f"{number}-{kind}.gguf") for number in range(len(models))]
            for source, target in zip(base, files, strict=True):
                if kind != "f16":
                    quantise(kit, source, target, kind)
            prompts = [load_tokenizer(str(folder))(PROMPT)["input_ids"] for folder in folders]
            turns = [
                [run_file(kit, file, prompt, 1, threads) for file, prompt in zip(files, prompts, strict=True)]
                for _ in range(rounds)
            ]
            for number, (name, folder) in enumerate(zip(models, folders, strict=True)):
                mine = [turn[number] for turn in turns]
                best = {key: min(min(one[key]) for one in mine) for key in ("decode", "read")}
                agree, gap = compared(_in_float32(folder, files[number], kind), prompts[number], mine[0]["tokens"])
                row = {
                    "name": f"{name} {kind}",
                    "model": name if name.startswith(_RANDOM) else folder.name,
                    "type": kind,
                    "bytes": files[number].stat().st_size,
                    "decode": 1000 / best["decode"],
                    "read": PROMPT_TOKENS * 1000 / best["read"],
                    "tokens": mine[0]["tokens"],
                    "agree": agree,
                    "gap": gap,
                }
                first = next((other for other in rows if other["type"] == kind), row)
                row |= {f"{key}_ratio": row[key] / first[key] for key in ("decode", "read")}
                rows.append(row)
                if kept is not None:
                    shutil.copyfile(files[number], kept / kept_name(folder, kind))
                if kind != "f16":
                    files[number].unlink()
    return rows


def kept_name(folder: Path, kind: str) -> str:
    """What a model's GGUF file is called, such as ``small-Q4_K_M.gguf``."""
    return f"{folder.absolute().name}-{kind}.gguf"


def _in_float32(folder: Path, file: Path, kind: str) -> Any:
    """What llama.cpp should compute: the model itself, or for a quantised file the weights that it holds."""
    if kind != "f16":
        try:
            return load_model(str(file), torch.float32)
        except ValueError:  # an architecture that Transformers does not read from GGUF files
            pass
    return load_model(str(folder), torch.float32)


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--tools", default=cache_folder(), type=click.Path(path_type=Path), show_default="in the user's cache",
    help="Where llama.cpp's converter and libraries are; what is missing is installed there.",
)  # fmt: skip
@click.option(
    "--type", "kinds", multiple=True, type=click.Choice(list(FILE_TYPES)),
    help=f"File types.  [default: {', '.join(KINDS)}]",
)  # fmt: skip
@click.option("--rounds", default=3, type=click.IntRange(min=1), help="Timed runs of each file; the best counts.")
@click.option("--threads", default=os.cpu_count() or 1, type=click.IntRange(min=1))
@click.option(
    "--keep", "kept", type=click.Path(path_type=Path), help="Leave the GGUF files in this folder: MODEL-TYPE.gguf."
)
@click.option("--results", type=click.Path(path_type=Path), help="Keep the numbers in llama.jsonl in this folder.")
def main(
    models: tuple[str, ...],
    tools: Path,
    kinds: tuple[str, ...],
    rounds: int,
    threads: int,
    kept: Path | None,
    results: Path | None,
) -> None:
    """Convert MODELS, the dense one first, and run them in llama.cpp."""
    silence_libraries()
    console, kit = Console(highlight=False), Tools(tools.absolute())
    if kept is not None:
        if len({Path(name).absolute().name for name in models}) < len(models):
            sys.exit("--keep names files by their models' directories, and two of these have the same name")
        kept.mkdir(parents=True, exist_ok=True)
    try:
        kit.prepare(lambda line: console.print(line, soft_wrap=True))
        rows = measure(kit, models, kinds or KINDS, rounds, threads, kept)
    except ValueError as error:
        sys.exit(str(error))
    console.print(_table(rows))
    if results is not None:
        machine = describe() | {"threads": threads}
        console.print(
            records.keep(results / "llama.jsonl", [records.rounded(row) | {"machine": machine} for row in rows])
        )
    if any(row["gap"] is not None and row["gap"] > NEAR_TIE for row in rows):
        sys.exit("llama.cpp's greedy tokens are not Transformers'")


def _table(rows: list[Row]) -> Table:
    table = Table("model", *(Column(name, justify="right") for name in ("type", "MB", "decode/s", "read/s")), "tokens")
    for row in rows:
        table.add_row(
            row["model"], row["type"], f"{row['bytes'] / 1e6:.0f}",
            f"{row['decode']:.1f} ({row['decode_ratio']:.2f} x)", f"{row['read']:.0f} ({row['read_ratio']:.2f} x)",
            told(row["agree"], row["gap"]),
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
