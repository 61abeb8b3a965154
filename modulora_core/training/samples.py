"""Answers of a model to some prompts of its data, without and with the adapter."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from modulora_core.data.rendering import IGNORED
from modulora_core.errors import WorkError
from modulora_core.lora.switching import without_adapter
from modulora_core.models.config import window_of
from modulora_core.models.sampling import Sampling, continuations
from modulora_core.progress import Progress

COUNT, LONGEST, PROMPT = 5, 48, 32
"""Number of prompts, tokens of an answer, and tokens of a prompt that is cut from a text."""

LEAST = 5.0
"""The seconds that all answers may take, if a tenth of the run is less."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, the answer in the data, and the model's answers.

    Attributes:
        before: the answer without the adapter; after: the answer with it.
    """

    prompt: str
    expected: str
    before: str
    after: str


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Any,
    *,
    seconds: float,
    tokens_per_second: float,
    show: Progress,
) -> list[Sample]:
    """Answer the prompts of some examples greedily, in one batch without and one with the adapter.

    Fewer prompts are asked, the shortest, and answers end early, if more would take too long. A
    model whose window has no room for a prompt and an answer gets none.

    Args:
        model: a model with an active adapter; it is in evaluation mode afterwards.
        tokenizer: its tokenizer.
        examples: a dataset of ``input_ids`` and ``labels``, or of TRL's ``prompt_ids`` and
            ``chosen_ids``.
        seconds: the time for all, without compiling kernels.
        tokens_per_second: tokens that the run trained in a second. A forward pass makes a third
            of its products, or half without gradient checkpointing.
        show: the bar.
    """
    window = window_of(model.config) or 2**20
    if window <= LONGEST:
        return []
    affordable = max(PROMPT, int(seconds / 4 * 3 * tokens_per_second))  # half the time: two passes
    most = min(COUNT, len(examples))
    chosen = [_split(examples[i * len(examples) // most]) for i in range(most)]
    chosen.sort(key=lambda pair: len(pair[0]))  # so that as many as can be are asked whole
    totals = itertools.accumulate(len(prompt) for prompt, _ in chosen)
    pairs = chosen[: max(1, sum(total <= affordable for total in totals))]
    longest = min(window - LONGEST, affordable)
    prompts = [prompt[-longest:] for prompt, _ in pairs]

    def texts(rows: list[list[int]]) -> list[str]:
        decoded = tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in decoded]

    def answered(done: int) -> list[str]:
        bar = _Bar(show, done, seconds / 2)
        try:
            return texts(continuations(model, tokenizer, prompts, Sampling(LONGEST), stopping=bar))
        except WorkError:  # a bad training is no reason to end the run before its adapter
            return ["(no answer: NaN or infinite logits)"] * len(prompts)

    model.eval()
    with torch.no_grad():
        with without_adapter(model):
            before = answered(0)
        after = answered(LONGEST)
    show("answering", 2 * LONGEST, 2 * LONGEST)  # answers may end early
    expected = texts([answer[:LONGEST] for _, answer in pairs])
    return list(map(Sample, texts(prompts), expected, before, after))


class _Bar(StoppingCriteria):
    """Moves the bar with each token, and ends answers ``seconds`` after their second token.

    The first two tokens may compile kernels, once: one for the prompt, one for a step. ``before``
    tokens came before these answers.
    """

    def __init__(self, show: Progress, before: int, seconds: float) -> None:
        self._show, self._before, self._seconds = show, before, seconds
        self._tokens, self._end = 0, math.inf

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> Any:
        self._tokens += 1
        self._show("answering", self._before + self._tokens, 2 * LONGEST)
        now = perf_counter()
        if self._tokens == 2:
            self._end = now + self._seconds
        ended = now >= self._end
        return torch.full((len(input_ids),), ended, dtype=torch.bool, device=input_ids.device)


def _split(example: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """The prompt of an example and its first answer; of a text, its beginning and the rest."""
    if "prompt_ids" in example:
        return example["prompt_ids"], example["chosen_ids"]
    ids, labels = example["input_ids"], example["labels"]
    start = next(i for i, label in enumerate(labels) if label != IGNORED)
    if start == 0:
        start = min(PROMPT, max(1, len(ids) // 2))
    end = next((i for i in range(start, len(ids)) if labels[i] == IGNORED), len(ids))
    return ids[:start], ids[start:end]
