"""What the GPU kernels must move and compute for a layer, and the least time that takes: bounds, not measurements.

``python -m benchmarks.kernel_cost`` prints the tables of docs/kernels.md. A bound is the longest of three: bytes of
memory over its bandwidth, flops on the matrix units over their peak, and operations of single lanes over the issue rate
of the ordinary units. Latency, launches, L2 and everything else come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

import click


@dataclass(frozen=True)
class Chip:
    """Peaks by the data sheet: bytes/s of memory, dense flop/s in 16 bits and TF32, float32 lane operations/s."""

    memory: float
    half: float
    tf32: float
    lanes: float


@dataclass(frozen=True)
class Cost:
    """Bytes of memory, flops on the matrix units in 16 bits and in TF32, operations of single lanes."""

    memory: float = 0.0
    half: float = 0.0
    tf32: float = 0.0
    lanes: float = 0.0

    def bound(self, chip: Chip) -> float:
        """Seconds at least."""
        matrix = self.half / chip.half + self.tf32 / chip.tf32
        return max(self.memory / chip.memory, matrix, self.lanes / chip.lanes)


CHIPS = {
    "A100 80 GB": Chip(2.04e12, 312e12, 156e12, 9.75e12),
    "H100 SXM": Chip(3.35e12, 989e12, 494e12, 33.5e12),
}
SHAPES = {
    "8B q, o": (4096, 4096),
    "8B k, v": (1024, 4096),
    "8B gate, up": (14336, 4096),
    "8B down": (4096, 14336),
    "70B q, o": (8192, 8192),
    "70B k, v": (1024, 8192),
    "70B gate, up": (28672, 8192),
    "70B down": (8192, 28672),
}
TOKENS = 2048
TILE = 32  # of the blocked solve
PAIRS = ((16, 16), (32, 32), (32, 64), (64, 64))


def hessian_update(columns: int) -> Cost:
    """2048 bfloat16 tokens: the lower triangle of tiles of 128."""
    flops = TOKENS * columns * (columns + 128.0)
    return Cost(memory=2.0 * TOKENS * columns + 6.0 * columns**2, half=flops)


def selection(rows: int, columns: int, block: int = 128) -> Cost:
    """The global residual mask of every block: three reads of what is left of the weights, then the block's mask."""
    starts = range(0, columns, block)
    trailing = sum(columns - start for start in starts)
    return Cost(memory=rows * (12.0 * trailing + 5.0 * columns))


def solved_in_registers(removed: int) -> float:
    """Lane operations of one row, an element and step: two sums under a mask and an fma make 5, one sum 3, none 1."""
    first, second = next(pair for pair in PAIRS if sum(pair) >= removed)
    steps = min(removed, first)
    return steps * (5.0 * first**2 + 3 * first * second + second**2) + max(0, removed - first) * 5.0 * second**2


def row_solves(rows: int, columns: int, block: int, removed: int) -> Cost:
    """Every row and block with ``removed`` columns each."""
    systems = rows * columns / block
    memory = systems * (5.0 * block + 6 * block + 8 * removed)
    if removed <= sum(PAIRS[-1]):
        return Cost(memory=memory, lanes=systems * solved_in_registers(removed))
    multiply_adds = removed**3 / 6 + removed**2 * TILE / 2
    return Cost(memory=memory, tf32=systems * 3 * 2 * multiply_adds, lanes=systems * 6.0 * removed * TILE**2)


def sweeps(rows: int, columns: int, block: int = 128) -> Cost:
    """SparseGPT's sweep: products for the panels before, 5 lane operations an element and step inside a panel."""
    systems = rows * columns / block
    return Cost(memory=systems * 13.0 * block, tf32=systems * 3 * block**2, lanes=systems * block * 7.0 * TILE)


def update(rows: int, columns: int) -> Cost:
    """The library's float32 product per block, c b^2 flops in all, two a lane operation."""
    return Cost(lanes=rows * columns**2 / 2)


def kernels(rows: int, columns: int) -> dict[str, Cost]:
    """Each kernel's cost over a whole layer."""
    return {
        "Hessian, 2048 tokens": hessian_update(columns),
        "select, 50%": selection(rows, columns),
        "row solve, 50%, B 128": row_solves(rows, columns, 128, 64),
        "row solve, 2:4, B 512": row_solves(rows, columns, 512, 256),
        "sweep, B 128": sweeps(rows, columns),
        "update (library)": update(rows, columns),
    }


def _markdown() -> str:
    names = list(kernels(1, 1))
    lines = ["| layer | chip | " + " | ".join(names) + " |", "|---|---" + "|---:" * len(names) + "|"]
    for shape, (rows, columns) in SHAPES.items():
        for chip_name, chip in CHIPS.items():
            bounds = [f"{1000 * cost.bound(chip):.2f}" for cost in kernels(rows, columns).values()]
            lines.append(f"| {shape} ({rows} x {columns}) | {chip_name} | " + " | ".join(bounds) + " |")
    return "\n".join(lines)


def _costs() -> str:
    lines = [
        "| layer | kernel | GB of memory | TFLOP on matrix units | T lane operations |",
        "|---|---|---:|---:|---:|",
    ]
    for shape, (rows, columns) in SHAPES.items():
        for name, cost in kernels(rows, columns).items():
            numbers = cost.memory / 1e9, (cost.half + cost.tf32) / 1e12, cost.lanes / 1e12
            lines.append(f"| {shape} | {name} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")
    return "\n".join(lines)


@click.command(help=__doc__)
def main() -> None:
    click.echo(f"Work of a layer:\n\n{_costs()}\n\nLower bounds in milliseconds:\n\n{_markdown()}")


if __name__ == "__main__":
    main()
