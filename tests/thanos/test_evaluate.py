"""``python -m thanos.evaluate``: what it measures, writes and refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from zero_shot_files import write_task

from thanos.evaluate import load_tokens, main, perplexity
from thanos.scoring.zeroshot import zero_shot

WORDS = "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 20)
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")
    for task in ("piqa", "arc_easy"):
        write_task(tmp_path / "tasks", task)
    return tmp_path / "tasks"


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_refused(result: Result, says: str) -> None:
    assert result.exit_code != 0
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert says in lines[0]


def test_table_and_file_hold_what_the_functions_return(
    model_folder: Path, text: Path, tasks: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scores.json"
    options = ["--perplexity", text, "--sequence-length", 16, "--windows", 4, "--tasks-data", tasks, "--limit", 5]
    result = evaluate(model_folder, *options, "--output", output, "--device", "cpu")
    assert result.exit_code == 0, result.output
    record = json.loads(output.read_text())

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    expected = perplexity(model, None, load_tokens(text, tokenizer), sequence_length=16, windows=4)
    measured = record["results"]["perplexity"][str(text)]
    assert measured.pop("perplexity") == pytest.approx(expected, rel=1e-6)
    assert measured == {
        "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "sequence_length": 16,
        "windows": 4,
        "bos": False,
    }
    answers = zero_shot(model, tokenizer, ["piqa", "arc_easy"], data=tasks, limit=5)
    assert record["results"]["zero_shot"] == answers.to_dict()
    settings = record["settings"]
    assert settings["tasks_sha256"]["piqa"] == hashlib.sha256((tasks / "piqa.jsonl").read_bytes()).hexdigest()
    assert (settings["limit"], settings["device"], settings["dtype"]) == (5, "cpu", "float32")
    assert {"python", "torch", "transformers", "lm-eval"} <= set(record["versions"])

    assert "boolq: no file in" in result.output
    assert "average of 2" in result.output
    for score in answers.tasks.values():
        assert f"{score.accuracy:.2%}" in result.output
    assert "\x1b" not in result.output


def test_a_compact_checkpoint_is_evaluated_as_it_is(model_folder: Path, text: Path, tmp_path: Path) -> None:
    from thanos.compact import pack
    from thanos_kernels import select_n_of_m

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data.masked_fill_(select_n_of_m(module.weight.data.abs(), 2, 4), 0)
    model.save_pretrained(model_folder)
    pack(model_folder, tmp_path / "compact")
    values = {}
    for name, folder in (("dense", model_folder), ("compact", tmp_path / "compact")):
        for dtype in ("auto", "bfloat16"):
            output = tmp_path / f"{name}-{dtype}.json"
            options = ["--perplexity", text, "--tasks", "none", "--dtype", dtype, "--output", output]
            result = evaluate(folder, *options)
            assert result.exit_code == 0, result.output
            record = json.loads(output.read_text())
            assert record["results"]["zero_shot"] is None
            values[name, dtype] = record["results"]["perplexity"][str(text)]["perplexity"]
    assert values["compact", "auto"] == pytest.approx(values["dense", "auto"], rel=1e-5)
    assert values["compact", "bfloat16"] == pytest.approx(values["dense", "bfloat16"], rel=1e-2)


def test_several_texts_or_none(model_folder: Path, text: Path, tasks: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(WORDS * 15)
    result = evaluate(
        model_folder, "--perplexity", text, "--perplexity", other, "--perplexity", text, "--tasks", "none"
    )
    assert result.exit_code == 0, result.output
    assert result.output.count("perplexity on ") == 2
    result = evaluate(model_folder, "--perplexity", "none", "--tasks", "piqa", "--tasks-data", tasks)
    assert result.exit_code == 0, result.output
    assert "erplexity" not in result.output
    assert_refused(evaluate(model_folder, "--perplexity", "none", "--tasks", "none"), "there is nothing to evaluate")


def test_sequences_start_as_the_tokenizer_starts_them(
    model_folder: Path, text: Path, bos_tokenizer: Any, tmp_path: Path
) -> None:
    bos_tokenizer.save_pretrained(model_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    options = [model_folder, "--perplexity", text, "--tasks", "none", "--sequence-length", 16]
    for bos in ("auto", "no"):
        output = tmp_path / f"{bos}.json"
        result = evaluate(*options, "--bos", bos, "--output", output)
        assert result.exit_code == 0, result.output
        record = json.loads(output.read_text())["results"]["perplexity"][str(text)]
        assert record["bos"] is (bos == "auto")
        expected = perplexity(model, bos_tokenizer, text, sequence_length=16, bos=bos)
        assert record["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert_refused(evaluate(*options, "--bos", "perhaps"), "'--bos'")


def test_texts_are_taken_from_the_field_asked_for(model_folder: Path, text: Path, tmp_path: Path) -> None:
    table = tmp_path / "text.csv"
    table.write_text(f'id,body\n1,"{text.read_text()}"\n')
    results = [
        evaluate(model_folder, "--perplexity", path, "--tasks", "none", *field)
        for path, field in ((text, []), (table, ["--text-field", "body"]))
    ]
    assert results[0].exit_code == 0, results[0].output
    assert results[0].output.split("perplexity on ")[1].split(": ")[1].split()[0] in results[1].output
    assert_refused(evaluate(model_folder, "--perplexity", table, "--tasks", "none"), "its columns are id, body")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tasks", "mmlu"], "there is no task 'mmlu'"),
        (["--tasks", "piqa,boolq"], "holds no file boolq.jsonl for the task boolq"),
        (["--tasks-data", "nowhere"], "nowhere"),
        (["--perplexity", "nowhere"], "nowhere is neither one of"),
        (["--batch-size", "0"], "the batch size is 'auto' or a number from 1 on, not '0'"),
        (["--limit", "0"], "'--limit'"),
        (["--windows", "0"], "'--windows'"),
        (["--sequence-length", "65"], "from 2 to the 64 tokens the model takes, not 65"),
        (["--device", "warp"], "'--device'"),
        (["--dtype", "int8"], "'--dtype'"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_read(
    model_folder: Path, text: Path, tasks: Path, options: list[str], says: str
) -> None:
    (model_folder / "model.safetensors").unlink()  # reading it would be another error
    assert_refused(evaluate(model_folder, "--perplexity", text, "--tasks-data", tasks, *options), says)


def test_damaged_tasks_are_refused_before_the_model_is_read(model_folder: Path, text: Path, tasks: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    (tasks / "boolq.jsonl").write_text('{"question": "is it so", "label": 1}\n')
    result = evaluate(model_folder, "--perplexity", text, "--tasks-data", tasks)
    assert_refused(result, "line 1, lacks the column 'passage' of the task boolq")


def test_short_texts_and_models_that_are_none_are_refused(model_folder: Path, tmp_path: Path, tasks: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the fox")
    result = evaluate(model_folder, "--perplexity", short, "--tasks", "none")
    assert_refused(result, "less than one sequence of 64")
    assert_refused(evaluate(tmp_path / "none", "--perplexity", short, "--tasks", "none"), "no model directory")


def test_an_output_is_replaced_only_when_told(model_folder: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    output.write_text("kept")
    options: list[Any] = [model_folder, "--perplexity", text, "--tasks", "none", "--output"]
    assert_refused(evaluate(*options, output), "exists; choose another or pass --overwrite")
    assert output.read_text() == "kept"
    assert_refused(evaluate(*options, tmp_path), "is a directory; name a file")
    assert_refused(evaluate(*options, tmp_path / "none" / "scores.json"), "does not exist")
    assert evaluate(*options, output, "--overwrite").exit_code == 0
    assert json.loads(output.read_text())["model"] == str(model_folder)
    assert not list(tmp_path.glob(".scores*"))


def test_debug_shows_the_error_itself(model_folder: Path, text: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    options = [model_folder, "--perplexity", text, "--tasks", "none"]
    assert_refused(evaluate(*options), "cannot read the model")
    assert isinstance(evaluate(*options, "--debug").exception, ValueError)
