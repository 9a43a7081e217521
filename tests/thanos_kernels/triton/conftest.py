"""Kernels run on the GPU where there is one, and otherwise in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter(device: torch.device) -> None:
    """At each call of a device function the interpreter patches Triton's language anew, which takes half its time."""
    if device.type != "cpu":
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if interpreter.tl.core.load.__name__ != "<lambda>":
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
