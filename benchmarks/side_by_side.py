"""One model dense, compact and in llama.cpp, in turns: ``python -m benchmarks.side_by_side``.

The model has TinyLlama-1.1B's shapes and random weights, half of them zero where it is compact. Every turn of every
form is a process of its own, so that its memory is its own; forms take turns, so that ratios hold on a machine that is
not idle. Needs Node for llama.cpp, see :mod:`benchmarks.llama_tools`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import click
import torch
from rich.console import Console
from rich.table import Column, Table

from benchmarks import records
from benchmarks.llama_cpp import PROMPT, named_model
from benchmarks.llama_tools import PROMPT_TOKENS, Tools, cache_folder, convert, quantise, run_file
from benchmarks.machine import describe
from benchmarks.records import Row
from thanos import pack
from thanos.bench_inference import file_bytes, random_checkpoint, timed_turn
from thanos.checkpoint import load_tokenizer
from thanos.commands.quiet import silence_libraries

_MODEL = "random:tinyllama-1.1b"
_COMPACT = {"2:4": "2:4", "50%": "unstructured"}
_VALUES = {"bfloat16": "plain", "int8": "int8"}
_TYPES = ("Q8_0", "Q4_K_M", "Q3_K_M")
_TOKENS = 16  # decoded in a turn


def once(folder: Path) -> Row:
    """One turn of a model that Transformers runs, in this process: milliseconds a step, and the bytes it grew by."""
    from transformers import AutoModelForCausalLM

    before = resident()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    draw = torch.Generator("cpu").manual_seed(0)
    long = torch.randint(model.config.vocab_size, (1, PROMPT_TOKENS), generator=draw)
    with torch.inference_mode():
        timed_turn(model, long, 2)  # warms up
        steps, read = timed_turn(model, long, _TOKENS)
    return {"decode": [1000 * median(steps)], "read": [1000 * read], "resident": resident() - before}


def resident() -> int:
    """Bytes of this process that are in memory, those of files that it reads from included; Linux."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])


def measure(kit: Tools, rounds: int, threads: int) -> list[Row]:
    """A row for each form: bytes, and of all turns the median of what was taken."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        dense = named_model(_MODEL, scratch)
        tokenizer = load_tokenizer(str(dense))
        prompt = tokenizer(PROMPT)["input_ids"]
        files = {"dense bfloat16": dense}
        for pattern, kind in _COMPACT.items():
            pruned = scratch / kind.replace(":", "-")
            random_checkpoint(pruned, kind, vocab_size=len(tokenizer))
            for values, how in _VALUES.items():
                files[f"{pattern} {values}"] = scratch / f"{pruned.name}-{values}"
                pack(pruned, files[f"{pattern} {values}"], values=how)
        base = scratch / "f16.gguf"
        convert(kit, dense, base)
        for kind in _TYPES:
            files[f"llama.cpp {kind}"] = scratch / f"{kind}.gguf"
            quantise(kit, base, files[f"llama.cpp {kind}"], kind)
        base.unlink()
        turns = [{form: _turn(kit, file, prompt, threads) for form, file in files.items()} for _ in range(rounds)]
        return [_row(form, file, [turn[form] for turn in turns]) for form, file in files.items()]


def _turn(kit: Tools, file: Path, prompt: list[int], threads: int) -> Row:
    if file.is_file():
        return run_file(kit, file, prompt, 1, threads)
    command = [sys.executable, "-m", "benchmarks.side_by_side", "--once", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        raise ValueError(f"{file.name} does not run: {run.stderr.strip()[-300:]}")
    found: Row = json.loads(run.stdout.splitlines()[-1])
    return found


def _row(form: str, file: Path, turns: list[Row]) -> Row:
    return {
        "name": form,
        "bytes": file.stat().st_size if file.is_file() else file_bytes(file),
        "resident": median(turn["resident"] for turn in turns),
        "decode": 1000 / median(value for turn in turns for value in turn["decode"]),
        "read": PROMPT_TOKENS * 1000 / median(value for turn in turns for value in turn["read"]),
        "turns": len(turns),
    }


@click.command()
@click.option(
    "--tools", default=cache_folder(), type=click.Path(path_type=Path), show_default="in the user's cache",
    help="Where llama.cpp's converter and libraries are; what is missing is installed there.",
)  # fmt: skip
@click.option("--rounds", default=3, type=click.IntRange(min=1), help="Turns of each form.")
@click.option("--threads", default=os.cpu_count() or 1, type=click.IntRange(min=1))
@click.option("--results", type=click.Path(path_type=Path), help="Keep the numbers in side.jsonl in this folder.")
@click.option("--once", "alone", hidden=True, type=click.Path(path_type=Path))
def main(tools: Path, rounds: int, threads: int, results: Path | None, alone: Path | None) -> None:
    """Compare the forms of a model of TinyLlama-1.1B's shapes."""
    silence_libraries()
    if alone is not None:
        print(json.dumps(once(alone)))
        return
    console, kit = Console(highlight=False), Tools(tools.absolute())
    try:
        kit.prepare(lambda line: console.print(line, soft_wrap=True))
        rows = measure(kit, rounds, threads)
    except ValueError as error:
        sys.exit(str(error))
    table = Table("form", *(Column(name, justify="right") for name in ("MB", "resident MB", "decode/s", "read/s")))
    for row in rows:
        sizes = (f"{row[key] / 1e6:,.0f}" for key in ("bytes", "resident"))
        table.add_row(row["name"], *sizes, f"{row['decode']:.1f}", f"{row['read']:.0f}")
    console.print(table)
    if results is not None:
        machine = describe() | {"threads": threads}
        kept = [records.rounded(row) | {"machine": machine} for row in rows]
        console.print(records.keep(results / "side.jsonl", kept))


if __name__ == "__main__":
    main()
