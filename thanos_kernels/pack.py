"""2:4 packing: two values of every four and where they stood (DESIGN section "2:4 formats", docs/format.md).

A group of four columns keeps two values at positions i0 < i1; a group with fewer nonzeros is filled up with zeros at
free positions. The four bits ``i0 | i1 << 2`` of a group, groups from left to right, fill words of metadata from the
low bits: four groups an int16, for int8 weights eight groups an int32.

Layouts differ in where those words lie:

* ``row_major``: by row and column.
* ``cutlass``: as ``torch.sparse._semi_structured_conversions.sparse_semi_structured_from_dense_cutlass`` orders them.
* ``cusparselt``: tiles of 32 rows x 2 words, each ordered as in ``cutlass``; values and metadata share one buffer.

Tensor cores take float32 as 1:2, not 2:4. So ``cutlass`` packs a float32 weight that keeps at most one of every pair as
PyTorch does (a pair counts as a group of four halves: b/8 words a row); any other float32 weight gets the metadata of
the 16-bit types (b/16 words a row), which stores it but which no tensor core reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from thanos_kernels import device, native

Layout = Literal["row_major", "cutlass", "cusparselt"]

# Indexed by four flags, the first weight's the lowest: the code PyTorch chooses, and whether at most two are set.
_CODES = (14, 8, 9, 4, 14, 8, 9, 4, 14, 12, 13, 4, 14, 12, 13, 4)
_EXTENSION: Any = vars(native)["_C"]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # PyTorch rewrites NaNs when it moves 16-bit floats
_NONE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Packed24:
    """A packed weight of shape (c, b).

    Attributes:
        values: (c, b/2), the weight's dtype.
        metadata: (c, b/16) int16, or (c, b/32) int32 for int8 (see the module for float32 in ``cutlass``).
        layout: ``"row_major"``, ``"cutlass"`` or ``"cusparselt"``; in the last, both are views of one buffer.
        shape: (c, b).
    """

    values: Tensor
    metadata: Tensor
    layout: Layout
    shape: tuple[int, int]

    @property
    def buffer(self) -> Tensor:
        """For ``cusparselt``, the one buffer (c, 9b/16): what ``torch._cslt_sparse_mm`` takes."""
        if self.layout != "cusparselt":
            raise ValueError(f"only the cusparselt layout has one buffer, not {self.layout}")
        rows, columns = self.shape
        width = columns // 2 + self.metadata.shape[1] * self.metadata.itemsize // self.values.itemsize
        return self.values.as_strided((rows, width), (width, 1))


def pack_24(weight: Tensor, layout: Layout = "row_major", *, backend: str = "auto") -> Packed24:
    """Pack a 2:4 weight.

    Args:
        weight: (c, b), float16, bfloat16, float32 or int8. ``row_major`` needs b to be a multiple of 16 (int8: 32);
            ``cutlass`` c of 32 and b of 32 (int8: 16 and 64); ``cusparselt`` both of 128, and takes no int8.
        layout: ``"row_major"``, ``"cutlass"`` or ``"cusparselt"``.
        backend: ``"auto"``, ``"native"`` (CPU), ``"cuda"`` or ``"reference"``.

    Raises:
        ValueError: a group keeps more than two values (the first such row and group are named), or a size that the
            layout cannot hold. Negative zero counts as zero and may come back positive.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"pack_24 takes a matrix, not {_describe(weight)}")
    _check_size(weight.dtype, weight.shape[0], weight.shape[1], layout)
    weight = weight.detach().resolve_neg().contiguous()
    if weight.data_ptr() % 16:
        weight = weight.clone()
    if layout == "cutlass" and weight.dtype == torch.float32:
        packed, offender = _pack(weight, layout, True, backend)
        if offender < 0:
            return packed
        _check_size(weight.dtype, weight.shape[0], weight.shape[1], layout, words_of=16)
    packed, offender = _pack(weight, layout, False, backend)
    if offender >= 0:
        row, group = divmod(offender, weight.shape[1] // 4)
        raise ValueError(
            f"the weight is not 2:4: row {row}, group {group} (columns {4 * group} to {4 * group + 3}) keeps "
            f"{int(weight[row, 4 * group : 4 * group + 4].count_nonzero())} values; prune it to 2:4 first"
        )
    return packed


def unpack_24(packed: Packed24, *, backend: str = "auto") -> Tensor:
    """The weight (c, b) of a :class:`Packed24`.

    Raises:
        ValueError: the tensors do not have the shapes that ``shape`` and ``layout`` say, or the metadata hold a code
            that no packer writes (the first such row and group are named).
    """
    values, metadata, layout, (rows, columns) = packed.values, packed.metadata, packed.layout, packed.shape
    pairs = _check_packed(packed)
    weight = values.new_empty((rows, columns))
    words = metadata.shape[1]
    values, metadata = values.detach().resolve_neg().contiguous(), metadata.contiguous()
    chosen = _backend(backend, values)
    if chosen == "reference":
        offender = _unpack_reference(values, metadata, weight, layout, pairs)
    else:
        arguments = (values.data_ptr(), metadata.data_ptr(), weight.data_ptr())
        offender = _run("unpack_24", chosen, arguments, values, rows, columns, pairs, layout)
    if offender >= 0:
        groups = words * metadata.itemsize * 2
        row, group = divmod(offender, groups)
        raise ValueError(f"the metadata of row {row}, group {group} is no 2:4 code: the packed weight is damaged")
    return weight


def reorder(packed: Packed24, layout: Layout) -> Packed24:
    """The same weight with its metadata moved to another layout; the values are shared.

    Raises:
        ValueError: the layout cannot hold the size, or is ``cusparselt``, whose values lie with its metadata.
    """
    pairs = _check_packed(packed)
    if "cusparselt" in (layout, packed.layout):
        raise ValueError("values and metadata share one buffer in layout 'cusparselt': unpack and pack the weight")
    _check_size(packed.values.dtype, *packed.shape, layout, None if pairs else 16)
    metadata = torch.empty_like(packed.metadata).view(-1)
    metadata[_offsets(packed.metadata, layout)] = packed.metadata.view(-1)[_offsets(packed.metadata, packed.layout)]
    return Packed24(packed.values, metadata.view(packed.metadata.shape), layout, packed.shape)


def _check_packed(packed: Packed24) -> bool:
    """Refuse tensors that contradict the shape; whether the words are those of 1:2 pairs."""
    values, metadata, (rows, columns) = packed.values, packed.metadata, packed.shape
    _check_size(values.dtype, rows, columns, packed.layout)
    word = _word(values.dtype)
    pairs = values.dtype == torch.float32 and packed.layout == "cutlass" and metadata.shape == (rows, columns // 8)
    width = columns // 8 if pairs else columns // (8 * word.itemsize)
    for name, tensor, dtype, shape in (
        ("values", values, values.dtype, (rows, columns // 2)),
        ("metadata", metadata, word, (rows, width)),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"the {name} of a packed {rows} x {columns} {_name(values.dtype)} weight must be {_name(dtype)} of "
                f"shape {shape}, not {_describe(tensor)}"
            )
    if metadata.device != values.device:
        raise ValueError(f"values lie on {values.device} and metadata on {metadata.device}")
    return pairs


def _check_size(dtype: torch.dtype, rows: int, columns: int, layout: str, words_of: int | None = None) -> None:
    """Refuse what a layout cannot hold, with the numbers that must divide."""
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, not {layout!r}")
    if dtype not in _DTYPES:
        raise TypeError(f"pack_24 takes {', '.join(map(_name, _DTYPES))}, not {_name(dtype)}")
    if layout == "cusparselt" and dtype == torch.int8:
        raise TypeError("layout 'cusparselt' is known for 16-bit metadata only: pack int8 with layout 'cutlass'")
    weights = words_of or (32 if dtype == torch.int8 else 16)
    if layout == "cutlass":
        pairs = dtype == torch.float32 and words_of is None  # 1:2 has words of eight weights
        row_multiple, column_multiple = 16 if dtype == torch.int8 else 32, weights if pairs else 2 * weights
    else:
        row_multiple, column_multiple = (128, 128) if layout == "cusparselt" else (1, weights)
    if rows % row_multiple or columns % column_multiple:
        raise ValueError(
            f"layout {layout!r} holds {_name(dtype)} weights whose rows are a multiple of {row_multiple} and columns a "
            f"multiple of {column_multiple}, not {rows} x {columns}"
        )


def _pack(weight: Tensor, layout: Layout, pairs: bool, backend: str) -> tuple[Packed24, int]:
    """Packed, and the flat index of the first group that keeps too many, or -1."""
    rows, columns = weight.shape
    word = _word(weight.dtype)
    width = columns // 8 if pairs else columns // (8 * word.itemsize)
    if layout == "cusparselt":
        bytes_of_values = rows * (columns // 2) * weight.itemsize
        buffer = weight.new_empty(bytes_of_values + rows * width * word.itemsize, dtype=torch.uint8)
        values = buffer[:bytes_of_values].view(weight.dtype).view(rows, columns // 2)
        metadata = buffer[bytes_of_values:].view(word).view(rows, width)
    else:
        values = weight.new_empty((rows, columns // 2))
        metadata = weight.new_empty((rows, width), dtype=word)
    chosen = _backend(backend, weight)
    if chosen == "reference":
        offender = _pack_reference(weight, values, metadata, layout, pairs)
    else:
        arguments = (weight.data_ptr(), values.data_ptr(), metadata.data_ptr())
        offender = _run("pack_24", chosen, arguments, weight, rows, columns, pairs, layout)
    return Packed24(values, metadata, layout, (rows, columns)), offender


def _backend(backend: str, tensor: Tensor) -> str:
    have = {
        "reference": True,
        "native": native.available() and tensor.device.type == "cpu",
        "cuda": native.available() and _EXTENSION.cuda and tensor.device.type == "cuda" and not torch.version.hip,
    }
    if backend == "auto":
        native.ready(tensor)  # which says that it is missing, where it is
        return next(name for name in ("native", "cuda", "reference") if have[name])
    if not have.get(backend):
        raise ValueError(f"backend {backend!r} cannot pack tensors on {tensor.device} with this installation")
    return backend


def _run(
    name: str, backend: str, arguments: tuple[int, ...], like: Tensor, rows: int, columns: int, pairs: bool, layout: str
) -> int:
    """Call a C++ or CUDA packer; the first bad group, or -1."""
    place = get_args(Layout).index(layout)
    if backend == "native":
        first = torch.empty(1, dtype=torch.int64, device="cpu")
        threads = torch.get_num_threads()
        kernel = getattr(_EXTENSION, name)
        kernel(*arguments, first.data_ptr(), rows, columns, like.itemsize, pairs, place, threads)
        return int(first)
    with device.on(like.device):
        first = torch.full((1,), _NONE, dtype=torch.int64, device=like.device)
        stream = torch.cuda.current_stream(like.device).cuda_stream
        kernel = getattr(_EXTENSION, f"cuda_{name}")
        kernel(*arguments, first.data_ptr(), rows, columns, like.itemsize, pairs, place, stream)
        found = int(first)
    return -1 if found == _NONE else found


def _pack_reference(weight: Tensor, values: Tensor, metadata: Tensor, layout: Layout, pairs: bool) -> int:
    """The specification: flags of nonzeros, a code for each group, the values at its two positions."""
    size = 2 if pairs else 4
    nonzero = weight.view(-1, size) != 0
    groups, values = weight.view(_BITS[weight.itemsize]).view(-1, size), values.view(_BITS[weight.itemsize])
    if pairs:
        code = torch.where(nonzero[:, 0], 4, 14)
        values.copy_(groups.gather(1, (code >> 1 & 1)[:, None]).view_as(values))
    else:
        flags = (nonzero.long() << torch.arange(4, dtype=torch.int64, device=weight.device)).sum(1)
        code = torch.tensor(_CODES, dtype=torch.int64, device=weight.device)[flags]
        values.copy_(groups.gather(1, torch.stack((code & 3, code >> 2), 1)).view_as(values))
    count = metadata.itemsize * 2
    shifts = 4 * torch.arange(count, dtype=torch.int64, device=weight.device)
    words = (code.view(-1, count) << shifts).sum(1)
    bits = 8 * metadata.itemsize
    words = torch.where(words >= 1 << bits - 1, words - (1 << bits), words).to(metadata.dtype)
    metadata.view(-1)[_offsets(metadata, layout).view(-1)] = words
    return _first(nonzero.sum(1) > size // 2)


def _unpack_reference(values: Tensor, metadata: Tensor, weight: Tensor, layout: Layout, pairs: bool) -> int:
    words = metadata.view(-1)[_offsets(metadata, layout).view(-1)]
    shifts = 4 * torch.arange(metadata.itemsize * 2, dtype=torch.int64, device=words.device)
    code = (words.long()[:, None] >> shifts & 15).view(-1, 1)
    known = code == 4
    for other in (14,) if pairs else (8, 9, 12, 13, 14):
        known = known | (code == other)
    positions = (code >> 1 & 1) if pairs else torch.cat((code & 3, code >> 2), 1)
    groups = weight.view(_BITS[weight.itemsize]).view(-1, 2 if pairs else 4).zero_()
    groups.scatter_(1, positions, values.view(groups.dtype).view(len(groups), -1))
    return _first(~known[:, 0])


def _first(bad: Tensor) -> int:
    return int(bad.to(torch.uint8).argmax()) if bool(bad.any()) else -1


def _offsets(metadata: Tensor, layout: Layout) -> Tensor:
    """Where each word (row, column) lies in the flat metadata."""
    rows, columns = metadata.shape
    row = torch.arange(rows, dtype=torch.int64, device=metadata.device)[:, None]
    column = torch.arange(columns, dtype=torch.int64, device=metadata.device)[None, :]
    if layout == "row_major":
        return row * columns + column
    band, weave = (32, 4) if metadata.dtype == torch.int16 else (16, 2)
    woven = row % band % 8 * weave + row % band // 8
    swap = ((woven % 2 == 0) & (column % 2 == 1)).long() - ((woven % 2 == 1) & (column % 2 == 0)).long()
    woven, column = woven + swap, column - swap
    if layout == "cutlass":
        return column // 2 * rows * 2 + (row // band * band + woven) * 2 + column % 2
    down, across = row // band, column // 2
    tile = down // 4 * 8 + across // 2 * 8 * (rows // 128) + down % 4 + across % 2 * 4
    return tile * band * 2 + woven * 2 + column % 2


def _word(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.int8 else torch.int16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(value: object) -> str:
    return f"{_name(value.dtype)} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def unpack_24_codes(metadata: Tensor) -> Tensor:
    """Positions (c, groups, 2) int64, from 0 to 3, of the kept values that ``row_major`` metadata (c, words) names."""
    shifts = torch.arange(0, 16, 4, dtype=torch.int64, device=metadata.device)
    codes = (metadata.long()[..., None] >> shifts & 15).flatten(1)
    return torch.stack((codes & 3, codes >> 2), 2)
