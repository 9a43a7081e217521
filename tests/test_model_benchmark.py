"""The model benchmark: it says where the time goes, and notices what would make a comparison unfair."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import engines, memory, peers
from thanos.checkpoint import load_model, save_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> engines.Job:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, dtype="float32",
    )  # fmt: skip
    save_model(transformers.LlamaForCausalLM(config), None, folder / "model")
    engines.save_warm_model(folder / "model", folder / "warm")
    samples, text = torch.randint(96, (4, 32)), torch.randint(96, (64,))
    return engines.Job("thanos", "thanos", "0.5", folder / "model", folder / "warm", samples, text, 32)


def test_a_run_tells_its_parts_apart_and_scores_what_it_wrote(job: engines.Job) -> None:
    begin = time.perf_counter()
    outcome = engines.run(job)
    assert 0 < outcome.total < time.perf_counter() - begin
    assert outcome.split.keys() == {"input_output", "forward", "hessian", "prune", "other"}
    assert all(seconds >= 0 for seconds in outcome.split.values())
    assert outcome.sparsity == 0.5
    assert outcome.perplexity is not None
    assert outcome.perplexity > 1


def test_what_an_engine_does_not_tell_apart_is_other(job: engines.Job, tmp_path: Path) -> None:
    def prune(*_: Any) -> dict[str, float]:
        time.sleep(0.3)
        return {"prune": 0.1}

    split = engines._prune_directory(prune, job.warm, tmp_path / "pruned", job.samples)
    assert split["prune"] == 0.1
    assert split["other"] >= 0.2, "what pruning took beyond the part that is told"
    assert split["input_output"] > 0
    assert (tmp_path / "pruned" / "config.json").exists()


def test_the_small_model_has_the_same_widths(job: engines.Job) -> None:
    model, warm = load_model(str(job.model)).state_dict(), load_model(str(job.warm)).state_dict()
    assert warm.keys() < model.keys()
    assert {name: tensor.shape for name, tensor in warm.items()} == {name: model[name].shape for name in warm}


def test_an_engine_that_changes_a_dense_weight_is_refused(job: engines.Job) -> None:
    dense, pruned = load_model(str(job.model)), load_model(str(job.model))
    pruned.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
    assert 0 < engines.pruned_share(dense, pruned, "this") < 0.5
    pruned.model.norm.weight.data[0] += 1
    with pytest.raises(ValueError, match=r"this changed model\.norm\.weight"):
        engines.pruned_share(dense, pruned, "this")


def test_the_peer_takes_n_of_m_as_we_do() -> None:
    assert peers._sparsity("0.5") == {"sparsity": 0.5}
    assert peers._sparsity("4:8") == {"sparsity": 0.5, "mask_structure": "4:8"}


@pytest.mark.skipif(bool(peers.missing()), reason=peers.missing())
def test_the_peer_prunes_the_same_layers(job: engines.Job, tiny_tokenizer: Any) -> None:
    for folder in (job.model, job.warm):
        tiny_tokenizer.save_pretrained(folder)
    assert engines.run(replace(job, engine="llmcompressor", method="wanda", pattern="2:4")).sparsity == 0.5


def test_peak_memory_sees_what_is_freed_again() -> None:
    size = 1 << 26
    assert memory.peak_bytes(lambda: torch.ones(size, dtype=torch.uint8).sum()) >= 0.9 * size
    assert memory.peak_bytes(lambda: None) < 0.1 * size


def test_peak_memory_counts_from_the_base() -> None:
    base = memory.resident_bytes() - (1 << 20)
    assert memory.peak_bytes(lambda: None, base=base) >= 0.9 * (1 << 20)
