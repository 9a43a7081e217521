"""Models larger than this machine would like: ``python -m benchmarks.large``.

``experts`` prunes one block of Qwen3-30B-A3B's shapes, ``stream`` a model of TinyLlama-1.1B's shapes from its files
and in memory, ``processes`` SmolLM2-135M by one process and by two. Weights are random but in the last. Each command is
a process of its own whose memory and time are looked at from outside.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import safe_open

from benchmarks import records
from benchmarks.ge import unit_seconds
from benchmarks.machine import describe
from benchmarks.memory import peak_bytes
from benchmarks.records import Row
from benchmarks.smollm2 import load_smollm2
from thanos import prune_model
from thanos.bench_inference import random_tinyllama
from thanos.checkpoint import save_model
from thanos.commands.quiet import silence_libraries

_ROOT = Path(__file__).parents[1]
_DATA = _ROOT.parent / "shared" / "data"
_INTERVAL = 0.05  # seconds between two looks at a process
GIB = 2**30


def own_bytes(process: int) -> int:
    """Anonymous memory of a process and of those that it started, in bytes; 0 once it has ended."""
    total = 0
    with suppress(FileNotFoundError, ProcessLookupError):
        known = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
        total = 1024 * int(known[1]) if known else 0
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            total += own_bytes(int(child))
    return total


def run(arguments: list[str], output: Path, *, processes: int = 1, group: Path | None = None) -> Row:
    """Prune by the command in processes of one thread: seconds by the clock and of processors, of the walk, peak bytes.

    Args:
        group: a control group that the process joins.

    Raises:
        RuntimeError: the command failed.
    """
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}

    def join() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    with tempfile.TemporaryFile("w+") as said:
        begin, peak, before = time.perf_counter(), 0, resource.getrusage(resource.RUSAGE_CHILDREN)
        child = subprocess.Popen(
            [*start, "thanos.prune", *arguments, "--output", str(output)],
            env=environment, cwd=_ROOT, stdout=said, stderr=said, preexec_fn=join,
        )  # fmt: skip
        while child.poll() is None:
            peak = max(peak, own_bytes(child.pid))
            time.sleep(_INTERVAL)
        seconds = time.perf_counter() - begin
        if child.returncode:
            said.seek(0)
            raise RuntimeError(said.read()[-2000:])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    report = json.loads((output / "pruning.json").read_text(encoding="utf-8"))
    return {"seconds": seconds, "walk": report["seconds"]["total"], "processor": processor, "peak": peak}


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A control group of so many bytes of memory, files read and written included.

    Raises:
        OSError: none can be made here.
    """
    first = Path("/sys/fs/cgroup/memory")  # of the first version of control groups
    group = (first if first.exists() else first.parent) / f"thanos-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first.exists() else "memory.max")).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def agreement(one: Path, other: Path) -> float:
    """The share of the weights that are zero in both checkpoints, or in neither."""
    same = total = 0
    with safe_open(one / "model.safetensors", "pt") as mine, safe_open(other / "model.safetensors", "pt") as theirs:
        for name in mine.keys():  # noqa: SIM118
            tensor = mine.get_tensor(name)
            if tensor.dim() == 2:
                same += int((tensor.eq(0) == theirs.get_tensor(name).eq(0)).sum())
                total += tensor.numel()
    return same / total


def experts_block(samples: int, length: int, experts: int, memory: float) -> Row:
    """Prune one block of Qwen3-30B-A3B's shapes at 50%: bytes beside its weights, seconds, and GE of the walk.

    Args:
        memory: the walk's memory limit in GiB.
    """
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=2048, moe_intermediate_size=768, num_experts=experts, num_experts_per_tok=8,
        num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=4, head_dim=128, norm_topk_prob=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokens = torch.randint(4096, (samples, length), generator=torch.Generator().manual_seed(0))
    reports: list[Any] = []
    limit, begin = int(memory * GIB), time.perf_counter()
    peak = peak_bytes(lambda: reports.append(prune_model(model, tokens, "0.5", memory_limit=limit)), interval=0.02)
    seconds, found = time.perf_counter() - begin, reports[0]
    shapes = {layer.shape for layer in found.layers}
    units = {shape: unit_seconds(torch.randn(shape), torch.randn(shape[1], shape[1])) for shape in shapes}
    unit = sum(units[layer.shape] for layer in found.layers)
    steps: dict[str, float] = {}
    for name, one in chain.from_iterable(layer.seconds.items() for layer in found.layers):
        steps[name] = steps.get(name, 0.0) + one
    return {
        "kind": "experts", "name": f"experts {experts}", "experts": experts, "samples": samples, "length": length,
        "memory_limit": memory,
        "weights": sum(layer.shape[0] * layer.shape[1] for layer in found.layers), "peak": peak, "seconds": seconds,
        "walk_ge": found.seconds["total"] / unit, "prune_ge": found.seconds["prune"] / unit, "ge_seconds": unit,
        "steps": steps, "fewest_tokens": min(layer.tokens for layer in found.layers),
    }  # fmt: skip


