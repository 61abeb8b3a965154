"""The commands as a user types them, on a small packed model."""

from __future__ import annotations

import io
import re

import pytest
import torch

from modulora_core.errors import DataError
from modulora_core.inference.generate import Generation
from modulora_core.inference.opened import open_to_run
from modulora_core.tests.adapted_models import logits
from modulora_core.tests.cli.conftest import save_source

pytestmark = pytest.mark.usefixtures("one_thread")

FEW_STEPS = ("--batch-size", 4, "--grad-accum", 1, "--seq-len", 16, "--lr", 0.05)


def test_quantize_prints_the_promised_keys(run, source, tmp_path):
    words = ("-q", "toy", "-o", "levels=7", "--max-shard-size", "20kB")
    code, found, _ = run("quantize", source, tmp_path / "out", *words)
    assert code == 0
    assert {"out", "bits_per_weight", "bytes", "seconds", "peak_memory_bytes"} <= found.keys()
    assert (found["quantizer"], found["options"]) == ("toy", {"levels": 7})
    assert "lm_head.weight" in found["kept"]["output head"]
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_info_shows_what_a_checkpoint_holds(run, packed, text_of):
    found = run("info", packed)[1]
    assert found["quantizers"][0]["quantizer"] == "toy"
    assert found["quantizers"][0]["parameters"] == 14
    assert found["bits_per_weight"] > 8
    stored = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    assert 0 < stored - found["bytes"] < 20_000  # the header
    text = text_of("info", packed)
    assert re.search(r"toy \(modulora-toy \S+\) 14 [\d,]+ [\d.]+ KiB 8\.\d+ levels=127", text)


def test_generate_streams_what_it_reports(run, packed, text_of):
    words = ("generate", packed, "The quick", "--max-new-tokens", 8)
    streamed = text_of(*words)
    code, found, _ = run(*words)
    assert code == 0
    assert streamed == " ".join(found["text"].split())
    assert 1 <= found["tokens"] <= 8
    raw = run(*words, "--raw")[1]
    assert raw["prompt_tokens"] < found["prompt_tokens"]
    sampled = [run(*words, "--temperature", 1.5, "--seed", seed)[1]["text"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_chat_keeps_the_conversation_until_it_is_reset(run, packed, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/reset\nagain\nmore\n/exit\nnever\n"))
    code, found, _ = run("chat", packed, "--max-new-tokens", 2, "--system", "s")
    assert code == 0
    said = [(m["role"], m["content"]) for m in found["messages"] if m["role"] != "assistant"]
    assert said == [("system", "s"), ("user", "again"), ("user", "more")]


class Typed(io.StringIO):
    """Lines from a terminal."""

    def isatty(self):
        return True


def test_chat_on_a_terminal_continues_after_an_error_and_after_ctrl_c(run, packed, monkeypatch):
    def answer(model, messages, sampling, on_text):
        last = messages[-1]["content"]
        if last == "long":
            raise DataError("prompt of 9 tokens: the model's window is 8")
        on_text("so ")
        if last == "stop":
            raise KeyboardInterrupt
        return Generation("so it is", 1, 1, 1.0)

    monkeypatch.setattr("modulora_core.inference.generate.generate", answer)
    lines = "one\nlong\n/rest\nstop\ntwo\n"
    monkeypatch.setattr("sys.stdin", Typed(lines))
    code, found, notes = run("chat", packed)
    assert code == 0
    said = [m["content"] for m in found["messages"]]
    assert said == ["one", "so it is", "stop", "so ", "two", "so it is"]
    assert "the model's window is 8 (the message is left out;" in notes
    assert "no such command: /rest" in notes
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))  # through a pipe an error is final
    assert run("chat", packed)[0] == 2


def check_every_command(run, packed, text, folder):
    """Finetune, merge and generate; the adapter and the merged model agree."""
    adapter, merged = folder / "adapter", folder / "merged"
    code, found, _ = run("finetune", packed, adapter, "--data", text, "--steps", 6, *FEW_STEPS)
    assert code == 0, found
    assert found["losses"][-1] < found["losses"][0]
    assert run("merge", packed, merged, "--adapter", adapter, "--dtype", "float32")[0] == 0
    assert run("generate", packed, "The", "--adapter", adapter, "--max-new-tokens", 2)[0] == 0
    models = (open_to_run(packed), open_to_run(packed, adapter=adapter), open_to_run(merged))
    base, tuned, together = (logits(model.load()) for model in models)
    assert not torch.allclose(tuned, base, atol=1e-2)
    torch.testing.assert_close(together, tuned, rtol=1e-4, atol=1e-4)
    return base


def test_every_command_takes_a_finetuned_adapter(run, packed, text, tmp_path, text_of):
    check_every_command(run, packed, text, tmp_path)
    assert run("info", tmp_path / "adapter")[1]["modules"] == 14
    assert "kind adapter modules 14 ranks 8 " in text_of("info", tmp_path / "adapter")


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_every_command_takes_a_model_with_packed_ends(run, architecture, text, tmp_path):
    source, packed = save_source(tmp_path / "source", architecture), tmp_path / "packed"
    head = ("--quantize-head", "toy") if architecture == "llama" else ()
    words = ("-q", "verbatim", "--quantize-embeddings", "toy:levels=127", *head)
    code, found, _ = run("quantize", source, packed, *words)
    assert code == 0, found
    assert not set(found["kept"]) & {"embedding", "output head"}
    groups = {group["quantizer"]: group for group in run("info", packed)[1]["quantizers"]}
    assert groups["verbatim"]["parameters"] == 14
    assert groups["toy"]["parameters"] == (2 if head else 1)
    base = check_every_command(run, packed, text, tmp_path)
    dense = logits(open_to_run(source).load())
    # 8 bits move a weight by 1/254 of a row's largest at most
    assert (base - dense).norm() < 0.02 * dense.norm()


QUANTIZE = "quantize {source} {new} -q toy"
WRONG = {
    f"{QUANTIZE} -o levels=x": "levels",
    f"{QUANTIZE} --override nonsense": "expected GLOB=NAME",
    f"{QUANTIZE} --quantize-head toy:": "--quantize-head: expected NAME or NAME:KEY=VALUE,...",
    f"{QUANTIZE} --seq-len 9": "--seq-len: expected --calibration SOURCE beside it, got none",
    f"{QUANTIZE} --tune-lr 1": "--tune-lr: expected --tune-epochs N beside it",
    "quantize {source} {source} -q toy": "new or empty",
    "quantize {packed} {new} -q toy": "already quantized",
    "generate {packed} x --adapter {new}": "adapter",
    "generate {packed} x --max-new-tokens 1000": "window",
    "compare {source} -q toy --out {text}": "expected a folder, got a file",
    "merge {packed} {new} --dtype int4": "dtype",
    "finetune {source} {new} --data {text} --steps 1": "modulora quantize",
    "convert {packed} {new} --to crude --model {packed}": "--to that writes an adapter, got --to",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_input_is_one_sentence_and_exit_code_2(run, source, packed, text, tmp_path, words):
    places = {"source": source, "packed": packed, "text": text, "new": tmp_path / "new"}
    code, found, errors = run(*(word.format(**places) for word in words.split()))
    assert code == 2, found
    assert WRONG[words] in found["error"]["message"]
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
