"""``python -m thanos.bench_inference MODEL``: what the compact form of a pruned model saves, measured here and now.

MODEL is a pruned checkpoint (packed into a temporary directory), a compact one (unpacked into one), or
``random:tinyllama-1.1b``: the shapes of TinyLlama-1.1B with random bfloat16 weights, half of them zero. Dense and
compact take turns in one process, so that their ratio holds on a machine that is not idle; times are medians.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from thanos import compact
from thanos.checkpoint import load_model
from thanos.commands.cli import TRUST_OPTION, Command, start
from thanos.commands.quiet import silence_libraries
from thanos.compact import MANIFEST
from thanos_kernels import select_n_of_m

_RANDOM = "random:tinyllama-1.1b"
_TINYLLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class Measured:
    """One form of a model: bytes on disk and in memory, tokens per second."""

    file_bytes: int
    weight_bytes: int
    decode: float
    prompt: float


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def file_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a checkpoint and of the manifest."""
    return sum(path.stat().st_size for path in [*folder.glob("*.safetensors"), *folder.glob(MANIFEST)])


def random_tinyllama(**changes: int) -> Any:
    """A model of TinyLlama-1.1B's shapes, some ``changes`` apart, with the same random bfloat16 weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**_TINYLLAMA, **changes}, dtype="bfloat16"))
    finally:
        torch.set_default_dtype(default)


def random_checkpoint(folder: Path, pattern: str, **changes: int) -> None:
    """Write :func:`random_tinyllama` with half of each linear layer in the blocks zero."""
    model = random_tinyllama(**changes)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.data
            halved = pattern == "unstructured"
            mask = (
                torch.rand(weight.shape, dtype=torch.float32, device="cpu") < 0.5
                if halved
                else select_n_of_m(weight.float().abs(), 2, 4)
            )
            weight.masked_fill_(mask, 0)
    model.save_pretrained(folder)


def measure(
    dense: Any, sparse: Any, folders: tuple[Path, Path], prompt: int, tokens: int, repeats: int
) -> list[Measured]:
    """Measure both in turns: ``tokens`` decoded after a short prompt, and a prompt of ``prompt`` tokens."""
    device = next(dense.parameters()).device
    vocabulary = dense.config.get_text_config().vocab_size
    draw = torch.Generator("cpu").manual_seed(0)
    long = torch.randint(vocabulary, (1, prompt), generator=draw, dtype=torch.int64, device="cpu").to(device)
    models = (dense, sparse)
    decode: list[list[float]] = [[], []]
    prefill: list[list[float]] = [[], []]
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for i, model in enumerate(models):
                steps, once = timed_turn(model, long, tokens)
                if turn:  # the first turn warms up
                    decode[i] += steps
                    prefill[i].append(once)
    return [
        Measured(file_bytes(folder), weight_bytes(model), 1 / median(decode[i]), prompt / median(prefill[i]))
        for i, (model, folder) in enumerate(zip(models, folders, strict=True))
    ]


def timed_turn(model: Any, long: torch.Tensor, tokens: int) -> tuple[list[float], float]:
    """Seconds of each of ``tokens`` decoded after the first eight of a prompt (1, S), and of the whole prompt."""
    state = model(long[:, :8], use_cache=True)
    steps = _decode(model, state, tokens, long.device)
    return steps, _timed(lambda: model(long, use_cache=True), long.device)


def _decode(model: Any, state: Any, tokens: int, device: torch.device) -> list[float]:
    """Seconds of each of ``tokens`` greedy steps."""
    seconds = []
    for _ in range(tokens):
        token = state.logits[:, -1:].argmax(-1)
        held = state.past_key_values
        results: list[Any] = []

        def step(token: Any = token, held: Any = held, results: list[Any] = results) -> None:
            results.append(model(token, past_key_values=held, use_cache=True))

        seconds.append(_timed(step, device))
        state = results[0]
    return seconds


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def show(dense: Measured, sparse: Measured, prompt: int, title: str) -> Table:
    """The table of both, and their ratio."""
    table = Table(title=title)
    for heading in ("", "dense", "compact", "compact / dense"):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, field, scale, unit in (
        ("file size", "file_bytes", 1e6, "MB"),
        ("weights in memory", "weight_bytes", 1e6, "MB"),
        ("decoding, batch 1", "decode", 1, "tokens/s"),
        (f"prompt of {prompt} tokens", "prompt", 1, "tokens/s"),
    ):
        left, right = getattr(dense, field), getattr(sparse, field)
        table.add_row(label, f"{left / scale:,.1f} {unit}", f"{right / scale:,.1f} {unit}", f"{right / left:.2f}")
    return table


@click.command(name="python -m thanos.bench_inference", cls=Command)
@click.argument("model")
@click.option("--pattern", type=click.Choice(["2:4", "unstructured"]), default="2:4", help="Of a random model.")
@click.option("--prompt", type=click.IntRange(min=8), default=512, show_default=True, help="Tokens in the long prompt.")
@click.option("--tokens", type=click.IntRange(min=1), default=8, show_default=True, help="Tokens decoded in a turn.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Turns of each form.")
@click.option("--device", default="cpu", show_default=True)
@TRUST_OPTION
def main(
    model: str, pattern: str, prompt: int, tokens: int, repeats: int, device: str, trust_remote_code: bool
) -> None:
    """Compare MODEL, a pruned or compact checkpoint or random:tinyllama-1.1b, dense and compact."""
    silence_libraries()
    with tempfile.TemporaryDirectory(prefix="thanos-bench-") as scratch:
        dense_folder, compact_folder = Path(scratch) / "dense", Path(scratch) / "compact"
        if model == _RANDOM:
            random_checkpoint(dense_folder, pattern)
            gc.collect()
        elif (Path(model) / MANIFEST).is_file():
            compact.unpack(model, dense_folder)
            compact_folder = Path(model)
        else:
            dense_folder = Path(model)
        if compact_folder != Path(model):
            compact.pack(dense_folder, compact_folder, trust_remote_code=trust_remote_code)
        dense = load_model(str(dense_folder), device=device, trust_remote_code=trust_remote_code)
        sparse = compact.load(compact_folder, device=device, trust_remote_code=trust_remote_code)
        results = measure(dense, sparse, (dense_folder, compact_folder), prompt, tokens, repeats)
    title = f"{model} ({str(dense.dtype).removeprefix('torch.')}, {device}, {torch.get_num_threads()} threads)"
    Console(width=100).print(show(results[0], results[1], prompt, title))


if __name__ == "__main__":
    start(main)
