"""Mixtures of experts: every layout routed, pruned and saved as it is, each expert as a layer of its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.mixtures import MIXTURES, tiny_mixture
from thanos import prune_model, prune_weight
from thanos.checkpoint import can_convert
from thanos.walk import walk
from thanos.walk.decoder import Layer, find_decoder
from thanos.walk.experts import FusedExperts
from thanos.walk.hessians import InputHessian


def build(family: str) -> Any:
    try:
        model = tiny_mixture(family)
    except AttributeError:
        pytest.skip(f"this version of transformers has no {family}")
    if family in ("gpt_oss", "llama4") and not can_convert():
        pytest.skip(f"Transformers 4 routes {family} otherwise; gpt_oss is refused, llama4 depends on the batch")
    if not can_convert() and not projections(model):
        pytest.skip(f"this version of transformers keeps the experts of {family} as ordinary layers")
    return model


def exact(model: Any) -> Any:
    """The model in float64, which PyTorch's grouped products do not take."""
    if hasattr(model, "_can_set_experts_implementation") and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.double()


def projections(model: nn.Module) -> dict[str, Layer]:
    return {layer.name: layer for block in find_decoder(model).layers for layer in block if layer.experts}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("family", MIXTURES)
def test_every_family_is_pruned_exactly_and_replayed_faithfully(
    family: str, passes: int, token_samples: Tensor
) -> None:
    model = build(family)
    outputs: list[Tensor] = []
    last = find_decoder(model).blocks[-1]
    handle = last.register_forward_hook(
        lambda _, __, output: outputs.append((output if isinstance(output, Tensor) else output[0]).clone())
    )
    report = prune_model(model, token_samples, "0.5", passes=passes, batch_size=4, block_size=16)
    walked = torch.cat(outputs[-1:] if passes == 1 else outputs[-2:])
    outputs.clear()
    with torch.no_grad():
        model(token_samples, use_cache=False)
    handle.remove()
    torch.testing.assert_close(walked, outputs[0], rtol=1e-4, atol=1e-4)
    layers = projections(model)
    assert len(layers) >= 8
    reported = {entry.name: entry for entry in report.layers}
    for name, layer in layers.items():
        assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2 == reported[name].zeros
        assert 0 <= reported[name].pool_share <= 1
        assert (reported[name].pool_share == 1) == (reported[name].tokens == 0)
    routers = [name for name, reason in report.dense.items() if "routes" in reason]
    assert not {name.removesuffix(".weight") for name in routers} & reported.keys()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "llama4", "jetmoe", "dbrx", "granitemoe"])
