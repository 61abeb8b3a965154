from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from types import ModuleType

import pytest

from modulora_core import registry
from modulora_core.cli import main

SMALL = ["--shape", "24x40", "--rows", "1", "--rows", "5", "--seconds", "1e-6"]

PROMISED_KEYS = {
    "quantizer",
    "options",
    "shape",
    "device",
    "device_name",
    "threads",
    "bits_per_weight",
    "comparisons",
}


def test_bench_prints_the_promised_object(
    toy: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "-o", "levels=7", "--dtype", "float16", "--device", "cpu", "--json"]
    assert main(["bench", "toy", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.keys() >= PROMISED_KEYS
    assert told["options"] == {"levels": 7}
    assert told["shape"] == [24, 40]
    assert {row["dtype"] for row in told["comparisons"][1:]} == {"float16"}
    for row in told["comparisons"]:
        assert min(row["ours"]["seconds"], row["dense"]["seconds"], row["ratio"]) > 0
        if "share_of_copy" in row:
            assert row["kind"] in ("pack", "decode")
            assert row["bytes_per_second"] > 0


def test_without_a_shape_it_is_the_next_that_the_quantizer_takes(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(toy.Toy, "spec", toy.Toy.spec.model_copy(update={"in_multiple": 96}))
    monkeypatch.setattr(registry, "create", lambda *_: toy.Toy())
    monkeypatch.setattr(
        quantizer_bench, "measure_quantizer", lambda _, config, **__: shapes.append(config.shape)
    )
    monkeypatch.setattr("modulora_core.cli.bench._told", lambda _: "")
    shapes: list[tuple[int, int]] = []
    with contextlib.suppress(AttributeError):  # there is no bench to tell of
        main(["bench", "toy"])
    assert shapes == [(2048, 2112)]


def test_bench_prints_a_table(toy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "toy", *SMALL, "--device", "cpu"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "toy (levels=127), 24 x 40, 8.800 bits per weight"
    assert lines[2] == "dtype rows ms dense ms × dense GB/s of copy noise turns"
    rows = [line.split(" ") for line in lines[3:16]]
    assert [words[0] for words in rows] == ["pack", *2 * ["decode", "x", "y", "x", "y", "LoRA"]]
    assert lines[16].startswith("Milliseconds are medians")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tyo"], "did you mean 'toy'"),
        (["toy", "-o", "level=3"], "levels"),
        (["toy", "--shape", "24"], "--shape: expected OUTxIN, such as 4096x11008, got '24'"),
        (["toy", "--shape", "0x4"], "shape: expected positive sizes"),
        (["toy", "--rows", "0"], "--rows"),
        (["toy", "--dtype", "float8"], "dtype: expected some of"),
        (["toy", "--seconds", "0"], "seconds: expected more than 0"),
        (["toy", "--device", "quantum"], "device 'quantum'"),
    ],
)
def test_a_wrong_request_is_a_sentence(
    toy: ModuleType, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["bench", *words, "--json"]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]["message"]
