"""A run that is not finished: the directory ``DIR.partial`` beside the output ``DIR``.

It holds ``model/``, which becomes ``DIR`` in the end, the state of the walk (``state.json``), and the hidden states in
front of the next block. Every change of ``state.json`` is one rename; what it speaks of is on the disk before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thanos.checkpoint.durable import sync, sync_tree, write_json
from thanos.checkpoint.writing import make_readable

FORMAT = 1
PREPARING, WALKING, FINISHED = "preparing", "walking", "finished"
_STATE, _MODEL, _PACKED, _REPLACED = "state.json", "model", "packed", "replaced"


class Partial:
    """The directory of an unfinished run.

    Args:
        target: where the model goes in the end.

    Attributes:
        folder: ``DIR.partial``.
        model: the model that is being written.
        packed: where its compact form is written, if that is what goes to the target.
        state: what ``state.json`` holds; empty as long as there is none.
    """

    def __init__(self, target: Path) -> None:
        self.target = target.absolute()
        self.folder = self.target.with_name(self.target.name + ".partial")
        self.model = self.folder / _MODEL
        self.packed = self.folder / _PACKED
        self.state: dict[str, Any] = {}

    @property
    def phase(self) -> str:
        """What the run was about; empty before it began."""
        return str(self.state.get("phase", ""))

    @property
    def moved(self) -> bool:
        """Whether the run is over, and its result in its place."""
        return self.phase == FINISHED and not self._result.exists()

    @property
    def _result(self) -> Path:
        return self.packed if self.state.get("packed") else self.model

    def check(self, resume: bool) -> None:
        """Find what an earlier run left, and refuse what does not fit.

        Raises:
            ValueError: there is an unfinished run and ``resume`` is not set, or none and it is; or it cannot be read.
        """
        if self._holds_nothing():
            if resume:
                raise ValueError(f"there is nothing to resume: {self.folder} does not exist")
            return
        if not resume:
            raise ValueError(
                f"{self.folder} holds an unfinished run: go on with it by --resume, or remove it to begin anew"
            )
        try:
            state = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
            known = state["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.folder} holds no state that a run could go on from ({type(error).__name__}); remove it to "
                "begin anew"
            ) from error
        if known != FORMAT:
            raise ValueError(
                f"{self.folder} was written in format {known} of unfinished runs, and this version goes on from "
                f"format {FORMAT}; finish it with the version that began it, or remove it"
            )
        self.state = state

    def _holds_nothing(self) -> bool:
        """Whether there is no such directory, or one that a run was killed in before it wrote anything down."""
        if not self.folder.is_dir():
            return True
        return all(path.name == f"{_STATE}.new" for path in self.folder.iterdir())

    def compare(self, identity: Mapping[str, Any]) -> None:
        """Refuse to go on with another run.

        Args:
            identity: what the run depends on, as plain values in dictionaries, with names that read well in a sentence.

        Raises:
            ValueError: the unfinished run differs, with the first difference.
        """
        if not self.state:
            return
        if (difference := _difference(self.state["identity"], json.loads(json.dumps(identity)))) is not None:
            raise ValueError(f"{self.folder} cannot be resumed by this run: {difference}")

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Make the directory, unless one was found."""
        if self.state:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        sync(self.folder.parent)
        self.save(format=FORMAT, phase=PREPARING, identity=identity)

    def rank(self, rank: int) -> Path:
        """What one of several processes keeps to itself."""
        return self.folder / f"rank-{rank}"

    def empty(self) -> None:
        """Make ``model/`` anew."""
        if self.model.exists():
            shutil.rmtree(self.model)
        self.model.mkdir()

    def save(self, **fields: Any) -> None:
        """Write the state down with these fields changed."""
        state = {**self.state, **fields}
        write_json(self.folder / _STATE, state)
        self.state = state

    def remove(self) -> None:
        """Remove the directory, the state last, so that what is left of it, if that is interrupted, is still known."""
        for path in self.folder.iterdir():
            if path.name == _STATE:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        (self.folder / _STATE).unlink(missing_ok=True)
        self.folder.rmdir()

    def finish(self, packed: bool = False) -> None:
        """Move the model, or its ``packed`` form, to its place, over a model that is there, and remove the rest.

        A run that was killed in here may call it again.
        """
        if self.phase != FINISHED:
            result = self.packed if packed else self.model
            make_readable(result)
            sync_tree(result)
            self.save(phase=FINISHED, packed=packed)
        if not self.moved:
            if self.target.exists():
                self.target.rename(self.folder / _REPLACED)
            self._result.rename(self.target)
            sync(self.target.parent)
        self.remove()


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> str | None:
    """The first difference in words; None where there is none."""
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        label = f"{where} {name}".strip()
        if isinstance(old, dict) and isinstance(new, dict):
            return _difference(old, new, label)
        if name not in now or name not in before or isinstance(old, dict) or isinstance(new, dict):
            return f"the {label} is {'not there any more' if name not in now else 'new'}"
        return f"the {label} was {_said(old)} and is now {_said(new)}"
    return None


def _said(value: Any) -> str:
    return "not set" if value is None else str(value)
