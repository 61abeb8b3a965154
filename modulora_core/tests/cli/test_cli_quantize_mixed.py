"""``modulora quantize --budget``: its words, its refusals, its table and its object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from modulora_core.cli import main
from modulora_core.cli.allocation import _layers
from modulora_core.tests.scaled_quantizer import save_model_with_tokenizer
from modulora_core.tests.width_quantizer import installed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with installed(tmp_path_factory.mktemp("widths-site")):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model_with_tokenizer("llama", tmp_path_factory.mktemp("source") / "llama"))


CALIBRATION = ["--calibration", "pydoc[:10%]", "--samples", "4", "--seq-len", "32"]


def test_tables_and_object_tell_the_same(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--budget",
        "162KiB",
        "--choices",
        "plain:bits=2",
        "heeding:bits=4",
        "plain:bits=8",
        *CALIBRATION,
    ]
    assert main(["quantize", source, str(tmp_path / "one"), *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["quantizer"] == "mixed"
    allocation = told["allocation"]
    assert told["bytes"] <= allocation["budget"] == 162 * 1024
    assert [choice["name"] for choice in allocation["choices"]] == [
        "plain:bits=2",
        "heeding:bits=4",
        "plain:bits=8",
    ]
    assert (
        sum(choice["layers"] for choice in allocation["choices"]) == len(allocation["layers"]) == 14
    )

    assert main(["quantize", source, str(tmp_path / "two"), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    for choice in allocation["choices"]:
        (line,) = [line.split() for line in lines if choice["name"] in line.split()]
        assert line[2] == str(choice["layers"])
    numbers = [
        line.split()[1:]
        for line in lines
        if line.startswith("model.layers.") and line.split()[1].isdigit()
    ]
    expected = [str(layer["choice"] + 1) for layer in allocation["layers"].values()]
    assert [number for row in numbers for number in row] == expected
    assert any(line.startswith("estimated growth of the loss") for line in lines)

    assert main(["info", str(tmp_path / "two"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert sum(group["parameters"] for group in facts["quantizers"]) == 14
    assert sum(group["bytes"] for group in facts["quantizers"]) == allocation["packed_bytes"]
    for key in ("budget", "kept_bytes", "ends_bytes", "packed_bytes", "measured_on", "ends"):
        assert facts["allocation"][key] == allocation[key]


def test_info_shows_the_table_without_errors(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--budget",
        "97KiB",
        "--choices",
        "plain:bits=2",
        "heeding:bits=4",
        "plain:bits=8",
        *CALIBRATION,
    ]
    words += ["--quantize-head", "plain:bits=4"]
    assert main(["quantize", source, str(tmp_path / "out"), *words]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert main(["info", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out.splitlines()

    def table(lines: list[str], first: str) -> list[list[str]]:
        start = next(
            i for i, line in enumerate(lines) if line.split()[: len(first.split())] == first.split()
        )
        return [line.split() for line in lines[start : lines.index("", start)]]

    def numbers(lines: list[str]) -> dict[str, dict[str, str]]:
        (_, *columns), *rows = table(lines, "block")
        return {block: dict(zip(columns, cells, strict=True)) for block, *cells in rows}

    assert numbers(shown) == numbers(printed)
    head, *rows = table(printed, "choice")
    assert head[:6] == ["choice", "layers", "weights", "size", "bits", "error"]
    assert rows[-1][:2] == ["plain:bits=4", "lm_head"]
    # the last cells of a choice, "0.0123 105 KiB 0.0456", are about errors; of heeding there is one choice, so that its bits tell nothing
    expected = [
        [cell.replace("heeding:bits=4", "heeding") for cell in row[:-4]] for row in rows[:-1]
    ]
    assert table(shown, "choice") == [head[:5], *expected, rows[-1]]
    (used,) = (line for line in printed if "of a budget of" in line)
    assert " head and embedding, " in used
    assert used in shown


@pytest.mark.parametrize(
    "change", [{"choices": []}, {"budget": "much"}, {"choices": [{"quantizer": "plain"}]}]
)
def test_info_leaves_out_what_it_cannot_read_of_the_choice(
    change: dict[str, object], source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is provenance: a checkpoint is no worse without."""
    words = ["--budget", "1GiB", "--choices", "plain:bits=2", "plain:bits=4", *CALIBRATION]
    assert main(["quantize", source, str(tmp_path / "out"), *words]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["allocation"] |= change
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["info", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["allocation"] is None
    assert facts["quantizers"][0]["parameters"] == 14


def test_more_than_enough_is_said(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--budget", "1GiB", "--choices", "plain:bits=2", "plain:bits=4", *CALIBRATION]
    assert main(["quantize", source, str(tmp_path / "out"), *words]) == 0
    printed = capsys.readouterr().out
    assert "the budget is more than enough: every layer has its best choice" in printed
    assert "model.layers.0 to 1" in printed  # alike, and so one line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected -q NAME, or --budget SIZE and --choices, got neither"),
        (["--choices", "plain"], "--choices: expected --budget SIZE beside it"),
        (["--budget", "1GiB"], "--budget: expected --choices"),
        (["--budget", "1GiB", "--choices", "plain", "heeding"], "--budget: expected --calibration SOURCE"),
        (["--budget", "1GiB", "-q", "plain", "--choices", "plain", *CALIBRATION], "-q: expected it without --budget"),
        (["--budget", "1GiB", "-o", "bits=2", "--choices", "plain", *CALIBRATION], "-o: expected it without"),
        (["--budget", "1GiB", "--override", "*=plain", "--choices", "plain", *CALIBRATION], "--override: expected it without"),
        (["--budget", "1GiB", "--choices", "plain:", "heeding", *CALIBRATION], "NAME:KEY=VALUE,..., got 'plain:'"),
        (["--budget", "1GiB", "--choices", ":bits=2", "heeding", *CALIBRATION], "got ':bits=2'"),
        (["--budget", "1GiB", "--choices", *CALIBRATION], "--choices: expected one or more words"),
        (["--budget", "much", "--choices", "plain"], "expected a size such as 24GiB"),
    ],
)  # fmt: skip
def test_wrong_words_are_refused_with_one_sentence(
    words: list[str], message: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", source, str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_blocks_stand_in_the_order_of_their_numbers_though_config_json_sorts_them_as_text() -> None:
    names = sorted(f"model.layers.{i}.q_proj.weight" for i in range(12))
    layers = {name: {"choice": int(name.split(".")[2]) % 2} for name in names}
    told = _layers(layers).columns[0].cells
    assert list(told) == [f"model.layers.{i}" for i in range(12)]
