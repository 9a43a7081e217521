"""One process of several: ``torchrun rank.py ACTION ARGUMENTS...``, the arguments those of ``thanos.prune``.

ACTION is what process 1 does before it prunes its third layer: ``none``, ``die``, ``stop`` (as a hung machine would),
``sleep``, ``fail``, or ``other`` (it is started with another seed). Patience is short here, and rows are shared out
however small a layer is, but for ``whole``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

from thanos.commands import processes
from thanos.commands.cli import start
from thanos.prune import main
from thanos.walk import distributed, walk

processes._INTERVAL, processes._PATIENCE = 0.2, 6.0
ACTIONS = {
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(600),
    "fail": lambda: (_ for _ in ()).throw(ValueError("it broke")),
}


def act(action: str) -> None:
    prune, calls = walk.prune_layer, []

    def pruned(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 12:
            ACTIONS[action]()
        return prune(*args, **options)

    walk.prune_layer = pruned


if __name__ == "__main__":
    torch.set_num_threads(1)
    action, *arguments = sys.argv[1:]
    sys.argv[1:] = arguments
    if action != "whole":
        distributed._WORTH_SHARING = 0
    if os.environ["RANK"] == "1":
        if action == "other":
            sys.argv += ["--damping", "0.02"]
        elif action in ACTIONS:
            act(action)
    start(main)
