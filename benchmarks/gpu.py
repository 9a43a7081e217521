"""``python -m benchmarks.gpu``: the layer and model benchmarks on a GPU, written with the device's name.

Each layer is pruned by every method, in this engine, on the same data, so that the numbers of one file compare. One GE
is a dense float32 product of the layer's size, in the same run. The model's weights are random: its time does not
depend on them.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks.clock import in_turns, seconds_of, waited
from benchmarks.ge import layer
from benchmarks.machine import describe
from benchmarks.records import Row, keep
from thanos import prune_model, prune_weight

CASES = [
    ("thanos", "0.5"),
    ("thanos", "2:4"),
    ("thanos", "structured:0.3"),
    ("sparsegpt", "0.5"),
    ("sparsegpt", "2:4"),
    ("wanda", "0.5"),
    ("wanda", "2:4"),
    ("magnitude", "0.5"),
]


def prune_layers(sizes: list[tuple[int, int]], device: torch.device, runs: int = 5) -> list[Row]:
    """Every method on random layers of these sizes (c, b); medians of ``runs`` after one that compiles and tunes."""
    results = []
    for rows, columns in sizes:
        weight, hessian = (tensor.to(device) for tensor in layer(rows, columns))
        [product] = in_turns([waited(partial(torch.matmul, weight, hessian), device.type)], runs)
        for method, pattern in CASES:
            prune = partial(prune_weight, weight, hessian, pattern, method=method)
            [seconds] = in_turns([waited(prune, device.type)], runs)
            result, shape = prune(), {"rows": rows, "columns": columns}
            results.append(
                {"name": f"{rows} x {columns} {method} {pattern}", "kind": "layer", **shape, "method": method,
                 "pattern": pattern, "seconds": seconds, "ge": seconds / product, "loss": result.loss,
                 "steps": result.seconds}
            )  # fmt: skip
    return results


def prune_a_model(blocks: int, device: torch.device) -> list[Row]:
    """Random Llama models with the widths of LLaMA-3 8B, 32 samples of 2048 tokens, by Thanos and by SparseGPT."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000,
    )  # fmt: skip
    samples = torch.randint(0, 32000, (32, 2048), generator=torch.Generator().manual_seed(0))
    results = []
    for method in ("thanos", "sparsegpt"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
        waited(lambda: None, device.type)()
        seconds = seconds_of(waited(partial(prune_model, model, samples, "0.5", method=method), device.type))
        name = f"{blocks} blocks {method} 0.5"
        results.append({"name": name, "kind": "model", "blocks": blocks, "method": method, "pattern": "0.5",
                        "seconds": seconds})  # fmt: skip
    return results


@click.command(help=__doc__)
@click.option(
    "--output",
    default=Path(__file__).parent / "results" / "gpu.jsonl",
    show_default="benchmarks/results/gpu.jsonl",
    type=click.Path(dir_okay=False, path_type=Path),
)
@click.option("--blocks", default=4, show_default=True, help="Decoder blocks of the model; 0 leaves it out.")
def main(output: Path, blocks: int) -> None:
    if not torch.cuda.is_available():
        sys.exit("bench-gpu needs a CUDA or ROCm device, and PyTorch sees none here; `make bench` measures the CPU.")
    device, machine = torch.device("cuda"), describe()
    rows = prune_layers([(4096, 4096), (14336, 4096), (4096, 14336)], device)
    rows += prune_a_model(blocks, device) if blocks else []
    path = keep(output, [{**row, "machine": machine} for row in rows])
    click.echo(f"{machine['gpu']}: written to {path}")


if __name__ == "__main__":
    main()
