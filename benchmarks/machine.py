"""The machine that a number was measured on: what its record keeps, and the sentence that a page says."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import psutil
import torch

from thanos.report.machine import machine

_VERSIONS = {"python": "Python", "torch": "PyTorch", "transformers": "Transformers", "thanos": "Thanos"}


def describe() -> dict[str, Any]:
    """Processor, cores, memory, versions and GPUs; nothing that names this machine or its folders."""
    known = machine()
    gpu = {name: known[key] for name, key in (("gpu", "GPUs"), ("driver", "driver"), ("triton", "triton"))}
    return {
        "processor": known["cpu"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        **{name: known[name] for name in ("python", "torch", "transformers")},
        "thanos": known["thanos-pruning"],
        **({} if known["GPUs"] == "none" else gpu),
    }


def sentences(rows: Iterable[dict[str, Any]]) -> list[str]:
    """One for each different machine of these records."""
    return list(dict.fromkeys(f"Machine: {_told(row['machine'])}." for row in rows if row.get("machine")))


def _told(known: dict[str, Any]) -> str:
    parts = [str(known.get("processor", "unnamed processor"))]
    parts += [f"{known[key]} {key if known[key] != 1 else key[:-1]}" for key in ("cores", "threads") if key in known]
    if "memory_gib" in known:
        parts.append(f"{known['memory_gib']} GiB of memory")
    return ", ".join([*parts, *(f"{name} {known[key]}" for key, name in _VERSIONS.items() if known.get(key))])
