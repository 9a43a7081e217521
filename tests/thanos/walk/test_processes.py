"""Processes that torchrun starts prune one model together; when one ends, all do, and the run can go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.marks import streams
from tests.mixtures import tiny_mixture
from tests.thanos.walk.test_resume import content
from thanos.prune import main

ROOT = Path(__file__).parents[3]


@pytest.fixture
def arguments(model_folder: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": "the lazy dog sleeps in the sun " * 9 + str(n)}) + "\n" for n in range(9))
    )
    common = ["--calibration", str(text), "--samples", "5", "--sequence-length", "16", "--device", "cpu"]
    return [str(model_folder), *common, "--evaluate", str(text), "--windows", "3"]


def torchrun(count: int, action: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("rank.py")
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)),
            *(str(script), action, *arguments),
        ],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("Error: ")]


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "pruning.json").read_text())
    return found


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor == 0 for name, tensor in tensors.items() if tensor.dim() == 2}


def agreement(one: Path, other: Path) -> float:
    mine, theirs = zeros(one), zeros(other)
    same = sum(int((mine[name] == theirs[name]).sum()) for name in mine)
    return same / sum(mask.numel() for mask in mine.values())


def alone(arguments: list[str], output: Path) -> None:
    done = CliRunner().invoke(main, [*arguments, "--output", str(output)])
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    ("action", "options"),
    [
        ("none", []),
        ("none", ["--targets", "corrected", "--refine", "refit", "--pattern", "2:4"]),
        ("whole", ["--method", "sparsegpt"]),
        ("none", ["--allocation", "curvature", "--pattern", "0.6"]),
        ("none", ["--allocation", "search", "--search-evaluations", "4", "--pack", "int8"]),
    ],
)
def test_two_processes_prune_as_one_does(action: str, options: list[str], arguments: list[str], tmp_path: Path) -> None:
    """The same bytes: Hessians are summed in the same halves, and rows do not depend on who works on them."""
    arguments = [*arguments, *options]
    alone(arguments, tmp_path / "one")
    done = torchrun(2, action, *arguments, "--output", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in") == 1
    (weights,) = (file.name for file in (tmp_path / "one").glob("*.safetensors"))
    assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()
    one, two = report(tmp_path / "one"), report(tmp_path / "two")
    assert two["effective_sparsity"] == pytest.approx(one["effective_sparsity"], abs=1e-4)
    assert [layer["name"] for layer in two["layers"]] == [layer["name"] for layer in one["layers"]]
    assert [layer["tokens"] for layer in two["layers"]] == [layer["tokens"] for layer in one["layers"]]
    for name in ("dense", "pruned"):
        assert two["perplexity"][name] == pytest.approx(one["perplexity"][name], rel=0.01)
    assert not list(tmp_path.glob("*.partial"))


def test_blocks_are_reconstructed_together(arguments: list[str], tmp_path: Path) -> None:
    """Each step takes samples of all; masks are those of one process, and each block comes nearer to the dense one."""
    text, words = tmp_path / "more.jsonl", "the lazy dog sleeps in the sun and the quick brown fox jumps "
    text.write_text("".join(json.dumps({"text": words * 9 + str(n)}) + "\n" for n in range(40)))
    arguments = [*arguments, "--calibration", str(text), "--samples", "32", "--reconstruct", "3"]
    alone(arguments, tmp_path / "one")
    done = torchrun(2, "none", *arguments, "--output", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert agreement(tmp_path / "one", tmp_path / "two") > 0.95
    one, two = report(tmp_path / "one")["blocks"], report(tmp_path / "two")["blocks"]
    assert len(two) == len(one) == 3
    for mine, theirs in zip(one, two, strict=True):
        assert mine["after"] < mine["before"]
        assert theirs["after"] < theirs["before"]
        assert theirs["parameters"] == mine["parameters"]


def test_batches_are_pruned_almost_as_one_process_does_and_as_before(arguments: list[str], tmp_path: Path) -> None:
    arguments = [*arguments, "--passes", "2", "--batch-size", "2"]
    alone(arguments, tmp_path / "one")
    for name in ("two", "again"):
        done = torchrun(2, "none", *arguments, "--output", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    assert content(tmp_path / "two") == content(tmp_path / "again")
    assert agreement(tmp_path / "one", tmp_path / "two") >= 0.999


@streams
def test_experts_are_shared_out_whole_and_streamed(arguments: list[str], tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_mixture("qwen3_moe").save_pretrained(tmp_path / "mixture")
    tiny_tokenizer.save_pretrained(tmp_path / "mixture")
    arguments = [str(tmp_path / "mixture"), *arguments[1:], "--passes", "2", "--batch-size", "2"]
    alone(arguments, tmp_path / "one")
    done = torchrun(2, "none", *arguments, "--stream", "yes", "--output", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert agreement(tmp_path / "one", tmp_path / "two") >= 0.999
    one, two = report(tmp_path / "one")["layers"], report(tmp_path / "two")["layers"]
    assert {layer["name"]: layer["tokens"] for layer in two} == {layer["name"]: layer["tokens"] for layer in one}


@pytest.mark.parametrize(("action", "said"), [("die", ""), ("stop", "has stopped working"), ("fail", "it broke")])
def test_a_process_that_is_lost_ends_all_and_the_run_goes_on(
    action: str, said: str, arguments: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    if action == "die":  # both streams of hidden states are written down, and shared out anew
        arguments = [*arguments, "--targets", "corrected"]
    begin = time.monotonic()
    done = torchrun(2, action, *arguments, "--output", str(output))
    assert time.monotonic() - begin < 60
    assert done.returncode != 0
    assert len(errors(done)) == 1, done.stderr
    assert said in errors(done)[0]
    assert "--resume" in errors(done)[0]
    assert not output.exists()
    if action == "die":  # with another number of processes
        alone([*arguments, "--resume"], output)
    else:
        done = torchrun(3 if action == "fail" else 2, "none", *arguments, "--output", str(output), "--resume")
        assert done.returncode == 0, done.stderr
    alone(arguments, tmp_path / "one")
    assert agreement(tmp_path / "one", output) >= (1 if action == "die" else 0.999)


@pytest.mark.parametrize(
    ("count", "action", "options", "match"),
    [
        (2, "other", [], "the option --damping of process 1 is 0.02, not 0.01"),
        (3, "none", ["--samples", "2"], "2 samples cannot be shared out among 3 processes"),
        (2, "none", ["--pattern", "channels:0.5"], "is the work of one process"),
        (2, "none", ["--pattern", "two"], "Invalid value for '--pattern'"),
    ],
)
def test_what_several_processes_cannot_do_is_said_once(
    count: int, action: str, options: list[str], match: str, arguments: list[str], tmp_path: Path
) -> None:
    done = torchrun(count, action, *arguments, *options, "--output", str(tmp_path / "out"))
    assert done.returncode != 0
    assert len(errors(done)) == 1, done.stderr
    assert match in errors(done)[0]
    assert not list(tmp_path.glob("out*"))
