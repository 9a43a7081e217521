"""Runs that can be taken up again: what they are known by, and what is said when one ends too early."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor

from thanos.checkpoint import Partial
from thanos.commands.cli import sentence
from thanos.engine.peers import Peers
from thanos.options import WalkOptions


def identify(
    arguments: Mapping[str, Any], options: WalkOptions, samples: Tensor, files: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run depends on, by names for users.

    Args:
        arguments: of the command, by the names that they have there.
        samples: the token ids (N, S).
        files: of the model, see :func:`thanos.checkpoint.fingerprint`.
    """
    record = {"pattern": str(options.pattern), "method": options.method, **options.record()}
    # What the values are is a matter of --pack, which is among the arguments.
    named = {f"--{name.replace('_', '-')}": value for name, value in record.items() if name != "values"}
    digest = hashlib.sha256(samples.contiguous().numpy().tobytes()).hexdigest()
    return {
        "option": {**named, **arguments},
        "model's": dict(files),
        "calibration samples'": {"shape": list(samples.shape), "hash": digest},
    }


def same_for_all(identity: Mapping[str, Any], peers: Peers) -> None:
    """Raise ValueError where one of several processes was started with something else."""
    of_first, *others = peers.objects(_flat(identity))
    for rank, other in enumerate(others, 1):
        for label in {**of_first, **other}:
            mine, theirs = of_first.get(label), other.get(label)
            if mine != theirs and not label.endswith(("--device", "time of change")):
                raise ValueError(
                    f"all processes must be started alike, and the {label} of process {rank} is {theirs}, not {mine}"
                )


def _flat(identity: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in identity.items():
        label = f"{where} {name}".strip()
        found |= _flat(value, label) if isinstance(value, Mapping) else {label: value}
    return found


@contextmanager
def keeping(unfinished: Partial, first: bool = True) -> Iterator[None]:
    """Where the body fails, say how to go on, or remove the directory of the run if nothing is done.

    Of several processes, the ``first`` alone removes it.
    """
    try:
        yield
    except BaseException as error:
        if not unfinished.state:
            raise
        done, searched = unfinished.state.get("block", 0), "search" in unfinished.state
        if not done and not searched:
            with suppress(OSError):
                if first:
                    unfinished.remove()
            raise
        where = f"the first {done} blocks are kept in {unfinished.folder}: the same command with --resume goes on"
        if done == 1:
            where = where.replace("first 1 blocks are", "first block is")
        if not done:
            where = where.replace("first 0 blocks are", "search so far is")
        if isinstance(error, Exception):
            raise ValueError(f"{sentence(error)}; {where}") from error
        raise KeyboardInterrupt(where) from error
