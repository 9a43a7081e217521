"""How much memory a piece of work takes, as the operating system sees it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import psutil


def resident_bytes() -> int:
    """Bytes of this process that lie in memory now."""
    return psutil.Process().memory_info().rss


def peak_bytes(function: Callable[[], object], *, base: int | None = None, interval: float = 0.001) -> int:
    """How far the process grows over ``base`` while ``function`` runs, in bytes.

    Args:
        base: :func:`resident_bytes` at an earlier moment; None takes the moment before the call.
        interval: seconds between two looks.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # memory that was freed but kept would hide what is taken again
    before, peak, done = resident_bytes() if base is None else base, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(interval):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return max(0, max(peak, resident_bytes()) - before)
