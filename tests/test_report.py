"""The results page: numbers straight from the JSON, the same text every time, and a word where JSON is missing."""

from __future__ import annotations

import builtins
import random
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks.experiments.outliers import KINDS
from benchmarks.experiments.registry import EXPERIMENTS
from benchmarks.experiments.run import Run
from benchmarks.records import read, write
from benchmarks.report.__main__ import main
from benchmarks.report.markdown import number, spread, table
from benchmarks.report.page import PICTURES, drawn, page
from benchmarks.report.read import load
from benchmarks.report.speed import exponent, width_series

STEPS = ("factor", "select", "solve", "update", "loss")
TASKS = ("openbookqa", "boolq", "piqa", "hellaswag", "arc_easy", "arc_challenge")
BASE = {None: 22.6, "0.5": 43.0, "0.45": 36.0, "structured:0.3": 150.0, "4:8": 58.0, "2:4": 86.0}
WORSE = {"dense": 1.0, "magnitude": 11.0, "wanda": 1.15, "sparsegpt": 1.05, "thanos": 1.0, "llama.cpp": 1.1}


def experiment_rows(run: Run, name: str) -> list[dict[str, Any]]:
    noise = random.Random(repr(run))
    machine = {"processor": "A processor", "threads": 2, "python": "3.11", "torch": "2.13.0"}
    common = {"run": run.told(), "machine": machine}
    if name == "outliers":
        names = [f"model.layers.{b}.{'mlp' if 'ate' in k or 'up' in k or 'down' in k else 'self_attn'}.{k}"
                 for b in range(30) for k in KINDS]  # fmt: skip
        shares = ("energy_share", "loss_share", "relative_loss")
        return [
            {**common, "name": n, "rows": 576, "outliers": 58} | {share: noise.random() for share in shares}
            for n in names
        ]
    nominal = {"structured:0.3": 0.3, "0.45": 0.45, None: 0.0}.get(run.pattern, 0.5)
    keeps = run.pattern is None or run.pattern.startswith("structured")
    effective = nominal * (1 if keeps else 1 - run.alpha) * (0.9 if run.exclude else 1)
    size = 1.0 if run.block_size is None else 1 + 0.02 / run.block_size
    perplexity = (
        BASE.get(run.pattern, 70.0) * WORSE[run.method] * (1 - 0.3 * run.alpha) * size * noise.uniform(0.98, 1.02)
    )
    row = {**common, "nominal_sparsity": nominal, "effective_sparsity": effective, "perplexity": perplexity}
    if name in ("refine", "reconstruct", "allocation", "shrink", "sparsity", "recovery", "bits", "presets"):
        row["held_out"] = 1.3 * perplexity
    if name == "bits":
        row["bits"] = noise.uniform(3, 16)
    tasks = {
        t: {"accuracy": noise.uniform(0.3, 0.7), "stderr": 0.049, "metric": "acc", "documents": 100} for t in TASKS
    }
    average = {"accuracy": mean(task["accuracy"] for task in tasks.values()), "stderr": 0.02}
    prune = noise.uniform(5, 15) + 40 / (run.block_size or 128)
    if run.method != "dense":
        row["seconds"] = {"forward": 20.0, "hessian": 15.0, "prune": prune, "other": 1.0, "total": 36 + prune}
    if name == "presets" and run.method != "dense":
        row["peak_bytes"] = 2.5e9
    if name in ("main", "presets") and run.seed == 0:
        row["zero_shot"] = {"tasks": tasks, "average": average}
    return [row]


