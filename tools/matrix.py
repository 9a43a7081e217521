"""Run the tests with the oldest and the newest versions claimed: ``python tools/matrix.py`` (``make test-matrix``).

Each combination is a Python found here, from 3.10 to 3.13, with the versions of constraints-oldest.txt or of
constraints.txt, in an environment of its own (``.venv-matrix``), by ``make pytest``. What passed goes into the README's
table; a row of the same versions is replaced. PyTorch's old builds for Linux are for CUDA and take several GB:
``--torch 2.13.0`` holds it at one.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
OPENING, CLOSING = "<!-- matrix -->", "<!-- /matrix -->"
SHOWN = ("torch", "transformers", "triton")
HEADER = ["| Python | PyTorch | Transformers | Triton | tests | result |", "| --- | --- | --- | --- | --- | --- |"]
PINS = {"oldest": "constraints-oldest.txt", "newest": "constraints.txt"}


def pythons() -> list[str]:
    """Those that pyproject.toml names and this machine has."""
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    works = [
        ["python" + version, "-c", "import venv, ensurepip"] for version in named if shutil.which("python" + version)
    ]
    return [
        command[0] for command in works if subprocess.run(command, capture_output=True, check=False).returncode == 0
    ]


def pins(which: str, torch: str | None) -> Path:
    """The constraints of a combination, PyTorch held at a version if asked for."""
    text = (ROOT / PINS[which]).read_text(encoding="utf-8")
    if torch:
        text = re.sub(r"^torch==.*$", f"torch=={torch}", text, flags=re.MULTILINE)
    path = ROOT / ".venv-matrix" / PINS[which]
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


def run(python: str, which: str, torch: str | None, tests: str) -> str:
    """Run the tests of one combination; its row of the table."""
    venv = ROOT / ".venv-matrix" / f"{python}-{which}-{torch or 'claimed'}"
    settings = [f"PYTHON={python}", f"VENV={venv}", f"CONSTRAINTS={pins(which, torch)}", f"TESTS={tests}"]
    done = subprocess.run(["make", "pytest", *settings], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    closing = re.search(r"(?:(\d+) failed, )?(\d+) passed(?:, (\d+) skipped)?", done.stdout)
    if closing is None:
        raise SystemExit(f"error: no tests ran with {python} and the {which} versions (messages above)")
    failed, passed, skipped = closing.groups()
    said = [f"{failed} failed"] * bool(failed) + [f"{passed} passed"] + [f"{skipped} skipped"] * bool(skipped)
    code = "import json, sys, importlib.metadata as m; print(json.dumps([m.version(n) for n in sys.argv[1:]]))"
    read = subprocess.run([venv / "bin" / "python", "-c", code, *SHOWN], capture_output=True, text=True, check=True)
    versions = [python.removeprefix("python"), *json.loads(read.stdout)]
    return "| " + " | ".join([*versions, f"`{tests}`" if tests else "all", ", ".join(said)]) + " |"


def versions_of(row: str) -> str:
    return "|".join(row.split("|")[:5])


def with_rows(text: str, rows: list[str]) -> str:
    """The README with the rows in its table; those of the same versions are replaced."""
    before, _, rest = text.partition(OPENING)
    table, found, after = rest.partition(CLOSING)
    if not found:
        raise SystemExit(f"error: README.md has no {OPENING} ... {CLOSING}")
    new = {versions_of(row) for row in rows}
    old = [row for row in table.strip().splitlines()[2:] if versions_of(row) not in new]
    return "\n".join([before + OPENING, *HEADER, *sorted([*old, *rows]), CLOSING + after])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append", help="such as python3.12; all that are here unless given")
    parser.add_argument("--versions", action="append", choices=list(PINS), help="both unless given")
    parser.add_argument("--torch", help="hold PyTorch at this version")
    parser.add_argument("--tests", default="", help="files or folders of tests, instead of all")
    chosen = parser.parse_args()
    failed = False
    for python in chosen.python or pythons():
        for which in chosen.versions or list(PINS):
            row = run(python, which, chosen.torch, chosen.tests)
            README.write_text(with_rows(README.read_text(encoding="utf-8"), [row]), encoding="utf-8")
            failed = failed or " failed" in row
    sys.exit(failed)


if __name__ == "__main__":
    main()
