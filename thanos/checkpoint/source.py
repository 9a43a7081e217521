"""Where a model's own files are: a directory here, or the hub's copy in the cache."""

from __future__ import annotations

from pathlib import Path

from thanos.checkpoint.reading import is_gguf
from thanos_kernels.errors import first_line


def source_folder(model: str) -> Path | None:
    """The directory of a model's files; None for a GGUF file, whose weights are not kept as they are.

    Args:
        model: a directory, the path of a ``.gguf`` file, or a name on the Hugging Face hub, whose files are fetched.

    Raises:
        ValueError: the hub cannot be read.
    """
    if is_gguf(model):
        return None
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    formats = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.tflite", "original/*"]
    try:
        return Path(snapshot_download(model, ignore_patterns=formats))
    except Exception as error:  # from the network, the hub or the cache
        raise ValueError(f"cannot read the files of {model} from the Hugging Face hub: {first_line(error)}") from error
