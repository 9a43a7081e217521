"""Every command of the README and of the pages is run as it stands there, where what it names lies, on tiny models.

A command that needs what is not here says so behind its ``#``: a GPU, the hub, Node, or llama.cpp.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import pytest
import torch

import thanos
from tests.conftest import new_tokenizer
from tests.mixtures import tiny_mixture
from tests.test_versions import PROJECT
from tests.zero_shot_files import WORDS, write_task
from thanos.checkpoint import can_convert
from thanos.walk.resume import Keeper

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = re.compile(r"#.*(GPU|\bhub\b|Node|llama\.cpp)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = {f"thanos.{name}": f"thanos.{name}" for name in ("prune", "evaluate", "doctor", "bench_inference")} | {
    "thanos.pack": "thanos.commands.pack",
    "thanos.unpack": "thanos.commands.unpack",
    "thanos.recover": "thanos.commands.recover",
    "thanos.report": "thanos.report.__main__",
}
# Smaller numbers in the place of those of real models; the last one given counts.
LESS = {
    "thanos.prune": ["--samples", "4", "--sequence-length", "32", "--windows", "4"],
    "thanos.recover": ["--minutes", "0.02", "--sequence-length", "32", "--windows", "4"],
    "thanos.bench_inference": ["--prompt", "16", "--tokens", "2", "--repeats", "1"],
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each block of code."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and texts by the names that the pages give them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 8}
    config = LlamaConfig(**shape, vocab_size=96, num_key_value_heads=2, max_position_embeddings=1024)
    for name, model in (("MODEL", LlamaForCausalLM(config)), ("Qwen/Qwen3-30B-A3B", tiny_mixture("qwen3_moe"))):
        model.save_pretrained(folder / name)
        new_tokenizer().save_pretrained(folder / name)
    text = " ".join(WORDS) + " "
    rows = [f"{text * (8 + number % 5)}{number}" for number in range(400)]
    (folder / "my.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (folder / "records.csv").write_text("body\n" + "\n".join(rows) + "\n")
    for name in ("my.txt", "held-out.txt"):
        (folder / name).write_text("\n".join(rows[:60]))
    for task in ("piqa", "boolq"):
        write_task(folder / "TASKS", task, count=3)
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the world, the current directory; the hub's texts are a few words."""
    folder = tmp_path / "here"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    documents = [" ".join(WORDS) * 40 + str(number) for number in range(60)]
    monkeypatch.setattr("thanos.text.readers._from_hub", lambda name, split: documents)
    return folder


def run_thanos(module: str, arguments: list[str]) -> None:
    command = importlib.import_module(COMMANDS[module]).main
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        command.main([*arguments, *(LESS.get(module, []) if "--steps" not in arguments else LESS[module][2:])])
    assert not end.value.code, said.getvalue()


def run_torchrun(arguments: list[str]) -> None:
    """By torchrun's own parser, and as one process; several are those of tests/thanos/walk/test_processes.py."""
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(arguments)
    assert parsed.module
    run_thanos(parsed.training_script, parsed.training_script_args)


def interrupted(arguments: list[str]) -> None:
    """Run ``thanos.prune`` until its first block is kept."""
    keep = Keeper.keep

    def once(self: Keeper, *given: Any) -> None:
        keep(self, *given)
        raise KeyboardInterrupt

    command = importlib.import_module("thanos.prune").main
    with patch.object(Keeper, "keep", once), contextlib.redirect_stderr(io.StringIO()), pytest.raises(SystemExit):
        command.main([*arguments, *LESS["thanos.prune"]])


def run_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    wanted = re.fullmatch(r"\.(?:\[([\w,]+)\])?", arguments[1])
    assert wanted, arguments
    assert set((wanted[1] or "").split(",")) - {""} <= set(PROJECT["optional-dependencies"])


def run_line(line: str) -> None:
    """Run one command of a page."""
    match shlex.split(line, comments=True):
        case ["python", "-m", module, *arguments] if module in COMMANDS:
            if not can_convert() and any(re.fullmatch(r"experts:.*|--stream", word) for word in arguments):
                return  # refused with Transformers 4, in a sentence
            if "--resume" in arguments:
                interrupted([word for word in arguments if word != "--resume"])
            run_thanos(module, arguments)
        case ["torchrun", *arguments]:
            run_torchrun(arguments)
        case ["python", "-c", _, "serve", *_] | ["curl", *_]:
            pass  # run by tests/thanos/test_serving.py
        case ["pip", *arguments]:
            run_pip(arguments)
        case words:
            pytest.fail(f"no test runs {words}: say behind a # that it needs a GPU, the hub, Node or llama.cpp")


def shell(page: Path) -> list[str]:
    """The commands of a page, in order, but those that need what is not here."""
    lines = [line for language, text in blocks(page) if language in ("", "bash") for line in text.splitlines()]
    return [line for line in lines if line.strip() and not ELSEWHERE.search(line)]


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_examples_run(example: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8"))) or ""
    usage = re.search(rf"^ *python examples/{example.name}(.*)$", said, re.MULTILINE)
    assert usage, "its docstring says how it is started"
    runpy.run_path(str(example))["main"](*[word for word in usage[1].split() if not word.startswith("[")])
    assert len(capsys.readouterr().out.splitlines()) > 2


WITH_COMMANDS = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_says_works(page: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name == "format.md":
        run_thanos("thanos.prune", ["MODEL", "--output", "DIR"])
        thanos.pack("DIR", "COMPACT")
        monkeypatch.chdir(here / "COMPACT")
    for language, text in blocks(page):
        if language == "python":
            made: dict[str, Any] = {}
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, str(page), "exec"), made)
            assert made
            continue
        for line in text.splitlines():
            if not line.strip() or ELSEWHERE.search(line):
                continue
            output = re.search(r"--output (\S+)", line)
            if page.name == "README.md" and output:  # its commands stand side by side, those of a tutorial in a row
                shutil.rmtree(output[1], ignore_errors=True)
            run_line(line)


def options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def test_every_option_named_is_one() -> None:
    known = {"--help", "--no-deps", "--workers"}
    for module in COMMANDS.values():
        known |= options(importlib.import_module(module).main)
    unknown = {}
    for page in PAGES:
        inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))
        named = {
            option
            for span in inline
            if "benchmarks" not in span
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)
        }
        if named - known:
            unknown[page.name] = named - known
    assert not unknown


def test_every_target_of_make_named_is_one() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        named = set(re.findall(r"(?:`|^    )make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, page
