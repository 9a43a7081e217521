"""Training a pruned model: what is trained, for how long, and from which start."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any

from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.lab import Lab
from benchmarks.experiments.run import TRAINING, Run
from benchmarks.records import Records, Row
from benchmarks.report.groups import pattern_name
from benchmarks.report.markdown import NOTHING, accuracy, number, table
from thanos.recover import RecoverOptions
from thanos.recover.model import recover_model
from thanos.recover.options import TRAINED

_PATTERNS = ("0.5", "2:4", "channels:0.25")
_STARTS = ("fast", "best")
_LENGTH = 512
_HELD_OUT = 8  # windows at the end of the training text, by which the best weights are chosen
_DENSE = Run("dense", None)
_WHAT = {"weights": "all kept weights", "norms": "norms and biases", "lora": "low-rank updates"}


def _runs() -> list[Run]:
    """What tells most first: an experiment of hours may be interrupted. Runs from `best` follow it, for its minutes."""
    fast = [Run(pattern=pattern, source=TRAINING) for pattern in _PATTERNS]
    best = [replace(run, quality="best") for run in fast]
    long = [_trained(run, "weights", 20) for run in fast]
    norms = [_trained(run, "norms", 5) for run in fast]
    without = [replace(run, repeats=0.0) for run in (*long, *norms)]
    from_best = [one for run in best for one in (run, _trained(run, "weights", 20))]
    every = [
        _trained(run, what, minutes) for run in (*fast, *best) for minutes in (20, 10) for what in reversed(TRAINED)
    ]
    return list(dict.fromkeys([_DENSE, *fast, *long, *norms, *from_best, *every, *without]))


def _trained(run: Run, what: str, minutes: int) -> Run:
    return replace(run, recover=what, minutes=minutes, repeats=RecoverOptions.repeats)


@lru_cache(maxsize=1)
def _start(lab: Lab, run: Run) -> tuple[Any, Row]:
    return lab.prune(run)


def measure(lab: Lab, run: Run, zero_shot: bool) -> list[Row]:
    """Perplexity on both texts after the training, and how far it went."""
    model, fields = _start(lab, replace(run, recover=None, minutes=0, repeats=0.0))
    if run.recover is not None:
        model = copy.deepcopy(model)
        fields = {**fields, "training": _train(lab, run, model)}
    accuracy = {"zero_shot": lab.zero_shot(model)} if zero_shot else {}
    return [{**fields, **lab.perplexities(model), **accuracy}]


def _train(lab: Lab, run: Run, model: Any) -> Row:
    windows = lab.training(_LENGTH)
    options = RecoverOptions(minutes=run.minutes, train=str(run.recover), repeats=run.repeats, seed=run.seed)
    done = recover_model(model, windows[:-_HELD_OUT], windows[-_HELD_OUT:], options, teacher=lab.model).training
    return {
        "learning_rate": options.rate,
        "steps": done.steps,
        "tokens": done.tokens,
        "seconds": round(done.seconds, 1),
        "best": done.best,
        "curve": [[point.step, round(point.held_out, 4)] for point in done.curve],
    }


def section(found: Records) -> list[str]:
    """For each pattern, each start and under it each way of training."""
    rows = {Run(**row["run"]): row for row in found.rows}
    dense = rows.get(_DENSE, {})
    text = [
        "Pruned by the presets `fast` and `best`, then trained by `thanos.recover` with its defaults, but for what a "
        f"row says, and the dense model as its teacher, on windows of {_LENGTH} tokens of the first seven eighths of "
        "the C4 sample. Repeats are the share of windows whose second half says the first again. Perplexity on "
        "WikiText-2 and on the last eighth of the C4 sample, which neither calibration nor training sees. Dense: "
        f"{number(dense.get('perplexity'))}, held out {number(dense.get('held_out'))}."
    ]
    for pattern in _PATTERNS:
        own = sorted((run for run in rows if run.pattern == pattern), key=_order)
        if own:
            text += [f"### {pattern_name(pattern)}", _table({run: rows[run] for run in own})]
    return text


def _order(run: Run) -> tuple[int, int, int, float]:
    trained = -1 if run.recover is None else TRAINED.index(run.recover)
    return _STARTS.index(run.quality), trained, run.minutes, run.repeats


def _table(rows: dict[Run, Row]) -> str:
    lines = []
    for run, row in rows.items():
        training = row.get("training", {})
        lines.append(
            [
                run.quality,
                _WHAT[run.recover] if run.recover else "not trained",
                run.minutes or NOTHING,
                f"{run.repeats:.0%}" if run.recover else NOTHING,
                f"{training['learning_rate']:g}" if training else NOTHING,
                f"{training['tokens']:,}" if training else NOTHING,
                row["machine"].get("processor", NOTHING),
                number(row["perplexity"]),
                number(row["held_out"]),
                accuracy(row["zero_shot"]["average"]) if "zero_shot" in row else NOTHING,
            ]
        )
    header = [
        "start",
        "trained",
        "minutes",
        "repeats",
        "rate",
        "tokens",
        "processor",
        "perplexity",
        "held out",
        "zero-shot, %",
    ]
    return table(header, lines, left=2)


EXPERIMENT = Experiment(_runs(), {"What does training bring back?": section}, measure=measure, zero_shot=True)
