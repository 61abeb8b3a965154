"""What is said of a run's losses."""

from __future__ import annotations

import math
import random

import pytest

from modulora_core.training.losses import divergence, loss_in_words

VOCABULARY = 49152
UNIFORM = math.log(VOCABULARY)


def noisy(*means: float) -> list[float]:
    """Losses of batches that differ as real ones do."""
    chance = random.Random(0)
    return [chance.gauss(mean, 0.4) for mean in means]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([2.5], "loss 2.5000"),
        ([1.762, 2.5, 2.9, 3.5831], "loss 2.6863 (mean of 4 steps)"),
        ([3.0] * 5 + [2.0] * 5, "loss 3.0000 → 2.0000 (means of the first and last 5 steps)"),
        ([3.0] * 100 + [2.0] * 100, "loss 3.0000 → 2.0000 (means of the first and last 20 steps)"),
    ],
)
def test_two_batches_are_no_trend(losses: list[float], said: str) -> None:
    assert loss_in_words(losses) == said


@pytest.mark.parametrize(
    ("losses", "eval_loss"),
    [
        ([4.3282, 9.0, UNIFORM], None),
        ([4.3282, UNIFORM - 1e-3], None),
        (noisy(*[3.0] * 5, *[UNIFORM] * 30), None),
        ([4.3282, 5.0, 6.0], 11.2),
        ([UNIFORM, 40.0], None),
    ],
    ids=["few", "rounded", "many", "held-out", "random-weights"],
)
def test_a_model_that_only_guesses_now_is_worse(
    losses: list[float], eval_loss: float | None
) -> None:
    said = divergence(losses, eval_loss, VOCABULARY)
    assert said.startswith(f"the loss was {losses[0]:.4f} at step 1 and is ")
    assert said.endswith(f"all 49152 tokens for equally likely has {UNIFORM:.4f}")


def test_a_loss_that_rose_by_more_than_batches_differ_is_worse() -> None:
    said = divergence(noisy(*[2.5] * 10, *[4.5] * 90), None, VOCABULARY)
    assert said.startswith("the loss rose from 2.")
    assert said.endswith("(means of the first and last 10 steps)")


@pytest.mark.parametrize(
    "losses",
    [[4.0], [UNIFORM], [1.762, 2.5, 2.9, 3.5831], noisy(*[2.5] * 10), noisy(*[2.5] * 200), [UNIFORM + 0.01 * i for i in range(9)],
     [2.5] * 5 + [2.51] * 5],
    ids=["one", "one-random", "harder-batches", "noise", "long-noise", "random-weights", "no-noise"],
)  # fmt: skip
def test_noise_is_not_taken_for_harm(losses: list[float]) -> None:
    assert divergence(losses, None, VOCABULARY) == ""
