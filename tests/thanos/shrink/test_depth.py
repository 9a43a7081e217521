"""Which blocks go: against trying them all, in memory and from files, and what is written of a streamed model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from tests.marks import streams
from thanos.checkpoint import BlockFiles
from thanos.pattern import Axis, Shrink
from thanos.prune import main
from thanos.shrink import StreamedDepth, shrink_model
from thanos.shrink.depth import depth_to_remove
from thanos.shrink.skip import Chain
from thanos.walk.decoder import find_decoder
from thanos.walk.divergence import divergence
from thanos.walk.store import from_files
from thanos.walk.stream import load_streamed

Tiny = Callable[..., Any]


@pytest.fixture
def deep(tiny_model: Tiny) -> Any:
    """Six blocks of unequal weight."""
    model = tiny_model("llama", num_hidden_layers=6)
    with torch.no_grad():
        for index, block in enumerate(model.model.layers):
            for name in ("mlp.down_proj", "self_attn.o_proj"):
                block.get_submodule(name).weight *= (3, 1, 8, 0.3, 5, 2)[index]
    return model


@pytest.fixture
def saved(deep: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """The same in several files."""
    folder = tmp_path / "deep"
    deep.save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def tried(model: Any, samples: torch.Tensor, removed: list[int]) -> float:
    """The mean divergence from the dense model without these blocks."""
    chain = Chain(model, find_decoder(model).blocks, samples[:1, :4])
    with torch.no_grad():
        wanted, found = (chain.logits(samples, some).log_softmax(-1) for some in ([], removed))
    return sum(divergence(one, other) for one, other in zip(wanted, found, strict=True)) / len(samples)


def greedy(
    model: Any, samples: torch.Tensor, count: int, protected: tuple[int, ...] = ()
) -> tuple[list[int], list[float]]:
    removed: list[int] = []
    scores: list[float] = []
    for _ in range(count):
        found = {n: tried(model, samples, [*removed, n]) for n in range(6) if n not in (*removed, *protected)}
        removed.append(min(found, key=lambda n: found[n]))
        scores.append(found[removed[-1]])
    return removed, scores


@pytest.mark.parametrize("protected", [(), (0, 3)])
def test_blocks_go_one_at_a_time_and_all_are_scored_anew(
    deep: Any, token_samples: torch.Tensor, protected: tuple[int, ...]
) -> None:
    blocks, scores = greedy(deep, token_samples, 3, protected)
    told: list[tuple[int, int]] = []
    with torch.no_grad():
        found = depth_to_remove(
            deep, find_decoder(deep), token_samples, 3, protected, tell=lambda *counts: told.append(counts)
        )
    assert found.blocks == blocks
    assert found.divergences == pytest.approx(scores, rel=1e-3)
    total = sum(6 - len(protected) - done for done in range(3))
    assert told == [(number, total) for number in range(1, total + 1)]


def test_samples_that_do_not_fit_at_once_are_judged_in_parts(
    deep: Any, token_samples: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        whole = depth_to_remove(deep, find_decoder(deep), token_samples, 2)
        monkeypatch.setattr("thanos.shrink.depth.available_memory", lambda _: 0)
        parts = depth_to_remove(deep, find_decoder(deep), token_samples, 2)
    assert parts.blocks == whole.blocks
    assert parts.divergences == pytest.approx(whole.divergences, rel=1e-4)


@streams
def test_from_files_one_block_is_in_memory_and_each_is_read_once_a_removal(
    saved: Path, deep: Any, token_samples: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = shrink_model(deep, token_samples, "depth:2").report.options
    model, files = load_streamed(str(saved))
    decoder = find_decoder(model)
    read, inside = [], [0, 0]
    load, drop = BlockFiles.load, BlockFiles.drop

    def loading(self: Any, block: Any) -> None:
        read.append(block)
        inside[0] += 1
        inside[1] = max(inside)
        load(self, block)

    def dropping(self: Any, block: Any) -> None:
        inside[0] -= 1
        drop(self, block)

    monkeypatch.setattr(BlockFiles, "load", loading)
    monkeypatch.setattr(BlockFiles, "drop", dropping)
    with torch.no_grad():
        found = depth_to_remove(model, decoder, token_samples, 2, stores=from_files(files))
        once = len(read)
        depth_to_remove(model, decoder, token_samples, 3, stores=from_files(files))
    assert found.blocks == wanted["removed_blocks"]
    assert found.divergences == pytest.approx(wanted["divergences"], rel=1e-4)
    assert inside == [0, 1]
    assert len(read) - 2 * once == 6 - 2


@streams
def test_a_streamed_model_is_written_as_one_in_memory_is(
    saved: Path, token_samples: torch.Tensor, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    words = "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun " * 3
    text.write_text("".join(json.dumps({"text": f"{words}{number}"}) + "\n" for number in range(30)))
    outputs = {}
    for stream in ("yes", "no"):
        outputs[stream] = tmp_path / stream
        result = CliRunner().invoke(
            main,
            [str(word) for word in (
                saved, "--output", outputs[stream], "--pattern", "depth:2", "--calibration", text, "--samples", 4,
                "--sequence-length", 32, "--evaluate", text, "--stream", stream,
            )],
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "depth:2: 6 blocks become 4" in result.output
        assert ("streaming the model" in result.output) == (stream == "yes")
    models = {stream: transformers.AutoModelForCausalLM.from_pretrained(path) for stream, path in outputs.items()}
    assert models["yes"].config.num_hidden_layers == 4
    state = models["no"].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in models["yes"].state_dict().items())
    assert models["yes"].state_dict().keys() == state.keys()
    reports = {stream: json.loads((path / "pruning.json").read_text()) for stream, path in outputs.items()}
    for key in ("dense", "pruned"):
        assert reports["yes"]["perplexity"][key] == pytest.approx(reports["no"]["perplexity"][key], rel=1e-4)
    assert reports["yes"]["effective_sparsity"] == pytest.approx(reports["no"]["effective_sparsity"])
    assert reports["yes"]["options"]["removed_blocks"] == reports["no"]["options"]["removed_blocks"]
    assert reports["yes"]["size"]["bytes"]["after"] < reports["yes"]["size"]["bytes"]["before"]
    kept = {path.name for path in outputs["yes"].iterdir()}
    assert {"tokenizer.json", "generation_config.json", "config.json", "model.safetensors.index.json"} <= kept


@streams
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "gpt_neox", "qwen3"])
def test_other_names_and_lists_of_blocks_are_streamed_too(
    tiny_model: Tiny, token_samples: torch.Tensor, tmp_path: Path, family: str
) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    shrunk = shrink_model(model, token_samples, "depth:1").model
    streamed, files = load_streamed(str(tmp_path / "dense"))
    pattern = Shrink((Axis("depth", count=1),))
    plan = StreamedDepth(streamed, files, tmp_path / "dense", token_samples, pattern)
    plan.run()
    (tmp_path / "small").mkdir()
    plan.save(tmp_path / "small")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_samples).logits, shrunk(token_samples).logits)


@streams
@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--pattern", "channels:0.25", "--stream", "yes"], "--stream yes is no option of the pattern channels:0.25"),
        (["--pattern", "depth:1@2", "--stream", "yes"], "--stream yes is no option of the pattern depth:1@2"),
        (["--pattern", "depth:2", "--stream", "yes", "--dtype", "bfloat16"], "a streamed model keeps its dtype"),
        (["--pattern", "depth:6", "--stream", "yes"], "leaves none of 6 blocks"),
    ],
)
def test_what_is_not_streamed(saved: Path, tmp_path: Path, options: list[str], match: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n\n" * 40)
    arguments = [saved, "--output", tmp_path / "out", "--calibration", text, "--samples", 2, "--sequence-length", 16]
    result = CliRunner().invoke(main, [*map(str, arguments), *options])
    assert result.exit_code not in (0, None)
    assert match in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
