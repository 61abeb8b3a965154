"""``modulora finetune`` in this process, on a tiny packed model."""

import json
import re

import pytest

from modulora_core.cli import main
from modulora_core.cli.app import load_command
from modulora_core.cli.finetune import PANELS
from modulora_core.data.sources import pydoc_text
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import FinetuneResult

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(pydoc_text()[:1000])
    return str(file)


OWN = {"config", "resume", "revision", "json", "debug"}
"""Options that are no field of FinetuneConfig."""


def test_the_options_are_the_fields_of_the_config():
    """If this fails: an option is a field of FinetuneConfig, and has its panel in PANELS."""
    params = {param.name: param for param in load_command("finetune").params}
    fields = FinetuneConfig.model_fields
    assert set(params) - OWN == set(fields)
    assert {name for names in PANELS.values() for name in names} == (
        set(fields) - {"model", "out"} | OWN - {"json", "debug"}
    )
    assert len(PANELS["Options"]) == 10
    for name, field in fields.items():
        param = params[name]
        assert param.default is None, "the config has the default"
        assert (field.description or "").rstrip(".")[1:] in param.help
        if name not in ("model", "out"):
            assert param.opts[0] == f"--{name.replace('_', '-')}"
        if isinstance(field.default, int | float | str):
            assert param.show_default == str(field.default)


def test_it_trains_and_reports(tunable, text, tmp_path, capsys):
    out = tmp_path / "out"
    short = ["--batch-size", "2", "--grad-accum", "1", "--seq-len", "32"]
    words = ["finetune", str(tunable), str(out), "--data", text, "--steps", "2", *short]
    assert main([*words, "--eval-data", text, "--eval-every", "1"]) == 0
    printed = capsys.readouterr()
    lines = [" ".join(line.split()) for line in printed.out.splitlines()]
    assert f"out {out}" in lines
    assert "steps 2" in lines
    assert any(line.startswith("eval loss ") for line in lines)
    assert any(re.fullmatch(r"losses [\d.]+ \(mean of 2 steps\)", line) for line in lines)
    following = "".join("".join(lines).partition("Next:")[2].split())
    for name in ("chat", "evaluate"):
        assert f"modulora{name}{tunable}--adapter{out}or:" in following
    assert f"moduloramerge{tunable}MERGED--adapter{out}" in following
    assert "step 1: loss " in printed.err
    assert (out / "adapter_config.json").is_file()


def test_flags_and_file_become_the_config(tmp_path, monkeypatch, capsys):
    asked = []

    def finetune(config, *, resume, **_):
        asked.append((config, resume))
        return FinetuneResult(
            out="out", model="m", steps=1, losses=[2.0], seconds=1.0, tokens_per_second=1.0
        )

    monkeypatch.setattr("modulora_core.training.finetune.finetune", finetune)
    monkeypatch.setattr("modulora_core.cli.finetune.check_places", lambda _: None)
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("The ship sailed north.")
    flags = ["--data", "a.txt", "--data", "b.txt", "--steps", "2", "--lr", "1e-2", "--rank", "4",
             "--targets", "q_proj,up_proj", "--no-gradient-checkpointing", "--optim", "sgd",
             "--report-to", "wandb,mlflow", "--trainer", "adam_beta1=0.8", "--trainer",
             "lr_scheduler_kwargs={\"power\": 2}"]  # fmt: skip
    assert main(["finetune", "m", "o", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() >= {
        "out", "steps", "losses", "eval_loss", "seconds", "tokens_per_second", "peak_memory_bytes",
    }  # fmt: skip
    expected = FinetuneConfig(
        model="m", out="o", data=("a.txt", "b.txt"), steps=2, lr=1e-2, rank=4, optim="sgd",
        targets=("q_proj", "up_proj"), gradient_checkpointing=False, report_to=("wandb", "mlflow"),
        trainer={"adam_beta1": "0.8", "lr_scheduler_kwargs": '{"power": 2}'},
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(expected.to_yaml())
    file = ["--config", str(tmp_path / "run.yaml")]
    assert main(["finetune", *file, "--resume"]) == 0
    assert main(["finetune", *file, "--epochs", "1", "--gradient-checkpointing"]) == 0
    changed = {"steps": None, "epochs": 1.0, "gradient_checkpointing": True}
    assert asked[:2] == [(expected, False), (expected, True)]
    assert asked[2][0] == expected.model_copy(update=changed)


WRONG = {
    "m o --data pydoc --steps 1 --epochs 1": "expected steps or epochs, got both",
    "--data pydoc --steps 1": "option 'model': expected a value, got none",
    "--revision v7 --data pydoc": "--revision: expected MODEL beside it",
    "m o --steps 1": "data: expected training data, got none",
    "m o --data pydoc --steps 1 --dtype int": "option 'dtype': expected 'auto', 'float32'",
    "m o --data pydoc --learning-rate 1": "no such option: --learning-rate",
    "m o --data pydoc --trainer 5": "option 'trainer': expected KEY=VALUE, got ['5']",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", *words.split()]) == 2
    printed = capsys.readouterr()
    assert WRONG[words] in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
