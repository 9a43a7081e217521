"""Pruned layers that stay compressed: in memory, and on disk."""

from thanos.compact.checkpoint import VALUES, Packed, load, pack, unpack
from thanos.compact.format import MANIFEST, FormatError, read_manifest
from thanos.compact.int8 import Int8BitmaskLinear, Int8Sparse24Linear
from thanos.compact.layers import BitmaskLinear, ColumnPrunedLinear, Sparse24Linear

__all__ = [
    "MANIFEST",
    "VALUES",
    "BitmaskLinear",
    "ColumnPrunedLinear",
    "FormatError",
    "Int8BitmaskLinear",
    "Int8Sparse24Linear",
    "Packed",
    "Sparse24Linear",
    "load",
    "pack",
    "read_manifest",
    "unpack",
]
