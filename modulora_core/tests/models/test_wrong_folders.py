"""A folder that isn't a model: every command says what it holds, and what to give."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from modulora_core.cli import main
from modulora_core.models.unfinished import MARKER, REQUEST, RUN_FILE
from modulora_core.tests.crude_folders import edit_config
from modulora_core.tests.tiny_models import save_tiny_model

COMMANDS = {
    "info": ["FOLDER"],
    "merge": ["FOLDER", "OUT"],
    "finetune": ["FOLDER", "OUT", "--data", "pydoc", "--steps", "1"],
    "convert": ["FOLDER", "OUT", "--to", "crude"],
    "quantize": ["FOLDER", "OUT", "-q", "toy"],
    "generate": ["FOLDER", "hello"],
    "evaluate": ["FOLDER"],
    "plan": ["FOLDER"],
}


def told(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    places = {"FOLDER": str(folder), "OUT": str(folder.parent / "out")}
    assert main([command, *(places.get(word, word) for word in COMMANDS[command])]) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "command", [name for name in COMMANDS if name != "info"]
)  # info tells what an adapter is
def test_an_adapter_is_told_from_a_model(
    command: str, toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "adapter_config.json").write_text("{}")
    expected = "the folder holds an adapter: give its base model, and the adapter with --adapter where the command has it"
    assert expected in told(command, tmp_path / "it", capsys)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([RUN_FILE], "an unfinished run of finetune; go on with it with --resume. The adapters that it saved are in checkpoints"),
        ([MARKER, REQUEST], "an unfinished run, not a model; go on with it with quantize and --resume"),
        ([MARKER], "an unfinished run, not a model; run its command again"),
    ],
)  # fmt: skip
def test_an_unfinished_run_is_told_from_a_model(
    command: str,
    files: list[str],
    expected: str,
    toy: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "it").mkdir()
    for name in files:
        (tmp_path / "it" / name).write_text("{}")
    assert expected in told(command, tmp_path / "it", capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_that_no_plugin_reads_it(
    command: str, toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model("llama", tmp_path / "it")
    edit_config(folder, quantization_config={"quant_method": "exotic"})
    expected = "quantized with exotic, which no installed plugin reads"
    assert expected in told(command, folder, capsys)
