"""The windows of tokens that are trained on: a text's own, and some that say their first half twice."""

from __future__ import annotations

import torch
from torch import Tensor


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of tokens (N, S) as the trainer takes them."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._tokens[index]}


def check_windows(windows: Tensor, held_out: Tensor, batch_size: int) -> None:
    """Raise ValueError where there is too little text."""
    if len(windows) < batch_size or not len(held_out):
        raise ValueError(
            f"there is too little text: {len(windows)} windows of {windows.shape[1]} tokens to train on and "
            f"{len(held_out)} to measure on, where a step takes {batch_size}; give more text, shorter windows or a "
            "smaller batch"
        )


def with_repeats(windows: Tensor, share: float) -> Tensor:
    """Add windows whose second half repeats the first, so that they are a share of all.

    A text of short documents teaches little of taking words over from far above, and what pruning left of it is
    trained away; in a window that says the same twice it is what predicts the second half.

    Args:
        windows: (N, S), int64, the text's own; they come first and stay as they are.
        share: of the windows returned, from 0 to 0.5, so that each window is repeated at most once.

    Returns:
        (N + M, S), int64, where M is N share / (1 − share), rounded. The repeated ones are evenly spaced in the text. A
        token that all windows begin with, that of the beginning of a text, is not said again in their middle.
    """
    count = round(len(windows) * share / (1 - share))
    if not count:
        return windows
    length = windows.shape[1]
    begin = int((windows[:, 0] == windows[0, 0]).all())
    middle = (length + begin + 1) // 2
    chosen = windows[torch.arange(count, dtype=torch.int64, device=windows.device) * len(windows) // count]
    return torch.cat([windows, torch.cat([chosen[:, :middle], chosen[:, begin : begin + length - middle]], 1)])
