"""The walk through a model: any family, exact sparsity, a faithful replay, and refusals before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.conftest import FAMILIES
from thanos import prune_model
from thanos.walk.decoder import find_decoder
from thanos.walk.events import Progress
from thanos.walk.memory import PeakMemory


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def last_block_outputs(block: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """What ``block`` returned each time while ``run()`` ran."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append((output if isinstance(output, Tensor) else output[0]).clone())

    handle = block.register_forward_hook(keep)
    run()
    handle.remove()
    return outputs


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_is_pruned_exactly_and_replayed_faithfully(
    family: str, passes: int, tiny_model: Callable[..., Any], token_samples: Tensor
) -> None:
    model = tiny_model(family)
    before = snapshot(model)
    decoder = find_decoder(model)
    last = decoder.blocks[-1]
    reports: list[Any] = []

    def prune() -> None:
        reports.append(prune_model(model, token_samples, "0.5", passes=passes, batch_size=4, block_size=16))

    walked = last_block_outputs(last, prune)
    real = last_block_outputs(last, lambda: model(token_samples, use_cache=False))
    final = torch.cat(walked[-1:] if passes == 1 else walked[-2:])
    torch.testing.assert_close(final, real[0], rtol=1e-4, atol=1e-4)

    report = reports[0]
    layers = {layer.name: layer for block in decoder.layers for layer in block}
    pruned = {entry.name for entry in report.layers}
    assert pruned | report.dense.keys() == layers.keys()
    for entry in report.layers:
        weight = layers[entry.name].weight
        assert tuple(weight.shape) == entry.shape
        assert int((weight == 0).sum()) == weight.numel() // 2
        assert entry.sparsity == 0.5
        assert 0 < entry.relative_loss < 1
    parameters = {f"{name}.weight" for name in pruned}
    for name, value in model.state_dict().items():
        assert (name in parameters) != torch.equal(value, before[name]), name


