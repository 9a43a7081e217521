"""What tells a model's files from others, without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from thanos.checkpoint.update import weight_files

_READ = 1 << 20  # bytes of a file that has no header of a known length
_OTHERS = ("*.bin", "*.pt", "*.pth", "*.gguf")


def fingerprint(model: str, source: Path | None) -> dict[str, dict[str, Any]]:
    """Of each file with weights, and of the configuration: size, time of the last change, and hash of its beginning.

    Args:
        model: as users name it; the path of the file where it is a GGUF file.
        source: its directory otherwise.

    Raises:
        ValueError: a file that the index names is not there.
    """
    if source is None:
        files = [Path(model)]
    else:
        files = weight_files(source) or sorted(path for pattern in _OTHERS for path in source.glob(pattern))
        files = [path for path in (*files, source / "config.json") if path.is_file()]
    return {f"file {path.name}": _of_file(path) for path in files}


def _of_file(path: Path) -> dict[str, Any]:
    stat = path.stat()
    with path.open("rb") as stream:
        begin = stream.read(8)
        length = int.from_bytes(begin, "little") if path.suffix == ".safetensors" else _READ
        digest = hashlib.sha256(begin + stream.read(min(length, 1 << 30)))
    return {"size": stat.st_size, "time of change": stat.st_mtime_ns, "hash": digest.hexdigest()}