def experiment(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line and the records."""
    settings = {
        "model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "calibration": "c4.jsonl", "evaluation": "wikitext2.txt",
        "evaluation_tokens": 8192, "window": 1024, "zero_shot_limit": 100,
    }  # fmt: skip
    rows = [row for run in EXPERIMENTS[name].runs for row in experiment_rows(run, name)]
    return {"command": f"python -m benchmarks.experiments {name}", "settings": settings}, rows


def main_rows(**fields: Any) -> list[dict[str, Any]]:
    """The records of the main table whose runs have these fields."""
    rows = experiment("main")[1]
    return [row for row in rows if all(getattr(Run(**row["run"]), key) == value for key, value in fields.items())]


def timed(rows: int, columns: int, ge: float) -> dict[str, Any]:
    unit = 0.8 * rows * columns**2 / 4096**3
    shares = dict(zip(STEPS, (0.4, 0.15, 0.15, 0.2, 0.05), strict=True))
    steps = {step: share * ge * unit for step, share in shares.items()}
    return {"rows": rows, "columns": columns, "seconds": ge * unit, "ge": ge, "ge_seconds": unit, "steps": steps,
            "peak_floats": 3.2 * columns**2}  # fmt: skip


def layer_records() -> list[dict[str, Any]]:
    shapes = [("LLaMA-2 7B", "q_proj", 4096, 4096), ("OPT-125M", "q_proj", 768, 768), ("OPT-125M", "fc1", 3072, 768)]
    ge = {"thanos": 1.6, "sparsegpt": 1.25, "wanda": 0.7, "magnitude": 0.6}
    found = []
    for model, layer, c, b in shapes:
        for pattern, alpha in [
            ("0.5", 0.0),
            ("2:4", 0.0),
            ("4:8", 0.0),
            ("structured:0.3", 0.0),
            ("structured:0.3", 0.1),
        ]:
            for method in ge:
                found.append((model, layer, c, b, method, pattern, alpha, "auto", ge[method] * (1 + ("4" in pattern))))
    found += [(*shapes[0], "paper", "0.5", 0.0, "reference", 116.0)]
    found += [(*shapes[0], "sparsegpt", "0.5", 0.0, "reference", 9.0)]
    return [
        {"kind": "layer", "model": model, "layer": layer, "method": method, "pattern": pattern, "alpha": alpha,
         "backend": backend, "ratio_to_sparsegpt": times / 1.25, "limit_ge": None,
         "times_of_rival": 71.5 if method == "paper" else None,
         **timed(c, b, times), **({"steps": {}} if method == "paper" else {})}
        for model, layer, c, b, method, pattern, alpha, backend, times in found
    ]  # fmt: skip


def scaling_records() -> list[dict[str, Any]]:
    found = []
    for method, power, most in (("sparsegpt", 2.9, 8192), ("thanos", 2.75, 8192), ("paper", 3.8, 2048)):
        for width in (512, 1024, 2048, 4096, 8192):
            if width <= most:
                fields = timed(width, width, 1.5) | {
                    "seconds": {"paper": 90}.get(method, 1.4) * (width / 4096) ** power
                }
                found.append({"kind": "width", "method": method, "pattern": "0.5", "block_size": 128, **fields})
    for pattern in ("0.5", "2:4"):
        for size in (32, 64, 128, 256, 512, 1024):
            ge = 1.2 + 20 / size + size / 1000 * (1 + (pattern == "2:4"))
            fields = {"method": "thanos", "pattern": pattern, "block_size": size}
            found.append({"kind": "block_size", **fields, **timed(4096, 4096, ge)})
    return found


def op_records() -> list[dict[str, Any]]:
    common = {"kind": "op", "dtype": "float32", "rows": 4096, "columns": 4096, "seconds": 0.06, "ge": 0.08}
    solve = {"op": "row_solve", "backend": "native", "gflops": 73.0, "peak_share": 0.38, "peak": "float32 product"}
    select = {"op": "select_smallest", "backend": "reference", "gbytes_per_second": 9.5, "peak_share": 0.7}
    return [common | solve, common | select | {"peak": "copy"}]


def model_records() -> list[dict[str, Any]]:
    runs = [
        ("thanos", "thanos", 30.0, 43.4),
        ("thanos", "sparsegpt", 31.0, 46.2),
        ("llmcompressor", "sparsegpt", 93.0, 46.5),
    ]
    split = {"input_output": 1.0, "forward": 9.0, "hessian": 8.0, "prune": 11.0, "other": 1.0}
    return [
        {"kind": "model", "model": "SmolLM2-135M-Instruct", "engine": engine, "method": method, "pattern": "0.5",
         "samples": 32, "length": 512, "dtype": "bfloat16", "total": total, "peak_bytes": 900 << 20,
         "split": split if engine == "thanos" else {},
         "perplexity": score, "perplexity_tokens": 16368, "settings": {"damping": "0.01"}}
        for engine, method, total, score in runs
    ]  # fmt: skip


def sparse_records() -> list[dict[str, Any]]:
    common = {"kind": "sparse", "dtype": "bfloat16", "rows": 4096, "columns": 11008, "dense_seconds": 0.0043}
    layer = {"form": "Sparse24Linear", "tokens": 1, "seconds": 0.002, "times_as_fast": 2.15, "at_least": 1.5}
    return [{**common, **layer, "bytes_share": 0.563}, {}]


def removal_records() -> list[dict[str, Any]]:
    """Made up."""
    steps = {"factor": 5.0, "remove": 9.0}
    return [
        {"kind": "removal", "model": "LLaMA-2 7B", "layer": "down_proj", "rows": 4096, "columns": 11008,
         "removed": 2752, "seconds": 14.0, "ge": 2.8, "ge_seconds": 5.0, "limit_ge": 3.0, "steps": steps}
    ]  # fmt: skip


def stage_records() -> list[dict[str, Any]]:
    """Made up."""
    common = {"kind": "stage", "rows": 4096, "columns": 4096, "seconds": 2.0, "ge": 2.5, "loss_left": 0.87}
    return [
        {**common, "stage": "refit", "pattern": "0.5", "limit_ge": 4.0},
        {**common, "stage": "search", "pattern": "2:4", "limit_ge": None},
    ]


def llama_records() -> list[dict[str, Any]]:
    """Made up: a dense model and a smaller one at two types."""
    found = []
    for kind, scale in (("f16", 1.0), ("Q4_K_M", 0.4)):
        for model, size, decode, agree, gap in (("dense", 200e6, 50.0, 32, None), ("small", 150e6, 65.0, 9, 0.05)):
            found.append(
                {"name": f"{model} {kind}", "model": model, "type": kind, "bytes": int(size * scale),
                 "decode": decode / scale, "read": 4 * decode / scale, "tokens": [5] * 32, "agree": agree, "gap": gap,
                 "decode_ratio": decode / 50, "read_ratio": decode / 50}
            )  # fmt: skip
    return found


SUITES = {
    "layer": layer_records,
    "scaling": scaling_records,
    "ops": op_records,
    "sparse": sparse_records,
    "model": model_records,
    "removal": removal_records,
    "stages": stage_records,
}


def results(place: Path) -> Path:
    return place / "benchmarks" / "results"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder laid out as the repository, with all result files, made up."""
    for name in EXPERIMENTS:
        write(results(tmp_path) / f"{name}.jsonl", *experiment(name))
    machine = {"processor": "A processor", "cores": 2, "memory_gib": 8, "python": "3.11", "torch": "2.13.0"}
    for name, rows in SUITES.items():
        write(results(tmp_path) / f"{name}.jsonl", {}, [{**row, "machine": machine} for row in rows()])
    write(results(tmp_path) / "llama.jsonl", {}, [{**row, "machine": machine} for row in llama_records()])
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plots, which take a second each."""
    monkeypatch.setattr("benchmarks.report.__main__.drawn", lambda results: {})


def report(place: Path, *options: str) -> Result:
    """Run the command in a folder laid out as the repository."""
    folders = ["--results", "benchmarks/results", "--output", "docs/results.md", "--readme", "README.md"]
    arguments = [str(place / word) if "/" in word or word.endswith(".md") else word for word in folders]
    return CliRunner().invoke(main, [*arguments, *options])


def text_of(place: Path) -> str:
    return page(load(results(place)), "plots")


def section(text: str, title: str) -> str:
    """From the heading to the next of the same or a higher level."""
    level, rest = re.search(rf"^(#+) {re.escape(title)}\n(.*)", text, re.DOTALL | re.MULTILINE).groups()  # type: ignore[union-attr]
    return re.split(rf"^#{{1,{len(level)}}} ", rest, flags=re.MULTILINE)[0]


def cells(text: str, start: str) -> list[str]:
    """Of the first table row that starts so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_same_json_gives_the_same_page_and_plots(place: Path) -> None:
    assert report(place).exit_code == 0
    files = [place / "docs" / "results.md", *sorted((place / "docs" / "plots").glob("*.png"))]
    first = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    assert report(place).exit_code == 0
    assert [file.read_bytes() for file in files] == first
    assert {file.stem for file in files[1:]} == set(PICTURES)
    assert set(re.findall(r"\(plots/(\w+)\.png\)", first[0].decode())) == set(PICTURES)
    assert max(map(len, first[1:])) < 60_000


def test_check_tells_a_stale_page_and_writes_nothing(place: Path, undrawn: None) -> None:
    assert report(place, "--check").exit_code == 1
    assert not (place / "docs").exists()
    report(place)
    assert report(place, "--check").exit_code == 0
    (results(place) / "alpha.jsonl").unlink()
    assert "would change" in report(place, "--check").output


def test_main_table_states_mean_deviation_and_effective_sparsity(place: Path) -> None:
    text = text_of(place)
    rows = main_rows(method="sparsegpt", pattern="2:4", exclude=None)
    scores, seconds = [row["perplexity"] for row in rows], rows[0]["seconds"]["total"]
    expected = f"{mean(scores):.2f} ± {stdev(scores):.2f}"
    found = cells(section(text, "2:4"), "SparseGPT ")
    assert found[2].startswith("50.00%")
    assert found[3].strip("*") == expected
    assert (found[4], found[6]) == ("3", f"{seconds:.2f}")
    matched = cells(section(text, "2:4"), "Thanos (blocks 9, 19 and 29 dense)")
    assert matched[2] == "45.00%"
    assert cells(section(text, "Unstructured 50%"), "SparseGPT (unstructured 45%)")[2] == "45.00%"
    assert cells(section(text, "2:4"), "magnitude")[4] == "1"


def test_bold_marks_the_best_of_the_same_effective_sparsity(place: Path) -> None:
    text = section(text_of(place), "2:4")
    lines = [line for line in text.splitlines() if "**" in line]
    groups = [re.search(r"(\d+)\.\d+%", line).group(1) for line in lines]  # type: ignore[union-attr]
    assert sorted(groups) == ["45", "50"], "one for each sparsity"
    assert lines[0].startswith("| Thanos | 0 |")


def test_paired_differences_are_taken_seed_by_seed(place: Path) -> None:
    thanos, wanda = (main_rows(method=method, pattern="0.5", alpha=0.0) for method in ("thanos", "wanda"))
    differences = [a["perplexity"] - b["perplexity"] for a, b in zip(thanos, wanda, strict=True)]
    found = cells(section(text_of(place), "How sure is that?"), "unstructured 50% | Thanos − Wanda")
    assert found[3] == f"{mean(differences):.2f} ± {stdev(differences):.2f}".replace("-", "−")
    assert found[4] == f"{sum(one < 0 for one in differences)} of 3"


def test_the_exponent_is_that_of_the_times(place: Path) -> None:
    series = width_series(load(results(place)).of("scaling", "width"))
    assert exponent(series["Thanos"]) == pytest.approx(2.75)
    assert exponent(series["the paper's algorithm"], 1024) == pytest.approx(3.8)
    assert exponent(series["Thanos"][:1]) is None
    assert cells(section(text_of(place), "Growth with the width"), "Thanos")[-2:] == ["2.75", "2.75"]


def test_a_baseline_is_compared_with_the_runs_beside_it(place: Path) -> None:
    assert cells(section(text_of(place), "Layers of real models"), "the paper's algorithm")[-1] == "71.50"


def test_sparse_layers_stand_beside_the_dense_one(place: Path) -> None:
    found = cells(section(text_of(place), "Sparse layers"), "`Sparse24Linear`")
    assert found == ["`Sparse24Linear`", "bfloat16", "4096 x 11008", "1", "2.00", "4.30", "2.15", "1.50", "0.56"]


def test_peers_stand_side_by_side(place: Path) -> None:
    found = cells(section(text_of(place), "Whole models"), "Thanos against llm-compressor's SparseGPT")
    assert found[2] == "3.10"
    assert found[4:] == ["43.40", "46.50"]


def test_presets_stand_beside_the_others(place: Path) -> None:
    part = section(text_of(place), "Which preset?")
    lines = [line for line in section(part, "2:4 by each preset").splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "dense", "Wanda", "SparseGPT", "Thanos, fast", "Thanos, balanced", "Thanos, best", "llm-compressor's Wanda",
        "llm-compressor's SparseGPT",
    ]  # fmt: skip
    best = cells(part, "Thanos, best")
    assert float(best[2]) == pytest.approx(1.3 * float(best[1]), abs=0.01)
    assert best[5] == "2.50"
    (place / "README.md").write_text("<!-- presets -->\n<!-- /presets -->\n")
    assert report(place).exit_code == 0
    told = cells((place / "README.md").read_text(), "**Thanos, best**")
    assert told[1:3] == best[1:3]
    assert len(told) == 7


def test_stages_of_a_layer_stand_beside_what_they_are_to_cost(place: Path) -> None:
    part = section(text_of(place), "Refits and mask searches of a layer")
    assert cells(part, "refit | 4096")[2:] == ["unstructured 50%", "2.00", "2.50", "4.00", "87.0%"]
    assert cells(part, "mask search and refit")[2:] == ["2:4", "2.00", "2.50", "", "87.0%"]


def test_models_in_llama_cpp_stand_beside_the_dense_one(place: Path) -> None:
    part = section(text_of(place), "In llama.cpp")
    rows = [cells(part, f"{model} | {kind}") for kind in ("f16", "Q4_K_M") for model in ("dense", "small")]
    assert rows[0][2:] == ["all 32 agree", "200 (100%)", "50.00 (1.00 x)", "200.0 (1.00 x)"]
    assert rows[1][2:] == ["9 agree, then a near-tie of 0.050 nats", "150 (75%)", "65.00 (1.30 x)", "260.0 (1.30 x)"]
    assert [row[3] for row in rows[2:]] == ["80 (100%)", "60 (75%)"]
    assert part.rstrip().endswith("Machine: A processor, 2 cores, 8 GiB of memory, Python 3.11, PyTorch 2.13.0.")
    (results(place) / "llama.jsonl").unlink()
    told = section(text_of(place), "In llama.cpp")
    assert "Not measured yet: `python -m benchmarks.llama_cpp DENSE SMALLER" in told


def test_large_models_are_told_in_sentences(place: Path) -> None:
    machine = {"processor": "A processor", "cores": 2}
    stream = {
        "kind": "stream", "limit": 1.5, "ratio": 1.15, "memory_processor": 200.0, "memory_peak": 4 * 2**30,
        "files_processor": 230.0, "files_peak": 2**30, "limited_processor": None,
    }  # fmt: skip
    processes = {
        "kind": "processes", "agreement": 1.0, "walk_ratio": 1.7, "ratio": 1.5, "one_walk": 76.0, "two_walk": 45.0
    }  # fmt: skip
    path = results(place) / "large.jsonl"
    write(path, {}, [{**row, "machine": machine} for row in (stream, processes)])
    part = section(text_of(place), "Models larger than one would like")
    assert "230.0 seconds (1.15 times as long) and 1.00 GiB from its files" in part
    assert "in a control group of 1.50 GiB it did not finish" in part
    assert "76.00 s (1.70 times as fast" in part
    assert "100.0% of the masks agree" in part
    path.unlink()
    told = section(text_of(place), "Models larger than one would like")
    assert "Not measured yet: `python -m benchmarks.large" in told


def test_the_cost_of_channels_is_told_in_products(place: Path) -> None:
    found = cells(section(text_of(place), "Channels of a layer"), "LLaMA-2 7B down_proj")
    assert found[1:] == ["4096 x 11008", "2752 of 11008", "14.00", "2.80", "3.00", "1.00", "1.80"]


@pytest.mark.parametrize("name", [*EXPERIMENTS, *SUITES])
def test_a_missing_file_leaves_its_command(place: Path, name: str) -> None:
    (results(place) / f"{name}.jsonl").unlink()
    command = f"benchmarks.experiments {name}" if name in EXPERIMENTS else f"pytest benchmarks/test_{name}.py"
    text = text_of(place)
    assert f"Not measured yet: `{'python -m ' if name in EXPERIMENTS else ''}{command}" in text
    assert set(re.findall(r"\(plots/(\w+)\.png\)", text)) == set(drawn(load(results(place))))


def test_no_file_at_all_and_partial_ones(place: Path) -> None:
    head, rows = experiment("main")
    for kept in (4, 0):
        write(results(place) / "main.jsonl", head, rows[:kept])
        assert f"{kept} of {len(rows)} runs are there" in text_of(place)
    for file in results(place).iterdir():
        file.unlink()
    assert text_of(place).count("Not measured yet") == 27
    assert report(place).exit_code == 0


def test_the_records_of_a_run_count_as_one(place: Path) -> None:
    assert len(read(results(place) / "outliers.jsonl").rows) > 200
    assert "Not complete" not in text_of(place)


def test_a_perplexity_that_is_not_finite_is_said(place: Path) -> None:
    head, rows = experiment("main")
    for row in rows:
        if row["run"].get("method") == "wanda" and row["run"].get("seed") == 1:
            row["perplexity"] = None
    write(results(place) / "main.jsonl", head, rows)
    assert cells(section(text_of(place), "2:4"), "Wanda")[3] == "not finite"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("main", "{"),
        ("main", ""),
        ("main", '{"command": "", "settings": {}}\n[1]'),
        ("main", '{"command": "", "settings": {}}\n{"run": {}}'),
        ("main", '{"command": ""}'),
        ("layer", '{}\n{"kind": "layer"}'),
        ("alpha", '{"command": "", "settings": {}}\n{"run": {"beta": 1}}'),
        ("gpu", '{}\n{"kind": "layer"}'),
        ("llama", '{}\n{"name": "a model"}'),
        ("removal", '{}\n{"kind": "removal"}'),
        ("stages", '{}\n{"kind": "stage"}'),
    ],
)
def test_a_damaged_file_is_named_in_one_sentence(place: Path, name: str, text: str) -> None:
    (results(place) / f"{name}.jsonl").write_text(text)
    result = report(place)
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 1
    assert name in result.output
    assert "again" in result.output
    assert not (place / "docs").exists()


