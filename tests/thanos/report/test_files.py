"""What stands beside a pruned model: a card that the hub reads, a recipe that makes the same bytes, the summary."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from reports import record
from rich.console import Console

from thanos.commands.again import ASIDE
from thanos.prune import main
from thanos.report import LayerReport, ModelReport
from thanos.report.card import base_model, card, carried
from thanos.report.read import run_of
from thanos.report.terminal import WIDTH, print_summary

WORDS = "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{WORDS * 3}{number}"}) + "\n" for number in range(60)))
    return path


def prune(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


RUNS = {
    "weights": ["--pattern", "2:4", "--outlier-fraction", "0.1", "--exclude", "o_proj", "--memory-limit", "1GiB"],
    "shape": ["--pattern", "channels:0.3+depth:1", "--multiple", 8],
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_recipe_makes_the_same_bytes(kind: str, model_folder: Path, text: Path, tmp_path: Path) -> None:
    first = prune(
        model_folder, "--output", tmp_path / "one", "--calibration", text, "--samples", 4, "--seed", 3, *RUNS[kind]
    )
    assert first.exit_code == 0, first.output
    recipe = tmp_path / "one" / "recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["pattern"] == RUNS[kind][1]
    again = prune("--recipe", recipe, "--output", tmp_path / "two")
    assert again.exit_code == 0, again.output
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert recipe.read_bytes() == (tmp_path / "two" / "recipe.yaml").read_bytes()
    other = prune("--recipe", recipe, "--output", tmp_path / "three", "--seed", 4)
    assert other.exit_code == 0, other.output
    assert weights(tmp_path / "one") != weights(tmp_path / "three")
    command = json.loads((tmp_path / "three" / "pruning.json").read_text())["command"]
    assert "--seed 4" in command
    assert "--recipe" not in command


def test_the_command_of_a_report_runs_as_it_stands(model_folder: Path, text: Path, tmp_path: Path) -> None:
    prune(model_folder, "--output", tmp_path / "one", "--calibration", text, "--samples", 4, "--allow-missing")
    command = shlex.split(json.loads((tmp_path / "one" / "pruning.json").read_text())["command"])
    assert command[:3] == ["python", "-m", "thanos.prune"]
    assert "--allow-missing" in command
    assert "--damping" not in command
    before = weights(tmp_path / "one")
    assert prune(*command[3:], "--overwrite").exit_code == 0
    assert weights(tmp_path / "one") == before


def test_every_option_has_its_place_in_a_recipe(model_folder: Path, text: Path, tmp_path: Path) -> None:
    """Whatever option is added is in the recipe, or is named as one that changes nothing in the model."""
    names: set[str] = set()
    for number, pattern in enumerate(("0.5", "channels:0.3")):
        output = tmp_path / str(number)
        result = prune(
            model_folder, "--output", output, "--calibration", text, "--samples", 4, "--pattern", pattern,
            *(["--method", "thanos"] if pattern == "0.5" else ["--importance", "obs", "--multiple", 8]),
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        names |= yaml.safe_load((output / "recipe.yaml").read_text()).keys()
    left = {parameter.name for parameter in main.params} - ASIDE - names
    assert left <= {
        "metric",
        "pack",
        "block_size",
        "text_field",
        "memory_limit",
        "batch_size",
        "exclude",
        "evaluate",
        "windows",
        *(parameter.name for parameter in main.params if getattr(parameter, "is_flag", False)),
    }
    assert len(names) > 15


RECIPES = {
    "pattern: [": "is no YAML",
    "just words": "holds no options",
    "": "holds no options",
    "patern: 0.5": "the key 'patern', which is no option",
    "pattern: {a: b}": "no plain value for pattern",
    "pattern: 9:4": "--pattern",
    "model: /gone/model": "no model directory",
    "calibration: /gone/text.jsonl": "neither one of c4, wikitext2, builtin nor a file",
    "resume: true": "the key 'resume', which is no option",
    "output: /a\nsamples: none": "--samples",
}


@pytest.mark.parametrize("content", RECIPES)
def test_bad_recipes_are_refused(content: str, model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    before = sorted(tmp_path.rglob("*"))
    given = [] if content.startswith("model") else [model_folder]
    result = prune(*given, "--recipe", file, "--output", tmp_path / "out")
    assert result.exit_code not in (0, None)
    assert RECIPES[content] in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert "cannot be read" in prune("--recipe", tmp_path / "none.yaml", "--output", tmp_path / "out").stderr


def test_a_pattern_in_a_recipe_needs_no_quotes(model_folder: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {model_folder}\npattern: 2:4  # YAML 1.1 reads 124\ncalibration: {text}\nsamples: 4\n")
    assert prune("--recipe", file, "--output", tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["pattern"] == "2:4"


def test_the_card_carries_over_what_holds(model_folder: Path, text: Path, tmp_path: Path) -> None:
    (model_folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: of-mine\nlanguage:\n- en\n- de\nbase_model: the/grandmother\n"
        "tags:\n- old\n---\n# The dense model\n"
    )
    (model_folder / "LICENSE").write_text("Mine.")
    result = prune(model_folder, "--output", tmp_path / "out", "--calibration", text, "--samples", 4)
    assert result.exit_code == 0, result.output
    from huggingface_hub import ModelCard

    written = ModelCard.load(tmp_path / "out" / "README.md")
    data = written.data.to_dict()
    assert (data["license"], data["license_name"], data["language"]) == ("other", "of-mine", ["en", "de"])
    assert data["library_name"] == "transformers"
    assert "base_model" not in data
    assert {"pruned", "thanos"} <= set(data["tags"])
    assert "old" not in data["tags"]
    assert "The dense model" not in written.text
    assert (tmp_path / "out" / "LICENSE").read_text() == "Mine."
    assert str(tmp_path / "out") not in written.content
    for said in ("from_pretrained", "--recipe recipe.yaml", "50.00%", "report.html", "method `thanos`"):
        assert said in written.text, said


@pytest.mark.parametrize(
    "content",
    ["", "# none", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: {a: b}\n---\n", "---\nlicense: 3"],
)
def test_what_a_card_does_not_say_is_left_out(content: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(content)
    assert carried(tmp_path / "README.md") == {}
    assert carried(tmp_path / "none.md") == {}


def test_the_base_model_is_a_name_on_the_hub_or_nothing(tmp_path: Path) -> None:
    assert base_model("some/model") == "some/model"
    assert base_model("/cache/models--some--model/snapshots/0123") == "some/model"
    assert base_model(str(tmp_path)) is None
    assert base_model("model.gguf/") is None
    assert "base_model: some/model" in card(run_of("out", record()), {})
    assert "/a/private/place" not in card(run_of("out", record()), {})


def layer(name: str, loss: float) -> LayerReport:
    return LayerReport(name, (64, 128), 4096, 0.5, 1.0, loss, 0.01, None, 100, {"solve": 1.0})


@pytest.mark.parametrize("terminal", [True, False])
def test_the_summary_fits_eighty_columns(terminal: bool) -> None:
    long = "model.language_model.transformer.decoder.layers.3.feed_forward.block_sparse_moe.experts.gate_up_proj[17]"
    report = ModelReport(
        "sparsegpt", "structured:0.3333333333333333", 0.5, 0.4751, {"outlier_fraction": 0.12345, "refine": "admm"},
        [layer("a", 0.01), layer(long, 0.5), layer("b", 0.02)], [],
        {f"m.{index}": "a router " * 12 for index in range(500)}, 1,
        {"forward": 1234.5, "hessian": 99.0, "prune": 4000.0, "other": 1.0, "total": 5334.5},
        perplexity={"dense": 5.43, "pruned": 1.5e8, "source": "/very/long" * 20 + "/text.jsonl"},
        size={"parameters": {"before": 7 * 10**9, "after": 6 * 10**9}, "bytes": {"before": None, "after": 12 * 10**9}},
    )  # fmt: skip
    stream = io.StringIO()
    print_summary(report, Console(file=stream, width=200, force_terminal=terminal, no_color=True), Path("/deep" * 40))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert max(map(len, lines)) <= WIDTH
    said = "\n".join(lines)
    for part in ("5.43 dense", "1.50e+08 pruned", "7 B -> 6 B parameters", "500: a router", "report.html"):
        assert part in said, part
    assert len(lines) < 24


def test_a_perplexity_that_is_none_is_shown_as_such(capsys: Any) -> None:
    report = ModelReport(
        "wanda", "0.5", 0.5, 0.5, {}, [], [], {}, 1, {"total": 0.0},
        perplexity={"dense": 5.0, "pruned": float("nan"), "source": "c4"},
    )  # fmt: skip
    print_summary(report, Console(force_terminal=False))
    assert "5.00 dense, – pruned, on c4" in capsys.readouterr().out
