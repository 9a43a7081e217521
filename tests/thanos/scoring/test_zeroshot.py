"""Zero-shot accuracy, checked against log-likelihoods computed by hand and against lm-eval's own model class."""

from __future__ import annotations

import json
import math
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zero_shot_files import documents, write_task

from tests.marks import SHARED
from thanos.scoring.zeroshot import TASKS, Average, TaskScore, ZeroShot, load_tasks, zero_shot

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")

REAL = SHARED / "data" / "zeroshot"


LONG: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 256},
    "gpt2": {"n_positions": 256},
    "opt": {"max_position_embeddings": 256},
    "gemma2": {"max_position_embeddings": 256, "sliding_window": 8},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All seven tasks, eight documents each."""
    for task in TASKS:
        write_task(tmp_path / "tasks", task)
    return tmp_path / "tasks"


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Of the continuation, from a forward of this one text."""
    before, tokens = len(tokenizer.encode(context)), tokenizer.encode(context + continuation)
    with torch.no_grad():
        scores = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(float(scores[place - 1, tokens[place]]) for place in range(before, len(tokens)))


def by_hand(task: str, document: dict[str, Any]) -> tuple[list[tuple[str, str]], int]:
    """The (prompt, answer) pairs of a document, and which is right."""
    match task:
        case "winogrande":
            before, after = document["sentence"].split("_")
            options = [document["option1"], document["option2"]]
            return [(before + option, f" {after.strip()}") for option in options], int(document["answer"]) - 1
        case "boolq":
            prompt = f"{document['passage']}\nQuestion: {document['question']}?\nAnswer:"
            return [(prompt, " no"), (prompt, " yes")], document["label"]
        case "piqa":
            prompt = f"Question: {document['goal']}\nAnswer:"
            return [(prompt, f" {document[key]}") for key in ("sol1", "sol2")], document["label"]
        case _:
            prompt, choices = f"Question: {document['question']}\nAnswer:", document["choices"]
            right = choices["label"].index(document["answerKey"])
            return [(prompt, f" {choice}") for choice in choices["text"]], right


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "mamba", "gemma2"])
def test_right_answers_are_those_a_brute_force_finds(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: Path, family: str
) -> None:
    model = tiny_model(family, **LONG.get(family, {}))
    tasks = ("winogrande", "boolq", "piqa", "arc_easy")
    scores = zero_shot(model, tiny_tokenizer, tasks, data=folder).tasks
    for task in tasks:
        right = 0
        for document in documents(task, 8):
            pairs, answer = by_hand(task, document)
            likely = [log_likelihood(model, tiny_tokenizer, *pair) for pair in pairs]
            right += likely.index(max(likely)) == answer
        assert scores[task].accuracy == right / 8, task


