"""How large a saved model is."""

from __future__ import annotations

import math
from pathlib import Path

from thanos.checkpoint.update import tensor_places, weight_files


def saved_size(model: Path | None) -> dict[str, int | None]:
    """Parameters and bytes of a model's weight files.

    Args:
        model: a model's directory, or one file of weights; None where it is not on this disk.

    Returns:
        ``parameters`` and ``bytes``; None what the files do not say without being loaded.
    """
    if model is None:
        return {"parameters": None, "bytes": None}
    if model.is_file():
        return {"parameters": None, "bytes": model.stat().st_size}
    files = weight_files(model)
    if not files:
        other = [path for kind in ("*.bin", "*.pt", "*.pth") for path in model.glob(kind)]
        return {"parameters": None, "bytes": sum(path.stat().st_size for path in other) or None}
    places = tensor_places(files)
    return {
        "parameters": sum(math.prod(place.shape) for place in places.values()),
        "bytes": sum(path.stat().st_size for path in files),
    }
