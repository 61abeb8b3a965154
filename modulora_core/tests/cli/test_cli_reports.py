"""What commands tell a reader, which is not the JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from modulora_core.cli import main
from modulora_core.tests.adapted_models import save_llama_with_tokenizer
from modulora_core.tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread", "toy")

Told = Callable[..., tuple[str, str]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], toy: ModuleType) -> Told:
    """``told("info", path)`` gives stdout and stderr of a command that succeeds, each on one line."""

    def told(*words: object) -> tuple[str, str]:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        out, errors = capsys.readouterr()
        return " ".join(out.split()), " ".join(errors.split())

    return told


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_llama_with_tokenizer(tmp_path / "source")
    return tmp_path / "source"


def test_each_quantizer_is_named_with_what_it_packed(told: Told, tmp_path: Path) -> None:
    source = save_tiny_model("llama-tied", tmp_path / "source")
    text, _ = told("quantize", source, tmp_path / "one", "-q", "toy")
    assert re.search(r"one: [\d,]+ weights packed by toy, ", text)
    assert "tied to model.embed_tokens.weight: lm_head.weight" in text
    words = ("-q", "toy", "--quantize-embeddings", "verbatim")
    text, _ = told("quantize", source, tmp_path / "two", *words)
    weights, by_toy, by_verbatim = re.search(
        r"two: ([\d,]+) weights packed \(([\d,]+) by toy, ([\d,]+) by verbatim\)", text
    ).groups()  # type: ignore[union-attr]
    assert by_verbatim == "3,072"  # 96 tokens of 32 numbers
    assert int(weights.replace(",", "")) == int(by_toy.replace(",", "")) + 3072
    assert "tied to" not in text.partition("Not quantized:")[2]
    assert "tied to" not in told("info", tmp_path / "two")[0]


def test_a_source_without_a_tokenizer_is_told(
    told: Told,
    source: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told("quantize", source, tmp_path / "with", "-q", "toy")
    assert caplog.messages == []
    bare = save_tiny_model("llama", tmp_path / "bare")
    told("quantize", bare, tmp_path / "without", "-q", "toy")
    (warning,) = caplog.messages
    assert f"model {bare}: it has no tokenizer files, such as tokenizer.json" in warning
    assert main(["generate", str(tmp_path / "without"), "hello"]) == 2
    assert (
        "copy the tokenizer's files of the model that it was made from" in capsys.readouterr().err
    )


def test_a_measurement_reads_like_every_other_report(
    told: Told, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 60)
    words = ("evaluate", source, "--data", tmp_path / "text.txt", "--seq-len", 16, "--segments", 1)
    number = r"\d+\.\d{4}"
    assert re.fullmatch(
        rf"perplexity {number}, {number} nats per token, of 15 tokens in 1 segment \d+\.\d s, peak memory [\d.]+ [MG]iB",
        told(*words)[0],
    )
    rows = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("evaluate", source, "--data", tmp_path / "rows.jsonl", "--metric", "accuracy")
    assert re.match(
        rf"accuracy {number}: [012] of 2 examples, among 2 labels \d+\.\d s, peak", told(*words)[0]
    )


@pytest.mark.parametrize(
    ("option", "value"), [("seq-len", 1), ("segments", 0), ("batch-size", 0), ("max-new-tokens", 0)]
)
def test_a_number_too_small_is_told_by_its_option(
    option: str, value: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path / "nothing"), f"--{option}", str(value)]) == 2
    assert f"--{option}" in capsys.readouterr().err


def test_info_counts_as_people_do(told: Told, source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    told("quantize", source, packed, "-q", "toy", "--quantize-head", "verbatim")
    config = json.loads((packed / "config.json").read_text())
    tuning = {"epochs": 1, "learning_rate": 0.005}
    record = {"calibration": {"samples": 1, "seq_len": 8, "source": "pydoc", "tuning": tuning}}
    config["quantization_config"] |= record
    (packed / "config.json").write_text(json.dumps(config))
    text, _ = told("info", packed)
    assert re.search(r"verbatim .*?: 1 parameter, [\d,]+ weights", text)
    assert (
        "calibrated on 1 sample of 8 tokens of pydoc, blocks tuned: 1 epoch at learning rate 0.005"
        in text
    )
    config["quantization_config"]["calibration"] = {"tuning": {}}  # less than we write
    (packed / "config.json").write_text(json.dumps(config))
    assert (
        "calibrated on ? samples of ? tokens of ?, blocks tuned: ? epochs"
        in told("info", packed)[0]
    )
