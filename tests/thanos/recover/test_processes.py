"""Processes that torchrun starts train one model together: the same steps as one process with the batches of all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file

from thanos.commands.recover import main
from thanos.prune import main as prune

pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[3]
WORDS = "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun "


@pytest.fixture
def arguments(model_folder: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{WORDS * 3}{number}"}) + "\n" for number in range(60)))
    given = [model_folder, "--output", tmp_path / "pruned", "--pattern", "2:4", "--calibration", text, "--samples", 6]
    done = CliRunner().invoke(prune, [*map(str, given), "--sequence-length", "32", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    # Four windows, all of which are in every step, in whatever order they come.
    few, tokenizer = tmp_path / "few.txt", transformers.AutoTokenizer.from_pretrained(model_folder)
    words = (WORDS * 40).split()
    while len(tokenizer(" ".join(words)).input_ids) >= 5 * 32:
        words.pop()
    few.write_text(" ".join(words))
    common = ["--teacher", str(model_folder), "--train", str(few), "--held-out", str(text), "--sequence-length", "32"]
    more = ["--learning-rate", "1e-3", "--device", "cpu", "--compute", "float32", "--evaluate", str(text)]
    return [str(tmp_path / "pruned"), *common, *more, "--steps", "6"]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*started, "-m", "thanos.recover", *arguments],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_two_processes_take_the_steps_of_one(arguments: list[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = CliRunner().invoke(main, [*arguments, "--batch-size", "4", "--output", str(one)])
    assert alone.exit_code == 0, alone.stderr
    done = torchrun(*arguments, "--batch-size", "2", "--save-minutes", "0", "--output", str(two))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in") == 1, "one speaks for all"
    assert not (tmp_path / "two.partial").exists()
    mine, theirs, start = (load_file(path / "model.safetensors") for path in (one, two, Path(arguments[0])))
    for name, own in mine.items():
        assert torch.equal(own == 0, theirs[name] == 0)
        assert torch.allclose(own, theirs[name], atol=2e-4), name
    assert any(not torch.equal(start[name], theirs[name]) for name in start)
    records = [json.loads((path / "pruning.json").read_text())["recovery"][-1] for path in (one, two)]
    assert records[0]["tokens"] == records[1]["tokens"] == 6 * 4 * 32
    assert records[1]["perplexity"]["after"] == pytest.approx(records[0]["perplexity"]["after"], rel=1e-3)
    assert records[1]["perplexity"]["after"] < records[1]["perplexity"]["before"]


def test_what_one_process_refuses_is_said_once(arguments: list[str], tmp_path: Path) -> None:
    done = torchrun(*arguments, "--batch-size", "3000", "--output", str(tmp_path / "out"))
    assert done.returncode != 0
    assert done.stderr.count("there is too little text") == 1
    assert not (tmp_path / "out").exists()
