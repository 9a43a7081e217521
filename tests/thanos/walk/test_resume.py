"""A run that is killed goes on where it was, and ends with the same bytes; what does not fit is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from thanos.checkpoint import update
from thanos.prune import main

ROOT = Path(__file__).parents[3]
KILLS = 20


@pytest.fixture
def arguments(model_folder: Path, tmp_path: Path) -> list[str]:
    """A run without its output: two passes in batches, over three blocks."""
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": "the lazy dog sleeps in the sun " * 9 + str(n)}) + "\n" for n in range(9))
    )
    return [
        str(model_folder), "--calibration", str(text), "--samples", "4", "--sequence-length", "16",
        "--passes", "2", "--batch-size", "3", "--memory-limit", "1GiB", "--device", "cpu",
    ]  # fmt: skip


def prune(arguments: list[str], output: Path, *options: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--output", str(output), *options])


def content(folder: Path) -> dict[str, Any]:
    """Hashes of a model directory's files; the report as it is, without what took how long, and where it is."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "report.html":
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    report = json.loads((folder / "pruning.json").read_text())
    report["seconds"], report["command"] = {}, report["command"].replace(str(folder), "DIR")
    for one in [*report["layers"], *report["blocks"]]:
        one["seconds"] = {}
    return {**found, "pruning.json": report}


class Stop:
    """Raises an error before the tensors of a block are written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, block: int, error: BaseException) -> None:
        self.write, self.left = update.Patches.__call__, block + 1

        def call(patches: Any, names: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise error
            self.write(patches, names)

        monkeypatch.setattr(update.Patches, "__call__", call)


def test_twenty_kills_change_no_byte(arguments: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("kills.py")
    killed = subprocess.run(
        [sys.executable, str(script), "7", str(KILLS), str(tmp_path / "killed"), *arguments],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert killed.returncode == 0, killed.stderr + killed.stdout
    assert f"killed {KILLS}," in killed.stdout
    finished = sorted(tmp_path.glob("killed*"))
    assert len(finished) > 1
    assert not [path for path in finished if path.suffix == ".partial"]
    for folder in finished:
        assert content(folder) == content(tmp_path / "killed")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ([], KeyboardInterrupt(), "interrupted; the first block is kept in"),
        ([], OSError(errno.ENOSPC, "No space left on device"), "the disk is full: there is no room left to write in"),
        (["--dtype", "bfloat16", "--memory-limit", "1"], ValueError("it broke"), "it broke; the first block is kept"),
        (["--passes", "1"], MemoryError(), "the same command with --resume goes on"),
        (
            ["--targets", "corrected", "--reconstruct", "1", "--memory-limit", "1"],
            ValueError("it broke"),
            "it broke; the first block is kept",
        ),
        (["--passes", "1", "--targets", "corrected", "--reconstruct", "1"], ValueError("it broke"), "it broke; the"),
        (["--allocation", "curvature", "--targets", "corrected", "--memory-limit", "1"], MemoryError(), "goes on"),
    ],
)
def test_what_is_done_is_kept_and_gone_on_with(
    options: list[str], error: BaseException, match: str, arguments: list[str], tmp_path: Path
) -> None:
    whole = prune(arguments, tmp_path / "whole", *options, "--evaluate", "builtin", "--windows", "2")
    assert whole.exit_code == 0, whole.output
    out = tmp_path / "out"
    options = [*options, "--evaluate", "builtin", "--windows", "2"]
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, 1, error)
        stopped = prune(arguments, out, *options)
    assert stopped.exit_code in (1, 130)
    assert match in stopped.stderr
    assert stopped.stderr.count("\n") == (2 if isinstance(error, KeyboardInterrupt) else 1)
    assert not out.exists()
    assert "holds an unfinished run: go on with it by --resume" in prune(arguments, out, *options).stderr
    again = prune(arguments, out, *options, "--resume")
    assert again.exit_code == 0, again.stderr
    assert "perplexity of the dense model" not in again.output
    assert content(out) == content(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_run_without_a_finished_block_leaves_nothing(
    error: BaseException, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.iterdir())
    Stop(monkeypatch, 0, error)
    stopped = prune(arguments, tmp_path / "out")
    assert stopped.exit_code in (1, 130)
    assert "--resume" not in stopped.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def unfinished(arguments: list[str], tmp_path: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, 1, KeyboardInterrupt())
        prune(arguments, tmp_path / "out")
    return tmp_path / "out.partial"


def test_another_run_is_not_resumed(unfinished: Path, arguments: list[str], tmp_path: Path) -> None:
    def refused(match: str, *options: str) -> None:
        before = {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()}
        result = prune(arguments, tmp_path / "out", "--resume", *options)
        assert result.exit_code == 1
        assert match in result.stderr
        assert result.stderr.count("\n") == 1
        assert {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()} == before

    refused("the option --pattern was 0.5 and is now 2:4", "--pattern", "2:4")
    refused("the option --targets was own and is now corrected", "--targets", "corrected")
    refused("the option --reconstruct was 0 and is now 1", "--reconstruct", "1")
    refused("the option --evaluate was not set and is now builtin", "--evaluate", "builtin", "--windows", "1")
    refused("the calibration samples' hash was", "--seed", "1")
    refused("the calibration samples' shape was [4, 16] and is now [5, 16]", "--samples", "5")
    model = Path(arguments[0]) / "model.safetensors"
    times = model.stat().st_atime_ns, model.stat().st_mtime_ns
    os.utime(model, ns=(times[0], times[1] + 1))
    refused("the model's file model.safetensors time of change was")
    os.utime(model, ns=times)
    spool = next(unfinished.glob("hidden-*.bin"))
    spool_content = spool.read_bytes()
    spool.write_bytes(spool_content[:-1])
    refused(f"the hidden states in {spool} are truncated")
    state = json.loads((unfinished / "state.json").read_text())
    (unfinished / "state.json").write_text(json.dumps({**state, "format": 0}))
    refused("was written in format 0 of unfinished runs")
    (unfinished / "state.json").write_text("{")
    refused("holds no state that a run could go on from")


def test_there_may_be_nothing_to_resume(arguments: list[str], tmp_path: Path) -> None:
    result = prune(arguments, tmp_path / "out", "--resume")
    assert result.exit_code == 1
    assert "there is nothing to resume" in result.stderr


def test_a_model_in_the_way_is_replaced_once_the_new_one_is_whole(
    arguments: list[str], model_folder: Path, tmp_path: Path
) -> None:
    assert prune(arguments, tmp_path / "out", "--method", "magnitude").exit_code == 0
    old = content(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, 1, KeyboardInterrupt())
        prune(arguments, tmp_path / "out", "--overwrite")
    assert content(tmp_path / "out") == old
    assert "exists; choose another" in prune(arguments, tmp_path / "out", "--resume").stderr
    assert prune(arguments, tmp_path / "out", "--resume", "--overwrite").exit_code == 0
    assert content(tmp_path / "out") != old