def test_findings_are_included_verbatim(place: Path) -> None:
    findings = place / "benchmarks" / "findings"
    findings.mkdir()
    names = [*EXPERIMENTS, "speed"]
    for name in names:
        (findings / f"{name}.md").write_text(f"What {name} *showed*.\n")
    text = text_of(place)
    assert [text.count(f"\n\nWhat {name} *showed*.\n") for name in names] == [1] * len(names)


def test_the_gpu_table_is_empty_until_measured(place: Path) -> None:
    assert "No GPU time has been measured yet" in text_of(place)
    layer = {"kind": "layer", "rows": 4096, "columns": 4096, "method": "thanos", "pattern": "2:4"}
    machine = {"machine": {"gpu": "Some GPU"}}
    write(results(place) / "gpu-one.jsonl", {}, [{**layer, "seconds": 0.0123, "ge": 1.5, **machine}])
    text = section(text_of(place), "GPU")
    assert "Some GPU" in text
    assert cells(text, "Thanos") == ["Thanos", "2:4", "4096 x 4096", "12.30", "1.50"]


def test_only_what_stands_between_the_markers_of_the_readme_changes(place: Path, undrawn: None) -> None:
    readme = place / "README.md"
    readme.write_text("above\n")
    report(place)
    assert readme.read_text() == "above\n"
    begin, end, speed, speed_end = (f"<!-- {name} -->" for name in ("results", "/results", "speed", "/speed"))
    readme.write_text(f"above\n{begin}\nold\n{end}\nbetween\n{speed}\nold\n{speed_end}\nbelow\n")
    assert report(place, "--check").exit_code == 1
    report(place)
    text = readme.read_text()
    assert text.startswith(f"above\n{begin}\n| perplexity |")
    assert f"{end}\nbetween\n{speed}\n| 4096 x 4096, GE |" in text
    assert text.endswith(f"{speed_end}\nbelow\n")
    assert "old" not in text
    assert "(docs/results.md)" in text
    report(place)
    assert readme.read_text() == text
    quality, layer = text.split("between")
    assert cells(quality, "Thanos (α = 0.1)")[1:] != ["", "", "", ""]
    assert [bool(cell) for cell in cells(quality, "Thanos (α = 0.1)")[1:]] == [False, True, False, False]
    assert cells(layer, "Thanos")[1:] == ["1.60", "3.20", "3.20", "1.60", "1.60"]
    assert cells(layer, "SparseGPT, in plain PyTorch")[1:] == ["9.00", "", "", "", ""]
    assert cells(layer, "the paper's algorithm")[1:] == ["116.0", "", "", "", ""]


def test_without_matplotlib_it_says_what_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "benchmarks.report.plots":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    result = report(place)
    assert result.exit_code == 1
    assert "pip install '.[report]'" in result.output
    assert not (place / "docs").exists()


def test_numbers_keep_three_digits() -> None:
    assert [number(x) for x in (None, 0, 0.00123456, 1.2345, 43.414, 486.46, 1337.85)] == [
        "", "0.00", "0.00123", "1.23", "43.41", "486.5", "1338"
    ]  # fmt: skip
    assert spread([1.0, 3.0]) == "2.00 ± 1.41"
    assert spread([-1.5], signed=True) == "−1.50"
    assert spread([2.0, None]) == "not finite"
    assert table(["a", "b"], [["x|y", 1]]) == "| a | b |\n| --- | --: |\n| x\\|y | 1 |"


def test_the_committed_page_is_what_the_committed_numbers_make() -> None:
    result = CliRunner().invoke(main, ["--check"])
    assert result.exit_code == 0, result.output
