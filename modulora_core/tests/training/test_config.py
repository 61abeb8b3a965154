"""One object is the flags, the --config file and the finetune.yaml of a run."""

from dataclasses import fields

import pytest
import yaml

from modulora_core.errors import OptionError
from modulora_core.lora.settings import LoRASettings
from modulora_core.training.arguments import total_steps
from modulora_core.training.config import FinetuneConfig

ASKED = {"model": "packed", "out": "out", "data": "notes.txt", "steps": 3}


def build(**options):
    return FinetuneConfig.build({**ASKED, **options})


def test_the_defaults_are_the_papers_and_the_settings_of_an_adapter_have_them_too():
    config, settings = build(), LoRASettings()
    assert (config.rank, config.alpha, config.dropout, config.lr) == (8, 32.0, 0.1, 1e-3)
    for field in fields(LoRASettings):
        value = getattr(config, field.name)
        value = value[0] if isinstance(value, tuple) else value
        assert value == getattr(settings, field.name), field.name


@pytest.mark.parametrize(
    "options",
    [
        {"data": ["a.txt", "pydoc[:90%]"], "eval_data": ["b.txt"], "eval_every": 2},
        {"targets": "q_proj, v_proj", "dtype": "bfloat16", "gradient_checkpointing": False},
        {"steps": None, "epochs": 0.5, "lr": "2e-4", "warmup": 10},
        {"adapter": "org/adapter", "dropout": 0.0},
    ],
    ids=["sources", "targets", "epochs", "adapter"],
)
def test_the_file_of_a_run_gives_the_same_config(options, tmp_path):
    config = build(**options)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    again = FinetuneConfig.build({}, file=tmp_path / "run.yaml")
    assert again == config
    assert again.differences(config) == []
    other = config.model_copy(update={"out": "elsewhere", "seed": 7})
    assert other.differences(config) == ["seed 0 → 7"]


def test_options_override_the_file_and_the_fields_that_they_exclude(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**ASKED, "lr": 1e-4, "rank": 16}))
    config = FinetuneConfig.build({"epochs": 2, "lr": 3e-4, "seed": None}, file=file)
    assert (config.steps, config.epochs, config.lr, config.rank) == (None, 2.0, 3e-4, 16)
    assert FinetuneConfig.build({"adapter": "org/a"}, file=file).adapter == "org/a"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1}, "expected steps or epochs, got both: 3 steps and 1 epochs"),
        ({"ranc": 4}, "unknown option 'ranc'; did you mean 'rank'"),
        ({"lr": 1e38}, r"lr: expected at most 1e\+30, got 1e\+38$"),
        ({"warmup": 1.5}, "warmup: expected a fraction below 1 or a whole number of steps"),
        ({"adapter": "a", "train_scales": True}, "train_scales: the adapter a has its own"),
        ({"keep_products": True, "gradient_checkpointing": False}, "keep_products: expected grad"),
        ({"data": [1]}, r"option 'data\.0': expected a valid string, got 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_option_is_refused_in_one_sentence(options, message):
    with pytest.raises(OptionError, match=f"^finetune: {message}"):
        build(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "{}: expected YAML"),
        ("- a\n- b\n", "config {}: expected lines of `option: value`, got list"),
        ("learning-rate: 1\n", "finetune with {}: unknown option 'learning-rate'"),
    ],
    ids=["broken", "list", "unknown"],
)
def test_a_file_that_is_no_config_is_refused_by_name(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(OptionError, match=message.format(file)):
        FinetuneConfig.build(ASKED, file=file)


def test_a_run_without_a_length_is_one_epoch():
    config = FinetuneConfig(model="m", out="o", data=["d"], batch_size=2, grad_accum=2)
    assert total_steps(config, examples=9) == 3  # 5 batches
    assert total_steps(config.model_copy(update={"epochs": 2.0}), examples=9) == 6
