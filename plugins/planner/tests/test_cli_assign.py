"""``modulora quantize --budget``, and ``modulora info`` of the checkpoint that it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Group

from modulora_core.cli import main
from modulora_planner.commands.tables import allocation_tables
from modulora_core.cli.terminal import Report, Terminal
from modulora_core.tests.scaled_quantizer import save_model_with_tokenizer
from modulora_core.tests.width_quantizer import installed

pytestmark = pytest.mark.usefixtures("one_thread")

Captured = pytest.CaptureFixture[str]

CALIBRATION = ["--calibration", "pydoc[:10%]", "--samples", "4", "--seq-len", "32"]
CHOICES = ["--choices", "plain:bits=2", "heeding:bits=4", "plain:bits=8"]


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with installed(tmp_path_factory.mktemp("widths-site")):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model_with_tokenizer("llama", tmp_path_factory.mktemp("source") / "llama"))


def test_object_tables_and_info_agree(source: str, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    words = ["--budget", "97KiB", *CHOICES, *CALIBRATION, "--quantize-head", "plain:bits=4"]
    assert main(["quantize", source, str(tmp_path / "json"), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    allocation = found["allocation"]
    assert found["quantizer"] == "mixed"
    assert found["bytes"] <= allocation["budget"] == 97 * 1024
    assert [choice["name"] for choice in allocation["choices"]] == CHOICES[1:]
    layers = sum(choice["layers"] for choice in allocation["choices"])
    assert layers == len(allocation["layers"]) == 14

    assert main(["quantize", source, str(out), *words]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    for number, choice in enumerate(allocation["choices"], 1):
        (row,) = [row for row in rows if row[:2] == [str(number), choice["name"]]]
        assert row[2] == str(choice["layers"])
        assert f"{choice['error']:.4f}" in row
    assert f"{allocation['error']:.5g}" in printed.partition("estimated growth of the loss")[2]
    (used,) = (line for line in printed.splitlines() if line.startswith("used "))
    numbers = {
        f"{block}.{layer}": str(layers["choice"] + 1)
        for name, layers in allocation["layers"].items()
        for block, layer in [(name[:14], name.split(".")[-2])]
    }
    assert table_of_blocks(printed) == numbers

    assert main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert used.split() in [line.split() for line in shown.splitlines()]
    assert table_of_blocks(shown) == numbers
    assert main(["info", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert sum(group["parameters"] for group in facts["quantizers"]) == 15
    for key in ("budget", "kept_bytes", "ends_bytes", "packed_bytes", "measured_on", "ends"):
        assert facts["allocation"][key] == allocation[key]


def table_of_blocks(printed: str) -> dict[str, str]:
    """The number of each layer's choice."""
    rows = [line.split() for line in printed[printed.index("\nblock") :].splitlines()[1:]]
    (_, *layers), *blocks = rows[: rows.index([])]
    return {
        f"{name}.{layer}": n for name, *ns in blocks for layer, n in zip(layers, ns, strict=True)
    }


def test_a_large_budget_is_reported_and_info_ignores_a_damaged_allocation(
    source: str, tmp_path: Path, capsys: Captured
) -> None:
    words = ["--budget", "1GiB", "--choices", "plain:bits=2", "plain:bits=4", *CALIBRATION]
    assert main(["quantize", source, str(tmp_path / "out"), *words]) == 0
    printed = capsys.readouterr().out
    assert "the budget is more than enough: every layer has its best choice" in printed
    assert "model.layers.0 to 1" in printed  # equal blocks are one row
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    recorded = dict(config["quantization_config"]["allocation"])
    for change in ({"choices": []}, {"budget": "much"}, {"choices": [{"quantizer": "plain"}]}):
        config["quantization_config"]["allocation"] = recorded | change
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
        assert main(["info", str(tmp_path / "out"), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["allocation"] is None
        assert facts["quantizers"][0]["parameters"] == 14


def test_blocks_are_in_the_order_of_their_numbers(capsys: Captured) -> None:
    names = sorted(f"model.layers.{i}.q_proj.weight" for i in range(12))  # as config.json sorts
    layers = {name: {"choice": int(name.split(".")[2]) % 2} for name in names}
    sizes = dict.fromkeys(("packed_bytes", "ends_bytes", "kept_bytes", "budget"), 1)
    allocation: dict[str, Any] = {"choices": [], "ends": {}, "layers": layers, **sizes}
    Terminal().show(Report({}, Group(*allocation_tables(allocation))))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "model." in line]
    assert rows == [[f"model.layers.{i}", str(i % 2 + 1)] for i in range(12)]


WRONG = {
    "": "expected -q NAME, or --budget SIZE and --choices, got neither",
    "--choices plain": "--choices: expected --budget SIZE beside it",
    "--budget 1GiB": "--budget: expected --choices",
    "--budget 1GiB --choices plain heeding": "--budget: expected --calibration SOURCE",
    "--budget 1GiB -q plain --choices plain": "-q: expected no -q beside --budget",
    "--budget 1GiB -o bits=2 --choices plain": "-o: expected no -o beside --budget",
    "--budget 1GiB --override *=plain --choices plain": "--override: expected no --override",
    "--budget 1GiB --choices plain: heeding --calibration pydoc": "got 'plain:'",
    "--budget 1GiB --choices :bits=2 heeding --calibration pydoc": "got ':bits=2'",
    "--budget 1GiB --choices --calibration pydoc": "--choices: expected one or more words",
    "--budget much --choices plain": "expected a size such as 24GiB",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(
    words: str, source: str, tmp_path: Path, capsys: Captured
) -> None:
    assert main(["quantize", source, str(tmp_path / "out"), *words.split()]) == 2
    printed = capsys.readouterr().err
    assert WRONG[words] in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())
