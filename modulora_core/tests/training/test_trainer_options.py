"""Fields of TrainingArguments, experiment trackers, callbacks, and the logs of a run."""

from typing import Any

import pytest
from transformers import TrainerCallback, TrainingArguments

from modulora_core.errors import MissingExtraError, OptionError
from modulora_core.training import trainer_options as options
from modulora_core.training.finetune import finetune
from modulora_core.training.trainer import TrainingStep
from modulora_core.training.trainer_options import check_reporters, trainer_options

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder(TrainerCallback):
    """Keeps the arguments and the last logs of a step."""

    arguments: TrainingArguments
    logs: dict[str, Any]

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.arguments, self.logs = args, logs


def test_values_are_parsed_to_the_types_of_the_fields():
    given = {"adam_beta1": "0.8", "dataloader_num_workers": "2", "torch_compile": "true",
             "neftune_noise_alpha": "5", "lr_scheduler_type": "polynomial",
             "debug": "underflow_overflow"}  # fmt: skip
    assert trainer_options(given) == {
        "adam_beta1": 0.8, "dataloader_num_workers": 2, "torch_compile": True,
        "neftune_noise_alpha": 5.0, "lr_scheduler_type": "polynomial",
        "debug": "underflow_overflow",
    }  # fmt: skip


def test_they_reach_the_trainer_and_a_callback_sees_the_logs(configure):
    seen, steps = Recorder(), list[TrainingStep]()
    config = configure(steps=2, trainer=["adam_beta1=0.5", "lr_scheduler_type=polynomial"])
    finetune(config, on_step=steps.append, callbacks=[seen])
    assert seen.arguments.adam_beta1 == 0.5
    assert seen.arguments.lr_scheduler_type == "polynomial"
    last = steps[-1]
    for name, value in {
        "loss": last.loss,
        "learning_rate": last.learning_rate,
        "grad_norm": last.grad_norm,
        "tokens_per_second": last.tokens_per_second,
        "memory_bytes": last.memory_bytes,
    }.items():
        assert seen.logs[name] == value
        assert value > 0
    assert last.memory_bytes > 10e6
    for part in (f"loss {last.loss:.2f}", "tok/s", "peak", "GiB"):
        assert part in last.line


WRONG = {
    "adam_beta3=1": "did you mean adam_beta2 or adam_beta1?",
    "learning_rate=1": "expected --lr instead",
    "logging_steps=2": "the run depends on its own value; leave it out",
    "dataloader_num_workers=-1": "trainer dataloader_num_workers: expected 0 or more, got -1",
    "lr_scheduler_type=poly": "poly is not a valid SchedulerType",
    'lr_scheduler_kwargs={"unknown": 1}': "trainer lr_scheduler_type .*: expected values that it",
    "log_level=foo": "trainer log_level: expected one of .*debug.*, got 'foo'",
    "optim_args=foo": r"trainer optim_args: expected KEY=VALUE,\.\.\., got 'foo'",
    "torch_compile_mode=foo": "trainer torch_compile_mode: Unrecognized mode=foo",
    "dataloader_persistent_workers=true": "trainer dataloader_persistent_workers: expected values",
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_field_is_refused_and_nothing_is_written(configure, tmp_path, word):
    before = set(tmp_path.rglob("*"))
    with pytest.raises(OptionError, match=WRONG[word]) as found:
        finetune(configure(trainer=[word]))
    assert "\n" not in str(found.value)
    assert set(tmp_path.rglob("*")) == before


def test_trackers_are_those_of_transformers(configure, monkeypatch, tmp_path):
    with pytest.raises(OptionError, match="no such tracker; expected tensorboard"):
        finetune(configure(report_to="tensorbord"))
    monkeypatch.setattr(options, "get_available_reporting_integrations", lambda: ["mlflow"])
    with pytest.raises(MissingExtraError, match=r"report_to wandb: .* pip install wandb"):
        finetune(configure(report_to="mlflow,wandb"))
    check_reporters(("mlflow",))
    assert not (tmp_path / "out").exists()
