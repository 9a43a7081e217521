"""All kernels in all the configurations they may be launched in."""

from __future__ import annotations

from thanos_kernels.triton import hessian, row_solve, row_solve_blocked, select, select_groups, sweep
from thanos_kernels.triton.common import Variant, precision


def variants(hip: bool) -> list[Variant]:
    """Every variant as it is compiled for AMD (``hip``) or NVIDIA chips."""
    products = precision(hip)
    return [
        *row_solve.variants(),
        *row_solve_blocked.variants(products),
        *select.variants(),
        *select_groups.variants(),
        *sweep.variants(products),
        *hessian.variants(products),
    ]
