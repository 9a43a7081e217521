"""Marks of tests of what takes a newer version of a library than the oldest claimed."""

from __future__ import annotations

import pytest
import torch

from thanos.checkpoint import can_convert

streams = pytest.mark.skipif(not can_convert(), reason="with Transformers 4 streaming is refused")
fuses = pytest.mark.skipif(not can_convert(), reason="with Transformers 4 most experts are ordinary layers")
replays = pytest.mark.skipif(
    not can_convert(), reason="in Transformers 4 these blocks keep a state, or give other results for other batches"
)
modes_see_flex_attention = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="PyTorch 2.8 runs flex_attention beneath no mode, and memory is estimated"
)
