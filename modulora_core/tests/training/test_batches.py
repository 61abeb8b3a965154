"""Batches of examples of similar length: every example once, and little padding."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modulora_core.data import Collator, load_examples
from modulora_core.tests.tiny_tokenizer import make_tokenizer, write_jsonl
from modulora_core.training.batches import SimilarLengths
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune
from modulora_core.training.interruption import Interrupted
from modulora_core.training.trainer import TrainingStep


def chat_lengths(count: int) -> list[int]:
    """Lengths of chats: about 180 tokens in the mean, and 5 % above 1,000."""
    draw = random.Random(0)
    return [
        draw.randint(1001, 1400) if draw.random() < 0.05 else int(draw.lognormvariate(4.6, 0.6))
        for _ in range(count)
    ]


def padding(lengths: list[int], order: list[int], batch_size: int) -> float:
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    positions = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / positions


@pytest.mark.parametrize("count", [0, 1, 5, 999, 1024])
@pytest.mark.parametrize("step_size", [1, 4, 32, 300])
def test_an_epoch_has_each_example_once_in_an_order_of_its_own(count: int, step_size: int) -> None:
    sampler = SimilarLengths(chat_lengths(count), step_size, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(count))
    assert len(sampler) == count
    assert list(sampler) == first, "a resumed run takes the same order"
    sampler.set_epoch(1)
    assert count < 9 or list(sampler) != first
    assert count < 9 or list(SimilarLengths(chat_lengths(count), step_size, seed=4)) != first


@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_little_of_a_batch_is_padding(batch_size: int) -> None:
    lengths = chat_lengths(2000)
    shuffled = random.Random(1).sample(range(2000), 2000)
    sampler = SimilarLengths(lengths, 8, seed=0)
    assert padding(lengths, list(sampler), batch_size) < 0.12
    assert padding(lengths, shuffled, batch_size) > 0.3


def test_a_run_of_few_steps_sees_short_and_long_examples() -> None:
    lengths = chat_lengths(2000)
    seen = [lengths[i] for i in list(SimilarLengths(lengths, 4, seed=0))[:160]]
    assert sum(seen) / len(seen) == pytest.approx(sum(lengths) / len(lengths), rel=0.35)


def test_the_share_of_padding_is_that_of_the_batches(
    configure: Callable[..., FinetuneConfig], tmp_path: Path
) -> None:
    rows = ({"prompt": "Is it?", "completion": " no" * count} for count in (1, 2, 9, 3, 12, 4, 5))
    answers = write_jsonl(tmp_path / "answers.jsonl", *rows)
    common = {"data": str(answers), "seq_len": 64, "batch_size": 2, "grad_accum": 1}
    result = finetune(configure(epochs=1, **common))
    examples = load_examples(answers, make_tokenizer(), seq_len=64)
    order, collate = list(SimilarLengths(examples.lengths, 2, seed=0)), Collator(0)
    batches = [collate([examples[i] for i in order[at : at + 2]]) for at in range(0, 7, 2)]
    mask = torch.cat([batch["attention_mask"].reshape(-1) for batch in batches])
    assert result.padding == pytest.approx(1 - float(mask.float().mean()))
    whole = finetune(configure(epochs=1, **{**common, "out": str(tmp_path / "b"), "batch_size": 1}))
    assert whole.padding == 0


def test_a_resumed_run_goes_on_with_the_same_batches(
    configure: Callable[..., FinetuneConfig], tmp_path: Path
) -> None:
    rows = ({"prompt": "Is it?", "completion": " no" * (1 + i % 7)} for i in range(9))
    answers = write_jsonl(tmp_path / "answers.jsonl", *rows)
    common = {"data": str(answers), "steps": 8, "save_every": 2, "batch_size": 2, "grad_accum": 1}
    whole = finetune(configure(**common))

    def interrupt(step: TrainingStep) -> None:
        if step.step == 6:  # of the second epoch
            os.kill(os.getpid(), signal.SIGINT)

    config = configure(**{**common, "out": str(tmp_path / "cut")})
    with pytest.raises(Interrupted):
        finetune(config, on_step=interrupt)
    assert finetune(config, resume=True).losses == whole.losses
