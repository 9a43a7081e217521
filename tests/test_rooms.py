"""The house: rooms import only rooms below them, and the kernels nothing of the models."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up; rooms on one line stand beside each other and do not import each other.
FLOORS = [
    {"threads"},
    {"thanos_kernels"},
    {"pattern", "linear"},
    {"options"},
    {"engine", "text", "checkpoint", "allocate"},
    {"report"},
    {"walk"},
    {"scoring"},
    {"compact", "shrink", "recover"},
    {"loading"},
    {"commands"},
    {"__main__"},  # a room's own command, such as thanos.report
    {"prune", "evaluate", "pack", "unpack", "doctor", "bench_inference"},
]
FLOOR = {room: index for index, rooms in enumerate(FLOORS) for room in rooms}


def room(module: str) -> str | None:
    """The room of a module of this project; None for other packages and for the face of ``thanos`` itself."""
    parts = module.split(".")
    if parts[0] == "thanos_kernels":
        return parts[0]
    return parts[1] if parts[0] == "thanos" and len(parts) > 1 else None


def imports(path: Path) -> set[str]:
    """The modules that a file imports, inside functions and for types alone too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path} imports relatively"
            deeper = {f"{node.module}.{name.name}" for name in node.names} if node.module == "thanos" else set()
            found |= deeper or {node.module}
    return found


def arrows() -> dict[tuple[str, str], str]:
    """(room, room it imports) to a file that does."""
    found = {}
    for path in sorted([*(ROOT / "thanos").rglob("*.py"), *(ROOT / "thanos_kernels").rglob("*.py")]):
        own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if path.stem == "__main__":
            own = "__main__"
        if own == "__init__":
            continue
        assert own in FLOOR, f"{path} stands in no room of the design"
        for module in imports(path):
            other = room(module)
            if other is not None and other != own:
                found[own, other] = str(path.relative_to(ROOT))
    return found


def test_arrows_point_down() -> None:
    found = arrows()
    assert len(found) > 20
    wrong = {pair: file for pair, file in found.items() if FLOOR[pair[0]] <= FLOOR.get(pair[1], 99)}
    assert not wrong


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for package in ("thanos", "thanos_kernels")
        for path in (ROOT / package).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 400
    }
    assert not long
