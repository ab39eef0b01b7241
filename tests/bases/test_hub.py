"""A hub id loads as a folder does: against a stand-in for the hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_folder: Path) -> Iterator[str]:
    """Serves one repository, `someone/tiny`, at one commit."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:4] == ["api", "models", "someone", "tiny"]:
                siblings = [{"rfilename": file.name} for file in tiny_folder.iterdir()]
                tree = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"}
                    for f in tiny_folder.iterdir()
                ]
                body = tree if "tree" in parts else {"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}
                self._send(json.dumps(body).encode(), "application/json")
            elif parts[:3] == ["someone", "tiny", "resolve"] and (file := tiny_folder / parts[-1]).is_file():
                self._send(file.read_bytes(), "application/octet-stream")
            else:
                self.send_response(404)
                self.send_header(
                    "X-Error-Code", "EntryNotFound" if parts[:2] == ["someone", "tiny"] else "RepoNotFound"
                )
                self.send_header("Content-Length", "0")
                self.end_headers()

        def _send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def load(hub: str, home: Path, name: str, **more: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's address is read when its client is imported."""
    script = (
        "import sys, veneer\n"
        "try:\n    base = veneer.load_base(sys.argv[1])\n"
        "except veneer.errors.VeneerError as error:\n    sys.exit(f'error: {error}')\n"
        "print(base.revision, base.parameter_count, base.tokenizer is not None, base.fingerprint)"
    )
    offline = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **more}
    return subprocess.run(
        [sys.executable, "-c", "import veneer.errors\n" + script, name],
        env={**os.environ, **offline}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_a_hub_id_is_fetched_and_then_found_without_the_hub(hub: str, tmp_path: Path) -> None:
    done = load(hub, tmp_path, "someone/tiny")
    assert done.returncode == 0, done.stderr
    revision, parameters, tokenizer, _ = done.stdout.split()
    assert (revision, parameters, tokenizer) == (COMMIT, "3161248", "True")
    again = load("http://127.0.0.1:9", tmp_path, "someone/tiny", HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout, again.stderr
    missing = load(hub, tmp_path, "someone/absent")
    assert missing.returncode == 1
    assert "error: " in missing.stderr
    assert "Traceback" not in missing.stderr
