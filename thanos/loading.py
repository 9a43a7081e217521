"""``thanos.load``: a model that takes code of this package to run, whichever kind it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load(folder: str | Path, *, device: str | torch.device | None = None, trust_remote_code: bool = False) -> Any:
    """The model in ``folder``: a compact checkpoint, or one whose depth follows the input.

    Args:
        device: where the model goes; the CPU if None.
        trust_remote_code: run the Python code that comes with a compact model. Nothing in a checkpoint can ask for it.

    Raises:
        ValueError: as :func:`thanos.compact.load` and :func:`thanos.shrink.guided.load_guided`.
    """
    from thanos.shrink.guided import FILE_NAME, load_guided

    if (Path(folder) / FILE_NAME).is_file():
        return load_guided(folder, device=device)
    from thanos.compact import load as load_compact

    return load_compact(folder, device=device, trust_remote_code=trust_remote_code)
