"""``python -m thanos.recover`` from end to end, and every refusal: one line, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result

from thanos.commands.recover import main
from thanos.prune import main as prune

pytest.importorskip("accelerate")

WORDS = "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{WORDS * 3}{number}"}) + "\n" for number in range(60)))
    return path


@pytest.fixture
def pruned(model_folder: Path, text: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "pruned"
    arguments = [model_folder, "--output", folder, "--pattern", "2:4", "--calibration", text, "--samples", 6]
    given = [str(one) for one in (*arguments, "--sequence-length", 32, "--dtype", "bfloat16")]
    result = CliRunner().invoke(prune, given)
    assert result.exit_code == 0, result.output
    return folder


def recover(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: one.detach() for name, one in model.named_parameters()}


def test_a_model_is_trained_from_end_to_end(pruned: Path, model_folder: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "trained"
    result = recover(
        pruned, "--output", output, "--teacher", model_folder, "--train", text, "--sequence-length", 32,
        "--steps", 12, "--learning-rate", 3e-3, "--batch-size", 3, "--evaluate", text, "--pattern", "2:4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert not (tmp_path / "trained.partial").exists()
    before, after = weights(pruned), weights(output)
    record = json.loads((output / "pruning.json").read_text())
    for layer in record["layers"]:
        old, new = before[f"{layer['name']}.weight"], after[f"{layer['name']}.weight"]
        assert new.dtype == torch.bfloat16
        assert torch.equal(old == 0, new == 0)
        assert not torch.equal(old, new)
        assert layer["zeros"] == int((new == 0).sum())
        assert layer["relative_loss"] > 0, "what the pruning wrote is still there"
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    (recovery,) = record["recovery"]
    assert recovery["perplexity"]["after"] < recovery["perplexity"]["before"]
    assert [point["step"] for point in recovery["curve"]][::6] == [0, 12]
    assert recovery["options"]["learning_rate"] == 3e-3
    assert recovery["seconds"] > 0
    assert recovery["tokens"] == 12 * 3 * 32
    assert f"gone through {12 * 3 * 0.75 / recovery['text']['samples']:.1f} times" in result.output
    assert "--pattern 2:4" in recovery["command"]
    assert "--learning-rate 0.003" in recovery["command"]
    page, card = (output / "report.html").read_text(), (output / "README.md").read_text()
    assert "Loss on text held out" in page
    assert "Trained afterwards" in card
    assert "no training followed" not in card
    assert "python -m thanos.recover" in card

    again = tmp_path / "again"
    result = recover(output, "--output", again, "--train", text, "--sequence-length", 32, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert len(json.loads((again / "pruning.json").read_text())["recovery"]) == 2


def test_zeros_without_a_record_are_found(pruned: Path, text: Path, tmp_path: Path) -> None:
    (pruned / "pruning.json").unlink()
    output = tmp_path / "trained"
    result = recover(pruned, "--output", output, "--train", text, "--sequence-length", 32, "--steps", 2)
    assert result.exit_code == 0, result.output
    before, after = weights(pruned), weights(output)
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before if "proj" in name)
    assert len(json.loads((output / "pruning.json").read_text())["layers"]) == 21


def refused(*arguments: object, match: str) -> None:
    result = recover(*arguments)
    assert result.exit_code, result.output
    line = " ".join(result.stderr.split())
    assert line.startswith("Error: ")
    assert match in line


def test_refusals(
    pruned: Path, model_folder: Path, text: Path, tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    output = tmp_path / "trained"
    usual = ["--output", output, "--train", text, "--sequence-length", 32]
    refused(model_folder, *usual, match="the model has no zeros to keep")
    refused(pruned, *usual, "--pattern", "1:2", match="does not have the pattern 1:2")
    refused(pruned, *usual, "--pattern", "structured:0.3", match="is a matter of shapes")
    refused(pruned, *usual, "--steps", 1, "--minutes", 1, match="in minutes or in steps")
    refused(pruned, *usual, "--mask", "decaying", match="Error: --mask decaying needs a pattern to fade to")
    refused(pruned, *usual, "--batch-size", 5000, match="there is too little text")
    refused(pruned, *usual, "--sequence-length", 65, match="the sequence length must be from 2 to the 64 tokens")
    refused(pruned, *usual, "--resume", match="there is nothing to resume")
    refused(pruned, "--output", pruned, "--train", text, match="is the model itself")
    teacher = tmp_path / "teacher"
    tiny_model("llama", vocab_size=97).save_pretrained(teacher)
    tiny_tokenizer.save_pretrained(teacher)
    refused(pruned, *usual, "--teacher", teacher, match="another vocabulary, of 97 tokens where the model has 96")
    assert not output.exists()
    assert not (tmp_path / "trained.partial").exists()


def test_a_run_goes_on_after_a_kill(pruned: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = [pruned, "--train", text, "--sequence-length", 32, "--steps", 8, "--save-minutes", 0]
    assert recover(*usual, "--output", tmp_path / "whole").exit_code == 0
    from thanos.recover import training

    steps = 0
    after_step = training.FixedMask.after_step

    def killed(*arguments: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        after_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training.FixedMask, "after_step", killed)
        result = recover(*usual, "--output", tmp_path / "part")
    assert "--resume goes on" in result.stderr
    refused(*usual, "--output", tmp_path / "part", match="holds an unfinished run")
    refused(*usual, "--output", tmp_path / "part", "--resume", "--rank", 3, match="--rank was 16 and is now 3")
    result = recover(*usual, "--output", tmp_path / "part", "--resume")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "part" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "part.partial").exists()
