"""Writing model directories, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_target(target: Path, *, overwrite: bool, source: str | None = None) -> None:
    """Refuse, before any work, an output directory that could not be written in the end.

    Raises:
        ValueError: it exists and ``overwrite`` is not set, it is not a model directory that could be replaced, it is
            the model ``source`` itself, inside it or around it, or its parent cannot be written.
    """
    if "\0" in str(target):
        raise ValueError(f"the output {str(target)!r} is no path, for it holds a null character; choose another")
    target = target.absolute()
    if source is not None and Path(source).exists():
        ours, theirs = target.resolve(), Path(source).resolve()
        if ours == theirs or (target.exists() and target.samefile(source)):
            raise ValueError(f"the output {target} is the model itself; choose another directory")
        if theirs in ours.parents or ours in theirs.parents:
            how = "lies inside" if theirs in ours.parents else "holds"
            raise ValueError(f"the output {target} {how} the model {source}; choose a directory beside it")
    if os.path.lexists(target):
        if not overwrite:
            raise ValueError(f"the output {target} exists; choose another or pass --overwrite")
        if target.is_symlink() or not target.is_dir():
            raise ValueError(f"the output {target} is not a directory; choose another")
        if any(target.iterdir()) and not (target / "config.json").is_file():
            raise ValueError(f"the output {target} does not hold a model, so it is not overwritten; choose another")
    parent = next(folder for folder in target.parents if os.path.lexists(folder))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".thanos-", dir=parent))
    except OSError as error:
        raise ValueError(f"cannot write the output {target}: {error.strerror or error} ({parent})") from error


@contextmanager
def staged(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new directory beside ``target`` that becomes ``target`` when the body ends well, else vanishes."""
    check_target(target, overwrite=overwrite)
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield folder
        make_readable(folder)
        _replace(target, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_readable(folder: Path) -> None:
    """Give a directory and what it holds the usual modes: mkdtemp makes it private, and safetensors its files."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _replace(target: Path, folder: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    old = folder.with_suffix(".old")
    target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model, generation configuration and tokenizer as ``from_pretrained`` reads them, in the model's dtype."""
    settings = getattr(model, "generation_config", None)
    try:
        model.save_pretrained(folder)
    except ValueError:  # of settings of generation that contradict each other, which older versions do not write
        if settings is None:
            raise
        try:
            model.generation_config = type(settings)()
            model.save_pretrained(folder)
        finally:
            model.generation_config = settings
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
