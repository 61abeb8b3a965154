"""One object for flags, the config file and the record of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from modulora_core.data import FORMATS
from modulora_core.errors import OptionError
from modulora_core.finetune_config import FinetuneConfig

NEEDED = {"model": "packed", "out": "adapter", "data": "notes.txt", "steps": 10}


def build(**options: object) -> FinetuneConfig:
    return FinetuneConfig.build(NEEDED | options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data": ["a.jsonl", "b.jsonl"], "eval_data": "c.jsonl", "eval_every": 5},
        {"targets": "q_proj, v_proj", "lr": "3e-4", "gradient_checkpointing": "false"},
        {"adapter": "org/adapter", "steps": None, "epochs": 2.5},
        {"data": "größer: [x].txt"},
    ],
    ids=["defaults", "several", "words", "adapter", "yaml-syntax"],
)
def test_the_file_of_a_run_makes_the_same_run(options: dict[str, object], tmp_path: Path) -> None:
    config = build(**options)
    file = tmp_path / "finetune.yaml"
    file.write_text(config.to_yaml(), "utf-8")
    assert FinetuneConfig.build({}, file=file) == config


def test_words_are_parsed_as_their_fields_are() -> None:
    config = build(steps="7", targets="q_proj, v_proj", lr="1e-4", gradient_checkpointing="no")
    assert (config.steps, config.lr, config.gradient_checkpointing) == (7, 1e-4, False)
    assert config.targets == ("q_proj", "v_proj")
    assert config.data == ("notes.txt",)


def test_flags_override_the_file_and_none_is_no_flag(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: packed\nout: a\ndata: x.txt\nepochs: 2\nlr: 5e-4\nrank: 4\n")
    config = FinetuneConfig.build({"out": "b", "steps": 3, "lr": None}, file=file)
    assert (config.out, config.lr, config.rank) == ("b", 5e-4, 4)
    assert (config.steps, config.epochs) == (3, None), "--steps replaces the file's epochs"
    continued = FinetuneConfig.build({"adapter": "old"}, file=file)
    assert (continued.adapter, continued.epochs) == ("old", 2), "--adapter replaces the file's rank"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rnk": 4}, "unknown option 'rnk'; did you mean 'rank'?"),
        ({"rank": "many"}, "option 'rank': expected a valid integer"),
        ({"rank": 0}, "option 'rank': expected greater than or equal to 1, got 0"),
        ({"dropout": 1}, "option 'dropout': expected less than 1, got 1"),
        ({"lr": "nan"}, "option 'lr': expected a finite number"),
        ({"epochs": 2}, "expected steps or epochs, got both: 10 steps and 2 epochs"),
        ({"steps": None}, "expected steps or epochs, got neither"),
        ({"warmup": 2.5}, r"warmup: expected a share below 1 or a whole number of steps, got 2\.5"),
        ({"eval_every": 5}, "eval_every is 5: expected eval_data"),
        (
            {"scheduler": "cosin"},
            "option 'scheduler': expected 'cosine', 'linear' or 'constant', got 'cosin'",
        ),
        ({"adapter": "old", "rank": 8}, "rank: the adapter old has its own"),
        ({"model": None}, "option 'model': expected a value, got none"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_option_is_one_sentence_that_names_it(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("?", r"\?")):
        build(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("a: [", "expected YAML"),
        ("- a\n- b\n", "expected lines of `option: value`, got list"),
        ("", "expected lines of `option: value`, got NoneType"),
        ("rnk: 4\n", "unknown option 'rnk'"),
    ],
    ids=["missing", "syntax", "list", "empty", "unknown"],
)
def test_a_bad_file_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(OptionError, match=rf"(?s)run\.yaml: .*{message}"):
        FinetuneConfig.build({}, file=file)


def test_differences_name_the_field_and_both_values_and_leave_out_aside() -> None:
    assert build(lr=1e-2, out="there").differences(build(lr=1e-3)) == ["lr 0.001 → 0.01"]


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        build().rank = 3  # type: ignore[misc]


def test_the_formats_are_those_that_the_data_module_reads() -> None:
    for format_ in ("auto", *FORMATS):
        assert build(format=format_).format == format_
    with pytest.raises(OptionError, match=", ".join(f"'{name}'" for name in ("auto", *FORMATS[:-1]))):
        build(format="else")


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, modulora_core.finetune_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_field_is_described_for_the_help() -> None:
    assert [name for name, field in FinetuneConfig.model_fields.items() if not field.description] == []
