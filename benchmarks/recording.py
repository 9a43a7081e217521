"""What a benchmark's JSON keeps: numbers for the results page, and nothing that names this machine or its folders."""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch

from thanos.doctor import machine

_KEPT = ("group", "name", "fullname", "extra_info", "stats")


def machine_info() -> dict[str, Any]:
    """Processor, cores, memory in bytes, and versions."""
    known = machine()
    return {
        "processor": known["cpu"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        **{name: known[name] for name in ("python", "torch", "transformers")},
        "thanos": known["thanos-pruning"],
    }


def slim(report: dict[str, Any]) -> None:
    """Strip pytest-benchmark's report in place: no commit, no single rounds, floats to six significant digits."""
    report.pop("commit_info", None)
    report["benchmarks"] = [
        {key: _rounded(one[key]) for key in _KEPT if key in one} for one in report.get("benchmarks", [])
    ]
    for one in report["benchmarks"]:
        one.get("stats", {}).pop("data", None)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
