"""What pyproject.toml claims against what the constraints pin, and what a source archive and a wheel hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from thanos_kernels import triton

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]
BUILD = [Requirement(text) for text in PYPROJECT["build-system"]["requires"]]
APART = ["peers", "docs"]  # in an environment of its own (see CONTRIBUTING.md); no part of what runs


def requirements() -> list[Requirement]:
    """All that the package asks for, in any of its extras or to be built."""
    extras = [texts for name, texts in PROJECT["optional-dependencies"].items() if name not in APART]
    return [*BUILD, *(Requirement(text) for texts in [PROJECT["dependencies"], *extras] for text in texts)]


def pins(file: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    parts = [line.split("==") for line in lines]
    return {canonicalize_name(name): Version(version) for name, version in parts}


def lower_bound(requirement: Requirement) -> Version:
    (only,) = requirement.specifier
    assert only.operator == ">=", f"{requirement} is no range with a lower bound alone"
    return Version(only.version)


def test_the_oldest_versions_claimed_are_those_tested() -> None:
    claimed = {canonicalize_name(one.name): lower_bound(one) for one in requirements()}
    oldest = pins("constraints-oldest.txt")
    assert {name: oldest.get(name) for name in claimed} == claimed


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_pinned_versions_are_within_the_ranges(file: str) -> None:
    pinned = pins(file)
    for one in requirements():
        version = pinned.get(canonicalize_name(one.name))
        assert version is None or version in one.specifier, one


def test_the_triton_refused_at_run_time_is_not_claimed() -> None:
    (claimed,) = [lower_bound(one) for one in requirements() if one.name == "triton"]
    assert claimed.release == triton.MINIMUM


def test_the_build_needs_no_pytorch() -> None:
    assert {one.name for one in BUILD} == {"setuptools", "pybind11", "ninja"}


def test_the_oldest_python_claimed_is_the_oldest_named() -> None:
    named = [text.split(" :: ")[-1] for text in PROJECT["classifiers"] if "Python :: 3." in text]
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert named == sorted(named, key=Version)


def test_a_source_archive_and_the_wheel_from_it_are_complete(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion=str(pins("constraints-oldest.txt")["setuptools"]))
    tree = tmp_path / "tree"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, tree, ignore=unwanted)
    environment = {**os.environ, "THANOS_NO_EXTENSION": "1"}

    def build(kind: str, folder: Path) -> Path:
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(tmp_path)!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (made,) = tmp_path.glob("*.tar.gz" if kind == "sdist" else "*.whl")
        return made

    with tarfile.open(build("sdist", tree)) as archive:
        archive.extractall(tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert {file.name for file in (unpacked / "csrc").iterdir()} == {file.name for file in (tree / "csrc").iterdir()}

    with zipfile.ZipFile(build("wheel", unpacked)) as wheel:
        held = {name for name in wheel.namelist() if name.endswith(".py")}
    sources = {
        str(file.relative_to(tree))
        for package in ("thanos", "thanos_kernels")
        for file in tree.glob(f"{package}/**/*.py")
    }
    assert held == sources
