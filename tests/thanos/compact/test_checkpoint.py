"""Compact checkpoints: restored to the byte, loaded without dense weights, and refused when they are damaged."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from thanos.compact import (
    BitmaskLinear,
    ColumnPrunedLinear,
    FormatError,
    Sparse24Linear,
    forms,
    read_manifest,
    structure,
)
from thanos.compact import checkpoint as compact
from thanos.linear import is_plain

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[3]


def keep_24(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.view(len(weight), -1, 4)
    smallest = groups.float().abs().argsort(-1)[..., :2]
    return groups.scatter(-1, smallest, 0).view_as(weight)


def test_what_save_pretrained_writes_loads_as_it_was(tmp_path: Path) -> None:
    model = pruned_llama(torch.bfloat16)
    model.save_pretrained(tmp_path / "pruned")
    compact.pack(tmp_path / "pruned", tmp_path / "compact")
    loaded = compact.load(tmp_path / "compact")
    loaded.save_pretrained(tmp_path / "again")
    tokens = torch.arange(24)[None]
    again = compact.load(tmp_path / "again")
    assert torch.equal(again(tokens).logits, loaded(tokens).logits)
    assert isinstance(again.model.layers[0].mlp.up_proj, Sparse24Linear)
    compact.unpack(tmp_path / "again", tmp_path / "plain")
    file = "model.safetensors"
    assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "pruned" / file).read_bytes()
    with pytest.raises(ValueError, match="save it in another directory"):
        loaded.save_pretrained(tmp_path / "compact")
    with pytest.raises(ValueError, match=r"was packed as torch\.bfloat16 and is torch\.float32 now"):
        loaded.float().save_pretrained(tmp_path / "wide")
    assert not (tmp_path / "wide").exists()


def test_falcons_own_linear_layers_are_packed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.FalconForCausalLM(config).eval()
    for block in model.transformer.h:
        for linear in (block.mlp.dense_h_to_4h, block.mlp.dense_4h_to_h, block.self_attention.query_key_value):
            linear.weight.data = keep_24(linear.weight.data)
    model.save_pretrained(tmp_path / "pruned")
    packed = compact.pack(tmp_path / "pruned", tmp_path / "compact")
    assert list(packed.kinds.values()).count("sparse24") == 6
    tokens = torch.arange(24)[None]
    loaded = compact.load(tmp_path / "compact")
    assert torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-5)


def test_a_linear_layer_that_computes_more_is_not_plain() -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    assert not is_plain(Scaled(4, 4))
    assert is_plain(torch.nn.Linear(4, 4))


def keep_half(weight: torch.Tensor) -> torch.Tensor:
    return weight * (torch.rand(weight.shape) < 0.5)  # leaves negative zeros


def keep_columns(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.clone()
    weight[1:, torch.randperm(weight.shape[1])[: weight.shape[1] // 3]] = 0
    return weight


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def pruned_llama(dtype: torch.dtype, tied: bool = False) -> Any:
    model = llama(tied).to(dtype)
    for block in model.model.layers:
        for linear, prune in (
            (block.self_attn.q_proj, keep_24),
            (block.self_attn.o_proj, keep_half),
            (block.mlp.up_proj, keep_24),
            (block.mlp.gate_proj, keep_half),
            (block.mlp.down_proj, keep_columns),
        ):
            linear.weight.data = prune(linear.weight.data)
    model.model.layers[0].mlp.up_proj.weight.data[3] = 1  # an outlier row
    return model


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    pruned_llama(request.param).save_pretrained(tmp_path / "pruned")
    (tmp_path / "pruned" / "pruning.json").write_text('{"method": "thanos"}')
    compact.pack(tmp_path / "pruned", tmp_path / "compact")
    return tmp_path / "pruned", tmp_path / "compact"


def same_files(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        result: torch.Tensor = model(tokens).logits
    return result.float()


def test_every_layer_gets_the_type_of_its_pattern(folders: tuple[Path, Path]) -> None:
    model = compact.load(folders[1])
    block = model.model.layers[0]
    assert type(block.self_attn.q_proj) is Sparse24Linear
    assert type(block.self_attn.o_proj) is BitmaskLinear
    assert type(block.self_attn.k_proj) is torch.nn.Linear
    assert type(block.mlp.up_proj) is Sparse24Linear
    assert block.mlp.up_proj.outlier_rows.tolist() == [3]
    assert type(block.mlp.gate_proj) is BitmaskLinear
    assert type(block.mlp.down_proj) is ColumnPrunedLinear
    assert block.mlp.down_proj.outlier_rows.tolist() == [0]


def test_unpacked_files_are_equal_to_the_byte(folders: tuple[Path, Path], tmp_path: Path) -> None:
    compact.unpack(folders[1], tmp_path / "restored")
    assert same_files(folders[0], tmp_path / "restored")


def test_the_loaded_model_computes_and_generates_the_same(folders: tuple[Path, Path]) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(folders[0], dtype="auto").eval()
    sparse = compact.load(folders[1])
    want, have = logits(dense), logits(sparse)
    limit = 1e-5 if sparse.dtype == torch.float32 else 2e-2
    assert (have - want).abs().max() <= limit * want.abs().max()
    tokens = torch.arange(6)[None]
    made = sparse.generate(tokens, max_new_tokens=5, do_sample=False)
    assert made.shape == (1, 11)
    assert not any(parameter.requires_grad for parameter in sparse.parameters())
    sparse(tokens)  # outside of inference mode, too


def test_no_dense_weight_is_held(folders: tuple[Path, Path]) -> None:
    model = compact.load(folders[1])
    held = {name for name, _ in model.named_parameters()}
    assert "model.layers.0.mlp.up_proj.weight" not in held
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    for module in model.modules():
        if hasattr(module, "weight_bytes"):
            assert module.weight_bytes < module.in_features * module.out_features * module.values.itemsize


@pytest.mark.parametrize("tied", [False, True])
def test_shards_and_tied_embeddings(tied: bool, tmp_path: Path) -> None:
    pruned_llama(torch.bfloat16, tied).save_pretrained(tmp_path / "pruned", max_shard_size="60KB")
    assert (tmp_path / "pruned" / "model.safetensors.index.json").exists()
    compact.pack(tmp_path / "pruned", tmp_path / "compact")
    compact.unpack(tmp_path / "compact", tmp_path / "restored")
    assert same_files(tmp_path / "pruned", tmp_path / "restored")
    model = compact.load(tmp_path / "compact")
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied
    assert isinstance(model.model.layers[1].mlp.down_proj, ColumnPrunedLinear)


def test_transposed_layers_of_gpt2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    dense = transformers.GPT2LMHeadModel(config).eval()
    for block in dense.transformer.h:
        block.mlp.c_fc.weight.data = keep_24(block.mlp.c_fc.weight.data.T.contiguous()).T.contiguous()
        block.mlp.c_proj.weight.data = keep_half(block.mlp.c_proj.weight.data)
    dense.save_pretrained(tmp_path / "pruned")
    compact.pack(tmp_path / "pruned", tmp_path / "compact")
    compact.unpack(tmp_path / "compact", tmp_path / "restored")
    assert same_files(tmp_path / "pruned", tmp_path / "restored")
    sparse = compact.load(tmp_path / "compact")
    assert isinstance(sparse.transformer.h[0].mlp.c_fc, Sparse24Linear)
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=1e-4, atol=1e-5)


def test_a_half_pruned_layer_takes_at_most_three_fifths(tmp_path: Path) -> None:
    for prune in (keep_24, keep_half):
        weight = prune(torch.randn(256, 512, dtype=torch.bfloat16))
        kept = forms.compress(weight, "x.weight", "file", False)
        assert kept is not None
        assert sum(part.nbytes for part in kept[1].values()) <= 0.60 * weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_takes_any_length(dtype: torch.dtype, tmp_path: Path) -> None:
    """Its query heads share key heads, so its layers meet activations of several widths."""
    pruned_llama(dtype).save_pretrained(tmp_path / "pruned")
    compact.pack(tmp_path / "pruned", tmp_path / "compact")
    model = compact.load(tmp_path / "compact")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        for length in (5, 7, 20, 60):
            tokens = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(length))
            have, want = compiled(tokens).logits.float(), model(tokens).logits.float()
            assert (have - want).norm() <= (1e-5 if dtype == torch.float32 else 0.01) * want.norm()


def test_a_model_under_autocast_stays_close(folders: tuple[Path, Path]) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(folders[0])
    with torch.autocast("cpu", torch.bfloat16):
        have, want = logits(compact.load(folders[1])), logits(dense)
    assert (have - want).norm() <= 0.03 * want.norm()


def test_dense_weights_stay_dense() -> None:
    weight = torch.randn(64, 64)
    assert forms.choose(weight) == "dense"
    assert forms.choose(keep_24(weight)) == "sparse24"
    assert forms.choose(keep_columns(weight)) == "columns"
    assert forms.choose(weight * (torch.rand(64, 64) < 0.4)) == "bitmask"
    assert forms.choose(torch.zeros(64, 64)) in ("columns", "bitmask")


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


NAME = "model.layers.0.mlp.gate_proj"
DAMAGES: dict[str, Callable[[Any], Any]] = {
    "version": lambda c: c.update(version=3),
    "format": lambda c: c.update(format="other"),
    "kind": lambda c: c["layers"][NAME].update(kind="sparse24"),
    "unknown kind": lambda c: c["layers"][NAME].update(kind="block"),
    "pattern": lambda c: c["layers"][NAME].update(pattern="2:4"),
    "dtype": lambda c: c["layers"][NAME].update(dtype="float16"),
    "kept": lambda c: c["layers"][NAME].update(kept=c["layers"][NAME]["kept"] + 1),
    "shape": lambda c: c["layers"][NAME].update(shape=[96, 65]),
    "absurd": lambda c: c["layers"][NAME].update(shape=[1 << 40, 1 << 40]),
    "negative": lambda c: c["layers"][NAME].update(outlier_rows=-1),
    "not a number": lambda c: c["layers"][NAME].update(kept="many"),
    "missing key": lambda c: c["layers"][NAME].pop("tensor"),
    "missing layer": lambda c: c["layers"].pop(NAME),
    "elsewhere": lambda c: c["sources"][0].update(file="../compact-00001-of-00001.safetensors"),
    "no file": lambda c: c["sources"].clear(),
    "half a character": lambda c: c["sources"][0].update(header=c["sources"][0]["header"].replace("pt", "\ud800")),
    "no layers": lambda c: c.update(layers=[]),
}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pruned_llama(torch.bfloat16).save_pretrained(tmp_path / "pruned")
    compact.pack(tmp_path / "pruned", tmp_path / "compact")
    return tmp_path / "compact"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_manifest_that_contradicts_the_tensors_is_refused(
    damage: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(packed / "compact.json", DAMAGES[damage])
    monkeypatch.setattr(structure, "build", lambda *_, **__: pytest.fail("something was built"))
    with pytest.raises(FormatError):
        compact.load(packed)
    with pytest.raises(FormatError):
        compact.unpack(packed, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize("where", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(where: int, packed: Path) -> None:
    path = next(packed.glob("compact-*.safetensors"))
    path.write_bytes(path.read_bytes()[:where])
    with pytest.raises(FormatError, match="truncated"):
        compact.load(packed)


def test_a_longer_file_and_a_wild_header_are_refused(packed: Path) -> None:
    path = next(packed.glob("compact-*.safetensors"))
    data = path.read_bytes()
    path.write_bytes(data + b"\0")
    with pytest.raises(FormatError, match="bytes where its header says"):
        read_manifest(packed)
    path.write_bytes(struct.pack("<Q", 1 << 60) + data[8:])
    with pytest.raises(FormatError, match="header"):
        read_manifest(packed)
    (packed / "compact.json").write_text("{")
    with pytest.raises(FormatError, match="JSON"):
        read_manifest(packed)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**9}, {"intermediate_size": 10**12}, {"hidden_size": 32}])
def test_a_configuration_that_contradicts_the_tensors_is_refused(change: dict[str, int], packed: Path) -> None:
    edit(packed / "config.json", lambda content: content.update(change))
    with pytest.raises(ValueError, match="config"):
        compact.load(packed)


def test_bits_that_contradict_the_values_are_refused(packed: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = next(packed.glob("compact-*.safetensors"))
    tensors = load_file(path)
    tensors[f"{NAME}.bits"][0, 0] ^= 1
    save_file(tensors, path)
    with pytest.raises(FormatError, match="bits keep"):
        compact.load(packed)
    with pytest.raises(FormatError, match="bits keep"):
        compact.unpack(packed, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_directories_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no compact\.json"):
        compact.load(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="safetensors"):
        compact.pack(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_commands(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from thanos.commands.pack import main as pack_main
    from thanos.commands.unpack import main as unpack_main

    run = CliRunner().invoke
    result = run(pack_main, [str(folders[0]), "--output", str(tmp_path / "again")])
    assert result.exit_code == 0
    assert "sparse24" in result.output
    result = run(pack_main, [str(folders[0]), "--output", str(tmp_path / "again")])
    assert result.exit_code != 0
    assert "exists" in result.output
    assert run(unpack_main, [str(tmp_path / "again"), "--output", str(tmp_path / "restored")]).exit_code == 0
    assert same_files(folders[0], tmp_path / "restored")
    assert run(unpack_main, [str(folders[0]), "--output", str(tmp_path / "x")]).exit_code != 0


@pytest.mark.parametrize("name", ["pack", "unpack"])
@pytest.mark.parametrize("order", ["import {0}.{1}; first = thanos.{1}", "first = thanos.{1}; import {0}.{1}"])
def test_the_function_stays_a_function_beside_its_command(order: str, name: str) -> None:
    lines = [
        "import thanos, types, thanos.compact",
        order.format("thanos", name),
        f"assert first is thanos.{name} is thanos.compact.{name}",
        f"assert type(thanos.{name}) is types.FunctionType",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("name", ["pack", "unpack"])
def test_the_command_runs_as_a_module(name: str) -> None:
    command = [sys.executable, "-W", "error", "-m", f"thanos.{name}", "--help"]
    shown = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert f"python -m thanos.{name}" in shown.stdout
