"""Where work happens: on the device of its tensors, whichever device is current."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA or ROCm ``device`` the current one, so that launches, streams and events inside belong to it.

    The one place that says so for Triton's launches and for those of the CUDA extension. PyTorch's own operations need
    no help: they go by their tensors.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
