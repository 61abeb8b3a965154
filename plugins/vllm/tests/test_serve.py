"""``modulora serve``: the requests that it refuses, and the commands that it starts."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from modulora_vllm import adapters, server
from modulora_vllm.cli.serve import waits
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from modulora_core import load_model
from modulora_core.checkpoints.opening import open_model
from modulora_core.cli import main
from modulora_core.errors import AdapterError, OptionError, WorkError
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.quantization.assignment import Assignment
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.adapted_models import randomize, trained

WRONG = {
    "--engine other": "--engine: expected one of auto, vllm, transformers, got 'other'",
    "--adapter path": "--adapter: expected NAME=ADAPTER, got 'path'",
    "--adapter a=x --adapter a=y": "--adapter: expected each name once, got 'a' twice",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_request_is_one_sentence(tunable, capsys, words):
    assert main(["serve", str(tunable), *words.split()]) == 2
    assert WRONG[words] in " ".join(capsys.readouterr().err.split())


def test_adapters_need_vllm(tunable, capsys, monkeypatch):
    monkeypatch.setattr(server, "vllm_here", lambda: None)
    assert main(["serve", str(tunable), "--adapter", "mine=somewhere"]) == 2
    assert "transformers' server takes no adapters" in " ".join(capsys.readouterr().err.split())


def test_vllm_gets_a_slot_more_than_adapters():
    made = server.vllm_server(
        ("0.32.0", "cpu"), "packed", {"a": "/a", "b": "/b"}, rank=9, host="localhost", port=1,
        dtype="auto", loading=False, more=["--max-model-len", "64"],
    )  # fmt: skip
    line = " ".join(made.words)
    assert "--enable-lora --max-loras 3 --max-lora-rank 16 --lora-modules a=/a b=/b" in line
    assert "--enforce-eager" in line
    assert line.endswith("--max-model-len 64")
    assert made.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "False"


def test_a_model_that_graphs_cannot_record_is_served_without_them(tunable, tmp_path):
    assert waits(open_model(tunable))  # Toy's spec doesn't state that it is capturable
    dense, tables = tunable.with_name("dense"), Assignment(default="nf4", embeddings="nf4")
    for name, quantizer in {"linear": "nf4", "tables": tables}.items():
        quantize(str(dense), tmp_path / name, quantizer)
    assert not waits(open_model(tmp_path / "linear"))
    assert waits(open_model(tmp_path / "tables"))
    assert not waits(open_model(dense))
    for eager in (False, True):
        made = server.vllm_server(
            ("0.32.0", "cuda"), "packed", {}, rank=1, host="localhost", port=1, dtype="auto",
            loading=False, more=[], eager=eager,
        )  # fmt: skip
        assert ("--enforce-eager" in made.words) == eager


def test_an_adapter_with_channel_scales_is_refused(tunable, tmp_path):
    model = load_model(tunable, device="cpu")
    add_lora(model, LoRASettings(rank=2, train_scales=True))
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"channel scales, which vLLM doesn't know.*merge"):
        prepared(tunable.with_name("dense"), tmp_path)


def test_an_adapter_of_packed_weights_on_dense_ones_is_named(tunable, tmp_path):
    save_adapter(trained(load_model(tunable, device="cpu")), tmp_path / "adapter")
    dense = tunable.with_name("dense")
    ready, rank, warnings = prepared(dense, tmp_path)
    assert (list(ready), rank) == (["mine"], 4)
    assert "trained on weights quantized with toy" in warnings[0]
    assert "serve the packed folder" in warnings[0]


def test_an_adapter_of_another_quantization_gives_a_warning(tunable, tmp_path, caplog):
    quantize(str(tunable.with_name("dense")), tmp_path / "other", "verbatim")
    save_adapter(trained(load_model(tunable, device="cpu")), tmp_path / "adapter")
    assert prepared(tunable, tmp_path / "same", tmp_path / "adapter")[2] == []
    assert not caplog.messages
    prepared(tmp_path / "other", tmp_path / "changed", tmp_path / "adapter")
    (message,) = caplog.messages
    assert "quantized with toy" in message
    assert f"used on {tmp_path / 'other'} quantized with verbatim" in message


def test_an_adapter_of_dense_weights_on_packed_ones_is_named(tunable, tmp_path):
    dense = tunable.with_name("dense")
    model = AutoModelForCausalLM.from_pretrained(dense)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    (warning,) = prepared(tunable, tmp_path)[2]
    assert f"it has no record of its base, {dense} by its config" in warning
    assert prepared(dense, tmp_path / "dense", tmp_path / "adapter")[2] == []


def prepared(model, tmp_path, adapter=None):
    wanted = adapters.parse([f"mine={adapter or tmp_path / 'adapter'}"])
    return adapters.prepare(wanted, open_model(model), str(model), tmp_path)


def test_names_of_adapters_are_plain():
    with pytest.raises(OptionError, match="expected NAME=ADAPTER"):
        adapters.parse(["a b=path"])


SLEEPER = """
import signal, subprocess, sys, time
{ignore}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, file=open(sys.argv[1], "w"), flush=True)
time.sleep(600)
"""
IGNORES = "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)"


@pytest.mark.parametrize("ignore", ["", IGNORES], ids=["ends", "ignores signals"])
def test_no_process_of_a_server_is_left(tmp_path, monkeypatch, ignore):
    monkeypatch.setattr(server, "GRACE", 1.0)
    note = tmp_path / "pid"
    words = [sys.executable, "-c", SLEEPER.format(ignore=ignore), str(note)]

    def answers(_):
        return note.exists() and note.read_text().endswith("\n")

    def on_ready():
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(server, "_answers", answers)
    begin = time.monotonic()
    server.serve(server.Server("sleeper", words), "http://localhost", on_ready)
    assert time.monotonic() - begin < 10
    child = int(note.read_text())
    for _ in range(50):
        if not is_alive(child):
            break
        time.sleep(0.1)
    assert not is_alive(child)


def is_alive(pid):
    """Whether a process runs; a zombie, which nobody has waited for, doesn't."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_server_that_ends_is_an_error():
    words = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(WorkError, match=r"sleeper: expected a server that runs.*code 3"):
        server.serve(server.Server("sleeper", words), "http://localhost:9", lambda: None)
