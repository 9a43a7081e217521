"""What tests need that may not be there: newer versions of a library than the oldest claimed, and data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from thanos.checkpoint import can_convert

SHARED = Path(__file__).parents[2] / "shared"  # beside the project

streams = pytest.mark.skipif(not can_convert(), reason="with Transformers 4 streaming is refused")
fuses = pytest.mark.skipif(not can_convert(), reason="with Transformers 4 most experts are ordinary layers")
replays = pytest.mark.skipif(
    not can_convert(), reason="in Transformers 4 these blocks keep a state, or give other results for other batches"
)
modes_see_flex_attention = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="PyTorch 2.8 runs flex_attention beneath no mode, and memory is estimated"
)
