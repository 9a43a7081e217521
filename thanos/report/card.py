"""``README.md`` of a pruned model: the card that a hub shows, with its metadata in front."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from thanos.report import numbers
from thanos.report.curve import before_and_after, recoveries, told
from thanos.report.page import PAGE
from thanos.report.read import Run, as_number
from thanos.report.recipe import RECIPE
from thanos.report.record import FILE_NAME

CARD = "README.md"
_CARRIED = ("license", "license_name", "license_link", "language")
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")


def carried(card: Path) -> dict[str, Any]:
    """What a pruned model's card takes over from that of its source: the license and the languages, if said there."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    found = re.match(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", text, flags=re.DOTALL)
    if found is None:
        return {}
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}
    if not isinstance(metadata, dict):
        return {}
    return {name: metadata[name] for name in _CARRIED if _plain(metadata.get(name))}


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(one, str) for one in value)
    return isinstance(value, str) and bool(value)


def base_model(model: str) -> str | None:
    """The name on the hub of a model that was given by its name or by its directory in the hub's cache; else None."""
    cached = _CACHED.search(Path(model).as_posix())
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    return model if _HUB_NAME.match(model) and not Path(model).exists() else None


def metadata(run: Run, source: Mapping[str, Any]) -> dict[str, Any]:
    """The card's metadata, as the hub reads it."""
    base = base_model(run.model) if run.model else None
    found: dict[str, Any] = {"base_model": base} if base else {}
    found["library_name"] = "transformers"
    found["pipeline_tag"] = "text-generation"
    tags = ["thanos", "pruned", run.text("method"), "smaller" if _smaller(run) else "sparse"]
    found["tags"] = list(dict.fromkeys(filter(None, tags)))
    return {**found, **source}


def card(run: Run, source: Mapping[str, Any]) -> str:
    """The model card of a run.

    Args:
        run: what was done.
        source: what :func:`carried` took over.
    """
    name = base_model(run.model) or Path(run.model).name.removesuffix(".gguf") or "a model"
    front = yaml.safe_dump(metadata(run, source), sort_keys=False, allow_unicode=True, width=10**6)
    parts = [
        f"---\n{front}---",
        f"# {name}, pruned: {_asked(run)}",
        _sentence(run, name),
        "## Numbers\n\n" + _table(_numbers(run)),
        "## Load it\n\n" + _load(run),
        "## Make it again\n\n" + _again(run),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(run)),
        f"[{PAGE}]({PAGE}) shows each layer with its loss; [{FILE_NAME}]({FILE_NAME}) holds the same for programs.",
    ]
    return "\n\n".join(parts) + "\n"


def _smaller(run: Run) -> bool:
    return bool(run.options.get("became"))


def _asked(run: Run) -> str:
    return f"{run.text('pattern')} by {run.text('method')}"


def _sentence(run: Run, name: str) -> str:
    where = f"[{name}](https://huggingface.co/{name})" if base_model(run.model) else name
    made = "[Thanos](https://arxiv.org/abs/2504.05346), an engine that prunes language models after training"
    if _smaller(run):
        done = f"is {where}, made smaller: {'; '.join(map(str, run.options['became']))}"
    else:
        done = (
            f"is {where} with {numbers.share(run.record.get('effective_sparsity'))} of the weights in its blocks "
            f"set to zero: method `{run.text('method')}`, pattern `{run.text('pattern')}`, {len(run.layers):,} layers"
        )
    samples = run.part("calibration")
    length = samples.get("length", samples.get("sequence_length"))
    text = Path(str(samples.get("source", ""))).name
    follows = "" if recoveries(run) else "; no training followed"
    calibrated = (
        f" It was calibrated on {samples['samples']} samples of {length} tokens of {text}{follows}."
        if samples.get("samples") and length and text
        else ""
    )
    trained = "".join(f" {told(one)}." for one in recoveries(run))
    return f"This {done}. It was made with {made}.{calibrated}{trained}"


