"""``python -m thanos.prune`` with patterns that make a smaller model: what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner, Result

import thanos
from thanos.prune import main


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    words = "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun " * 3
    path.write_text("".join(json.dumps({"text": f"{words}{number}"}) + "\n" for number in range(30)))
    return path


def prune(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_smaller_model_is_written(model_folder: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "smaller"
    result = prune(
        model_folder, "--output", output, "--pattern", "channels:0.3+kv-heads:1+depth:1", "--multiple", 8,
        "--calibration", text, "--samples", 4, "--sequence-length", 32, "--evaluate", text, "--importance", "wanda",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "channels:0.3: 48 channels become 32, 33.3% fewer" in result.output
    assert "kv-heads:1: 4 query heads in 2 groups become 2 in 1 groups" in result.output
    assert "depth:1: 3 blocks become 2" in result.output
    config = json.loads((output / "config.json").read_text())
    assert [config[name] for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads")] == [32, 2, 1]
    assert (config["head_dim"], config["num_hidden_layers"]) == (8, 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert model.generate(**tokenizer("the quick", return_tensors="pt"), max_new_tokens=4).shape[1] > 2
    report = json.loads((output / "pruning.json").read_text())
    assert report["method"] == "wanda"
    assert report["perplexity"]["pruned"] > 1
    assert [layer["name"].rpartition(".")[2] for layer in report["layers"]] == ["o_proj", "down_proj"] * 2
    before = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    weights = [
        sum(module.weight.numel() for name, module in one.named_modules() if name.endswith("_proj"))
        for one in (before, model)
    ]
    assert report["effective_sparsity"] == pytest.approx(1 - weights[1] / weights[0])


def test_blocks_are_adjusted_by_a_preset(model_folder: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "smaller"
    result = prune(
        model_folder, "--output", output, "--pattern", "channels:0.3", "--multiple", 8, "--calibration", text,
        "--samples", 4, "--sequence-length", 32, "--quality", "best", "--reconstruct", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "quality best: --targets corrected, --reconstruct 1" in result.output
    report = json.loads((output / "pruning.json").read_text())
    assert [block["block"] for block in report["blocks"]] == [0, 1, 2]
    assert (report["options"]["reconstruct"], report["options"]["correction"]) == (1, 0.5)


def test_depth_that_follows_the_input_keeps_the_whole_model(model_folder: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "guided"
    result = prune(
        model_folder, "--output", output, "--pattern", "depth:1@2", "--calibration", text, "--samples", 6,
        "--sequence-length", 16, "--evaluate", text,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(json.loads((output / "depth_sets.json").read_text())["removed"]) == 2
    plain = transformers.AutoModelForCausalLM.from_pretrained(output)
    dense = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), dense.parameters(), strict=True))
    assert thanos.load(output).generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3).shape[1] > 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--pattern", "channels:0.25+channels:0.5"], "names channels twice"),
        (["--pattern", "channels:0.1"], "multiples of 64"),
        (["--pattern", "heads:0.1", "--multiple", "8"], "cannot be shared out"),
        (["--pattern", "experts:0.5"], "has no mixture"),
        (["--pattern", "depth:3"], "leaves none of 3 blocks"),
        (["--pattern", "depth:1@9"], "needs at least 9 samples"),
        (["--pattern", "channels:0.25", "--multiple", "0"], "--multiple"),
        (["--pattern", "channels:0.25", "--importance", "nosuch"], "--importance"),
        (["--pattern", "channels:0.25+heads:0.5+kv-heads:1"], "names both heads and kv-heads"),
        (["--pattern", "depth:1+depth:1@2"], "names depth twice"),
        (["--pattern", "channels:0.25", "--refine", "refit"], "--refine is no option of the pattern channels:0.25"),
        (["--pattern", "0.5", "--importance", "obs"], "--importance is no option of the pattern 0.5, which leaves"),
        (["--pattern", "depth:1", "--importance", "wanda"], "decides on channels, heads and experts"),
        (["--pattern", "experts:0.5", "--importance", "fisher"], "REAP's score"),
        (["--pattern", "depth:1", "--reconstruct", "2"], "leaves every layer's width as it is"),
        (["--pattern", "depth:1", "--quality", "best"], "leaves every layer's width as it is"),
        (["--pattern", "channels:0.25", "--resume"], "--resume is no option of the pattern channels:0.25"),
    ],
)
def test_bad_requests_are_refused(
    model_folder: Path, text: Path, tmp_path: Path, options: list[str], match: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = prune(
        model_folder, "--output", tmp_path / "out", "--calibration", text, "--samples", 2, "--evaluate", text, *options
    )
    assert result.exit_code not in (0, None)
    assert match in result.stderr
    assert result.stderr.count("\n") == 1
    assert "perplexity of the dense model" not in result.output
    assert sorted(tmp_path.rglob("*")) == before
