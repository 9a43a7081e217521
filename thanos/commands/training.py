"""What ``thanos.recover`` checks before it trains, what it trains on, and what it writes down."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from thanos.recover.options import RecoverOptions

RENAMED = {"train": "train_what", "share": "teacher_share"}
"""Options of the training that the command calls otherwise."""


def check_accelerate() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("training needs the package accelerate: pip install 'thanos-pruning[recover]'")


def record_of(pruned: str) -> Mapping[str, Any]:
    """What the model's ``pruning.json`` holds; empty where there is none."""
    from thanos.report.read import read_run
    from thanos.report.record import FILE_NAME

    return read_run(Path(pruned)).record if (Path(pruned) / FILE_NAME).is_file() else {}


def checked_config(pruned: str, trusted: dict[str, Any]) -> Any:
    from thanos import checkpoint
    from thanos.compact import MANIFEST
    from thanos.shrink.guided import FILE_NAME

    if (Path(pruned) / MANIFEST).is_file():
        raise ValueError(f"{pruned} is a compact checkpoint; restore it with thanos.unpack, and train that")
    if (Path(pruned) / FILE_NAME).is_file():
        raise ValueError(f"{pruned} chooses its blocks by the prompt, and such a model is not trained")
    config = checkpoint.load_config(pruned, **trusted)
    checkpoint.check_unquantised(config, pruned)
    return config


def check_teacher(teacher: str, config: Any, tokenizer: Any, trusted: dict[str, Any]) -> None:
    """Refuse a teacher whose tokens are not the model's, before weights are read."""
    from thanos import checkpoint

    other = checkpoint.load_config(teacher, **trusted)
    checkpoint.check_unquantised(other, teacher)
    own, theirs = (one.get_text_config().vocab_size for one in (config, other))
    same = own == theirs and checkpoint.load_tokenizer(teacher, **trusted).get_vocab() == tokenizer.get_vocab()
    if not same:
        count = f", of {theirs} tokens where the model has {own}" if own != theirs else ""
        raise ValueError(
            f"the teacher {teacher} has another vocabulary{count}; take the dense model that this one was pruned from"
        )


@dataclass(frozen=True)
class Texts:
    """Windows to train on, to measure on, and to score; and where the first came from."""

    windows: Tensor
    held_out: Tensor
    scored: Any
    provenance: dict[str, Any]


def read_texts(
    run: Any, job: RecoverOptions, config: Any, tokenizer: Any, say: Callable[[str], None], processes: int = 1
) -> Texts:
    from thanos.recover.windows import check_windows
    from thanos.scoring.windows import load_windows, window_length
    from thanos.text import load_packed

    reading: Any = {"bos": run.bos, "text_field": run.text_field}
    length = window_length(config, run.sequence_length)
    say(f"reading the text {run.train}")
    packed = load_packed(run.train, tokenizer, length, **reading)
    count = min(run.held_out_windows, len(packed.tokens) // 4)
    windows, held = packed.tokens[: len(packed.tokens) - count], packed.tokens[len(packed.tokens) - count :]
    if run.held_out is not None:
        windows = packed.tokens
        held = load_windows(run.held_out, tokenizer, length, windows=run.held_out_windows, **reading).tokens
    check_windows(windows, held, job.batch_size * processes)
    scored = None
    if run.evaluate is not None:
        scored = load_windows(run.evaluate, tokenizer, window_length(config), windows=run.windows, **reading)
    told = {**packed.provenance(), "samples": len(windows), "held_out": run.held_out or "the end of the same text"}
    return Texts(windows, held, scored, {**told, "held_out_samples": len(held), "seed": job.seed})


def identity_of(
    run: Any, job: RecoverOptions, texts: Texts, files: Mapping[str, Any], processes: int = 1
) -> dict[str, Any]:
    """What a run depends on, by names for users."""
    digest = hashlib.sha256()
    for part in (texts.windows, texts.held_out):
        digest.update(part.contiguous().numpy().tobytes())
    options = {f"--{RENAMED.get(name, name).replace('_', '-')}": value for name, value in job.record().items()}
    own = {"PRUNED": run.pruned, "--teacher": run.teacher, "--evaluate": run.evaluate, "--windows": run.windows}
    text = {"shape": list(texts.windows.shape), "hash": digest.hexdigest()}
    return {
        "option": {**options, **own},
        "number of": {"processes": processes},
        "model's": dict(files),
        "training text's": text,
    }


def write_record(
    run: Any,
    job: RecoverOptions,
    model: Any,
    record: Mapping[str, Any],
    done: Any,
    texts: Texts,
    scores: dict[str, Any],
    command: str,
    folder: Path,
) -> None:
    from thanos.report import versions
    from thanos.report.recovery import continued, write_recovered
    from thanos.walk.decoder import find_decoder
    from thanos.walk.zeros import count_zeros

    decoder = find_decoder(model)
    shapes = {layer.name: (layer.weight.shape[0], layer.weight.shape[1]) for block in decoder.layers for layer in block}
    counted = [count_zeros(block, layers, {}) for block, layers in zip(decoder.blocks, decoder.layers, strict=True)]
    effective = sum(zeros for zeros, _ in counted) / max(1, sum(total for _, total in counted))
    training = done.training
    options = {
        **job.record(),
        "model": run.pruned,
        "teacher": run.teacher,
        "device": str(run.device),
        "dtype": str(done.dtype).removeprefix("torch."),
    }
    recovery = {
        "options": options,
        "text": texts.provenance,
        "curve": [dataclasses.asdict(point) for point in training.curve],
        "best": training.best,
        "steps": training.steps,
        "tokens": training.tokens,
        "seconds": training.seconds,
        "note": training.note,
        "perplexity": scores,
        "command": command,
        "versions": versions(),
    }
    begin = record or {"method": "training" if job.mask != "fixed" else "", "options": {"model": run.pruned}}
    layers = {name: (shapes[name], zeros) for name, zeros in done.zeros.items()}
    write_recovered(continued(begin, recovery, layers, effective), folder, title=run.output.absolute().name)