def _tokenizer(text: Path) -> Any:
    """One of at most 32,000 tokens, as many as TinyLlama's, trained on a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train([str(text)], trainers.BpeTrainer(vocab_size=32000, special_tokens=["<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def streamed(calibration: Path, limit: float) -> Row:
    """TinyLlama-1.1B's shapes in bfloat16, 16 samples of 256 tokens: in memory, from files, and from files in a limit.

    The third run is in a control group of ``limit`` GiB, where one can be made.
    """
    with tempfile.TemporaryDirectory() as folder:
        dense, out = Path(folder) / "dense", Path(folder) / "out"
        save_model(random_tinyllama(), _tokenizer(calibration), dense)
        common = [str(dense), "--calibration", str(calibration), "--samples", "16", "--sequence-length", "256"]
        found = {}
        for name, stream in (("memory", "no"), ("files", "yes")):
            found[name] = run([*common, "--pattern", "0.5", "--stream", stream], out / name)
        try:
            with control_group(int(limit * GIB)) as group:
                arguments = [*common, "--pattern", "0.5", "--stream", "yes"]
                found["limited"] = run(arguments, out / "limited", group=group)
        except (OSError, RuntimeError) as error:
            click.echo(error, err=True)
            found["limited"] = dict.fromkeys(found["files"])
        same = (out / "memory/model.safetensors").exists() and all(
            path.read_bytes() == (out / "files" / path.name).read_bytes()
            for path in sorted((out / "memory").glob("*.safetensors"))
        )
    if not same:
        raise RuntimeError("the streamed run gave other bytes")
    ratio = found["files"]["processor"] / found["memory"]["processor"]
    return {
        "kind": "stream", "name": "stream", "limit": limit, "ratio": ratio,
        **{f"{name}_{key}": value for name, one in found.items() for key, value in one.items()},
    }  # fmt: skip


def processes(calibration: Path) -> Row:
    """SmolLM2-135M at 50% by one process of one thread and by two, 32 x 512 tokens, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        save_model(*load_smollm2(torch.float32), dense)
        common = [str(dense), "--calibration", str(calibration), "--samples", "32", "--sequence-length", "512"]
        found = [run([*common, "--pattern", "0.5"], Path(folder) / str(n), processes=n) for n in (1, 2)]
        same = agreement(Path(folder) / "1", Path(folder) / "2")
    one, two = found
    return {
        "kind": "processes", "name": "processes", "agreement": same, "walk_ratio": one["walk"] / two["walk"],
        "ratio": one["seconds"] / two["seconds"], "one": one["seconds"], "two": two["seconds"],
        "one_walk": one["walk"], "two_walk": two["walk"],
    }  # fmt: skip


@click.command(context_settings={"show_default": True})
@click.argument("names", nargs=-1, type=click.Choice(["experts", "stream", "processes"]))
@click.option("--calibration", type=click.Path(path_type=Path), default=_DATA / "c4-sample.jsonl", help="A text.")
@click.option("--limit", default=1.2, help="GiB of the control group of 'stream'.")
@click.option("--samples", default=32, help="Of 512 tokens, for 'experts'.")
@click.option("--experts", default=128, help="How many the block of 'experts' has.")
@click.option("--memory-limit", "memory", default=3.0, help="GiB for the activations and Hessians of 'experts'.")
@click.option("--results", type=click.Path(path_type=Path), help="Keep the numbers in large.jsonl in this folder.")
def main(
    names: tuple[str, ...],
    calibration: Path,
    limit: float,
    samples: int,
    experts: int,
    memory: float,
    results: Path | None,
) -> None:
    """Measure NAMES, all unless some are given."""
    silence_libraries()
    made: dict[str, Callable[[], Row]] = {
        "experts": lambda: experts_block(samples, 512, experts, memory),
        "stream": lambda: streamed(calibration, limit),
        "processes": lambda: processes(calibration),
    }
    for name in names or tuple(made):
        row = records.rounded(made[name]())
        click.echo(json.dumps(row))
        if results is not None:
            records.keep(results / "large.jsonl", [row | {"machine": describe()}])


if __name__ == "__main__":
    main()
