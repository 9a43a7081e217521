"""What a result depends on beside the code: the machine and the versions. Said here, for reports and benchmarks."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from thanos_kernels import native

PACKAGES = ("thanos-pruning", "torch", "triton", "transformers", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, str]:
    """Names and versions, for a person."""
    facts = {**versions(), "system": platform.platform(), "cpu": processor()}
    facts["cpus"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    facts["cpu threads"] = str(torch.get_num_threads())
    facts["native extension"] = "built" if native.available() else native.ABSENCE
    facts["CUDA / ROCm of torch"] = torch.version.cuda or torch.version.hip or "none"
    facts["driver"] = _driver()
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    facts["GPUs"] = ", ".join(torch.cuda.get_device_name(index) for index in devices) or "none"
    return facts


def processor() -> str:
    """The name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        if found:
            return found[0]
    amd = Path("/sys/module/amdgpu/version")
    return f"amdgpu {amd.read_text().strip()}" if amd.exists() else "none"
