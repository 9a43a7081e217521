"""Keeps the libraries' warnings and progress bars out of a command's output."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from contextlib import suppress
from functools import partial


def silence_libraries(model: str = "") -> None:
    """From here on only this package speaks; for commands, not for code that others import.

    Args:
        model: that will be read, as users name it. What it does not need is not imported: that takes seconds.
    """
    import transformers

    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module="thanos")  # such as: a kernel is not used here, for it computes wrongly
    warnings.showwarning = lambda message, *_, **__: print(f"Warning: {message}", file=sys.stderr)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if "datasets" in sys.modules:
        import datasets

        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
    else:  # what it reads when it is imported
        os.environ |= {"DATASETS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    if model.lower().endswith(".gguf"):
        with suppress(ImportError, AttributeError):  # its bar obeys none of the switches above
            gguf = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
            gguf.__dict__["tqdm"] = partial(gguf.tqdm, disable=True)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