@pytest.mark.parametrize("family", ["Bart", "MBart", "Pegasus", "Marian", "Blenderbot", "PLBart", "TrOCR"])
def test_decoders_of_encoder_decoders_are_pruned_alone(family: str, token_samples: Tensor) -> None:
    sizes = {"decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=96, d_model=32, is_decoder=True, is_encoder_decoder=False, **sizes, **tokens
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    report = prune_model(model, token_samples, "0.5")
    weight = model.model.decoder.layers[1].fc1.weight
    assert int((weight == 0).sum()) == weight.numel() // 2
    assert {layer.name.rpartition(".")[2] for layer in report.layers} >= {"q_proj", "out_proj", "fc1", "fc2"}
    assert all("encoder_attn" in name for name in report.dense)


def test_layers_with_the_same_input_share_a_hessian(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    for passes in (1, 2):
        report = prune_model(tiny_model("llama"), token_samples, "0.5", passes=passes)
        shared = {entry.name.split("layers.0.")[-1]: entry.shared_with for entry in report.layers[:7]}
        assert shared["self_attn.k_proj"] == shared["self_attn.v_proj"] == "model.layers.0.self_attn.q_proj"
        assert shared["mlp.up_proj"] == "model.layers.0.mlp.gate_proj"
        own = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
        assert all(shared[name] is None for name in own)


def test_parallel_blocks_share_across_attention_and_mlp(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    report = prune_model(tiny_model("cohere"), token_samples, "0.5")
    shared = {entry.name.split("layers.0.")[-1]: entry.shared_with for entry in report.layers[:7]}
    assert shared["mlp.gate_proj"] == "model.layers.0.self_attn.q_proj"


def test_two_passes_do_not_depend_on_the_batches(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    reports = [
        prune_model(tiny_model("llama").double(), token_samples, "0.5", passes=2, batch_size=size) for size in (1, 4, 6)
    ]
    for other in reports[1:]:
        for one, two in zip(reports[0].layers, other.layers, strict=True):
            assert one.loss == pytest.approx(two.loss, rel=1e-9)


def test_activations_keep_the_models_dtype(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    model = tiny_model("llama").bfloat16()
    seen: list[torch.dtype] = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    prune_model(model, token_samples, "2:4", passes=1)
    assert set(seen) == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    groups = model.model.layers[2].mlp.down_proj.weight.unflatten(1, (-1, 4))
    assert bool(((groups == 0).sum(-1) >= 2).all())


def test_output_head_is_never_run(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    model = tiny_model("llama")
    runs: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: runs.append(1))
    prune_model(model, token_samples, "0.5")
    assert not runs


def test_model_is_left_as_it_was_found_but_for_its_weights(
    tiny_model: Callable[..., Any], token_samples: Tensor
) -> None:
    model = tiny_model("llama").train()
    state = torch.get_rng_state()
    prune_model(model, token_samples, "0.5")
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    with pytest.raises(RuntimeError, match="stop here"):
        prune_model(model, token_samples, "0.5", progress=fail)
    assert model.training
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__


def fail(_: Progress) -> None:
    raise RuntimeError("stop here")


def test_excluded_layers_stay_dense_and_count(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    report = prune_model(model, token_samples, "0.5", exclude=r"layers\.0\.|down_proj")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{entry.name}.weight" for entry in report.layers}
    assert len(report.layers) == 12
    assert len(report.excluded) == 9
    zeros = sum(int((value == 0).sum()) for name, value in model.state_dict().items() if "proj" in name)
    total = sum(value.numel() for name, value in model.state_dict().items() if "proj" in name)
    assert report.effective_sparsity == pytest.approx(zeros / total)
    with pytest.raises(ValueError, match="leaves no layer"):
        prune_model(model, token_samples, "0.5", exclude=".")
    with pytest.raises(ValueError, match="no regular expression"):
        prune_model(model, token_samples, "0.5", exclude="(")


def test_outlier_rows_lower_the_effective_sparsity(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    report = prune_model(tiny_model("gpt_neox"), token_samples, "2:4", outlier_fraction=0.25)
    assert report.nominal_sparsity == 0.5
    assert report.effective_sparsity == 0.375


def test_structured_pruning_removes_whole_columns(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    model = tiny_model("gpt2")
    prune_model(model, token_samples, "structured:0.25")
    rows = model.transformer.h[1].mlp.c_fc.weight.detach()  # Conv1D: in features x out features
    assert int((rows == 0).all(1).sum()) == 8


def test_memory_limit_decides_the_walk(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    assert prune_model(tiny_model("llama"), token_samples, "0.5", memory_limit=1).passes == 2
    assert prune_model(tiny_model("llama"), token_samples, "0.5", memory_limit=1 << 40).passes == 1


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    with PeakMemory() as memory:
        values = torch.ones(1000)
        for _ in range(5):
            values = torch.exp(values)
            values.view(10, 100).add_(1)
    assert memory.peak == 8000


def test_progress_names_each_layer_before_and_after(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    events: list[Progress] = []
    report = prune_model(tiny_model("opt"), token_samples, "0.5", progress=events.append)
    names = [entry.name for entry in report.layers]
    assert [event.layer for event in events[::2]] == [event.layer for event in events[1::2]] == names
    assert all(event.relative_loss is None for event in events[::2])
    assert [event.relative_loss for event in events[1::2]] == [entry.relative_loss for entry in report.layers]
    assert events[-1].done == events[-1].layers == len(names)


class Experts(nn.Module):
    """A mixture of experts of linear layers; the last expert never gets a token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        choice = (flat[:, 0] > 0).long()
        output = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            output[choice == index] = expert(flat[choice == index])
        return output.view_as(hidden)


@pytest.mark.parametrize("passes", [1, 2])
def test_experts_without_tokens_stay_dense(passes: int, tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp = Experts(32)
    before = snapshot(model)
    report = prune_model(model, token_samples, "0.5", passes=passes, batch_size=4)
    unused = [f"model.layers.{index}.mlp.experts.2" for index in range(3)]
    assert list(report.dense) == unused
    for name in unused:
        assert torch.equal(model.state_dict()[f"{name}.weight"], before[f"{name}.weight"])
    tokens = {entry.name: entry.tokens for entry in report.layers}
    assert tokens["model.layers.0.mlp.experts.0"] + tokens["model.layers.0.mlp.experts.1"] == token_samples.numel()


def refused(model: Any, samples: Tensor, match: str, **options: Any) -> None:
    before = snapshot(model)
    options = {"pattern": "0.5", **options}
    with pytest.raises(ValueError, match=match):
        prune_model(model, samples, **options)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_layers_that_do_not_fit_are_refused_before_any_work(
    tiny_model: Callable[..., Any], token_samples: Tensor
) -> None:
    model = tiny_model("llama", intermediate_size=50)  # the down projections come last in each block
    refused(model, token_samples, r"layers\.0\.mlp\.down_proj.*width", pattern="2:4")
    refused(tiny_model("llama"), token_samples, "must not exceed 1", pattern="structured:0.6", outlier_fraction=0.5)
    refused(tiny_model("llama"), token_samples, "method must be one of", method="nosuch")
    refused(tiny_model("llama"), token_samples, "block size", block_size=0)
    refused(tiny_model("llama"), token_samples, "passes must be 1 or 2", passes=3)
    refused(tiny_model("llama"), token_samples, "damping", damping=-1.0)


def test_nan_and_infinity_name_the_layer(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    refused(model, token_samples, r"layers\.1\.mlp\.up_proj.*NaN or infinity")
    for passes in (1, 2):
        model = tiny_model("llama")
        model.model.layers[0].post_attention_layernorm.weight.data[3] = float("inf")
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj.*activations.*NaN or infinity"):
            prune_model(model, token_samples, "0.5", passes=passes)


def test_samples_that_do_not_fit_are_refused(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    model = tiny_model("llama")
    refused(model, torch.zeros(2, 65, dtype=torch.int64), "longer than the 64")
    refused(model, torch.full((2, 8), 96), "token 96")
    refused(model, torch.zeros(0, 8, dtype=torch.int64), "non-empty")
    refused(model, torch.zeros(2, 8), "token ids")
    refused(model, torch.zeros(2, 8, dtype=torch.int64, device="meta"), "on the meta device")
    refused(model, torch.ones(2, 8, dtype=torch.int64).to_sparse(), r"layout torch\.sparse_coo")
    for ragged in ([[1, 2], [3]], [torch.ones(2), torch.ones(3)], ["a"]):
        with pytest.raises(TypeError, match="lists of them of one length, not list of others"):
            prune_model(model, ragged, "0.5")  # type: ignore[arg-type]


def test_a_list_of_tensors_is_samples(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    first, second = tiny_model("llama"), tiny_model("llama")
    prune_model(first, token_samples, "0.5")
    prune_model(second, list(token_samples), "0.5")  # type: ignore[arg-type]
    assert torch.equal(first.model.layers[2].mlp.up_proj.weight, second.model.layers[2].mlp.up_proj.weight)


def test_a_model_that_does_not_run_is_said_not_to(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    model = tiny_model("llama")
    model.model.layers[0].half()
    refused(model, token_samples, r"LlamaForCausalLM does not run on the samples, before anything is pruned \(Runtime")


def test_unsupported_models_are_refused(token_samples: Tensor) -> None:
    both = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    refused(transformers.T5ForConditionalGeneration(both), token_samples, "encoder-decoder")


def test_blocks_that_are_no_chain_are_refused(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    class Scaled(transformers.LlamaModel):
        """Does something to the hidden states between its blocks."""

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            hidden = self.embed_tokens(input_ids)
            tables = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
            for block in self.layers:
                hidden = 1.5 * block(hidden, position_embeddings=tables)
            return (self.norm(hidden),)

    model = tiny_model("llama")
    model.model.__class__ = Scaled
    refused(model, token_samples, "more than one tensor of hidden states")
