"""Weights and tokenizer by hub name: the real client of the hub against a small hub on this machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.support.tiny_backbones import TEXT, VISION
from tests.support.word_tokenizer import tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import sys
import torch
from mama.export.frozen_weights import files_of
from mama.model import attention
from mama.runtime import console
from mama.errors import ConfigError
from mama.settings.schema import TextConfig, VisionConfig
from mama.data.tokenizer import pretrained
from mama.model.text_tower import build_text
from mama.model.vision_tower import build_vision
console.configure_logging()
kernel = attention.choose("sdpa", torch.device("cpu"))
for name in sys.argv[1:]:
    try:
        tokenizer = pretrained(name, {})
        text = build_text(TextConfig(model=name, tune="full"), tokenizer, kernel)
        vision = build_vision(VisionConfig(model="lab/vision"), kernel)
    except ConfigError as error:
        sys.exit(str(error))
    if not {key.removeprefix("transformer.") for key in files_of(name)} >= text.backbone.state_dict().keys():
        sys.exit(f"{name}: consolidation does not find its files")
    print(sum(p.sum().item() for p in text.parameters()), sum(p.sum().item() for p in vision.parameters()))
"""


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """Serves `folder/<owner>/<name>/<file>` as the hub serves repositories; yields its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            repository, _, place = self.path.lstrip("/").partition("/resolve/main/")
            path = folder / repository / place
            found = bool(place) and path.is_file()
            content = path.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Error-Code", "" if found else "EntryNotFound")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def build(endpoint: str, cache: Path, *names: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    """A language model with its tokenizer, and an image model."""
    folder = tmp_path / "hub"
    torch.manual_seed(0)
    shape = {**TEXT["gpt2"], "vocab_size": len(tokenizer())}
    AutoModel.from_config(AutoConfig.for_model(**shape)).save_pretrained(folder / "lab" / "text")
    tokenizer().save(folder / "lab" / "text")
    AutoModel.from_config(AutoConfig.for_model(**VISION["dinov2"])).save_pretrained(folder / "lab" / "vision")
    return folder


def test_models_are_fetched_by_name_once_and_a_hub_out_of_reach_is_one_line(repositories: Path, tmp_path: Path) -> None:
    with hub(repositories) as address:
        done = build(address, tmp_path / "cache", "lab/text")
    assert done.returncode == 0, done.stderr
    expected = []
    for name in ("text", "vision"):
        model = AutoModel.from_pretrained(repositories / "lab" / name)
        expected.append(sum(p.sum().item() for n, p in model.named_parameters() if "pooler" not in n))
    assert [float(number) for number in done.stdout.split()] == pytest.approx(expected, abs=1e-3)
    assert "text.model: lab/text: 40 tensors loaded, 0 missing, 0 unexpected" in done.stderr
    assert "HTTP Request" not in done.stderr

    again = build(address, tmp_path / "cache", "lab/text", "lab/never-fetched", offline=True)
    assert again.stdout == done.stdout, again.stderr
    assert again.returncode == 1
    refusal = again.stderr.splitlines()[-1]
    assert refusal.startswith("text.model: the tokenizer of lab/never-fetched cannot be loaded: We couldn't connect to")
    assert len(refusal) < 300
