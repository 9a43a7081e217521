"""The compact checkpoint on disk, as docs/format.md describes it: what is read here is checked before it is used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from thanos_kernels.sparse_int8 import GROUP

FORMAT = "thanos-compact"
VERSION = 2
MANIFEST = "compact.json"
PLACE_HOLDER = (0,)  # the shape of what stands under a packed weight's own name: no program takes it for the weight
_MAX_HEADER = 100 << 20
_MAX_EXPANSION, _FREE_BYTES = 1024, 1 << 20  # a layer may grow so much when it is decoded, and no more
DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16)}
_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
}
_SIZES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
PATTERNS = {"bitmask": "unstructured", "sparse24": "2:4", "columns": "structured"}
LAYOUTS = {"bitmask": "bits64", "sparse24": "row_major", "columns": "dense"}
INT8 = "_int8"  # behind a kind: its values are int8
_KINDS_OF_VERSION = {1: {*PATTERNS}, VERSION: {*PATTERNS, f"bitmask{INT8}", f"sparse24{INT8}"}}


def base_of(kind: str) -> str:
    """The kind, whatever its values are: a key of PATTERNS."""
    return kind.removesuffix(INT8)


class FormatError(ValueError):
    """A checkpoint that is damaged, of another version, or contradicts itself."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file: dtype as safetensors names it, shape, first and last byte after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Layer:
    """One compressed linear layer: ``kind`` is one of its version's; ``shape`` is (out_features, in_features)."""

    kind: str
    tensor: str
    file: str
    shape: tuple[int, int]
    dtype: str
    transposed: bool
    outlier_rows: int
    kept: int  # values (bitmask), kept columns (columns); half the columns (sparse24)
    zero_signs: int  # zeros of which a sign is stored, or 0

    @property
    def is_int8(self) -> bool:
        return self.kind != self.base

    @property
    def base(self) -> str:
        """The kind, whatever its values are: "bitmask", "sparse24" or "columns"."""
        return base_of(self.kind)

    def tensors(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors that hold it: name to dtype and shape."""
        rows, columns = self.shape
        value, plain = DTYPES[self.dtype][0], rows - self.outlier_rows
        held = "I8" if self.is_int8 else value
        if self.base == "bitmask":
            parts = {"values": (held, (self.kept,)), "bits": ("I64", (rows, -(-columns // 64)))}
        elif self.base == "sparse24":
            parts = {"values": (held, (plain, columns // 2)), "metadata": ("I16", (plain, columns // 16))}
        else:
            parts = {"values": (value, (plain, self.kept)), "columns": ("I64", (self.kept,))}
        if self.is_int8:
            parts["scales"] = ("F16", (plain, -(-columns // GROUP)))
        if self.base != "bitmask":
            parts |= {"outliers": (value, (self.outlier_rows, columns)), "outlier_rows": ("I64", (self.outlier_rows,))}
        if self.zero_signs:
            parts["zero_signs"] = ("U8", (-(-self.zero_signs // 8),))
        return {f"{name}.{part}": what for part, what in parts.items()}


@dataclass(frozen=True)
class Source:
    """A file of the ordinary checkpoint: its name, its header to the byte, and the compact file that stands for it."""

    name: str
    header: str
    file: str


@dataclass(frozen=True)
class Manifest:
    """What ``compact.json`` says. ``index`` is the name and the text of the ordinary checkpoint's index, if any."""

    layers: dict[str, Layer]
    sources: list[Source]
    index: tuple[str, str] | None
    version: int = VERSION

    def write(self, folder: Path) -> None:
        layers = {}
        for name, layer in self.layers.items():
            layers[name] = {"pattern": PATTERNS[layer.base], "layout": LAYOUTS[layer.base], **asdict(layer)}
        content = {
            "format": FORMAT,
            "version": self.version,
            "layers": layers,
            "sources": [asdict(source) for source in self.sources],
            "index": None if self.index is None else {"name": self.index[0], "text": self.index[1]},
        }
        (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_header(path: Path) -> tuple[str, dict[str, Entry]]:
    """The header of a safetensors file, its text and its tensors, checked against the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise FormatError(
                    f"{path} is truncated or no safetensors file: its header of {length} bytes is not there"
                )
            text = file.read(length).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"cannot read {path}: {error}") from error
    entries = parse_header(text, str(path))
    expected = 8 + length + max((entry.end for entry in entries.values()), default=0)
    if size != expected:
        raise FormatError(f"{path} has {size} bytes where its header says {expected}: it is truncated or damaged")
    return text, entries


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A reader of the tensors in a safetensors file; what the library refuses is a FormatError."""
    try:
        file = safe_open(path, framework="pt")
    except Exception as error:  # the library's own kinds of errors
        raise FormatError(f"cannot read {path}: {error}") from error
    with file as reader, torch.device("cpu"):  # older versions of the library read to the default device
        yield reader


def parse_header(text: str, where: str) -> dict[str, Entry]:
    """The tensors of a safetensors header, which must fill the data without gaps or overlaps."""
    content = _json(text, where)
    entries = {}
    for name, value in content.items():
        if name == "__metadata__":
            continue
        dtype, shape, offsets = (_get(value, key, kind, f"{where}, {name}") for key, kind in _ENTRY)
        if dtype not in _SIZES or not all(_is_size(n) for n in [*shape, *offsets]) or len(offsets) != 2:
            raise FormatError(
                f"{where}: tensor {name} has an unknown dtype, shape or place ({dtype}, {shape}, {offsets})"
            )
        if math.prod(shape) * _SIZES[dtype] != offsets[1] - offsets[0]:
            raise FormatError(
                f"{where}: tensor {name} of {dtype} {shape} does not have {offsets[1] - offsets[0]} bytes"
            )
        entries[name] = Entry(dtype, tuple(shape), offsets[0], offsets[1])
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise FormatError(f"{where}: tensor {name} begins at byte {entry.begin} instead of {position}")
        position = entry.end
    return entries


_ENTRY = (("dtype", str), ("shape", list), ("data_offsets", list))


def read_manifest(folder: Path) -> Manifest:
    """Read ``compact.json`` and check it against the files beside it, without reading their data.

    Raises:
        FormatError: it is missing, of another version, contradicts the tensors, or would decode to absurd sizes.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FormatError(
            f"{folder} is no compact checkpoint: it holds no {MANIFEST}; make one with python -m thanos.pack"
        )
    try:
        content = _json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"cannot read {path}: {error}") from error
    if content.get("format") != FORMAT:
        raise FormatError(f"{path} is no {FORMAT} manifest (its format is {content.get('format')!r})")
    version = content.get("version")
    if type(version) is not int or version not in _KINDS_OF_VERSION:
        raise FormatError(f"{path} has version {version!r}; this program reads versions 1 to {VERSION}")
    where = str(path)
    layers = {
        name: _layer(value, version, f"{where}, layer {name}")
        for name, value in _get(content, "layers", dict, where).items()
    }
    sources = [_source(value, where) for value in _get(content, "sources", list, where)]
    index = content.get("index")
    if index is not None:
        index = (_file_name(_get(index, "name", str, where), where), _get(index, "text", str, where))
    manifest = Manifest(layers, sources, index, version)
    _check_tensors(folder, manifest)
    _check_scales(folder, manifest)
    return manifest


def _layer(value: Any, version: int, where: str) -> Layer:
    fields = {"kind": str, "tensor": str, "file": str, "shape": list, "dtype": str, "transposed": bool}
    fields |= {"outlier_rows": int, "kept": int, "zero_signs": int}
    given = {key: _get(value, key, kind, where) for key, kind in fields.items()}
    shape, kind = given["shape"], given["kind"]
    if kind not in _KINDS_OF_VERSION[version] or given["dtype"] not in DTYPES:
        raise FormatError(f"{where}: unknown kind {kind!r} or dtype {given['dtype']!r}")
    base = base_of(kind)
    if value.get("pattern") != PATTERNS[base] or value.get("layout") != LAYOUTS[base]:
        raise FormatError(f"{where}: pattern and layout of {kind} are {PATTERNS[base]!r} and {LAYOUTS[base]!r}")
    sizes = [*shape, given["outlier_rows"], given["kept"], given["zero_signs"]]
    if len(shape) != 2 or not all(_is_size(n) for n in sizes):
        raise FormatError(f"{where}: sizes must be whole numbers from 0, and shape two of them ({sizes})")
    rows, columns = shape
    most = {"bitmask": rows * columns, "columns": columns, "sparse24": columns // 2}[base]
    if given["outlier_rows"] > rows or given["kept"] > most or given["zero_signs"] > rows * columns:
        raise FormatError(f"{where}: more outlier rows, kept weights or zeros than a {rows} x {columns} weight has")
    if base == "sparse24" and columns % 16:
        raise FormatError(f"{where}: a 2:4 weight has a multiple of 16 columns, not {columns}")
    if base != kind and given["zero_signs"]:
        raise FormatError(f"{where}: a weight of int8 values has no signs of zeros, and zero_signs must be 0")
    layer = Layer(**{**given, "shape": (rows, columns)})
    size = DTYPES[layer.dtype][1].itemsize
    held = sum(math.prod(dims) * _SIZES[dtype] for dtype, dims in layer.tensors("").values())
    if expands_too_far(layer.shape, size, held):
        raise FormatError(f"{where}: {held} bytes cannot stand for {rows} x {columns} weights")
    return layer


def expands_too_far(shape: tuple[int, int], item_size: int, held: int) -> bool:
    """Whether a reader would refuse a layer of this shape held in so few bytes."""
    return shape[0] * shape[1] * item_size > _FREE_BYTES + _MAX_EXPANSION * held


def _source(value: Any, where: str) -> Source:
    name, header, file = (_get(value, key, str, where) for key in ("name", "header", "file"))
    return Source(_file_name(name, where), header, _file_name(file, where))


def _check_tensors(folder: Path, manifest: Manifest) -> None:
    """Every ordinary tensor stands in its compact file, as it is or as its layer says, and nothing else does."""
    by_tensor = {layer.tensor: (name, layer) for name, layer in manifest.layers.items()}
    files = [source.file for source in manifest.sources]
    if len(set(files)) != len(files) or len({source.name for source in manifest.sources}) != len(files):
        raise FormatError(f"{folder / MANIFEST} names a file twice")
    seen = set()
    for source in manifest.sources:
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for tensor, entry in parse_header(source.header, f"{MANIFEST}, {source.name}").items():
            if tensor not in by_tensor:
                expected[tensor] = (entry.dtype, entry.shape)
                continue
            name, layer = by_tensor[tensor]
            shape = layer.shape[::-1] if layer.transposed else layer.shape
            if (entry.dtype, entry.shape, source.file) != (DTYPES[layer.dtype][0], shape, layer.file):
                raise FormatError(f"{MANIFEST}: layer {name} contradicts the header of {source.name}")
            expected |= layer.tensors(name)
            if manifest.version > 1:
                expected[tensor] = (entry.dtype, PLACE_HOLDER)
            seen.add(name)
        _, entries = read_header(folder / source.file)
        found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        for name in [*expected, *found]:
            if expected.get(name) != found.get(name):
                raise FormatError(
                    f"{folder / source.file}: tensor {name} is {found.get(name, 'missing')}, and {MANIFEST} says "
                    f"{expected.get(name, 'nothing of it')}"
                )
    if missing := sorted(set(manifest.layers) - seen):
        raise FormatError(f"{MANIFEST}: layer {missing[0]} belongs to no file")


def _check_scales(folder: Path, manifest: Manifest) -> None:
    """Scales are positive and finite."""
    for source in manifest.sources:
        names = [name for name, layer in manifest.layers.items() if layer.is_int8 and layer.file == source.file]
        if not names:
            continue
        with opened(folder / source.file) as reader:
            for name in names:
                scales = reader.get_tensor(f"{name}.scales")
                if not bool((scales.isfinite() & (scales > 0)).all()):
                    raise FormatError(
                        f"{folder / source.file}: scales of layer {name} are not positive and finite; it is damaged"
                    )


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
        if "\\ud" in text.lower():  # half of a pair of surrogates can be said so, and cannot be written
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} does not hold JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{where} must hold a JSON object, not {type(content).__name__}")
    return content


def _get(value: Any, key: str, kind: type, where: str) -> Any:
    found = value.get(key) if isinstance(value, dict) else None
    if type(found) is not kind:
        raise FormatError(f"{where}: {key!r} must be a JSON {kind.__name__}, not {found!r:.60}")
    return found


def _file_name(name: str, where: str) -> str:
    if not name or Path(name).name != name or "\\" in name or name in (".", ".."):
        raise FormatError(f"{where}: {name!r} is not the name of a file beside it")
    return name


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 48
