"""Install a wheel into a fresh environment without a compiler, and prune with it: ``python tools/try_wheel.py WHEEL``.

Nothing of the checkout is used. With ``--sdist ARCHIVE`` the source archive is built and installed as well, with a
compiler.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "ninja")
USE = """
import shutil, torch, transformers
import thanos, thanos_kernels
from thanos.report.page import run_page
from thanos_kernels import native

assert not [name for name in {compilers!r} if shutil.which(name)], "there is a compiler"
assert "site-packages" in thanos_kernels.__file__, thanos_kernels.__file__
weight, inputs = torch.randn(64, 128), torch.randn(512, 128)
result = thanos.prune_weight(weight, inputs.T @ inputs / len(inputs), "2:4", backend="native")
assert int((result.weight == 0).sum()) == weight.numel() // 2
shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
report = thanos.prune_model(model, torch.randint(3, 99, (4, 32)), "0.5")
assert abs(report.effective_sparsity - 0.5) < 0.01
model.save_pretrained("pruned")
report.write(__import__("pathlib").Path("pruned"))
thanos.pack("pruned", "compact")
assert thanos.load("compact").generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, pad_token_id=0).shape == (1, 5)
print("thanos-pruning", thanos.__version__, "works with torch", torch.__version__)
"""


def environment(folder: Path, path: str) -> tuple[Path, dict[str, str]]:
    """A fresh virtual environment, and the variables for what runs in it."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX", "CC", "CUDA_HOME")}
    pins = {"PIP_CONSTRAINT": str(CONSTRAINTS), "PIP_BUILD_CONSTRAINT": str(CONSTRAINTS)}
    return folder / "bin" / "python", {**clean, **pins, "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--sdist", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="thanos-wheel-") as scratch:
        folder = Path(scratch)
        python, variables = environment(folder / "venv", str(folder / "venv" / "bin"))
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, str(chosen.wheel.absolute())], env=variables, check=True)
        subprocess.run([str(python), "-c", USE.format(compilers=COMPILERS)], env=variables, cwd=folder, check=True)
        helped = [str(python), "-m", "thanos.prune", "--help"]
        subprocess.run(helped, env=variables, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        if chosen.sdist:
            variables["PATH"] = os.environ["PATH"]
            remove = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "thanos-pruning"]
            subprocess.run(remove, env=variables, check=True)
            subprocess.run([*pip, str(chosen.sdist.absolute())], env=variables, check=True)
            loaded = "import thanos_kernels._C as built; print('the source archive is built:', built.__name__)"
            subprocess.run([str(python), "-c", loaded], env=variables, cwd=folder, check=True)
            shutil.rmtree(folder / "venv")


if __name__ == "__main__":
    main()
