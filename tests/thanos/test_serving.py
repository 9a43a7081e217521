"""The README's lines for Transformers' server: a compact model answers a chat request over HTTP."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from tests.thanos.compact.test_checkpoint import keep_24
from thanos import compact

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("openai", reason="the extra serve is not installed")
pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="the server of Transformers 4 is started in another way"
)

ROOT = Path(__file__).parents[2]
SERVE, CURL = (
    re.search(pattern, (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    for pattern in (r"^python -c .* serve COMPACT.*$", r"^curl .*$")
)


@pytest.fixture
def folder(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A compact 2:4 model with int8 values and a chat template."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, max_position_embeddings=256)
    for block in model.model.layers:
        for layer in (block.mlp.up_proj, block.mlp.gate_proj, block.mlp.down_proj, block.self_attn.q_proj):
            layer.weight.data = keep_24(layer.weight.data)
    model.save_pretrained(tmp_path / "pruned")
    tiny_tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tiny_tokenizer.save_pretrained(tmp_path / "pruned")
    compact.pack(tmp_path / "pruned", tmp_path / "COMPACT", values="int8")
    return tmp_path / "COMPACT"


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    assert SERVE is not None
    _, *words = shlex.split(SERVE[0].replace("COMPACT", str(folder)))
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(folder.parent)}
    with (
        (folder.parent / "server.log").open("w+") as log,
        subprocess.Popen(
            [sys.executable, *words, "--port", str(port)], env=environment, stdout=log, stderr=log, cwd=folder.parent
        ) as server,
    ):
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.5)
                if server.poll() is not None:
                    break
            else:
                pytest.fail("the server did not start in two minutes")
            assert server.poll() is None, (folder.parent / "server.log").read_text()
            yield f"http://localhost:{port}"
        finally:
            server.kill()


def test_a_compact_model_answers_a_chat_request(folder: Path, address: str) -> None:
    assert CURL is not None
    words = shlex.split(CURL[0])
    assert words[1].startswith("localhost:8000/")
    body = {**json.loads(words[words.index("-d") + 1]), "max_tokens": 8}
    name, _, value = words[words.index("-H") + 1].partition(": ")
    request = urllib.request.Request(
        address + words[1].removeprefix("localhost:8000"), json.dumps(body).encode(), {name: value}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.loads(answer.read())
    assert found["usage"]["completion_tokens"] > 0
    model, tokenizer = compact.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.apply_chat_template(body["messages"], return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        own = model.generate(**tokens, max_new_tokens=8, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    assert found["choices"][0]["message"]["content"] == tokenizer.decode(own, skip_special_tokens=True)
