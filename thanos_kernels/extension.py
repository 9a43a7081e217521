"""Where the C++ extension is, whether it fits, and what to say where it does not.

Knows nothing of PyTorch: ``setup.py`` reads this file too, for :func:`interface`.

The environment variable THANOS_NO_EXTENSION=1 does without the extension, silently.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"  # in a checkout; an installation has only what was built from it
REMEDY = (
    "to build it, run 'pip install .', or 'python setup.py build_ext --inplace' in a checkout, with a C++17 compiler"
)


def unwanted() -> bool:
    """Whether THANOS_NO_EXTENSION asks to do without."""
    return os.environ.get("THANOS_NO_EXTENSION", "0") not in ("", "0")


def interface() -> str | None:
    """A fingerprint of what Python calls in ``csrc/``; None where there are no sources."""
    files = sorted([*CSRC.glob("*kernels.h"), *CSRC.glob("bindings*.cpp")])
    if not files:
        return None
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def load() -> tuple[Any, str]:
    """The extension and ``""``, or None and why: half a sentence that names the file, where there is one."""
    if unwanted():
        return None, "THANOS_NO_EXTENSION is set"
    if PathFinder.find_spec("thanos_kernels._C", [str(HERE)]) is None:  # another checkout's, installed, does not count
        others = sorted(file.name for file in HERE.glob("_C.*") if file.suffix in (".so", ".pyd"))
        if not others:
            return None, "the C++ extension is not built"
        here = f"Python {sys.version_info[0]}.{sys.version_info[1]} on {sysconfig.get_platform()}"
        return None, f"the C++ extension was built for another Python or machine ({', '.join(others)}) than {here}"
    try:
        module = import_module("thanos_kernels._C")
    except ImportError as error:
        return None, f"the C++ extension does not load ({' '.join(str(error).split())})"
    wanted = interface()
    if wanted is not None and getattr(module, "interface", None) != wanted:
        return None, f"the C++ extension ({module.__file__}) was not built from the sources in {CSRC}"
    return module, ""
