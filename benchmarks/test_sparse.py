"""Sparse linear layers and 2:4 packing against PyTorch's dense layer and a plain copy, in the same run.

``pytest benchmarks/test_sparse.py -s`` prints a table and fails where a ratio misses its target. Dense and sparse take
turns; figures are ratios of medians, which carry over between machines better than seconds.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.clock import in_turns
from thanos.compact import BitmaskLinear, ColumnPrunedLinear, Int8BitmaskLinear, Int8Sparse24Linear, Sparse24Linear
from thanos.compact.base import SparseLinear
from thanos_kernels import native, pack_24, select_n_of_m, sparse

ROWS, COLUMNS = 4096, 11008  # 90 MB in bfloat16: larger than the last-level cache

pytestmark = pytest.mark.skipif(not native.available(), reason="needs the C++ extension")


def pruned(kind: type[SparseLinear]) -> nn.Linear:
    linear = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16)
    weight = linear.weight.data
    if kind is Sparse24Linear:
        weight.masked_fill_(select_n_of_m(weight.float().abs(), 2, 4), 0)
    elif kind is BitmaskLinear:
        weight.masked_fill_(torch.rand(weight.shape) < 0.5, 0)
    else:
        weight[:, torch.randperm(COLUMNS)[: int(0.3 * COLUMNS)]] = 0
    return linear


@pytest.mark.parametrize(
    ("kind", "tokens", "at_least"),
    [
        (Sparse24Linear, 1, 1.5),
        (BitmaskLinear, 1, 1.5),
        (ColumnPrunedLinear, 1, 1.3),
        (Sparse24Linear, 512, 1 / 1.15),
        (BitmaskLinear, 512, 1 / 1.15),
        (ColumnPrunedLinear, 512, 1.25),
    ],
)
def test_speed_against_the_dense_layer(
    record: Callable[..., None], finding: Callable[[str], None], kind: type[SparseLinear], tokens: int, at_least: float
) -> None:
    torch.manual_seed(0)
    linear = pruned(kind)
    layer = kind.from_linear(linear)
    inputs = torch.randn(tokens, COLUMNS, dtype=torch.bfloat16)
    with torch.inference_mode():
        dense, sparse = in_turns([lambda: linear(inputs), lambda: layer(inputs)], 51 if tokens == 1 else 11)
    share, name = layer.weight_bytes / linear.weight.nbytes, f"{kind.__name__}, {tokens} tokens"
    shape = {"rows": ROWS, "columns": COLUMNS, "tokens": tokens, "dtype": "bfloat16"}
    times = {"seconds": sparse, "dense_seconds": dense, "times_as_fast": dense / sparse, "at_least": at_least}
    record(name, kind="sparse", form=kind.__name__, **shape, **times, bytes_share=share)
    finding(f"{name}: {dense / sparse:.2f} times as fast as dense ({dense * 1e3:.1f} ms), {share:.3f} of its bytes")
    assert dense / sparse >= at_least


@pytest.mark.parametrize(
    ("kind", "rounded"), [(Sparse24Linear, Int8Sparse24Linear), (BitmaskLinear, Int8BitmaskLinear)]
)
def test_speed_of_int8_values_against_bfloat16(
    finding: Callable[[str], None],
    kind: type[SparseLinear],
    rounded: type[Int8Sparse24Linear] | type[Int8BitmaskLinear],
) -> None:
    """One token; THANOS_ISA=avx2 in the environment measures that instruction set."""
    torch.manual_seed(0)
    layer = kind.from_linear(pruned(kind))
    int8, inputs = rounded.from_sparse(layer), torch.randn(1, COLUMNS, dtype=torch.bfloat16)
    with torch.inference_mode():
        plain, whole = in_turns([lambda: layer(inputs), lambda: int8(inputs)], 51)
    finding(f"{rounded.__name__}, 1 token: {plain / whole:.2f} times as fast as {kind.__name__} ({plain * 1e3:.2f} ms)")
    assert plain / whole >= 1.5


@pytest.mark.parametrize("kind", [Sparse24Linear, BitmaskLinear])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_where_kernels_and_the_library_cross(
    kind: type[SparseLinear], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prints what FEW_TOKENS in thanos_kernels/sparse.py was set by."""
    torch.manual_seed(0)
    layer = kind.from_linear(pruned(kind)).to(dtype)

    def limited(most: int) -> None:
        monkeypatch.setitem(sparse.FEW_TOKENS, dtype, most)
        layer(inputs)

    for tokens in (4, 8, 16, 24, 32, 48):
        inputs = torch.randn(tokens, COLUMNS, dtype=dtype)
        with torch.inference_mode():
            kernel, library = in_turns([partial(limited, tokens), partial(limited, 0)], 7)
        print(f"\n{kind.__name__}, {dtype}, {tokens} tokens: kernel / library {kernel / library:.2f}", end="")


def test_packing_runs_at_memory_speed() -> None:
    weight = pruned(Sparse24Linear).weight.data
    copy, packing = in_turns([weight.clone, lambda: pack_24(weight)], 11)
    print(f"\npack_24: {packing / copy:.2f} times a copy of the same bytes")
    assert packing <= 2 * copy
