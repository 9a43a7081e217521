"""Sparse layers of int8 values: close to the layer they are made of, the same on every instruction set."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from thanos.compact import BitmaskLinear, Int8BitmaskLinear, Int8Sparse24Linear, Sparse24Linear
from thanos_kernels import select_n_of_m
from thanos_kernels.sparse_int8 import GROUP, scales_of

KINDS = {Int8BitmaskLinear: BitmaskLinear, Int8Sparse24Linear: Sparse24Linear}
Kind = type[Int8BitmaskLinear] | type[Int8Sparse24Linear]


def pruned(kind: Kind, rows: int, columns: int, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, dtype=dtype)
    weight = linear.weight.data
    sparse24 = kind is Int8Sparse24Linear
    weight.masked_fill_(select_n_of_m(weight.float().abs(), 2, 4) if sparse24 else torch.rand(weight.shape) < 0.5, 0)
    return linear


def product(layer: nn.Module, inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        result: Tensor = layer(inputs)
    return result.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(5, 16), (64, 144), (33, 256), (9, 4144), (7, 70), (3, 200), (1, 1)])
def test_every_instruction_set(tier: str, kind: Kind, dtype: torch.dtype, rows: int, columns: int) -> None:
    if kind is Int8Sparse24Linear and columns % 16:
        pytest.skip("2:4 takes multiples of 16 columns")
    linear = pruned(kind, rows, columns, dtype)
    layer = kind.from_linear(linear)
    decoded, weight = layer.weight.detach().double(), linear.weight.detach().double()
    assert decoded.float().eq(0)[weight == 0].all()
    step = scales_of(weight.to(dtype)).double().repeat_interleave(GROUP, 1)[:, :columns]
    rounding = torch.finfo(dtype).eps * weight.abs() + 1e-7  # of the decoded weight, and of the scale
    assert ((decoded - weight).abs() <= 0.51 * step + rounding + 2**-11 * weight.abs()).all()
    for tokens in (1, 3, 4, 9, 60):
        inputs = torch.randn(tokens, columns, dtype=dtype)
        want = inputs.double() @ decoded.T + linear.bias.detach().double()
        assert (product(layer, inputs) - want).norm() <= 0.015 * want.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_a_sparse_one_is_that_of_the_dense_one(kind: Kind) -> None:
    linear = pruned(kind, 24, 160, torch.bfloat16)
    want, have = kind.from_linear(linear), kind.from_sparse(KINDS[kind].from_linear(linear))
    for (name, left), right in zip(want.named_buffers(), have.buffers(), strict=True):
        assert left.equal(right), name
    with pytest.raises(TypeError, match="takes a"):
        kind.from_sparse(have)


@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_five_bits_a_weight(kind: Kind) -> None:
    layer = kind.from_linear(pruned(kind, 64, 4096, torch.bfloat16))
    assert 8 * layer.weight_bytes / (64 * 4096) < 5.2


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_copies_and_state(kind: Kind) -> None:
    linear = pruned(kind, 24, 160, torch.float32)
    layer, inputs = kind.from_linear(linear), torch.randn(2, 160)
    want = product(layer, inputs)
    assert product(copy.deepcopy(layer), inputs).equal(want)
    there_and_back = copy.deepcopy(layer).to(torch.bfloat16)
    assert product(there_and_back, inputs.bfloat16()).sub(want).norm() <= 0.02 * want.norm()
    assert there_and_back.to(torch.float32).scales.equal(layer.scales)  # never rounded
    state = layer.state_dict()
    assert state["scales"].dtype == torch.float16
    assert state["values"].dtype == torch.int8
    other = kind(160, 24)
    other.load_state_dict(state)
    assert product(other, inputs).equal(want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [float("nan"), 0.0, -1.0, float("inf")])
def test_scales_that_are_not_positive_are_refused(kind: Kind, wrong: float) -> None:
    layer = kind.from_linear(pruned(kind, 8, 160, torch.float32))
    state = layer.state_dict()
    state["scales"] = state["scales"].clone()
    state["scales"][3, 1] = wrong
    with pytest.raises(RuntimeError, match="scales must be positive and finite"):
        kind(160, 8).load_state_dict(state)
    state["scales"] = state["scales"][:, :1]
    with pytest.raises(RuntimeError, match=r"size mismatch|scales of shape"):
        kind(160, 8).load_state_dict(state)


def test_codes_that_name_no_two_columns_are_refused() -> None:
    layer = Sparse24Linear.from_linear(pruned(Int8Sparse24Linear, 8, 160, torch.float32))
    state = layer.state_dict()
    state["metadata"][2, 1] = 0
    with pytest.raises(RuntimeError, match="code of a 2:4 group"):
        Sparse24Linear(160, 8).load_state_dict(state)


def test_what_does_not_fit_a_scale_is_refused() -> None:
    linear = pruned(Int8BitmaskLinear, 4, 64, torch.float32)
    linear.weight.data[1, 5] = 1e9
    with pytest.raises(ValueError, match="too large for int8"):
        Int8BitmaskLinear.from_linear(linear)


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_is_not_finite_gives_nan(tier: str, kind: Kind) -> None:
    layer, inputs = kind.from_linear(pruned(kind, 8, 160, torch.float32)), torch.randn(1, 160)
    inputs[0, 7] = float("nan")
    assert product(layer, inputs).isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_compiler_takes_it(kind: Kind) -> None:
    layer, inputs = kind.from_linear(pruned(kind, 8, 160, torch.float32)), torch.randn(3, 160)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert product(compiled, inputs).equal(product(layer, inputs))
