"""What configuration and shapes tell is refused before the weights are read, on the real model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.mixtures import tiny_mixture
from thanos import checkpoint
from thanos.commands.first import refuse_by_files
from thanos.compact import MANIFEST
from thanos.options import WalkOptions
from thanos.prune import main

LIMIT = 10.0  # seconds

REFUSED = {
    "width": (["--pattern", "3:7"], "layers.0.self_attn.q_proj: pattern 3:7 needs a width that 7 divides, not 576"),
    "rows": (["--outlier-fraction", "0.9999"], "makes each of the layer's 576 rows an outlier"),
    "exclude": (["--exclude", "."], "leaves no layer to prune"),
    "length": (["--sequence-length", "99999"], "is longer than the"),
}


@pytest.fixture
def model() -> str:
    from benchmarks.smollm2 import model_file

    try:
        return model_file()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_come_before_the_weights(
    case: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        pytest.fail("the weights were read")

    monkeypatch.setattr(checkpoint, "load_model", read)
    given, reason = REFUSED[case]
    begin = time.process_time()
    result = CliRunner().invoke(
        main, [model, "--output", str(tmp_path / "out"), "--calibration", "builtin", "--evaluate", "builtin", *given]
    )
    assert result.exit_code == 1, result.output
    assert reason in " ".join(result.stderr.split())
    assert time.process_time() - begin < LIMIT
    assert not (tmp_path / "out").exists()


_WITHOUT = """
import sys
from thanos.prune import main
for given in ("--pattern 3:7", "--sequence-length 99999", "--outlier-fraction 0.9999"):
    try:
        main([sys.argv[1], "--output", sys.argv[2], "--calibration", "builtin", *given.split()])
    except SystemExit as end:
        assert end.code == 1
assert not {"transformers", "datasets"} & set(sys.modules)
"""


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_what_the_files_tell_is_refused_without_transformers(
    family: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    """Importing it takes longer than all else; of GPT-2, the longest sequence follows from its class alone."""
    make = tiny_mixture if family == "mixtral" else tiny_model
    make(family).save_pretrained(tmp_path / "model")
    if family == "gpt2":
        changed(tmp_path / "model", max_position_embeddings=64, rope_theta=1.0)
    command = [sys.executable, "-c", _WITHOUT, str(tmp_path / "model"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 3
    for line, reason in zip(said, ("3:7 needs a width that 7 divides", "longer than the", "an outlier"), strict=True):
        assert reason in line
    assert not (tmp_path / "out").exists()


def test_files_refuse_only_what_cannot_be_right(model_folder: Path) -> None:
    def job(**options: Any) -> WalkOptions:
        return WalkOptions.of(options.pop("pattern", "3:6"), **options)

    refuse_by_files(str(model_folder), job(), None)  # 48 columns fit, and these may be all that is pruned
    refuse_by_files(str(model_folder / "config.json"), job(pattern="3:7"), 99999)  # no directory
    refuse_by_files(str(model_folder), job(), 64)
    with pytest.raises(ValueError, match="longer than the 64 tokens"):
        refuse_by_files(str(model_folder), job(), 65)
    with pytest.raises(ValueError, match=r"self_attn\.\w+: pattern 3:6"):
        refuse_by_files(str(model_folder), job(exclude="mlp"), None)
    changed(model_folder, quantization_config={"quant_method": "gptq", "bits": 4})  # its matrices have other shapes
    refuse_by_files(str(model_folder), job(pattern="3:7"), None)
    (model_folder / "model.safetensors").write_bytes(b"damaged")
    changed(model_folder, quantization_config=None)
    refuse_by_files(str(model_folder), job(pattern="3:7"), None)


def refused(folder: Path, reason: str, monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: pytest.fail("the weights were read"))
    text = folder.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    arguments = [str(folder), "--output", str(folder.parent / "out"), "--calibration", str(text), *given]
    result = CliRunner().invoke(main, [*arguments, "--samples", "2", "--sequence-length", "16"])
    assert result.exit_code == 1, result.output
    assert reason in " ".join(result.stderr.split())
    assert not (folder.parent / "out").exists()


def changed(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_packed_weights_are_refused_before_they_are_read(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(model_folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(model_folder, "holds quantised weights (gptq)", monkeypatch)


def test_a_compact_checkpoint_is_refused(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model_folder / MANIFEST).write_text("{}")
    refused(model_folder, "thanos.unpack", monkeypatch)


def test_tokens_beyond_the_vocabulary_are_refused(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(model_folder, vocab_size=4)
    refused(model_folder, "the model's vocabulary has 4", monkeypatch)


def test_rows_that_would_all_be_outliers_are_refused(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(model_folder, "each of the layer's 16 rows an outlier", monkeypatch, "--outlier-fraction", "0.96")


def test_a_backend_that_cannot_run_here_is_refused(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(model_folder, "backend='triton' runs on CUDA and ROCm tensors", monkeypatch, "--backend", "triton")
