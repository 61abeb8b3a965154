"""Losses are summarized by means of several steps, so that noise is no trend."""

import math
import random

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from modulora_core.errors import WorkError
from modulora_core.training.interruption import Interruption
from modulora_core.training.loss_trend import divergence, worsening
from modulora_core.training.trainer import Watcher

VOCABULARY = 49152
UNIFORM = math.log(VOCABULARY)


def noisy(*means):
    """Losses of batches that differ as real ones do."""
    chance = random.Random(0)
    return [chance.gauss(mean, 0.4) for mean in means]


@pytest.mark.parametrize(
    ("losses", "eval_loss"),
    [
        ([4.3282, UNIFORM - 1e-3], None),
        (noisy(*[3.0] * 5, *[UNIFORM] * 30), None),
        ([4.3282, 5.0, 6.0], 11.2),
    ],
    ids=["few steps", "many steps", "evaluation data"],
)
def test_a_model_that_only_guesses_is_worse(losses, eval_loss):
    worse = worsening(losses, eval_loss, VOCABULARY)
    assert worse.startswith(f"the loss was {losses[0]:.4f} at step 1 and is ")
    assert worse.endswith(f"a uniform guess among 49152 tokens has {UNIFORM:.4f}")


def test_a_loss_that_rose_by_more_than_batches_differ_is_worse():
    worse = worsening(noisy(*[2.5] * 10, *[4.5] * 90), None, VOCABULARY)
    assert worse.startswith("the loss rose from 2.")
    assert worse.endswith("(means of the first and last 10 steps)")


@pytest.mark.parametrize(
    "losses",
    [
        [1.762, 2.5, 2.9, 3.5831],
        noisy(*[2.5] * 200),
        [UNIFORM + 0.01 * i for i in range(9)],
        [2.5] * 5 + [2.51] * 5,
    ],
    ids=["harder batches", "noise", "random weights", "no noise"],
)
def test_noise_is_not_worse(losses):
    assert worsening(losses, None, VOCABULARY) == ""


def test_a_run_stops_when_its_model_only_guesses(tmp_path):
    watcher = Watcher(None, None, Interruption())
    watcher.vocabulary, watcher.show = VOCABULARY, lambda *_: None
    losses = [*noisy(*[3.0] * 8), *[UNIFORM] * 10]
    state, arguments = TrainerState(), TrainingArguments(str(tmp_path), learning_rate=0.1)
    facts = {"learning_rate": 0.1, "tokens_per_second": 1.0, "memory_bytes": 1}
    with pytest.raises(
        WorkError, match=r"step 13: the run diverged: .* in the last 5 steps; .*0\.1"
    ):
        for state.global_step, loss in enumerate(losses, 1):
            state.log_history.append({"loss": loss})
            watcher.on_log(arguments, state, TrainerControl(), {"loss": loss, **facts})


def test_a_random_model_that_begins_with_a_guess_does_not_diverge():
    assert divergence([UNIFORM] * 20, VOCABULARY) == ""
    assert divergence(noisy(*[3.0] * 50), VOCABULARY) == ""