@pytest.mark.parametrize("experts", ["routed", "all"])
def test_each_expert_is_pruned_on_what_was_routed_to_it(
    family: str, experts: str, token_samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, in float64: the dense block's routing, each expert's tokens, their Hessian blended with the pool's."""
    if family == "granitemoe" and not can_convert():
        pytest.skip("the router of Transformers 4 gives other things, which by_hand does not read")
    model = exact(build(family))
    name, module, arguments = first_experts(model, token_samples)
    wanted = by_hand(module, arguments, experts)
    options = {"passes": 2, "batch_size": len(token_samples), "experts": experts, "exclude": "[^]]$"}
    report = prune_model(model, token_samples, "0.5", **options)
    layers = projections(model)
    tokens = {entry.name: entry.tokens for entry in report.layers}
    assert wanted
    for (parameter, expert), (result, count) in wanted.items():
        full = f"{name}.{parameter}[{expert}]"
        torch.testing.assert_close(layers[full].weight, result, rtol=1e-7, atol=1e-9)
        assert tokens[full] == count


def first_experts(model: nn.Module, samples: Tensor) -> tuple[str, nn.Module, tuple[Tensor, ...]]:
    """The first module with experts, its name, and what it is called with."""
    layer = next(iter(projections(model).values()))
    assert layer.experts is not None
    seen: list[Any] = []
    handle = layer.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    with torch.no_grad():
        model(samples, use_cache=False)
    handle.remove()
    return layer.experts.name, layer.module, seen[0]


def by_hand(module: Any, arguments: Any, mode: str) -> dict[tuple[str, int], tuple[Tensor, int]]:
    kind = type(module).__name__
    with torch.no_grad():
        if kind == "JetMoeParallelExperts":
            inputs, sizes = arguments
            parts = list(inputs.split(sizes if isinstance(sizes, list) else sizes.tolist()))
            return stage("weight", module.weight, [(part, None) for part in parts], inputs, mode, None)
        if kind == "Llama4TextExperts":
            views = arguments[0].view(len(module.down_proj), -1, arguments[0].shape[-1])
            routed = [(view[(view != 0).any(1)], None) for view in views]
            tokens = arguments[0]
        else:
            hidden, index, weights = arguments
            tokens = hidden.reshape(-1, hidden.shape[-1])
            routed = []
            for expert in range(getattr(module, "num_experts", None) or len(module.down_proj)):
                row, slot = (index.view(len(tokens), -1) == expert).nonzero(as_tuple=True)
                routed.append((tokens[row], weights.view(len(tokens), -1)[row, slot]))
        if kind == "DbrxExperts":
            mlp, shape = module.mlp, (len(routed), -1, tokens.shape[1])
            into = {own: getattr(mlp, own).view(shape) for own in ("w1", "v1")}
            out = {"w2": mlp.w2.view(shape).transpose(1, 2)}
        else:
            turned = kind in ("GptOssExperts", "Llama4TextExperts")
            first = "up_proj" if kind == "NemotronHExperts" else "gate_up_proj"
            into, out = {first: getattr(module, first)}, {"down_proj": module.down_proj}
            if turned:
                into = {own: value.transpose(1, 2) for own, value in into.items()}
                out = {own: value.transpose(1, 2) for own, value in out.items()}

        def inner(expert: int, inputs: Tensor) -> Tensor:
            """What enters the second projection, in the family's own words."""
            first = [inputs @ value[expert].T for value in into.values()]
            if kind == "DbrxExperts":
                return mlp.activation_fn(first[0]) * first[1]
            if kind == "NemotronHExperts":
                return module.act_fn(first[0])
            if kind == "GptOssExperts":
                first[0] = first[0] + module.gate_up_proj_bias[expert]
                gate, up = (
                    first[0][:, ::2].clamp(max=module.limit),
                    first[0][:, 1::2].clamp(-module.limit, module.limit),
                )
                return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
            gate, up = first[0].chunk(2, dim=-1)
            return module.act_fn(gate) * up

        results: dict[tuple[str, int], tuple[Tensor, int]] = {}
        for own, value in into.items():
            results |= stage(own, value, [(part, None) for part, _ in routed], tokens, mode, None)
        second = [(inner(e, part), scale) for e, (part, scale) in enumerate(routed)]
        every = [inner(e, tokens) for e in range(len(routed))] if mode == "all" else None
        for own, value in out.items():
            results |= stage(own, value, second, None, mode, every)
        return results


def stage(
    own: str, weights: Tensor, parts: list[Any], everyone: Tensor | None, mode: str, every: list[Tensor] | None
) -> dict[tuple[str, int], tuple[Tensor, int]]:
    def mean(part: Tensor, scale: Tensor | None) -> Tensor:
        mass = torch.ones(len(part), dtype=part.dtype) if scale is None else scale**2
        return (part * mass[:, None]).T @ part / mass.sum()

    if everyone is not None:
        pool = mean(everyone, None)
    else:
        scale = None if parts[0][1] is None else torch.cat([scale for _, scale in parts])
        pool = mean(torch.cat([part for part, _ in parts]), scale)
    results = {}
    for expert, (part, scale) in enumerate(parts):
        if mode == "all":
            part = everyone if every is None else every[expert]
            hessian = mean(part, None)
        elif len(part) == 0:
            hessian = pool
        else:
            kappa = walk.POOL_WEIGHT * len(pool)
            hessian = (len(part) * mean(part, scale) + kappa * pool) / (len(part) + kappa)
        results[own, expert] = prune_weight(weights[expert], hessian, "0.5").weight, len(part)
    return results


def test_the_memory_limit_cuts_experts_into_groups_and_changes_nothing(token_samples: Tensor) -> None:
    models = [exact(build("qwen2_moe")) for _ in range(2)]
    reports = [
        prune_model(model, token_samples, "0.5", passes=2, batch_size=3, memory_limit=limit)
        for model, limit in zip(models, (1 << 30, 20_000), strict=True)
    ]
    assert {entry.name for entry in reports[0].layers} == {entry.name for entry in reports[1].layers}
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("family", "passes"), [("qwen3_moe", 1), ("dbrx", 1), ("qwen3_moe", 2)])
def test_hessians_of_experts_are_forgotten_once_they_are_pruned(
    family: str, passes: int, token_samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass an expert's Hessian lives while it is pruned, in two until then: not as long as its inputs do."""
    model, made, alive = build(family), weakref.WeakSet[InputHessian](), list[int]()
    begin, prune = InputHessian.__init__, walk.prune_layer

    def init(self: InputHessian, first: str) -> None:
        begin(self, first)
        made.add(self)

    def count(*args: Any, **options: Any) -> Any:
        alive.append(sum(one.hessian is not None for one in made))
        return prune(*args, **options)

    monkeypatch.setattr(InputHessian, "__init__", init)
    monkeypatch.setattr(walk, "prune_layer", count)
    prune_model(model, token_samples, "0.5", passes=passes, memory_limit=1)
    assert len(projections(model)) >= 16
    assert max(alive) <= 8  # of one expert, blended with the pool, two pools, and the attention's


def test_an_expert_that_sees_no_token_is_pruned_on_the_pool_and_says_so(token_samples: Tensor) -> None:
    model = build("mixtral")
    for block in model.model.layers:
        block.mlp.gate.weight.data[3] = -100.0 * block.mlp.gate.weight.data[:3].abs().sum(0)
        block.mlp.gate.register_forward_hook(never_the_last)
    report = prune_model(model, token_samples, "2:4")
    last = [entry for entry in report.layers if entry.name.endswith("[3]")]
    assert len(last) == 4
    assert all((entry.tokens, entry.pool_share, entry.sparsity) == (0, 1.0, 0.5) for entry in last)


def never_the_last(_: nn.Module, __: Any, output: Any) -> Any:
    logits, weights, index = output
    return logits, weights, index % 3


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "nemotron_h"])
def test_what_is_saved_loads_in_the_layout_it_came_in(family: str, tmp_path: Path, token_samples: Tensor) -> None:
    build(family).save_pretrained(tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    prune_model(model, token_samples, "0.5")
    model.save_pretrained(tmp_path / "pruned")
    assert names(tmp_path / "pruned") == names(tmp_path / "dense")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    with torch.no_grad():
        assert torch.equal(again(token_samples).logits, model(token_samples).logits)
    for name, layer in projections(again).items():
        assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2, name


def names(folder: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            found |= {name: reader.get_slice(name).get_shape() for name in reader.keys()}  # noqa: SIM118
    return found


def test_excluding_sees_the_names_of_experts(token_samples: Tensor) -> None:
    model = build("mixtral")
    report = prune_model(model, token_samples, "0.5", exclude=r"experts\.down_proj\[[02]\]")
    assert report.excluded == [
        f"model.layers.{block}.mlp.experts.down_proj[{expert}]" for block in (0, 1) for expert in (0, 2)
    ]


def test_the_module_is_left_as_it_was_found(token_samples: Tensor) -> None:
    model = build("mixtral")
    implementation = model.config._experts_implementation

    def stop(_: Any) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        prune_model(model, token_samples, "0.5", progress=stop)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert model.config._experts_implementation == implementation


def test_experts_whose_forward_is_not_called_are_refused(token_samples: Tensor) -> None:
    model = build("mixtral")
    for block in model.model.layers:
        experts = block.mlp.experts
        block.mlp.forward = lambda hidden, experts=experts: (
            type(experts)
            .forward(
                experts, hidden[0], torch.zeros(hidden.shape[1], 2, dtype=torch.int64), torch.ones(hidden.shape[1], 2)
            )[None]
            .expand_as(hidden)
        )
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: its block runs without calling it"):
        prune_model(model, token_samples[:1], "0.5")


def test_an_unknown_layout_is_refused_before_any_work(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    class Strange(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.matrices = nn.Parameter(torch.randn(*shape))

    for shape in ((4, 32, 32), (400, 32)):
        model = tiny_model("llama")
        model.model.layers[1].strange = Strange(*shape)
        with pytest.raises(ValueError, match=r"layers\.1\.strange\.matrices .* in Strange is no linear layer"):
            prune_model(model, token_samples, "0.5")


def test_a_norm_behind_the_experts_is_honoured(token_samples: Tensor) -> None:
    model = build("mixtral")
    experts: Any = model.model.layers[0].mlp.experts
    experts.has_post_expert_norm, experts.post_expert_norm = True, nn.LayerNorm(32)
    adapter = FusedExperts("x", experts)
    inputs = torch.randn(5, 48)
    wanted = experts.post_expert_norm(inputs @ experts.down_proj[1].T)
    torch.testing.assert_close(adapter.project(1, 1, inputs), wanted)
