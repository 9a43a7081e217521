"""2:4 packing against PyTorch's own converter, against the reference, and there and back."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from elsewhere import HERE, two_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as oracle

from thanos_kernels import native, pack, pack_24, unpack_24
from thanos_kernels.pack import Packed24

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.int8]
BACKENDS = ["reference"] + (["native"] if native.available() else [])


def weight_24(rows: int, columns: int, dtype: torch.dtype, seed: int = 0, group: int = 4) -> torch.Tensor:
    """Groups that keep from none to half of their values, every pattern among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 100, (rows, columns), generator=generator).to(dtype)
    ranks = torch.rand(rows, columns // group, group, generator=generator).argsort(-1)
    kept = torch.randint(0, group // 2 + 1, (rows, columns // group, 1), generator=generator)
    return (values.view(rows, -1, group) * (ranks < kept)).view(rows, columns)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (64, 128), (96, 192), (160, 1024)])
def test_cutlass_equals_pytorch(dtype: torch.dtype, rows: int, columns: int, backend: str) -> None:
    weight = weight_24(rows, columns, dtype, group=2 if dtype == torch.float32 else 4)
    values, metadata = oracle(weight)
    packed = pack_24(weight, "cutlass", backend=backend)
    assert same_bits(packed.values, values)
    assert same_bits(packed.metadata, metadata)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pattern_of_a_group_is_coded_as_by_pytorch(backend: str) -> None:
    flags = torch.arange(16)[:, None] >> torch.arange(4) & 1
    kept = flags[flags.sum(1) <= 2]
    weight = kept.repeat(32 * 16, 1)[: 32 * 16].reshape(32, 64).to(torch.float16)
    values, metadata = oracle(weight)
    packed = pack_24(weight, "cutlass", backend=backend)
    assert same_bits(packed.values, values)
    assert same_bits(packed.metadata, metadata)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_major_groups_from_the_low_bits(backend: str) -> None:
    weight = torch.zeros(1, 16, dtype=torch.float16)
    weight[0, [0, 1, 4, 6, 9, 11, 14, 15]] = torch.arange(1, 9, dtype=torch.float16)
    packed = pack_24(weight, backend=backend)
    assert packed.values.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert packed.metadata.tolist() == [[(4 | 8 << 4 | 13 << 8 | 14 << 12) - (1 << 16)]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cusparselt_is_cutlass_tiles_in_blocks_of_four_by_two(dtype: torch.dtype, backend: str) -> None:
    rows, columns = 256, 384
    weight = weight_24(rows, columns, dtype)
    packed = pack_24(weight, "cusparselt", backend=backend)
    metadata = packed.metadata.flatten()
    for down in range(rows // 32):
        for across in range(columns // 32):
            tile = weight[32 * down : 32 * down + 32, 32 * across : 32 * across + 32].contiguous()
            index = down // 4 * 8 + across // 2 * 8 * (rows // 128) + down % 4 + across % 2 * 4
            expected = pack_24(tile, "cutlass", backend="reference").metadata.flatten()
            assert torch.equal(metadata[64 * index : 64 * index + 64], expected)
    assert packed.values.untyped_storage().data_ptr() == packed.metadata.untyped_storage().data_ptr()
    whole = packed.buffer.flatten()
    assert same_bits(whole[: rows * columns // 2].view(rows, -1), packed.values)
    assert same_bits(whole[rows * columns // 2 :].view(torch.int16), metadata)


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(["row_major", "cutlass", "cusparselt"]),
    dtype=st.sampled_from(DTYPES),
    down=st.integers(1, 3),
    across=st.integers(1, 5),
    seed=st.integers(0, 1000),
    backend=st.sampled_from(BACKENDS),
)
def test_round_trip(layout: str, dtype: torch.dtype, down: int, across: int, seed: int, backend: str) -> None:
    if layout == "cusparselt" and dtype == torch.int8:
        return
    row, column = {"row_major": (7, 32), "cutlass": (32, 64), "cusparselt": (128, 128)}[layout]
    weight = weight_24(down * row, across * column, dtype, seed)
    packed = pack_24(weight, layout, backend=backend)
    assert same_bits(unpack_24(packed, backend=backend), weight)
    assert same_bits(packed.metadata, pack_24(weight, layout, backend="reference").metadata)
    assert same_bits(unpack_24(packed, backend="reference"), weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_keeps_two_of_four_where_it_is_not_one_of_two(backend: str) -> None:
    weight = torch.zeros(32, 64)
    weight[:, :2] = 1
    packed = pack_24(weight, "cutlass", backend=backend)
    assert same_bits(packed.metadata, pack_24(weight.half(), "cutlass", backend=backend).metadata)
    assert torch.equal(unpack_24(packed, backend=backend), weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["row_major", "cutlass"])
def test_the_first_offending_group_is_named(layout: str, dtype: torch.dtype, backend: str) -> None:
    weight = weight_24(64, 128, dtype)
    weight[41, 8:12] = 1
    weight[17, 100:104] = 1
    weight[17, 123] = weight[17, 120] = weight[17, 121] = 1
    with pytest.raises(ValueError, match=r"not 2:4: row 17, group 25 \(columns 100 to 103\) keeps 4 values"):
        pack_24(weight, layout, backend=backend)


@pytest.mark.parametrize(
    ("layout", "dtype", "shape", "numbers"),
    [
        ("row_major", torch.float16, (4, 24), "multiple of 16, not 4 x 24"),
        ("row_major", torch.int8, (4, 48), "multiple of 32, not 4 x 48"),
        ("cutlass", torch.bfloat16, (48, 64), "rows are a multiple of 32 .* not 48 x 64"),
        ("cutlass", torch.bfloat16, (32, 48), "columns a multiple of 32, not 32 x 48"),
        ("cutlass", torch.int8, (24, 64), "rows are a multiple of 16"),
        ("cutlass", torch.int8, (16, 96), "columns a multiple of 64"),
        ("cutlass", torch.float32, (32, 24), "columns a multiple of 16"),
        ("cusparselt", torch.float16, (128, 64), "rows are a multiple of 128 and columns a multiple of 128"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(layout: str, dtype: torch.dtype, shape: tuple, numbers: str) -> None:
    with pytest.raises(ValueError, match=numbers):
        pack_24(torch.zeros(shape, dtype=dtype), layout)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        pack_24(torch.zeros(32, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="matrix"):
        pack_24(torch.zeros(32))
    with pytest.raises(ValueError, match="layout"):
        pack_24(torch.zeros(32, 32), "columns")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="int8"):
        pack_24(torch.zeros(128, 128, dtype=torch.int8), "cusparselt")


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_metadata_are_refused(backend: str) -> None:
    packed = pack_24(weight_24(4, 64, torch.float16))
    packed.metadata[2, 1] = 0x0E4E
    with pytest.raises(ValueError, match="row 2, group 7"):
        unpack_24(packed, backend=backend)
    with pytest.raises(ValueError, match="values of a packed"):
        unpack_24(Packed24(packed.values[:, 1:], packed.metadata, "row_major", (4, 64)), backend=backend)
    with pytest.raises(ValueError, match="metadata of a packed"):
        unpack_24(Packed24(packed.values, packed.metadata.int(), "row_major", (4, 64)), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_are_values_and_views_are_taken(backend: str) -> None:
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    weight[3, 5], weight[3, 6] = float("nan"), float("inf")
    assert same_bits(unpack_24(pack_24(weight, backend=backend), backend=backend), weight)
    offset = torch.cat((torch.ones(1), weight.flatten())).to(torch.bfloat16)[1:].view(64, 64)
    for view in (offset, weight.T.contiguous().T, weight.repeat(1, 2)[:, 64:]):
        assert torch.equal(unpack_24(pack_24(view, backend=backend), backend=backend).isnan(), view.isnan())


@pytest.mark.skipif(not native.available(), reason="the extension is not built")
def test_cuda_launches_on_the_device_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[str, int, Any]] = []
    with two_devices() as (current, moved):

        def kernel(name: str) -> Any:
            return lambda *arguments: launched.append((name, current.index, arguments[-1]))

        extension = SimpleNamespace(cuda=True, cuda_pack_24=kernel("pack"), cuda_unpack_24=kernel("unpack"))
        monkeypatch.setattr(pack, "_EXTENSION", extension)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=device))
        packed = pack_24(moved(torch.zeros(32, 64, dtype=torch.bfloat16)), "cutlass", backend="cuda")
        assert packed.values.device == packed.metadata.device == HERE
        assert unpack_24(packed, backend="cuda").device == HERE
        assert current.index == 0
    assert launched == [("pack", 1, HERE), ("unpack", 1, HERE)]


@pytest.mark.skipif(not native.available(), reason="the extension is not built")
def test_packing_asks_for_no_default() -> None:
    weight = weight_24(32, 64, torch.bfloat16)
    with torch.device("meta"):
        for backend in BACKENDS:
            assert same_bits(unpack_24(pack_24(weight, backend=backend), backend=backend), weight)


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@cuda
@pytest.mark.parametrize("layout", ["row_major", "cutlass", "cusparselt"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu(layout: str, dtype: torch.dtype) -> None:
    if layout == "cusparselt" and dtype == torch.int8:
        pytest.skip("cusparselt takes no int8")
    weight = weight_24(256, 512, dtype)
    here, there = pack_24(weight, layout), pack_24(weight.cuda(), layout)
    assert same_bits(here.values, there.values.cpu())
    assert same_bits(here.metadata, there.metadata.cpu())
    assert same_bits(unpack_24(there).cpu(), weight)


@cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cusparselt_equals_its_own_compressor(dtype: torch.dtype) -> None:
    if not torch.backends.cusparselt.is_available():
        pytest.skip("needs cuSPARSELt")
    weight = weight_24(256, 512, dtype).cuda()
    packed = pack_24(weight, "cusparselt")
    assert same_bits(packed.buffer.flatten(), torch._cslt_compress(weight).flatten())
    other = torch.randn(512, 64, device="cuda").to(dtype)
    product = torch._cslt_sparse_mm(packed.buffer, other)
    torch.testing.assert_close(product, weight @ other)
