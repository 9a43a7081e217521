"""How good the methods are, and how sure that is: the main experiment."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.experiments.grid import PATTERNS
from benchmarks.report.markdown import NOTHING, accuracy, folded, listing, number, percent, spread, table
from benchmarks.report.read import Experiment, Results
from benchmarks.report.rows import Group, groups, home, pattern_name, provenance, run_name
from thanos.scoring.zeroshot import TASKS

_SAME = 0.005  # effective sparsities less than this apart compare


def comparable(group: Group, other: Group) -> bool:
    """Whether two runs have the same effective sparsity, up to what whole rows and columns allow."""
    return abs(group.sparsity - other.sparsity) < _SAME


def main_section(results: Results) -> list[str]:
    experiment = results.experiments["main"]
    found = groups(experiment)
    alphas = sorted({group.run.alpha for group in found if group.run.alpha})
    text = [
        "Perplexity is the mean ± standard deviation over calibration seeds (magnitude pruning reads no calibration "
        "samples and is deterministic: one run). Zero-shot accuracy is that of seed 0, with its standard error. "
        "Seconds are those of the whole walk through the model, seed 0. In bold, the lowest perplexity among rows of "
        "the same effective sparsity."
    ]
    if alphas:
        text[0] += (
            f" α = {listing([f'{alpha:g}' for alpha in alphas])} leaves that share of the rows of each layer dense, "
            "those with the largest outputs; where this lowers the effective sparsity, the rows below it have α = 0 "
            "at the sparsity it leaves."
        )
    for pattern in PATTERNS:
        if block := [group for group in found if home(group.run) == pattern]:
            dense = [group for group in found if group.run.method == "dense"]
            text.append(f"### {pattern_name(pattern).capitalize()}\n\n{_pattern_table(dense + block)}")
    scored = [group for group in found if group.first.get("zero_shot") and group.run.method != "magnitude"]
    if scored:
        text.append(_zero_shot(experiment, scored))
    return [*text, provenance(experiment)]


def _pattern_table(block: list[Group]) -> str:
    rows = []
    for group in block:
        peers = [other for other in block if other.run.method != "dense" and comparable(group, other)]
        scores = spread(group.perplexities)
        best = len(peers) > 1 and _mean(group) == min(map(_mean, peers)) < float("inf")
        zero_shot = group.first.get("zero_shot")
        rows.append(
            [
                run_name(group.run, alpha=False),
                f"{group.run.alpha:g}" if group.run.method == "thanos" else NOTHING,
                percent(group.sparsity, 2),
                f"**{scores}**" if best else scores,
                len(group.rows),
                accuracy(zero_shot["average"]) if zero_shot else NOTHING,
                number(group.seconds),
            ]
        )
    return table(["method", "α", "effective sparsity", "perplexity", "runs", "zero-shot, %", "seconds"], rows)


def _mean(group: Group) -> float:
    scores = [float("inf") if score is None else score for score in group.perplexities]
    return sum(scores) / len(scores)


def _zero_shot(experiment: Experiment, scored: list[Group]) -> str:
    tasks = list(dict.fromkeys(task for group in scored for task in group.first["zero_shot"]["tasks"]))
    rows = []
    for group in scored:
        score = group.first["zero_shot"]
        cells = [accuracy(score["tasks"][task]) if task in score["tasks"] else NOTHING for task in tasks]
        rows.append([pattern_name(home(group.run)), run_name(group.run), *cells, accuracy(score["average"])])
    limit = experiment.settings.get("zero_shot_limit")
    documents = f"the first {limit} documents of each task" if limit else "all documents of each task"
    note = (
        f"Accuracy in percent ± standard error, on {documents}, by lm-eval's prompts and plain log-likelihood (`acc`)."
    )
    if absent := [task for task in TASKS if task not in tasks]:
        note += f" Of the paper's {len(TASKS)} tasks, {listing(absent)} {'is' if len(absent) == 1 else 'are'} not here."
    return folded(
        f"Zero-shot accuracy by task ({len(tasks)} tasks)",
        f"{note}\n\n{table(['pattern', 'method', *tasks, 'average'], rows, left=2)}",
    )


def paired_section(results: Results) -> list[str]:
    experiment = results.experiments["main"]
    found = groups(experiment)
    rows = []
    for pattern in PATTERNS:
        for ours in (group for group in found if home(group.run) == pattern and group.run.method == "thanos"):
            for other in found:
                if home(other.run) == pattern and _rival(other, ours) and (row := _paired(ours, other)):
                    rows.append([pattern_name(pattern), *row])
    text = (
        "Both runs of a pair see the same calibration samples, so the difference of their perplexities varies less "
        "than either. Mean ± standard deviation of the difference over the seeds; negative: the first is better. "
        "The deviation is that of the calibration samples alone; another evaluation text would shift the numbers too."
    )
    header = ["pattern", "pair", "effective sparsity", "difference of perplexity", "first better in"]
    return [text, table(header, rows, left=2), provenance(experiment)]


def _rival(other: Group, ours: Group) -> bool:
    """Wanda or SparseGPT at the sparsity of ours, or Thanos with alpha = 0 where ours has some."""
    if other.run.method == "thanos":
        return comparable(other, ours) and other.run.alpha == 0 < ours.run.alpha
    return comparable(other, ours) and other.run.method in ("sparsegpt", "wanda")


def _paired(ours: Group, other: Group) -> Sequence[object] | None:
    seeds = [seed for seed in ours.rows if seed in other.rows]
    pairs = [(ours.rows[seed]["perplexity"], other.rows[seed]["perplexity"]) for seed in seeds]
    differences = [None if None in pair else pair[0] - pair[1] for pair in pairs]
    if not differences:
        return None
    wins = sum(difference is not None and difference < 0 for difference in differences)
    name = f"{run_name(ours.run)} − {run_name(other.run)}"
    return [name, percent(ours.sparsity, 1), spread(differences, signed=True), f"{wins} of {len(pairs)}"]


def readme_table(results: Results) -> str:
    """The main table in short: a row a method, a column a pattern; only runs at their pattern's own sparsity."""
    experiment = results.experiments["main"]
    found = [group for group in groups(experiment) if home(group.run) == group.run.pattern and not group.run.exclude]
    found = [group for group in found if not group.run.alpha or _keeps(group)]
    rows = []
    for method, alpha in dict.fromkeys((group.run.method, group.run.alpha) for group in found):
        here = {group.run.pattern: group for group in found if (group.run.method, group.run.alpha) == (method, alpha)}
        cells = [here.get(pattern, here.get(None)) for pattern in PATTERNS]
        name = run_name(next(iter(here.values())).run)
        scores = [spread(cell.perplexities) if cell else NOTHING for cell in cells]
        rows.append([f"**{name}**" if method == "thanos" and not alpha else name, *scores])
    return table(["perplexity", *map(pattern_name, PATTERNS)], rows)


def _keeps(group: Group) -> bool:
    """Whether alpha leaves the sparsity at the pattern's own."""
    nominal = [row["nominal_sparsity"] for row in group.rows.values()]
    return abs(group.sparsity - nominal[0]) < _SAME
