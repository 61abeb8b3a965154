"""The commands as a user types them, on a small packed model."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modulora_core.cli import main
from modulora_core.errors import DataError
from modulora_core.inference.generate import Generation
from modulora_core.tests.tiny_models import tiny_config
from modulora_core.tests.tiny_tokenizer import make_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"

Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], toy: ModuleType) -> Run:
    """``run("info", path)`` gives the exit code, the JSON object of stdout, and stderr."""

    def run(*words: object) -> tuple[int, dict[str, Any], str]:
        code = main([*map(str, words), "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out), captured.err

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    tokenizer = make_tokenizer(template=TEMPLATE)
    torch.manual_seed(0)
    config = tiny_config("llama")
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def packed(run: Run, source: Path, tmp_path: Path) -> Path:
    assert run("quantize", source, tmp_path / "packed", "-q", "toy")[0] == 0
    return tmp_path / "packed"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return path


def test_quantize_prints_the_promised_keys_and_lists_what_it_kept(
    run: Run, source: Path, tmp_path: Path
) -> None:
    code, told, _ = run(
        "quantize",
        source,
        tmp_path / "out",
        "-q",
        "toy",
        "-o",
        "levels=7",
        "--max-shard-size",
        "20kB",
    )
    assert code == 0
    keys = {
        "out",
        "quantizer",
        "options",
        "bits_per_weight",
        "bytes",
        "seconds",
        "peak_memory_bytes",
    }
    assert keys <= told.keys()
    assert told["options"] == {"levels": 7}
    assert "lm_head.weight" in told["kept"]["output head"]
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_info_says_what_a_checkpoint_holds(run: Run, packed: Path) -> None:
    code, told, _ = run("info", packed)
    assert code == 0
    assert told["quantizers"][0]["quantizer"] == "toy"
    assert told["quantizers"][0]["parameters"] == 14
    assert told["bits_per_weight"] > 8
    stored = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    assert 0 < stored - told["bytes"] < 20_000  # the header


def test_evaluate_agrees_with_a_plain_loop_over_the_merged_model(
    run: Run, packed: Path, text: Path, tmp_path: Path
) -> None:
    code, told, _ = run("evaluate", packed, "--data", text, "--seq-len", 16, "--segments", 3)
    assert code == 0
    assert {"metric", "perplexity", "tokens", "segments", "peak_memory_bytes"} <= told.keys()
    assert run("merge", packed, tmp_path / "merged", "--dtype", "float32")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = (
        tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt")
        .input_ids[0, :48]
        .view(3, 16)
    )
    with torch.no_grad():
        loss = sum(model(row[None], labels=row[None]).loss.item() for row in ids) / 3
    assert told["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    code, dense, _ = run(
        "evaluate", tmp_path / "merged", "--data", text, "--seq-len", 16, "--segments", 3
    )
    assert dense["perplexity"] == pytest.approx(told["perplexity"], rel=1e-4)


def test_generate_streams_what_it_reports(
    packed: Path, toy: ModuleType, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    words = ["generate", packed, "The quick", "--max-new-tokens", 5]
    assert main([str(word) for word in words]) == 0
    streamed = capsys.readouterr().out
    code, told, _ = run(*words)
    assert code == 0
    assert streamed.rstrip("\n") == told["text"].rstrip("\n")
    assert 1 <= told["tokens"] <= 5
    assert run(*words, "--raw")[1]["prompt_tokens"] < told["prompt_tokens"]


def test_sampling_depends_on_the_seed_alone(run: Run, packed: Path) -> None:
    words = ("generate", packed, "The", "--raw", "--max-new-tokens", 8, "--temperature", 1.5)
    first, again, other = (run(*words, "--seed", seed)[1]["text"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_chat_keeps_the_conversation_until_it_is_reset(
    run: Run, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/reset\nagain\nmore\n/exit\nnever\n"))
    code, told, _ = run("chat", packed, "--max-new-tokens", 2, "--system", "s")
    assert code == 0
    assert [(m["role"], m["content"]) for m in told["messages"] if m["role"] != "assistant"] == [
        ("system", "s"), ("user", "again"), ("user", "more"),
    ]  # fmt: skip


class Typed(io.StringIO):
    """Lines that somebody types, who presses Ctrl-C once an answer has begun where a line is ``stop``."""

    def isatty(self) -> bool:
        return True


def test_somebody_who_types_goes_on_after_a_mistake_and_stops_an_answer(
    run: Run, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(
        model: Any, tokenizer: Any, messages: list[dict[str, str]], sampling: Any, on_text: Any
    ) -> Generation:
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
    code, told, notes = run("chat", packed)
    assert code == 0
    assert [m["content"] for m in told["messages"]] == [
        "one",
        "so it is",
        "stop",
        "so ",
        "two",
        "so it is",
    ]
    assert (
        "the model's window is 8 (the message is left out; /reset forgets the conversation)"
        in notes
    )
    assert "no such command: /rest" in notes
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))  # a pipe: nobody is there to go on
    assert run("chat", packed)[0] == 2


def test_bytes_that_are_no_text_are_refused(
    run: Run, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caf = b"caf\xe9".decode(errors="surrogateescape")
    code, told, _ = run("generate", packed, caf, "--raw", "--max-new-tokens", 1)
    assert (code, told["error"]["message"]) == (
        2,
        "prompt: expected text in UTF-8, got other bytes after 'caf'",
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(caf + "\n"))
    assert run("chat", packed)[0] == 2


def test_a_finetuned_adapter_is_used_by_every_command(
    run: Run, packed: Path, text: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    code, told, _ = run("finetune", packed, adapter, "--data", text, "--steps", 6, "--seq-len", 16, "--batch-size", 4,
                        "--grad-accum", 1, "--lr", 0.05)  # fmt: skip
    assert code == 0
    assert told["losses"][-1] < told["losses"][0]
    perplexity = {name: run("evaluate", packed, "--data", text, "--seq-len", 16, "--segments", 2, *flags)[1]["perplexity"]
                  for name, flags in {"base": (), "tuned": ("--adapter", adapter)}.items()}  # fmt: skip
    assert perplexity["tuned"] < perplexity["base"]
    assert run("info", adapter)[1]["modules"] == 14
    assert (
        run("merge", packed, tmp_path / "merged", "--adapter", adapter, "--dtype", "float32")[0]
        == 0
    )
    merged = run("evaluate", tmp_path / "merged", "--data", text, "--seq-len", 16, "--segments", 2)[
        1
    ]
    assert merged["perplexity"] == pytest.approx(perplexity["tuned"], rel=1e-4)
    assert run("generate", packed, "The", "--adapter", adapter, "--max-new-tokens", 2)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize", "{source}", "{new}", "-q", "tyo"], "did you mean 'toy'"),
        (["quantize", "{source}", "{new}", "-q", "toy", "-o", "level=3"], "levels"),
        (["quantize", "{source}", "{new}", "-q", "toy", "-o", "levels=x"], "levels"),
        (
            ["quantize", "{source}", "{new}", "-q", "toy", "--override", "nonsense"],
            "expected GLOB=NAME",
        ),
        (
            ["quantize", "{source}", "{new}", "-q", "toy", "--max-shard-size", "big"],
            "--max-shard-size",
        ),
        (["quantize", "{source}", "{source}", "-q", "toy"], "new or empty"),
        (["quantize", "{packed}", "{new}", "-q", "toy"], "already quantized"),
        (["quantize", "{text}", "{new}", "-q", "toy"], "expected a folder or a .gguf file"),
        (["info", "{source}"], "modulora quantize"),
        (["evaluate", "{packed}", "--data", "missing.txt"], "missing.txt"),
        (["evaluate", "{packed}", "--metric", "bleu"], "--metric"),
        (["evaluate", "{packed}", "--data", "{text}", "--seq-len", "100000"], "tokens"),
        (["generate", "{source}", "x", "--adapter", "{new}"], "is dense"),
        (["generate", "{packed}", "x", "--adapter", "{new}"], "adapter"),
        (["generate", "{packed}", "x", "--temperature", "-1"], "temperature"),
        (["generate", "{packed}", "x", "--dtype", "int4"], "dtype"),
        (["generate", "{packed}", "x", "--max-new-tokens", "1000"], "window"),
        (["merge", "{packed}", "{new}", "--dtype", "int4"], "dtype"),
        (["merge", "{source}", "{new}"], "modulora quantize"),
        (
            ["finetune", "{source}", "{new}", "--data", "{text}", "--steps", "1"],
            "modulora quantize",
        ),
    ],
)
def test_a_wrong_input_is_one_sentence_and_exit_code_2(
    run: Run, source: Path, packed: Path, text: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    places = {"source": source, "packed": packed, "text": text, "new": tmp_path / "new"}
    before = sorted(path.name for path in tmp_path.iterdir())
    code, told, errors = run(*(word.format(**places) for word in words))
    assert code == 2, told
    assert message in told["error"]["message"]
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == before
