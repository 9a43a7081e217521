"""Sparse linear layers stand in for ``nn.Linear``: same results, same interface."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from thanos.compact import BitmaskLinear, ColumnPrunedLinear, Sparse24Linear
from thanos.compact.base import SparseLinear
from thanos_kernels import native
from thanos_kernels import sparse as kernels

KINDS = [Sparse24Linear, BitmaskLinear, ColumnPrunedLinear]
DTYPES = [torch.float32, torch.bfloat16]


def pruned(
    kind: type[SparseLinear], columns: int, rows: int, dtype: torch.dtype, *, bias: bool = True, outliers: int = 0
) -> nn.Linear:
    """A linear layer whose weight has the pattern of ``kind``, its first rows outliers."""
    linear = nn.Linear(columns, rows, bias=bias)
    weight = linear.weight.data
    if kind is Sparse24Linear:
        groups = weight.view(rows, -1, 4)
        dense = groups.scatter(2, torch.rand(groups.shape).argsort(-1)[..., :2], 0).view_as(weight)
    elif kind is BitmaskLinear:
        dense = weight * (torch.rand(rows, columns) < torch.rand(rows, 1))
    else:
        dense = weight.clone()
        dense[:, torch.randperm(columns)[: columns // 3]] = 0
    dense[:outliers] = weight[:outliers]
    linear.weight.data = dense
    return linear.to(dtype)


def agree(have: torch.Tensor, linear: nn.Linear, inputs: torch.Tensor) -> None:
    """Within float32 (or one rounding to bfloat16) of the product in float64, measured by the sum of absolute terms."""
    assert have.dtype == inputs.dtype
    weight, x = linear.weight.double(), inputs.double()
    want, scale = x @ weight.T, x.abs() @ weight.abs().T
    if linear.bias is not None:
        want, scale = want + linear.bias.double(), scale + linear.bias.double().abs()
    limit = 1e-5 * want.abs() + 1e-6 * scale
    if inputs.dtype == torch.bfloat16:
        limit = 2**-8 * want.abs() + 2**-16 * scale + 1e-6
    assert ((have.double() - want).abs() <= limit + 1e-12).all()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(
    tokens=st.sampled_from([1, 2, 4, 7, 8, 13, 40]),
    words=st.integers(1, 20),
    rows=st.integers(1, 40),
    outliers=st.integers(0, 3),
    bias=st.booleans(),
)
def test_result(
    kind: type[SparseLinear], dtype: torch.dtype, tokens: int, words: int, rows: int, outliers: int, bias: bool
) -> None:
    columns = 16 * words + (0 if kind is Sparse24Linear else words % 3)
    linear = pruned(kind, columns, rows, dtype, bias=bias, outliers=min(outliers, rows // 3))
    inputs = torch.randn(tokens, columns).to(dtype)
    agree(kind.from_linear(linear)(inputs), linear, inputs)


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set(kind: type[SparseLinear], dtype: torch.dtype) -> None:
    for columns, rows in ((16, 3), (48, 5), (272, 33), (1040, 130)):
        linear = pruned(kind, columns, rows, dtype, outliers=rows // 8)
        layer = kind.from_linear(linear)
        assert torch.equal(layer.weight, linear.weight)
        for tokens in (1, 5, 9):
            inputs = torch.randn(tokens, columns).to(dtype)
            agree(layer(inputs), linear, inputs)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_comes_back_and_special_values_stay(kind: type[SparseLinear], dtype: torch.dtype) -> None:
    linear = pruned(kind, 80, 24, dtype, outliers=2)
    linear.weight.data[5, linear.weight.data[5].nonzero()[0]] = float("inf")
    layer = kind.from_linear(linear)
    assert torch.equal(layer.weight, linear.weight)
    assert (layer.in_features, layer.out_features) == (80, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_not_disturbed_by_its_neighbours(kind: type[SparseLinear]) -> None:
    linear = pruned(kind, 80, 24, torch.float32)
    inputs = torch.randn(3, 80)
    before = kind.from_linear(linear)(inputs)
    linear.weight.data[7][linear.weight.data[7] != 0] = float("nan")
    after = kind.from_linear(linear)(inputs)
    assert after[:, 7].isnan().all()
    others = torch.arange(24) != 7
    assert torch.equal(after[:, others], before[:, others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 1, 50)])
def test_leading_dimensions(kind: type[SparseLinear], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    linear = pruned(kind, 64, 24, dtype, outliers=1)
    layer = kind.from_linear(linear)
    inputs = torch.randn(*shape, 64).to(dtype)
    assert layer(inputs).shape == (*shape, 24)
    agree(layer(inputs), linear, inputs)
    if inputs.dim() == 3:
        strided = inputs.transpose(0, 1)
        agree(layer(strided), linear, strided)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_state_loads_into_a_new_layer(kind: type[SparseLinear], assign: bool) -> None:
    layer = kind.from_linear(pruned(kind, 96, 40, torch.bfloat16, outliers=3))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = kind(96, 40, dtype=torch.bfloat16)
    assert not other.weight.count_nonzero()
    other.load_state_dict(torch.load(file), assign=assign)
    inputs = torch.randn(5, 96).to(torch.bfloat16)
    assert torch.equal(other(inputs), layer(inputs))
    assert repr(other) == repr(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_independent_and_conversions_convert(kind: type[SparseLinear]) -> None:
    linear = pruned(kind, 96, 40, torch.float32, outliers=3)
    layer = kind.from_linear(linear)
    inputs = torch.randn(5, 96)
    want = layer(inputs)
    other = copy.deepcopy(layer)
    other.get_buffer("values").zero_()
    other.bias.zero_()
    assert torch.equal(layer(inputs), want)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    agree(half(inputs.bfloat16()), copy.deepcopy(linear).to(torch.bfloat16), inputs.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_it_is(kind: type[SparseLinear]) -> None:
    layer = kind.from_linear(pruned(kind, 96, 40, torch.bfloat16, bias=False))
    assert "in_features=96, out_features=40, bias=False, dtype=bfloat16" in repr(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_misuse_is_refused_with_a_sentence(kind: type[SparseLinear]) -> None:
    layer = kind.from_linear(pruned(kind, 64, 24, torch.float32))
    with pytest.raises(RuntimeError, match="has no backward"):
        layer(torch.randn(2, 64, requires_grad=True))
    with torch.no_grad():
        layer(torch.randn(2, 64, requires_grad=True))
    with pytest.raises(ValueError, match="in_features=64"):
        layer(torch.randn(2, 63))
    with pytest.raises(TypeError, match="bfloat16"):
        layer(torch.randn(2, 64).bfloat16())
    with pytest.raises(TypeError, match="Conv2d"):
        kind.from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match="float64"):
        kind.from_linear(nn.Linear(16, 16).double())


@pytest.mark.parametrize("tokens", [0, 3, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_right(kind: type[SparseLinear], tokens: int) -> None:
    linear = pruned(kind, 96, 70, torch.float32, outliers=2)
    layer = kind.from_linear(linear).double()
    inputs = torch.randn(tokens, 96, dtype=torch.float64)
    torch.testing.assert_close(layer(inputs), linear.double()(inputs), rtol=1e-13, atol=1e-13)
    assert layer.weight.equal(linear.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_that_cannot_be_are_refused_and_undone(kind: type[SparseLinear]) -> None:
    layer, inputs = kind.from_linear(pruned(kind, 64, 24, torch.float32, outliers=1)), torch.randn(3, 64)
    want = layer(inputs)
    for convert, words in (
        (lambda: layer.to(torch.float8_e4m3fn), "not torch.float8_e4m3fn: restore the dense model"),
        (lambda: layer.type(torch.float32), r"is torch.int64 and cannot become torch.float32: .*\.to\(dtype\)"),
    ):
        with pytest.raises(TypeError, match=words):
            convert()
        assert layer(inputs).equal(want)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_its_dtype(kind: type[SparseLinear], tokens: int, dtype: torch.dtype) -> None:
    linear = pruned(kind, 96, 70, dtype, outliers=2)
    layer, inputs = kind.from_linear(linear), torch.randn(tokens, 96)
    exact = inputs.double() @ linear.weight.double().T + linear.bias.double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for given in (inputs, inputs.bfloat16(), inputs.half()):
            result = layer(given)
            assert result.dtype == linear(given).dtype == torch.bfloat16
            torch.testing.assert_close(result.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_one_compiled_graph_serves_every_length(kind: type[SparseLinear]) -> None:
    layer = kind.from_linear(pruned(kind, 64, 24, torch.float32, outliers=1))
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    torch.compiler.reset()
    compiled = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for tokens in (5, 20, 100, 2):
            inputs = torch.randn(3, tokens, 64)
            assert compiled(inputs).equal(layer(inputs))
    assert graphs == 1


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_without_memory(kind: type[SparseLinear]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert kind(64, 24, device="meta")(torch.empty(2, 5, 64, device="meta")).shape == (2, 5, 24)
    layer = kind.from_linear(pruned(kind, 64, 24, torch.float32))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(2, 64)).shape == (2, 24)


class Renamed(nn.Linear):
    """Another name for the same product."""


class Doubled(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_subclass_counts_where_it_computes_the_same(kind: type[SparseLinear]) -> None:
    linear, inputs = pruned(kind, 64, 24, torch.float32), torch.randn(3, 64)
    linear.__class__ = Renamed
    agree(kind.from_linear(linear)(inputs), linear, inputs)
    linear.__class__ = Doubled
    with pytest.raises(TypeError, match="not Doubled with a forward of its own"):
        kind.from_linear(linear)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_another_dtype_are_refused(kind: type[SparseLinear]) -> None:
    """The kernels read memory: half as much of it, or twice, is no error that they could see."""
    layer = kind.from_linear(pruned(kind, 64, 24, torch.float32, outliers=1))
    state = layer.state_dict()
    new = kind(64, 24)
    new.load_state_dict({**state, "bias": state["bias"].bfloat16()}, assign=True)
    with pytest.raises(TypeError, match=r"a part of the layer is torch\.bfloat16"):
        new(torch.randn(2, 64))
    name = next(name for name, tensor in state.items() if not tensor.is_floating_point())
    with pytest.raises(RuntimeError, match=f"{name} must be torch.int"):
        kind(64, 24).load_state_dict({**state, name: state[name].to(torch.int8)}, assign=True)


def test_damaged_state_is_refused() -> None:
    layer = BitmaskLinear.from_linear(pruned(BitmaskLinear, 70, 24, torch.float32))
    state = layer.state_dict()
    for name, value in (("values", state["values"][1:]), ("bits", state["bits"] | 1 << 40)):
        with pytest.raises(RuntimeError, match="bits"):
            BitmaskLinear(70, 24).load_state_dict({**state, name: value})
    column = ColumnPrunedLinear.from_linear(pruned(ColumnPrunedLinear, 64, 24, torch.float32, outliers=2))
    state = column.state_dict()
    with pytest.raises(RuntimeError, match="columns must increase strictly"):
        ColumnPrunedLinear(64, 24).load_state_dict({**state, "columns": state["columns"] + 64})
    with pytest.raises(RuntimeError, match="outlier"):
        ColumnPrunedLinear(64, 24).load_state_dict({**state, "outlier_rows": state["outlier_rows"][:1]})


def test_a_dense_weight_is_not_24() -> None:
    with pytest.raises(ValueError, match=r"not 2:4: 24 of its 24 rows .* row 0 the first"):
        Sparse24Linear.from_linear(nn.Linear(64, 24))
    with pytest.raises(ValueError, match="multiple of 16, not 24"):
        Sparse24Linear.from_linear(nn.Linear(24, 24))


@pytest.mark.parametrize("kind", KINDS)
def test_outlier_rows_are_found_anywhere(kind: type[SparseLinear]) -> None:
    linear = pruned(kind, 64, 40, torch.float32)
    dense = torch.randn(64)
    linear.weight.data[[0, 17, 39]] = dense
    layer = kind.from_linear(linear)
    if kind is not BitmaskLinear:
        assert layer.get_buffer("outlier_rows").tolist() == [0, 17, 39]
    inputs = torch.randn(3, 64)
    agree(layer(inputs), linear, inputs)


@pytest.mark.parametrize("kind", [Sparse24Linear, BitmaskLinear])
def test_half_a_weight_takes_at_most_three_fifths(kind: type[SparseLinear]) -> None:
    linear = pruned(Sparse24Linear, 1024, 256, torch.bfloat16)
    assert kind.from_linear(linear).weight_bytes <= 0.60 * linear.weight.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_are_multiplied_in_tiles(kind: type[SparseLinear], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_TILE_BYTES", 64 * 96 * 4)
    linear = pruned(kind, 96, 200, torch.float32, outliers=5)
    inputs = torch.randn(60, 96)
    agree(kind.from_linear(linear)(inputs), linear, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_extension(kind: type[SparseLinear], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    linear = pruned(kind, 80, 24, torch.float32, outliers=2)
    inputs = torch.randn(3, 80)
    layer = kind.from_linear(linear)
    agree(layer(inputs), linear, inputs)
    assert torch.equal(layer.weight, linear.weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda(kind: type[SparseLinear]) -> None:
    linear = pruned(kind, 512, 256, torch.bfloat16, outliers=32).cuda()
    inputs = torch.randn(100, 512, device="cuda").bfloat16()
    torch.testing.assert_close(kind.from_linear(linear)(inputs), linear(inputs), rtol=2e-2, atol=2e-2)