def _numbers(run: Run) -> list[tuple[str, str, str]]:
    rows = []
    scores = run.part("perplexity")
    if scores:
        text = Path(str(scores.get("source", ""))).name
        rows.append(
            (f"perplexity on {text}", numbers.perplexity(scores.get("dense")), numbers.perplexity(scores.get("pruned")))
        )
    for recovery in recoveries(run):
        before, after, text = before_and_after(recovery)
        if after is not None:
            label = f"perplexity on {text}, before and after training"
            rows.append((label, numbers.perplexity(before), numbers.perplexity(after)))
    for label, key, said in (("parameters", "parameters", numbers.count), ("weights on disk", "bytes", numbers.size)):
        if run.number("size", key, "after") is not None:
            rows.append((label, said(run.number("size", key, "before")), said(run.number("size", key, "after"))))
    zeros = sum(int(as_number(layer.get("zeros")) or 0) for layer in run.layers)
    if zeros and not _smaller(run):
        rows.append(("weights that were set to zero", "", numbers.count(zeros)))
    rows.append(("sparsity of the blocks, effective", "", numbers.share(run.record.get("effective_sparsity"))))
    rows.append(("sparsity of the blocks, nominal", "", numbers.share(run.record.get("nominal_sparsity"))))
    if run.worst:
        middle = run.worst[(len(run.worst) - 1) // 2]["relative_loss"]
        rows.append(("relative loss of a layer, median", "", numbers.small(middle)))
        rows.append(("relative loss of a layer, largest", "", numbers.small(run.worst[0]["relative_loss"])))
    return rows


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    lines = ["| | dense | pruned |", "| --- | --: | --: |"]
    return "\n".join([*lines, *(f"| {name} | {before} | {after} |" for name, before, after in rows)])


def _load(run: Run) -> str:
    if "@" in run.text("pattern"):
        return (
            "```python\nimport thanos\n\nmodel = thanos.load(DIR)  # chooses by the prompt which blocks run\n```\n\n"
            "Any other program runs all blocks, as in the dense model."
        )
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(DIR, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(DIR)\n"
        'inputs = tokenizer("The capital of France is", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))\n```\n\n"
        "`DIR` is this directory, or its name on the hub."
    )


def _again(run: Run) -> str:
    command = _elsewhere(run.text("command"))
    made = f"It was made by\n\n```\n{command}\n```\n\nand " if command else ""
    commands = [_elsewhere(str(one.get("command") or "")) for one in recoveries(run)]
    trained = "".join(f"\n\nThen it was trained by\n\n```\n{one}\n```" for one in commands if one)
    return (
        f"{made}[{RECIPE}]({RECIPE}) holds every option, the defaults too:\n\n"
        f"```\npython -m thanos.prune --recipe {RECIPE} --output NEW\n```{trained}"
    )


def _elsewhere(command: str) -> str:
    """The command for any output: where it went on the machine that made it is nobody's business."""
    words = shlex.split(command)
    for index, word in enumerate(words[:-1]):
        if word == "--output":
            words[index + 1] = "DIR"
    return shlex.join(words)


def _limits(run: Run) -> list[str]:
    lines = [
        "What the dense model must not be used for, this one must not either; its license holds for this one too.",
        "Pruning costs quality, and not evenly: knowledge and rare languages go first. Measure on your own task.",
    ]
    if not run.part("perplexity"):
        lines.append("No perplexity was measured when it was made.")
    if not _smaller(run):
        pack = "`python -m thanos.pack DIR --output COMPACT` makes it smaller; `thanos.load(COMPACT)` runs that."
        lines.append(
            "The zeros are stored, so that every program loads it: it is as large and as fast as the dense model. "
            + pack
        )
    if run.part("dense") or run.record.get("excluded"):
        count = len(run.part("dense")) + len(run.record.get("excluded") or [])
        lines.append(f"{count:,} layers stay dense; {FILE_NAME} names them, with the reasons.")
    return lines
