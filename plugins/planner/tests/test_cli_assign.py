"""``modulora assign``, and the commands after it."""

import json
import shlex

import pytest

from modulora_core.cli import main
from modulora_core.tests.scaled_quantizer import save_model_with_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "widths")


CALIBRATION = ["--calibration", "pydoc[:10%]", "--samples", "4", "--seq-len", "32"]
CHOICES = [
    "--choices", "plain:bits=2", "--choices", "heeding:bits=4", "--choices", "plain:bits=8"
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return str(save_model_with_tokenizer("llama", tmp_path_factory.mktemp("source") / "llama"))


def test_object_and_tables_agree_and_the_next_command_packs(source, tmp_path, capsys):
    file = tmp_path / "mixed.yaml"
    words = ["--budget", "97KiB", *CHOICES, *CALIBRATION, "--quantize-head", "plain:bits=4"]
    assert main(["assign", source, str(tmp_path / "json.yaml"), *words, "--json"]) == 0
    allocation = json.loads(capsys.readouterr().out)["table"]
    assert allocation["budget"] == 97 * 1024
    assert [choice["name"] for choice in allocation["choices"]] == CHOICES[1::2]
    layers = sum(choice["layers"] for choice in allocation["choices"])
    assert layers == len(allocation["layers"]) == 14

    assert main(["assign", source, str(file), *words]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    for number, choice in enumerate(allocation["choices"], 1):
        (row,) = [row for row in rows if row[:2] == [str(number), choice["name"]]]
        assert row[2] == str(choice["layers"])
        assert f"{choice['error']:.4f}" in row
    assert f"{allocation['error']:.5g}" in printed.partition("estimated growth of the loss")[2]
    numbers = {
        f"{block}.{layer}": str(layers["choice"] + 1)
        for name, layers in allocation["layers"].items()
        for block, layer in [(name[:14], name.split(".")[-2])]
    }
    assert table_of_blocks(printed) == numbers
    following = shlex.split(printed[printed.rindex("modulora quantize") :].replace("\\\n", " "))
    out = str(tmp_path / "out")
    assert main([out if word == "PACKED" else word for word in following[1:]]) == 0
    capsys.readouterr()
    assert main(["info", out, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] <= allocation["budget"]
    assert sum(group["parameters"] for group in facts["quantizers"]) == 15


def table_of_blocks(printed):
    """The number of each layer's choice."""
    rows = [line.split() for line in printed[printed.index("\nblock") :].splitlines()[1:]]
    (_, *layers), *blocks = rows[: rows.index([])]
    return {
        f"{name}.{layer}": n for name, *ns in blocks for layer, n in zip(layers, ns, strict=True)
    }


def test_a_large_budget_is_reported(source, tmp_path, capsys):
    words = ["--budget", "1GiB", "--choices", "plain:bits=2", "--choices", "plain:bits=4"]
    words += CALIBRATION
    file = str(tmp_path / "a.yaml")
    assert main(["assign", source, file, *words]) == 0
    printed = capsys.readouterr().out
    assert "the budget is more than enough: every layer has its best choice" in printed
    assert "model.layers.0 to 1" in printed  # equal blocks are one row
    assert "--calibration" not in printed[printed.rindex("modulora quantize") :]
    assert main(["assign", source, file, *words, "--resume"]) == 0
    assert "it is finished; nothing is left to resume" in capsys.readouterr().out


WRONG = {
    "": "Missing option '--budget'",
    "--budget 1GiB --choices plain --choices heeding": "Missing option '--calibration'",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(words, source, tmp_path, capsys):
    assert main(["assign", source, str(tmp_path / "a.yaml"), *words.split()]) == 2
    printed = capsys.readouterr().err
    assert WRONG[words].lower() in printed.lower()
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())
