"""How a command's threads wait for each other. Knows nothing of PyTorch, which reads what is set here when loaded."""

from __future__ import annotations

import os
import sys
from itertools import pairwise

SPINS = "1000"  # some tens of microseconds; the library's own 300,000 are milliseconds
COMMANDS = ("thanos.prune", "thanos.evaluate", "thanos.recover", "benchmarks.demo")


def wait_briefly() -> None:
    """Let waiting OpenMP threads sleep soon, in a process that is one of COMMANDS, unless the user said how they wait.

    Where another process keeps a processor busy, a thread that spins takes the turn of the one that it waits for. Not
    in a process of the user's own, of which this package is a part, nor in ``thanos.bench_inference``, which measures
    what such a process gets: decoding a small model on an idle machine is quicker with threads that spin.
    """
    if "torch" in sys.modules or os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        return
    if any(option == "-m" and module in COMMANDS for option, module in pairwise(sys.orig_argv)):
        os.environ["GOMP_SPINCOUNT"] = SPINS
