"""DPO on a tiny packed Llama, through TRL."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from modulora_core.errors import MissingExtraError
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.tests.processes import finetuned, run_in_processes
from modulora_core.tests.tiny_tokenizer import write_jsonl
from modulora_core.training.finetune import finetune
from modulora_core.training.run_log import RunLog
from modulora_core.training.trainer import TrainingStep

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # TRL warns, such as of names that transformers renamed
]

PAIRS = [("Who?", " me", " nobody else"), ("What?", " it", " something"), ("When?", " now", " so"),
         ("How?", " well", " in some way")]  # fmt: skip


@pytest.fixture
def preferences(tmp_path):
    rows = ({"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS)
    return str(write_jsonl(tmp_path / "preferences.jsonl", *rows))


@pytest.fixture
def dpo(configure, preferences):
    def made(**options):
        defaults: dict[str, Any] = {"method": "dpo", "data": preferences, "lr": 1e-2, "warmup": 0,
                                    "grad_accum": 1}  # fmt: skip
        return configure(**{**defaults, **options})

    return made


def log_probability(model, tokenizer, prompt, answer):
    """Σ log p of the answer and the EOS after it, by torch alone."""
    start, ids = (tokenizer(text).input_ids for text in (prompt, prompt + answer))
    ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        scores = model.eval()(ids).logits[0, :-1].log_softmax(-1)
    found: Tensor = scores.gather(1, ids[0, 1:, None])[len(start) - 1 :].sum()
    return found


def dpo_loss(model, reference, packed, beta):
    """The mean of -log σ(β (Δ chosen - Δ rejected)) over all pairs."""
    tokenizer = AutoTokenizer.from_pretrained(packed)
    losses = []
    for prompt, chosen, rejected in PAIRS:
        chosen_change, rejected_change = (
            log_probability(model, tokenizer, prompt, answer)
            - log_probability(reference, tokenizer, prompt, answer)
            for answer in (chosen, rejected)
        )
        losses.append(-nn.functional.logsigmoid(beta * (chosen_change - rejected_change)))
    return float(torch.stack(losses).mean())


@pytest.mark.slow
def test_the_loss_begins_at_log_2_and_ends_at_its_definition(dpo, preferences, tunable, tmp_path):
    pytest.importorskip("trl", reason="pip install trl")
    steps: list[TrainingStep] = []
    config = dpo(
        steps=4, batch_size=2, eval_data=preferences, trainer={"beta": "0.5"}, baseline=True
    )
    result = finetune(config, on_step=steps.append)
    assert result.losses[0] == pytest.approx(math.log(2), rel=1e-5)
    assert result.eval_loss_before == pytest.approx(math.log(2), rel=1e-5)
    model = load_model(tunable)
    load_adapter(model, tmp_path / "out")
    assert result.eval_loss == pytest.approx(
        dpo_loss(model, load_model(tunable), tunable, 0.5), rel=1e-4
    )
    assert result.eval_loss < 0.6
    assert all(step.grad_norm and step.tokens_per_second > 0 for step in steps)
    assert any("rewards/margins" in entry for entry in RunLog.read(tmp_path / "out").log_history)
    assert "with TRL's DPOTrainer on dense" in (tmp_path / "out" / "README.md").read_text()
    # continued: its reference is the adapter at the start
    again = finetune(dpo(steps=1, batch_size=2, adapter=str(tmp_path / "out"),
                         out=str(tmp_path / "further")))  # fmt: skip
    assert again.losses == pytest.approx([math.log(2)], rel=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(dpo, preferences, tmp_path):
    pytest.importorskip("trl", reason="pip install trl")
    config = dpo(steps=2, batch_size=2, eval_data=preferences)
    expected = finetuned(**config.model_dump(exclude_none=True))
    shared = config.model_dump(exclude_none=True) | {
        "batch_size": 1, "out": str(tmp_path / "shared"),
    }  # fmt: skip
    for found in run_in_processes(2, _finetuned, shared):
        assert found == pytest.approx(expected, rel=1e-4)


def _finetuned(options):
    return finetuned(**options)


def test_without_trl_it_is_refused(dpo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match=r"trl, .* pip install 'modulora-core\[pref"):
        finetune(dpo())
    assert not (tmp_path / "out").exists()
