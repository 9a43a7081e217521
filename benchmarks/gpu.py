"""``python -m benchmarks.gpu``: the layer and model benchmarks on a GPU, written as JSON with the device's name.

Each layer is pruned by every method, in this engine, on the same data, so that the numbers of one file compare. One GE
is a dense float32 product of the layer's size, in the same run. The model's weights are random: its time does not
depend on them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.ge import layer
from thanos import prune_weight
from thanos.doctor import machine

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
_RUNS = 5


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(function: Any, device: torch.device, runs: int = _RUNS) -> float:
    """The median of ``runs`` calls after one that compiles and tunes."""
    times = []
    for _ in range(runs + 1):
        _wait(device)
        begin = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[runs // 2]


def prune_layers(sizes: list[tuple[int, int]], device: torch.device, runs: int = _RUNS) -> list[dict[str, Any]]:
    """Every method on random layers of these sizes (c, b)."""
    results = []
    for rows, columns in sizes:
        weight, hessian = (tensor.to(device) for tensor in layer(rows, columns))
        product = median_seconds(lambda w=weight, h=hessian: w @ h, device, runs)
        for method, pattern in CASES:
            found: dict[str, Any] = {}

            def prune(w: torch.Tensor = weight, h: torch.Tensor = hessian) -> None:
                found["result"] = prune_weight(w, h, pattern, method=method)  # noqa: B023

            seconds = median_seconds(prune, device, runs)
            results.append(
                {
                    "rows": rows,
                    "columns": columns,
                    "method": method,
                    "pattern": pattern,
                    "seconds": seconds,
                    "ge": seconds / product,
                    "loss": found["result"].loss,
                    "steps": found["result"].seconds,
                }
            )
    return results


def prune_a_model(blocks: int, device: torch.device) -> list[dict[str, Any]]:
    """Random Llama models with the widths of LLaMA-3 8B, 32 samples of 2048 tokens, by Thanos and by SparseGPT."""
    import transformers

    from thanos import prune_model

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000,
    )  # fmt: skip
    samples = torch.randint(0, 32000, (32, 2048), generator=torch.Generator().manual_seed(0))
    results = []
    for method in ("thanos", "sparsegpt"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
        _wait(device)
        begin = time.perf_counter()
        prune_model(model, samples, "0.5", method=method)
        _wait(device)
        results.append({"blocks": blocks, "method": method, "pattern": "0.5", "seconds": time.perf_counter() - begin})
    return results


@click.command(help=__doc__)
@click.option(
    "--output",
    default=Path(__file__).parent / "results" / "gpu.json",
    show_default="benchmarks/results/gpu.json",
    type=click.Path(dir_okay=False, path_type=Path),
)
@click.option("--blocks", default=4, show_default=True, help="Decoder blocks of the model; 0 leaves it out.")
def main(output: Path, blocks: int) -> None:
    if not torch.cuda.is_available():
        sys.exit("bench-gpu needs a CUDA or ROCm device, and PyTorch sees none here; `make bench` measures the CPU.")
    device = torch.device("cuda")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "machine": machine()}
    report["layers"] = prune_layers([(4096, 4096), (14336, 4096), (4096, 14336)], device)
    report["models"] = prune_a_model(blocks, device) if blocks else []
    output.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(f"{report['device']}: written to {output}")


if __name__ == "__main__":
    main()
