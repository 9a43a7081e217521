"""``thanos.load``: a model that takes code of this package to run; and registration for ``from_pretrained``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
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


_QUANTIZERS = "transformers.quantizers.auto"


class _AfterQuantizers(MetaPathFinder):
    """Has Transformers' list of quantizers extended by ours as soon as it is imported, and not before."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        run = loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Let ``from_pretrained`` of Transformers read compact checkpoints, now or when Transformers is imported."""
    if _QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterQuantizers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterQuantizers())


def _register() -> None:
    try:
        import thanos.compact.quantizer  # noqa: F401
    except Exception as error:  # importing Transformers goes on
        warnings.warn(f"from_pretrained does not read compact models here, thanos.load does: {error}", stacklevel=2)
