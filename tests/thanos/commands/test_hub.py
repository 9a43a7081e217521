"""``--push-to-hub`` against a stand-in for the hub: what arrives, and that a failure loses nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from thanos.prune import main

ROOT = Path(__file__).parents[3]


class Hub(ThreadingHTTPServer):
    """Takes commits as the hub does; weights by the large-file protocol.

    Attributes:
        files: what arrived, by name.
        cards: those whose metadata it was to check.
        failing: the status of every commit, if it is to fail.
        known: whether it knows who asks.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.created: list[str] = []
        self.cards: list[str] = []
        self.failing = 0
        self.known = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        return

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            if self.server.known:
                return self.answer({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})
            return self.answer({"error": "Invalid user token."}, 401)
        return self.answer({"id": "me/pruned", "sha": "0" * 40, "siblings": []})

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        self.server.stored[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        content = self.body()
        if self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(content)["content"])
            return self.answer({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(content)["name"])
            return self.answer({"url": f"{self.server.address}/me/pruned"})
        if "/preupload/" in self.path:
            files = [
                {
                    **file,
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(content)["files"]
            ]
            return self.answer({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.address}/store/{one['oid']}"}}}
                for one in json.loads(content)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            if self.server.failing:
                return self.answer({"error": "the disk of the hub is full"}, self.server.failing)
            for line in content.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    self.server.files[entry["value"]["path"]] = self.server.stored[entry["value"]["oid"]]
            return self.answer(
                {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.address}/me/pruned"}
            )
        return self.answer({"error": f"there is no {self.path}"}, 404)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pushed(hub: Hub, model_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs the command in a process of its own, which knows the stand-in as the hub."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun " * 20)

    def run(name: str, **changes: str) -> Any:
        known = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_stand_in", "HF_HOME": str(tmp_path / "home")}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        return subprocess.run(
            [
                *(sys.executable, "-m", "thanos.prune", str(model_folder), "--output", str(tmp_path / "out")),
                *("--calibration", str(text), "--samples", "2", "--sequence-length", "16", "--method", "wanda"),
                *("--push-to-hub", name),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **known, **switches, **changes},
            cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


def test_all_files_arrive(hub: Hub, pushed: Callable[..., Any], tmp_path: Path) -> None:
    run = pushed("me/pruned")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == f"uploaded to {hub.address}/me/pruned"
    assert hub.created == ["pruned"]
    assert set(hub.cards) == {(tmp_path / "out" / "README.md").read_text()}
    assert hub.files.keys() == {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "README.md", "report.html", "recipe.yaml", "pruning.json"} <= hub.files.keys()
    for name, content in hub.files.items():
        assert hashlib.sha256(content).digest() == hashlib.sha256((tmp_path / "out" / name).read_bytes()).digest()


def test_a_failed_upload_loses_nothing(hub: Hub, pushed: Callable[..., Any], tmp_path: Path) -> None:
    hub.failing = 400
    run = pushed("me/pruned")
    assert run.returncode == 1
    assert run.stderr.startswith(f"Error: the model is saved in {tmp_path / 'out'}, but could not be uploaded")
    assert f"'hf upload me/pruned {tmp_path / 'out'}' tries again" in run.stderr
    assert run.stderr.count("\n") == 1
    assert hub.files == {}
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out.partial").exists()


def test_what_the_hub_would_not_take_is_refused_first(hub: Hub, pushed: Callable[..., Any], tmp_path: Path) -> None:
    hub.known = False
    run = pushed("me/pruned")
    assert run.returncode == 1
    assert run.stderr.startswith("Error: cannot upload to me/pruned: the hub does not know you")
    assert run.stderr.count("\n") == 1
    for name in ("a/b/c", "me/--", ""):
        result = CliRunner().invoke(main, ["model", "--output", str(tmp_path / "out"), "--push-to-hub", name])
        assert result.exit_code == 2
        assert "is no name on the hub" in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
