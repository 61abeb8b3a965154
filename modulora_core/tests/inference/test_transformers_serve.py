"""``transformers serve`` answers with a packed folder, in a process that imports our format."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from modulora_core import load_model

for library in ("fastapi", "uvicorn", "openai"):  # of transformers[serving]
    pytest.importorskip(library)
pytestmark = pytest.mark.slow

SERVE = "import modulora_core.hf; from transformers.cli.transformers import app; app()"


def test_the_server_completes_as_generate_does(
    tunable: Path, toy_root: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", str(tunable), "--port", str(port)]
    body = {"model": str(tunable), "prompt": "the first", "max_tokens": 5, "temperature": 0}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with (tmp_path / "log").open("w") as log:
        environment = {**os.environ, "PYTHONPATH": str(toy_root)}
        command += ["--device", "cpu"]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(120):
            time.sleep(0.5)
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            except OSError:
                continue
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = json.load(answer)["choices"][0]["text"]
    finally:
        server.terminate()
        server.wait()
    tokenizer = AutoTokenizer.from_pretrained(tunable)
    ids = tokenizer("the first", return_tensors="pt").input_ids
    model = load_model(tunable, device="cpu")
    new = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert text == tokenizer.decode(new, skip_special_tokens=True)
