"""transformers' own Trainer, and TRL's, on a model with ``add_lora``: resume, and the best step."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.tests.adapted_models import logits

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    {"input_ids": [*range(3 + i, 15 + i)], "labels": [*range(3 + i, 15 + i)]} for i in range(16)
]


def adapted(folder, seed=0):
    model = load_model(folder, device="cpu")
    add_lora(model, LoRASettings(rank=4, dropout=0.1, seed=seed, train_scales=True))
    return model


def arguments(out, **more):
    return {
        "output_dir": str(out), "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "learning_rate": 1e-2, **more,
    }  # fmt: skip


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_resumes_with_the_losses_of_the_whole_run(tunable, tmp_path, caplog):
    settings = TrainingArguments(**arguments(tmp_path))
    whole = Trainer(model=adapted(tunable), args=settings, train_dataset=ROWS)
    whole.train()
    resumed = Trainer(model=adapted(tunable, seed=7), args=settings, train_dataset=ROWS)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert torch.equal(logits(resumed.model), logits(whole.model))
    assert "missing keys" not in caplog.text

    again = load_model(tunable, device="cpu")  # the checkpoint is an adapter folder too
    load_adapter(again, tmp_path / "checkpoint-4")
    assert torch.equal(logits(again), logits(whole.model))
    frozen = {name for name, p in whole.model.named_parameters() if not p.requires_grad}
    assert not frozen & {*load_file(tmp_path / "checkpoint-4" / "model.safetensors")}


class Spoil(TrainerCallback):
    """Makes the adapter worse after the second step."""

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 2:
            self.best = logits(model)
            model.train()
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.add_(10)


def test_trainer_loads_the_best_model_at_the_end(tunable, tmp_path):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    spoil = Spoil()
    trainer = Trainer(
        model=adapted(tunable), args=TrainingArguments(**arguments(tmp_path, **options)),
        train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[spoil],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert torch.equal(logits(trainer.model), spoil.best)
