"""DPO on a tiny packed Llama, through TRL."""

import math

import pytest
import torch
from modulora_dpo.config import PreferenceConfig
from modulora_dpo.dpo import Preferences, dpo
from torch import nn
from transformers import AutoTokenizer

from modulora_core.cli import main
from modulora_core.errors import OptionError
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.tests.processes import run_in_processes
from modulora_core.tests.tiny_tokenizer import write_jsonl
from modulora_core.training.run_log import RunLog

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
def configure(tunable, preferences, tmp_path):
    """Makes the config of a run without a baseline; options change it."""

    def made(**options):
        defaults = {"model": str(tunable), "out": str(tmp_path / "out"), "data": preferences,
                    "batch_size": 2, "seq_len": 32, "lr": 1e-2, "warmup": 0,
                    "baseline": False}  # fmt: skip
        return PreferenceConfig.build({**defaults, **options})

    return made


def log_probability(model, tokenizer, prompt, answer):
    """Σ log p of the answer and the EOS after it, by torch alone."""
    start, ids = (tokenizer(text).input_ids for text in (prompt, prompt + answer))
    ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        scores = model.eval()(ids).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None])[len(start) - 1 :].sum()


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
def test_the_loss_begins_at_log_2_and_ends_at_its_definition(
    configure, preferences, tunable, tmp_path
):
    steps = []
    config = configure(
        steps=4, batch_size=2, eval_data=preferences, trainer={"beta": "0.5"}, baseline=True
    )
    result = dpo(config, on_step=steps.append)
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
    again = dpo(configure(steps=1, batch_size=2, adapter=str(tmp_path / "out"),
                         out=str(tmp_path / "further")))  # fmt: skip
    assert again.losses == pytest.approx([math.log(2)], rel=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(configure, preferences, tmp_path):
    config = configure(steps=2, batch_size=2, eval_data=preferences)
    expected = losses(config.model_dump(exclude_none=True))
    shared = config.model_dump(exclude_none=True) | {
        "batch_size": 1, "out": str(tmp_path / "shared"),
    }  # fmt: skip
    for found in run_in_processes(2, losses, shared):
        assert found == pytest.approx(expected, rel=1e-4)


def losses(options):
    """The losses of a run, and its loss on the evaluation data."""
    result = dpo(PreferenceConfig.build(options))
    return [*result.losses, result.eval_loss]


def test_the_options_of_finetune_that_preferences_lack_are_refused(configure):
    for name, value in {"format": "chat", "packing": True, "prompt": "a", "shard": 3}.items():
        with pytest.raises(OptionError, match=name):
            configure(**{name: value})
    assert configure().dropout == 0
    assert PreferenceConfig(model="a", out="b").lr == 5e-5


def test_an_adapter_on_the_head_and_a_split_model_are_refused(configure, tunable, tmp_path):
    model = load_model(tunable)
    add_lora(model, LoRASettings())
    model.set_output_embeddings(model.get_submodule("model.layers.0.mlp.up_proj"))
    with pytest.raises(OptionError, match="expected an output head without an adapter"):
        Preferences().check_model(model, "tiny")
    with pytest.raises(OptionError, match="expected whole weights in each process, got shard"):
        dpo(configure(steps=1, shard=True))
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_the_command_trains_resumes_and_refuses(tunable, preferences, tmp_path, capsys):
    words = ["dpo", str(tunable), str(tmp_path / "out"), "--data", preferences]
    assert main([*words, "--format", "text"]) == 2
    assert "no such option: --format" in capsys.readouterr().err
    assert main([*words, "--trainer", "beta=soon"]) == 2
    assert "beta" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--steps", "1", "--batch-size", "2", "--seq-len", "32"]) == 0
    assert "modulora merge" in capsys.readouterr().out
    assert main([*words, "--steps", "1", "--batch-size", "2", "--seq-len", "32", "--resume"]) == 0
    assert "it is finished" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "Reward margin" in (tmp_path / "out" / "report.html").read_text()
