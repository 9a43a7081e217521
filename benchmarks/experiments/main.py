"""The main table: how good the methods are at each pattern, and how sure that is."""

from __future__ import annotations

from benchmarks.experiments.experiment import Experiment, grouped
from benchmarks.experiments.run import PATTERNS, Run, each_seed
from benchmarks.records import Records
from benchmarks.report.groups import Group, groups, pattern_name, run_name
from benchmarks.report.markdown import NOTHING, accuracy, folded, listing, percent, spread, table
from thanos.scoring.zeroshot import TASKS

# Every tenth decoder block left dense: alpha = 0 at the effective sparsity that alpha = 0.1 leaves n:m.
A_TENTH_DENSE = r"layers\.(9|19|29)\."
_SAME = 0.005  # effective sparsities less than this apart compare


def runs() -> list[Run]:
    """Every method at every pattern, Thanos with alpha too; where that lowers the sparsity, alpha = 0 matched to it."""
    found = [Run("dense", None)]
    for pattern in PATTERNS:
        found.append(Run("magnitude", pattern))
        varied = [Run(method, pattern) for method in ("wanda", "sparsegpt", "thanos")]
        varied.append(Run("thanos", pattern, alpha=0.1))
        if pattern == "0.5":
            varied += [Run(method, "0.45") for method in ("sparsegpt", "thanos")]
        elif not pattern.startswith("structured"):
            varied.append(Run("thanos", pattern, exclude=A_TENTH_DENSE))
        found += each_seed(varied)
    return found


def home(run: Run) -> str | None:
    """The pattern in whose table a run belongs: an unstructured run at another sparsity stands in that of 50%."""
    return run.pattern if run.pattern in PATTERNS or run.pattern is None else PATTERNS[0]


def comparable(group: Group, other: Group) -> bool:
    """Whether two runs have the same effective sparsity, up to what whole rows and columns allow."""
    return abs(group.sparsity - other.sparsity) < _SAME


def tables(found: Records) -> list[str]:
    """A table a pattern, and zero-shot accuracy by task."""
    all_groups = groups(found.rows)
    alphas = sorted({group.run.alpha for group in all_groups if group.run.alpha})
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
        if block := [group for group in all_groups if home(group.run) == pattern]:
            dense = [group for group in all_groups if group.run.method == "dense"]
            text.append(f"### {pattern_name(pattern).capitalize()}\n\n{_pattern_table(dense + block)}")
    scored = [group for group in all_groups if group.first.get("zero_shot") and group.run.method != "magnitude"]
    return [*text, *([_zero_shot(found, scored)] if scored else [])]


def _pattern_table(block: list[Group]) -> str:
    def scores(group: Group) -> str:
        text = spread(group.values("perplexity"))
        peers = [other for other in block if other.run.method != "dense" and comparable(group, other)]
        best = len(peers) > 1 and _mean(group) == min(map(_mean, peers)) < float("inf")
        return f"**{text}**" if best else text

    return grouped(
        block,
        ("method", lambda group: run_name(group.run, alpha=False)),
        ("α", lambda group: f"{group.run.alpha:g}" if group.run.method == "thanos" else NOTHING),
        "effective sparsity",
        ("perplexity", scores),
        "runs",
        "zero-shot, %",
        "seconds",
    )


def _mean(group: Group) -> float:
    return sum(float("inf") if score is None else score for score in group.values("perplexity")) / len(group.rows)


def _zero_shot(found: Records, scored: list[Group]) -> str:
    tasks = list(dict.fromkeys(task for group in scored for task in group.first["zero_shot"]["tasks"]))
    rows = []
    for group in scored:
        score = group.first["zero_shot"]
        cells = [accuracy(score["tasks"][task]) if task in score["tasks"] else NOTHING for task in tasks]
        rows.append([pattern_name(home(group.run)), run_name(group.run), *cells, accuracy(score["average"])])
    note = (
        f"Accuracy in percent ± standard error, on the first {found.head['settings']['zero_shot_limit']} documents of "
        "each task, by lm-eval's prompts and plain log-likelihood (`acc`)."
    )
    if absent := [task for task in TASKS if task not in tasks]:
        note += f" Of the paper's {len(TASKS)} tasks, {listing(absent)} {'is' if len(absent) == 1 else 'are'} not here."
    body = table(["pattern", "method", *tasks, "average"], rows, left=2)
    return folded(f"Zero-shot accuracy by task ({len(tasks)} tasks)", f"{note}\n\n{body}")


def paired(found: Records) -> list[str]:
    """The differences of perplexity, seed by seed."""
    here: dict[str | None, list[Group]] = {}
    for group in groups(found.rows):
        here.setdefault(home(group.run), []).append(group)
    rows = [
        [pattern_name(pattern), *row]
        for pattern in PATTERNS
        for ours in here.get(pattern, [])
        for other in here.get(pattern, [])
        if _rivals(ours, other) and (row := _difference(ours, other))
    ]
    text = (
        "Both runs of a pair see the same calibration samples, so the difference of their perplexities varies less "
        "than either. Mean ± standard deviation of the difference over the seeds; negative: the first is better. "
        "The deviation is that of the calibration samples alone; another evaluation text would shift the numbers too."
    )
    header = ["pattern", "pair", "effective sparsity", "difference of perplexity", "first better in"]
    return [text, table(header, rows, left=2)]


def _rivals(ours: Group, other: Group) -> bool:
    """Whether Thanos stands against Wanda or SparseGPT at its sparsity, or with some alpha against none."""
    if ours.run.method != "thanos" or not comparable(ours, other):
        return False
    without = other.run.method == "thanos" and other.run.alpha == 0 < ours.run.alpha
    return without or other.run.method in ("sparsegpt", "wanda")


def _difference(ours: Group, other: Group) -> list[str]:
    seeds = [seed for seed in ours.rows if seed in other.rows]
    pairs = [(ours.rows[seed]["perplexity"], other.rows[seed]["perplexity"]) for seed in seeds]
    differences = [None if None in pair else pair[0] - pair[1] for pair in pairs]
    wins = sum(difference is not None and difference < 0 for difference in differences)
    name = f"{run_name(ours.run)} − {run_name(other.run)}"
    told = [name, percent(ours.sparsity, 1), spread(differences, signed=True), f"{wins} of {len(pairs)}"]
    return told if differences else []


def readme_table(found: Records) -> str:
    """The main table in short: a row a method, a column a pattern; only runs at their pattern's own sparsity."""
    cells: dict[tuple[str, float], dict[str | None, Group]] = {}
    for group in groups(found.rows):
        full = abs(group.sparsity - group.values("nominal_sparsity")[0]) < _SAME
        if home(group.run) == group.run.pattern and not group.run.exclude and (full or not group.run.alpha):
            cells.setdefault((group.run.method, group.run.alpha), {})[group.run.pattern] = group
    rows = []
    for (method, alpha), here in cells.items():
        name = run_name(next(iter(here.values())).run)
        shown = [here.get(pattern, here.get(None)) for pattern in PATTERNS]
        scores = [spread(group.values("perplexity")) if group else NOTHING for group in shown]
        rows.append([f"**{name}**" if method == "thanos" and not alpha else name, *scores])
    return table(["perplexity", *map(pattern_name, PATTERNS)], rows)


EXPERIMENT = Experiment(runs(), {"How good is it?": tables, "How sure is that?": paired}, zero_shot=True)
