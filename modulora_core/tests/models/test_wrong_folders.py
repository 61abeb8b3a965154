"""A folder that isn't a model: every command says what it holds, and what to give."""

import pytest

from modulora_core.cli import main
from modulora_core.models.folders import HOLDS_AN_ADAPTER, MARKER, REQUEST, RUN_FILE
from modulora_core.tests.crude_folders import edit_config
from modulora_core.tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("toy")

COMMANDS = {
    "merge": ["FOLDER", "OUT"],
    "finetune": ["FOLDER", "OUT", "--data", "pydoc", "--steps", "1"],
    "convert": ["FOLDER", "OUT", "--to", "crude"],
    "quantize": ["FOLDER", "OUT", "-q", "toy"],
    "generate": ["FOLDER", "hello"],
    "plan": ["FOLDER"],
}
FOLDERS = {
    "adapter_config.json": HOLDS_AN_ADAPTER,
    RUN_FILE: "an unfinished run of finetune; go on with it with --resume",
    REQUEST: "an unfinished run, not a model; go on with it with quantize and --resume",
    MARKER: "an unfinished run, not a model; run its command again",
    "config.json": "quantized with exotic, which no installed plugin reads",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_a_folder_holds(command, tmp_path, capsys):
    for name, expected in FOLDERS.items():
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).write_text("{}")
        if name == REQUEST:
            (folder / MARKER).touch()
        if name == "config.json":
            save_tiny_model("llama", folder)
            edit_config(folder, quantization_config={"quant_method": "exotic"})
            capsys.readouterr()
        places = {"FOLDER": str(folder), "OUT": str(tmp_path / "out")}
        assert main([command, *(places.get(word, word) for word in COMMANDS[command])]) == 2
        assert expected in " ".join(capsys.readouterr().err.split())
