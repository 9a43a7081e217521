"""The processes that torchrun starts: how they find each other, and how all end when one does.

Each beats in the store that torchrun keeps, as long as it works or waits for the others. One that does neither for a
while has hung; one whose process ended beats no more. Whoever notices first says so, and all end.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import click
import torch

from thanos.commands.cli import sentence
from thanos.engine.peers import ALONE, Peers

_INTERVAL = 2.0  # seconds between two beats
_PATIENCE = 40.0  # seconds without a beat
_BACKSTOP = timedelta(hours=2)  # of waiting for others who all beat
_IDLE = 0.005  # seconds of processor time between two beats that are no work


def started_by_torchrun() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process speaks for all."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def own_device(chosen: torch.device) -> torch.device:
    """Where this process works: each of those on one machine has a GPU of its own."""
    if started_by_torchrun() and chosen.type == "cuda":
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return chosen


@contextmanager
def joined(device: torch.device) -> Iterator[Peers]:
    """Within the body, the processes that torchrun started work together; without torchrun, this one is alone.

    An error in the body ends all processes. The first to fail says why, the others are silent.

    Args:
        device: where this process works.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    import torch.distributed as dist

    from thanos.walk.distributed import Processes

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_BACKSTOP)
    watch = _Watch(dist.get_rank(), dist.get_world_size())
    try:
        yield Processes(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), watch.set_waiting)
    except BaseException as error:
        if not watch.claim(error):
            sys.stderr.flush()
            os._exit(1)
        watch.stop(done=False)
        raise
    watch.stop(done=True)
    with suppress(RuntimeError):
        dist.destroy_process_group()


class _Watch:
    """Beats, and listens to the others, in a thread of its own."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._ends = threading.Event()
        self._waiting = False
        self._waits = self._beats = 0
        self._worked = time.process_time()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._mine, self._theirs = _store(), _store()
        self._mine.set(f"where/{rank}", f"{platform.node()} {os.getpid()}")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def set_waiting(self, waiting: bool) -> None:
        self._waits += waiting
        self._waiting = waiting

    def claim(self, error: BaseException) -> bool:
        """Whether this process is the first to fail, so that it says why."""
        with suppress(RuntimeError):
            said = self._mine.compare_set("failure", "", f"{self._rank} {sentence(error)}")
            return said.split(b" ", 1)[0] == str(self._rank).encode()
        return self._rank == 0  # torchrun's store is gone

    def stop(self, done: bool) -> None:
        self._ends.set()
        self._thread.join(timeout=5)
        with suppress(RuntimeError):
            self._mine.set(f"beat/{self._rank}", "done" if done else "failed")

    def _run(self) -> None:
        while not self._ends.wait(_INTERVAL):
            try:
                self._beat()
                lost = self._lost()
                failed = self._theirs.check(["failure"])
            except RuntimeError:
                return  # torchrun is gone, and ends the processes that it started
            if lost is not None and not self._ends.is_set():
                self._end(lost)
            if failed and not self._ends.wait(3 * _INTERVAL):
                os._exit(1)  # who failed has said so; this process waits for it in vain

    def _beat(self) -> None:
        worked = time.process_time() - time.thread_time()
        if worked - self._worked > _IDLE:
            self._beats += 1
        self._worked = worked
        self._theirs.set(f"beat/{self._rank}", f"{self._beats if not self._waiting else f'waiting {self._waits}'}")

    def _lost(self) -> int | None:
        """A process that has neither worked nor begun to wait for too long, if there is one.

        To wait for long is right as long as another works; where all wait, the first is named.
        """
        now = time.monotonic()
        for rank in range(self._size):
            key = f"beat/{rank}"
            beat = self._theirs.get(key) if self._theirs.check([key]) else b""
            if beat != self._seen.get(rank, (None, now))[0]:
                self._seen[rank] = beat, now
        running = [rank for rank, (beat, _) in self._seen.items() if beat != b"done"]
        late = [rank for rank in running if now - self._seen[rank][1] > _PATIENCE]
        idle = [rank for rank in late if not self._seen[rank][0].startswith(b"waiting")]
        if not idle and len(late) < len(running):
            return None
        return next(iter(idle or late), None)

    def _end(self, lost: int) -> None:
        """Say that a process has hung, end it where it is on this machine, and end this one; torchrun ends the rest."""
        why = f"process {lost} of {self._size} has stopped working"
        if self.claim(ValueError(why)):
            click.echo(f"Error: {why}; the same command with --resume goes on from the last finished block", err=True)
            sys.stderr.flush()
        with suppress(RuntimeError, OSError, ValueError):
            where, pid = self._theirs.get(f"where/{lost}").decode().rsplit(" ", 1)
            if where == platform.node():
                os.kill(int(pid), signal.SIGKILL)
        os._exit(1)


def _store() -> Any:
    """A connection of its own to the store that torchrun keeps; a connection is not for two threads."""
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))
    run = f"{os.environ['TORCHELASTIC_RUN_ID']}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return dist.PrefixStore(f"thanos/{run}", store)