def test_log_likelihoods_are_those_of_lm_eval(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's own class for Hugging Face models needs accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from thanos.scoring.likelihood import Scorer

    model = tiny_model("llama")  # takes 64 tokens, fewer than the longest prompt here: both cut it from the left
    pairs = [("the quick", " fox"), ("the quick", " dog sleeps"), ("the quick", " fox"), ("", " sun sleeps")]
    pairs += [("dog and fox " * 40, " sun"), ("brown ", " fox"), ("jumps over", " the lazy dog and then the dog")]
    requests = [
        Instance("loglikelihood", doc={}, arguments=pair, idx=index, metadata=("x", index, 1))
        for index, pair in enumerate(pairs)
    ]
    expected = HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    for batch_size in (None, 1, 3):
        found = Scorer(model, tiny_tokenizer, batch_size).loglikelihood(requests)
        assert [likely for likely, _ in found] == pytest.approx([likely for likely, _ in expected], rel=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_batches_change_nothing_and_progress_counts_documents(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: Path
) -> None:
    model = tiny_model("llama").train()
    tasks = load_tasks(TASKS, folder)
    seen: list[tuple[str, int, int]] = []
    together = zero_shot(model, tiny_tokenizer, tasks, progress=lambda *step: seen.append(step))
    assert together == zero_shot(model, tiny_tokenizer, tasks, batch_size=1)
    assert together == zero_shot(model, tiny_tokenizer, data=folder, batch_size=5)
    assert model.training
    for task in TASKS:
        done = [step[1] for step in seen if step[0] == task]
        assert done == sorted(done)
        assert (done[0], done[-1]) == (0, 8)
    assert {step[2] for step in seen} == {8}


def test_a_batch_that_does_not_fit_is_halved(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    expected = zero_shot(model, tiny_tokenizer, ["piqa"], data=folder)
    forward, sizes = model.forward, []

    def cramped(input_ids: torch.Tensor, logits_to_keep: int = 0, use_cache: bool = False) -> Any:
        if input_ids.numel() > 200:
            raise torch.OutOfMemoryError
        sizes.append(input_ids.numel())
        return forward(input_ids=input_ids, logits_to_keep=logits_to_keep, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", cramped)
    assert zero_shot(model, tiny_tokenizer, ["piqa"], data=folder) == expected
    assert len(sizes) > 1
    with pytest.raises(torch.OutOfMemoryError):
        zero_shot(model, tiny_tokenizer, ["piqa"], data=folder, batch_size=16)


def test_limit_takes_the_first_documents(tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: Path) -> None:
    model = tiny_model("llama")
    lines = (folder / "piqa.jsonl").read_text().splitlines(keepends=True)
    few = folder.parent / "few"
    few.mkdir()
    (few / "piqa.jsonl").write_text("".join(lines[:3]))
    limited = zero_shot(model, tiny_tokenizer, ["piqa"], data=folder, limit=3)
    assert limited == zero_shot(model, tiny_tokenizer, ["piqa"], data=few)
    assert limited.tasks["piqa"].documents == 3
    assert zero_shot(model, tiny_tokenizer, ["piqa"], data=folder, limit=99).tasks["piqa"].documents == 8
    assert zero_shot(model, tiny_tokenizer, ["piqa"], data=folder, limit=1).tasks["piqa"].stderr is None
    for wrong in ({"limit": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1, not 0"):
            zero_shot(model, tiny_tokenizer, ["piqa"], data=folder, **wrong)


def test_standard_errors(tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: Path) -> None:
    found = zero_shot(tiny_model("llama"), tiny_tokenizer, data=folder)
    for score in found.tasks.values():
        expected = math.sqrt(score.accuracy * (1 - score.accuracy) / (score.documents - 1))
        assert score.stderr == pytest.approx(expected, abs=1e-12)
    made = ZeroShot({"piqa": TaskScore(0.5, 0.03, "acc", 10), "boolq": TaskScore(0.7, 0.04, "acc", 1000)})
    assert made.average == pytest.approx((0.6, 0.025))
    assert made.to_dict() == {
        "tasks": {
            "piqa": {"accuracy": 0.5, "stderr": 0.03, "metric": "acc", "documents": 10},
            "boolq": {"accuracy": 0.7, "stderr": 0.04, "metric": "acc", "documents": 1000},
        },
        "average": {"accuracy": pytest.approx(0.6), "stderr": pytest.approx(0.025)},
    }
    assert ZeroShot({"piqa": TaskScore(1.0, None, "acc", 1)}).average == Average(1.0, None)


def test_normalised_accuracy_is_given_where_lm_eval_has_it(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: Path
) -> None:
    scores = zero_shot(tiny_model("llama"), tiny_tokenizer, data=folder).tasks
    without = {task for task, score in scores.items() if score.accuracy_norm is None}
    assert without == {"winogrande", "boolq"}
    assert {score.metric for score in scores.values()} == {"acc"}


def test_a_compact_model_scores_as_its_dense_twin(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: Path, tmp_path: Path
) -> None:
    from thanos.compact import load, pack
    from thanos_kernels import select_n_of_m

    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data.masked_fill_(select_n_of_m(module.weight.data.abs(), 2, 4), 0)
    model.save_pretrained(tmp_path / "dense")
    assert set(pack(tmp_path / "dense", tmp_path / "compact").kinds.values()) - {"dense"}
    compact = load(tmp_path / "compact")
    assert zero_shot(compact, tiny_tokenizer, data=folder) == zero_shot(model, tiny_tokenizer, data=folder)


def test_local_files_need_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded = load_tasks(TASKS, folder)
    assert list(loaded.tasks) == list(TASKS)
    assert loaded.left_out == ()


def test_tasks_without_a_file_are_left_out_only_when_all_are_asked_for(tmp_path: Path) -> None:
    write_task(tmp_path, "piqa")
    loaded = load_tasks(TASKS, tmp_path)
    assert list(loaded.tasks) == ["piqa"]
    assert loaded.left_out == tuple(task for task in TASKS if task != "piqa")
    with pytest.raises(ValueError, match=r"holds no file boolq.jsonl for the task boolq"):
        load_tasks(["piqa", "boolq"], tmp_path)


def test_a_folder_without_any_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file winogrande.jsonl"):
        load_tasks(TASKS, tmp_path)
    with pytest.raises(ValueError, match="there is no directory"):
        load_tasks(TASKS, tmp_path / "none")


def test_tasks_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no task 'mmlu'; the tasks are winogrande, "):
        load_tasks(["piqa", "mmlu"], tmp_path)
    with pytest.raises(ValueError, match="no tasks were asked for"):
        load_tasks([], tmp_path)


def test_without_lm_eval_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"need lm-eval .*pip install '\.\[eval\]'"):
        load_tasks(["piqa"], tmp_path)


def test_without_a_hub_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**_: Any) -> None:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"cannot read the tasks from the Hugging Face hub \(Couldn't reach it\)"):
        load_tasks(["piqa"])


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared is not there")
def test_the_real_files(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    loaded = load_tasks(TASKS, REAL)
    assert loaded.left_out == ("hellaswag",)
    scores = zero_shot(tiny_model("llama"), tiny_tokenizer, loaded, limit=2)
    assert [score.documents for score in scores.tasks.values()] == [2] * 6
    assert json.loads(json.dumps(scores.to_dict()))["average"]["accuracy"] == pytest.approx(scores.average.accuracy)


def test_scores_do_not_depend_on_the_default_device(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: Path
) -> None:
    model = tiny_model("llama", **LONG["llama"])
    expected = zero_shot(model, tiny_tokenizer, ["piqa"], data=folder)
    with torch.device("meta"):
        assert zero_shot(model, tiny_tokenizer, ["piqa"], data=folder) == expected
