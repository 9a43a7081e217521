"""How much memory activations take, and how much there is."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thanos.walk.replay import Call

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # names of glibc's mallopt(3)
_TRIM_THRESHOLD, _MMAP_MAX = 128 * 1024, 65536  # its defaults
_MMAP_THRESHOLD = 32 << 20  # up to which glibc raises it by itself
_LARGE = 1 << 20
# Held within a mode: PyTorch 2.8 notes for all threads at once whether there is one, and where two threads leave theirs
# in turn, it goes on as if there were, and compiles nothing any more.
_MODE = threading.RLock()


class PeakMemory(TorchDispatchMode):
    """Within its body, counts the bytes of tensors that operations create and that are alive at the same time.

    What a kernel allocates inside and frees again is not seen.

    Attributes:
        peak: the largest number of bytes alive at once.
    """

    supports_higher_order_operators = True  # such as flex_attention

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given:
                self._add(leaf.untyped_storage())
        return output

    def __enter__(self) -> PeakMemory:
        _MODE.acquire()
        try:
            super().__enter__()  # type: ignore[no-untyped-call]
        except BaseException:
            _MODE.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        finally:
            _MODE.release()
        self._storages.clear()

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return

        def freed(_: weakref.ref[torch.UntypedStorage]) -> None:
            self._alive -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, freed)
        self._alive += size
        self.peak = max(self.peak, self._alive)


def bytes_per_sample(block: nn.Module, call: Call, hidden: Tensor) -> int:
    """What one sample takes while a block runs, in bytes: its hidden states and all that is alive at the worst moment.

    Args:
        hidden: (1, length, width), hidden states of one sample.
    """
    if any(type(leaf).__name__ == "BlockMask" for leaf in tree_leaves((call.args, call.kwargs))):
        # Of flex_attention, which is compiled: torch.compile does not work beneath a mode, nor after a try there.
        return _bytes_of_outputs(block, call, hidden) + hidden.nbytes
    try:
        with PeakMemory() as memory:
            call(block, hidden)
    except Exception:  # of other code that is compiled
        return _bytes_of_outputs(block, call, hidden) + hidden.nbytes
    return memory.peak + hidden.nbytes


def _bytes_of_outputs(block: nn.Module, call: Call, hidden: Tensor) -> int:
    """As if all that the block's innermost modules return were alive at once; a failure of the block is raised."""
    sizes: list[int] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        sizes.extend(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

    with ExitStack() as stack:
        for module in block.modules():
            if not any(True for _ in module.children()):
                stack.callback(module.register_forward_hook(note).remove)
        call(block, hidden)
    return sum(sizes)


def available_memory(device: torch.device) -> int:
    """Bytes that are free on the device; on the CPU what the machine, or its control group, still gives."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = min(free, int(lines["MemAvailable"].split()[0]) * 1024)
    group = Path("/sys/fs/cgroup")
    limit, current = group / "memory.max", group / "memory.current"
    if limit.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(current.read_text()))
    return max(0, free)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the body, memory that is freed is kept for the next tensor instead of going back to the system.

    glibc gives blocks of 32 MB and more back at once; getting them again costs page faults, a fifth of the processor
    time of a forward of 32 x 512 tokens through a block of SmolLM2-135M. With another C library, or where the
    environment sets glibc's allocator, nothing is done.
    """
    if (libc := _allocator()) is None:
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        libc.malloc_trim(0)


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Within the body, memory of tensors of a megabyte and more goes back to the system as soon as it is freed.

    glibc raises by itself the size from which it does so, up to 32 MB. Then what was freed of one block of a streamed
    model, with a few bytes taken from each piece, is too small for the same tensor of the next: without this, all of
    TinyLlama's 2.2 GB end up in memory. As :func:`freed_memory_kept` otherwise.
    """
    if (libc := _allocator()) is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        libc.malloc_trim(0)


def _allocator() -> ctypes.CDLL | None:
    """The C library, where it is glibc and the environment leaves its allocator as it is."""
    libc = ctypes.CDLL(None)
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    return libc if not tuned and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
