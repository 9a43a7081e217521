"""``python -m thanos.prune --pack``: the compact form of what is pruned, in one go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner, Result

import thanos
from thanos.commands import runs
from thanos.prune import main

TEXT = "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 60)
    return path


def prune(*arguments: object) -> Result:
    small = ("--samples", "4", "--sequence-length", "32")
    return CliRunner().invoke(main, [*(str(argument) for argument in arguments), *small])


@pytest.mark.parametrize("stream", ["no", "yes"])
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_one_command_writes_what_plain_loading_reads(
    pattern: str, stream: str, model_folder: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "compact"
    result = prune(
        model_folder, "--output", output, "--pattern", pattern, "--calibration", text, "--pack", "int8",
        "--evaluate", text, "--stream", stream,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "packed: " in result.output
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("compact")] == ["compact"]
    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"2:4": "Int8Sparse24Linear", "0.5": "Int8BitmaskLinear"}[pattern] in kinds
    thanos.unpack(output, tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    tokens = torch.arange(2, 18)[None]
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, plain(tokens).logits, atol=0.05)
    record = json.loads((output / "pruning.json").read_text())
    assert record["options"]["values"] == "int8"
    assert record["perplexity"]["pruned"] > 1
    assert "--pack int8" in record["command"]
    again = prune("--recipe", output / "recipe.yaml", "--output", tmp_path / "again", "--calibration", text)
    assert again.exit_code == 0, again.output
    for file in output.glob("compact-*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_plain_values_are_packed_as_they_are(model_folder: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "plain"
    result = prune(model_folder, "--output", output, "--calibration", text, "--pack", "plain")
    assert result.exit_code == 0, result.output
    kinds = {type(module).__name__ for module in thanos.load(output).modules()}
    assert "BitmaskLinear" in kinds
    assert json.loads((output / "pruning.json").read_text())["options"]["values"] == "plain"


def test_a_run_that_was_killed_while_packing_goes_on(
    model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (model_folder, "--calibration", text, "--pack", "int8")
    assert prune(*arguments, "--output", tmp_path / "whole").exit_code == 0
    packed = runs._pack

    def killed(*given: object) -> bool:
        packed(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_pack", killed)
    assert prune(*arguments, "--output", tmp_path / "killed").exit_code != 0
    monkeypatch.undo()
    other = prune(*arguments[:-1], "plain", "--output", tmp_path / "killed", "--resume")
    assert "--pack was int8 and is now plain" in other.stderr
    result = prune(*arguments, "--output", tmp_path / "killed", "--resume")
    assert result.exit_code == 0, result.output + result.stderr
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()
    assert not (tmp_path / "killed.partial").exists()


def test_a_smaller_model_is_not_packed(model_folder: Path, text: Path, tmp_path: Path) -> None:
    result = prune(
        model_folder, "--output", tmp_path / "out", "--pattern", "channels:0.5", "--calibration", text, "--pack", "int8"
    )
    assert result.exit_code == 2
    assert "--pack is no option of the pattern channels:0.5: a smaller model has no zeros" in result.stderr
    assert not (tmp_path / "out").exists()
