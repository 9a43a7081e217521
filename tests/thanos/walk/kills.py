"""Kills a run again and again: ``python kills.py SEED KILLS OUTPUT ARGUMENTS...``, those of ``thanos.prune``.

Each process is a fork of this one, which has run once, undisturbed, into OUTPUT itself. Half of the kills come at a
random moment, half right before or in the middle of a random write, rename or fsync. Prints where they struck.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from thanos.checkpoint import update
from thanos.prune import main


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(function: Callable[..., Any], left: list[int], torn: bool = False) -> Callable[..., Any]:
    """Kills the process when it is called for the last time of those that are ``left``."""

    def call(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if torn:  # half of a tensor
                stream, place, tensor = args
                stream.seek(place.begin)
                stream.write(b"\xff" * (tensor.numel() * tensor.element_size() // 2))
                stream.flush()
            die()
        return function(*args, **options)

    return call


def run(arguments: list[str], strike: Callable[[], None]) -> tuple[int, float]:
    """The status of a process that was forked to run, and the seconds that it took."""
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
        strike()
        code = 1
        try:
            main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return status, time.monotonic() - begin


def at_a_call(count: int) -> None:
    left = [count]
    os.fsync = deadly(os.fsync, left)
    os.replace = deadly(os.replace, left)
    Path.rename = deadly(Path.rename, left)  # type: ignore[method-assign]
    Path.unlink = deadly(Path.unlink, left)  # type: ignore[method-assign]
    update._overwrite = deadly(update._overwrite, left, torn=True)


def at_a_time(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)  # nobody handles it, so it ends the process at any instruction


def begun(target: Path) -> bool:
    """Whether a run into this directory can be gone on with."""
    partial = target.with_name(f"{target.name}.partial")
    return partial.exists() and any(path.suffix == ".json" for path in partial.iterdir())


def kill(seed: int, kills: int, arguments: list[str], output: Path) -> None:
    """Kill runs until one has ended; begin again, with another output, as long as there are kills left."""
    with suppress(SystemExit):
        main([*arguments, "--output", str(output)])
    draw = random.Random(seed)
    struck = finished = 0
    longest = 1.0
    while struck < kills:
        target = output.with_name(f"{output.name}{finished}")
        resume = ["--resume"] if begun(target) else []
        if target.exists() and not resume:  # killed when all was done, before it could end
            with suppress(OSError):
                target.with_name(f"{target.name}.partial").rmdir()
            finished += 1
            continue
        by_call, count, seconds = struck % 2 == 0, draw.randint(1, 60), draw.uniform(0.05, longest)
        strike = (lambda n=count: at_a_call(n)) if by_call else (lambda s=seconds: at_a_time(s))  # type: ignore[misc]
        status, took = run([*arguments, "--output", str(target), *resume], strike)
        if os.WIFSIGNALED(status):
            struck += 1
        elif status:
            raise SystemExit(f"a run with {resume} ended with {status}")
        else:
            finished, longest = finished + 1, took
        print(f"killed {struck}, finished {finished}, {'call' if by_call else 'time'} {took:.1f} s", flush=True)
    target = output.with_name(f"{output.name}{finished}")
    resume = ["--resume"] if begun(target) else []
    if target.exists() and not resume:
        return
    status, _ = run([*arguments, "--output", str(target), *resume], lambda: None)
    if status:
        raise SystemExit(f"the last run ended with {status}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill(int(sys.argv[1]), int(sys.argv[2]), sys.argv[4:], Path(sys.argv[3]))
