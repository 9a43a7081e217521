"""``python -m thanos.prune`` from end to end, and every refusal: one line, nothing written."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result

from thanos.prune import main

WORDS = "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{WORDS * 3}{number}"}) + "\n" for number in range(60)))
    return path


def prune(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_model_is_pruned_from_end_to_end(model_folder: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "pruned"
    result = prune(
        model_folder, "--output", output, "--pattern", "2:4", "--calibration", text, "--samples", 6,
        "--sequence-length", 32, "--evaluate", text, "--seed", 5, "--dtype", "bfloat16", "--exclude", "o_proj",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stderr == ""

    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert model.generate(tokenizer("the quick", return_tensors="pt").input_ids, max_new_tokens=4).shape[1] > 2

    report = json.loads((output / "pruning.json").read_text())
    assert report["method"] == "thanos"
    assert report["pattern"] == "2:4"
    assert report["nominal_sparsity"] == 0.5
    assert report["calibration"] == {
        "source": str(text),
        "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "seed": 5,
        "samples": 6,
        "sequence_length": 32,
        "bos": False,
    }
    assert {"torch", "transformers", "python"} <= report["versions"].keys()
    assert report["perplexity"]["dense"] > 1
    assert report["perplexity"]["pruned"] > 1
    assert len(report["layers"]) == 18
    weights = dict(model.named_parameters())
    pruned = 0
    for layer in report["layers"]:
        weight = weights[f"{layer['name']}.weight"]
        assert list(weight.shape) == layer["shape"]
        assert bool(((weight.unflatten(1, (-1, 4)) == 0).sum(-1) >= 2).all())
        assert layer["sparsity"] == 0.5
        assert 0 < layer["relative_loss"] < 1
        assert layer["loss"] > 0
        assert layer["damping"] == 0.01
        assert {"hessian", "factor", "select", "solve", "update"} <= layer["seconds"].keys()
        pruned += weight.numel() // 2
    total = sum(weight.numel() for name, weight in weights.items() if "proj" in name)
    assert report["effective_sparsity"] == pytest.approx(pruned / total)
    assert report["excluded"] == [f"model.layers.{index}.self_attn.o_proj" for index in range(3)]


def test_sequence_length_is_capped_by_default_only(model_folder: Path, text: Path, tmp_path: Path) -> None:
    arguments = [model_folder, "--calibration", text, "--samples", 4, "--method", "magnitude"]
    assert prune(*arguments, "--output", tmp_path / "one").exit_code == 0
    report = json.loads((tmp_path / "one" / "pruning.json").read_text())
    assert report["calibration"]["sequence_length"] == 64
    refused(*arguments, "--output", tmp_path / "two", "--sequence-length", 65, match="longer than the 64 tokens")


def test_sequences_start_as_the_tokenizer_starts_them(
    model_folder: Path, text: Path, bos_tokenizer: Any, tmp_path: Path
) -> None:
    bos_tokenizer.save_pretrained(model_folder)
    arguments = [model_folder, "--calibration", text, "--samples", 4, "--method", "wanda", "--evaluate", text]
    reports = {}
    for bos in ("auto", "no"):
        result = prune(*arguments, "--output", tmp_path / bos, "--bos", bos, "--windows", 2)
        assert result.exit_code == 0, result.output
        reports[bos] = json.loads((tmp_path / bos / "pruning.json").read_text())
        assert reports[bos]["perplexity"]["windows"] == 2
        assert reports[bos]["perplexity"]["bos"] is reports[bos]["calibration"]["bos"] is (bos == "auto")
    assert reports["auto"]["perplexity"]["dense"] != reports["no"]["perplexity"]["dense"]
    assert reports["auto"]["layers"][0]["loss"] != reports["no"]["layers"][0]["loss"]


def test_texts_are_taken_from_the_field_asked_for(model_folder: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text().replace('"text"', '"body"'))
    hashes = []
    for path, field in ((text, []), (other, ["--text-field", "body"])):
        arguments = [
            "--output",
            tmp_path / path.stem,
            "--calibration",
            path,
            "--evaluate",
            path,
            "--samples",
            2,
            *field,
        ]
        result = prune(model_folder, *arguments, "--method", "magnitude")
        assert result.exit_code == 0, result.output
        hashes.append(json.loads((tmp_path / path.stem / "pruning.json").read_text())["perplexity"]["dense"])
    assert hashes[0] == hashes[1]
    refused(model_folder, "--output", tmp_path / "out", "--calibration", other, match="name one with --text-field")


def test_the_same_seed_gives_the_same_model(model_folder: Path, text: Path, tmp_path: Path) -> None:
    hashes = []
    for name in ("one", "two"):
        torch.manual_seed(len(name))
        prune(model_folder, "--output", tmp_path / name, "--calibration", text, "--samples", 4)
        hashes.append(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]


def refused(*arguments: object, match: str) -> None:
    result = prune(*arguments)
    assert result.exit_code not in (0, None)
    assert match in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--pattern", "1.5"], "pattern"),
        (["--pattern", "4:2"], "n:m"),
        (["--pattern", "nonsense"], "none of 0.5, 50%, 2:4"),
        (["--pattern", "7:13"], "model.layers.0.mlp.down_proj: pattern 7:13 needs a width"),
        (["--pattern", "structured:0.6", "--outlier-fraction", "0.5"], "must not exceed 1"),
        (["--outlier-fraction", "1"], "--outlier-fraction"),
        (["--method", "nosuch"], "--method"),
        (["--block-size", "0"], "--block-size"),
        (["--pattern", "2:4", "--block-size", "6"], "multiple of 4"),
        (["--damping", "-1"], "--damping"),
        (["--damping", "nan"], "--damping"),
        (["--passes", "3"], "--passes"),
        (["--exclude", "("], "--exclude"),
        (["--exclude", "."], "leaves no layer"),
        (["--device", "nosuch"], "--device"),
        (["--device", "meta"], "--device"),
        (["--dtype", "int8"], "--dtype"),
        (["--calibration", "/nowhere.txt"], "neither one of c4, wikitext2, builtin nor a file"),
        (["--evaluate", "/nowhere.txt"], "--evaluate"),
        (["--samples", "100000"], "take fewer or shorter samples"),
        (["--samples", "0"], "--samples"),
        (["--nosuch"], "--nosuch"),
    ],
)
def test_bad_options_are_refused(
    model_folder: Path, text: Path, tmp_path: Path, options: list[str], match: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    refused(model_folder, "--output", tmp_path / "out", "--calibration", text, "--samples", 2, *options, match=match)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_models_and_outputs_are_refused(model_folder: Path, text: Path, tmp_path: Path) -> None:
    rest = ["--calibration", text, "--samples", 2]
    refused(tmp_path / "none", "--output", tmp_path / "out", *rest, match="no model directory")
    refused(model_folder, "--output", text, *rest, match="exists")
    refused(model_folder, "--output", model_folder, "--overwrite", *rest, match="is the model itself")
    refused(model_folder, "--output", text / "below", *rest, match="cannot write")
    refused(model_folder, *rest, match="--output")
    empty = tmp_path / "empty.txt"
    empty.touch()
    refused(model_folder, "--output", tmp_path / "out", "--calibration", empty, match="holds no text")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(model_folder)
    refused(model_folder, "--output", tmp_path / "out", *rest, match="layers.1.mlp.up_proj: its weights hold NaN")
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_error_itself(model_folder: Path, text: Path, tmp_path: Path) -> None:
    result = prune(model_folder, "--output", tmp_path / "out", "--calibration", text, "--samples", 10**6, "--debug")
    assert isinstance(result.exception, ValueError)


def test_interruption_leaves_nothing(
    model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("thanos.walk.walk.Walk.prune_block", interrupt)
    before = sorted(tmp_path.iterdir())
    result = prune(model_folder, "--output", tmp_path / "out", "--calibration", text, "--samples", 2)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_the_module_runs_as_a_command(model_folder: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thanos.prune", str(model_folder), "--output", str(tmp_path / "out")]
    run = subprocess.run(
        [*command, "--calibration", str(text), "--samples", "2", "--method", "wanda"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert [line.split(":")[0] for line in run.stdout.splitlines() if line.startswith("block")] == [
        f"block {number}/3" for number in (1, 2, 3)
    ]
    assert (tmp_path / "out" / "pruning.json").exists()
    run = subprocess.run([*command, "--pattern", "2"], capture_output=True, text=True)
    assert run.returncode != 0
    assert run.stderr.count("\n") == 1
