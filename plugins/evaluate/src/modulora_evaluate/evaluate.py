"""Measure a model: perplexity of text, accuracy on labels, ROUGE and exact match of answers.

    perplexity = exp(nll)      nll = -1/N Σ log p(xₜ | x₍<t₎)      N predicted tokens, in nats

The log-softmax is computed in fp32, for a few rows of logits at a time
(:mod:`modulora_core.training.chunked_loss`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from modulora_core.arguments import checked
from modulora_core.data import token_segments
from modulora_core.data.examples import Collator, longest_first
from modulora_core.data.formats import Conversation
from modulora_core.data.rendering import Encoded, Renderer, check_ids
from modulora_core.data.sources import Source
from modulora_core.data.templates import Template
from modulora_core.errors import DataError, OptionError, WorkError
from modulora_core.inference.opened import Runnable, tokenizer_and_loader
from modulora_core.models.config import vocabulary_of, window_of
from modulora_core.models.generation import Sampling
from modulora_core.progress import Display, Progress, no_progress, shown
from modulora_core.training.chunked_loss import token_losses
from modulora_core.training.readout import read_out
from modulora_evaluate.answers import exact_match, rouge
from modulora_evaluate.metrics import Metric
from modulora_evaluate.passes import asked_in, batches, check_examples, evaluating

MAX_LABELS = 64
"""Accuracy scores every label for every example, so it refuses more distinct answers than this."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The perplexity, ``exp(nll)``, and ``nll``, the mean -log p of a predicted token in nats.

    Attributes:
        tokens: number of predicted tokens, ``seq_len - 1`` per segment.
    """

    perplexity: float
    nll: float
    tokens: int
    segments: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The accuracy, ``correct / examples``, and the distinct answers that were compared, sorted."""

    accuracy: float
    correct: int
    examples: int
    labels: tuple[str, ...]


@checked
def evaluate(
    model: Runnable,
    data: Source = "pydoc",
    *,
    metric: Metric = "perplexity",
    seq_len: int = 512,
    segments: int | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 128,
    beams: int = 1,
    prompt: str | None = None,
    completion: str | None = None,
    adapter: str | Path | None = None,
    progress: Display = True,
) -> Any:
    """Measure a model on data, as ``modulora evaluate`` does.

    The result is a :class:`Perplexity`, :class:`Accuracy`, :class:`Rouge` or :class:`ExactMatch`.

    Args:
        model: MODEL as on the command line, the result of ``open_to_run``, or a loaded model with
            its tokenizer, ``(model, tokenizer)``.
        data: files, a Hub dataset, or pydoc.
        metric: the metric, and so the class of the result.
        seq_len: tokens per segment; segments: limit of their number; both for perplexity.
        batch_size: segments, answers or prompts per forward pass.
        max_new_tokens: limit of an answer; beams: beams of its search; for rouge and exact-match.
        prompt, completion: templates of columns of the data, as in a finetuning config; not for
            perplexity.
        adapter: a LoRA adapter in PEFT's format, if ``model`` is a name.
        progress: called as ``progress("evaluating", done, total)`` after each pass; by default a
            bar on a terminal, and False shows none.

    Raises:
        OptionError: an unknown metric, or a value out of range.
        DataError: the data is missing or malformed, or does not fit the metric.
        RequestError: the model cannot be opened.
        WorkError: the model's logits are NaN or infinite.
    """
    template = Template.of(prompt, completion)
    if template is not None and metric == "perplexity":
        raise OptionError("prompt: expected another metric than perplexity, which measures text")
    with shown(progress, "evaluating", "passes") as progress:
        tokenizer, load = tokenizer_and_loader(model, adapter)
        if metric == "perplexity":
            ids = token_segments(data, tokenizer, seq_len, segments)
            return perplexity(load(), ids, batch_size=batch_size, progress=progress)
        asked = asked_in(data, template)  # a bad source is refused before the model is loaded
        common: Any = {"batch_size": batch_size, "progress": progress}
        if metric == "accuracy":
            return accuracy(load(), tokenizer, asked, **common)
        measure = rouge if metric == "rouge" else exact_match
        sampling = Sampling(max_new_tokens, beams=beams)
        return measure(load(), tokenizer, asked, sampling, **common)


def perplexity(
    model: Any, segments: Tensor, *, batch_size: int = 1, progress: Progress = no_progress
) -> Perplexity:
    """The perplexity of ``segments``, each by itself: all tokens but the first are predicted.

    Arguments and errors are those of :func:`segment_losses`.
    """
    losses = segment_losses(model, segments, batch_size=batch_size, progress=progress)
    nll = math.fsum(losses) / len(losses)
    tokens = segments.shape[0] * (segments.shape[1] - 1)
    return Perplexity(perplexity_of(nll), nll, tokens, segments.shape[0])


def perplexity_of(nll: float) -> float:
    """``exp(nll)``; infinite where it is too large for a number."""
    return math.exp(nll) if nll < 700 else math.inf


def segment_losses(
    model: Any, segments: Tensor, *, batch_size: int = 1, progress: Progress = no_progress
) -> list[float]:
    """The mean -log p of a predicted token in each segment, in nats.

    Args:
        model: a transformers causal language model. It keeps its mode, training or evaluation.
        segments: token ids, int64 ``[n, seq_len]`` (:func:`modulora_core.data.token_segments`).

    Raises DataError, OptionError, WorkError.
    """
    if segments.dim() != 2 or segments.shape[0] < 1 or segments.shape[1] < 2:
        raise DataError(
            f"segments: expected shape [n >= 1, seq_len >= 2], got {list(segments.shape)}"
        )
    window = window_of(model.config)
    if window is not None and segments.shape[1] > window:
        raise OptionError(
            f"seq_len {segments.shape[1]}: expected at most the model's window of {window} tokens"
        )
    check_ids([int(segments.max())], vocabulary_of(model.config), "segments")
    losses: list[float] = []
    with evaluating(model):
        for start, batch in batches(segments, batch_size, progress):
            sums = _nll(model, {"input_ids": batch, "labels": batch})
            if not all(map(math.isfinite, sums)):
                raise WorkError(
                    "perplexity: expected finite logits, got NaN or Inf in segments from "
                    f"{start} on"
                )
            losses += [total / (segments.shape[1] - 1) for total in sums]
    return losses


def accuracy(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Conversation],
    *,
    batch_size: int = 8,
    progress: Progress = no_progress,
) -> Accuracy:
    """The fraction of examples whose own answer is the most likely of all distinct answers.

    The score of an answer is the log-likelihood of its tokens and of the token that closes it. So a
    label that is the beginning of another has no advantage. Prompts and answers are rendered as in
    training (:func:`modulora_core.data.load_examples`).

    Args:
        model: a transformers causal language model. It keeps its mode, training or evaluation.
        asked: prompts with their labels (:func:`modulora_evaluate.passes.asked_in`).

    Raises DataError, OptionError, WorkError.
    """
    chat = next((each for each in asked if each.plain is None), None)
    if chat is not None:
        raise DataError(f"{chat.place}: accuracy: expected a prompt and a label, got a chat")
    examples = {each.answer: each for each in asked}  # an example of each answer
    labels = tuple(sorted(examples))
    if not 2 <= len(labels) <= MAX_LABELS:
        raise DataError(
            f"{asked[0].place}: accuracy: expected 2 to {MAX_LABELS} distinct labels from here on, "
            f"got {len(labels)}"
        )
    renderer = Renderer(tokenizer)
    pairs = [(each, examples[label]) for each in asked for label in labels]

    def encoded(batch: Sequence[tuple[Conversation, Conversation]]) -> list[Encoded]:
        return renderer.encode([renderer.render(_answered(*pair))[-1] for pair in batch])

    lengths: list[int] = []
    for _, batch in batches(pairs, 256):
        tokens = [ids for ids, _ in encoded(batch)]
        check_examples(model, tokens, [each for each, _ in batch])
        lengths += map(len, tokens)
    collate, scores = Collator(0), [math.nan] * len(pairs)
    with evaluating(model):
        for _, batch in batches(longest_first(lengths), batch_size, progress):
            rows = [
                {"input_ids": ids, "labels": goals}
                for ids, goals in encoded([pairs[i] for i in batch])
            ]
            for i, score in zip(batch, _nll(model, collate(rows)), strict=True):
                scores[i] = score
    if not all(map(math.isfinite, scores)):
        raise WorkError("accuracy: expected finite logits, got NaN or Inf")
    correct = 0
    for i, each in enumerate(asked):
        own = scores[i * len(labels) : (i + 1) * len(labels)]
        correct += labels[own.index(min(own))] == each.answer
    return Accuracy(correct / len(asked), correct, len(asked), labels)


def _answered(asked: Conversation, other: Conversation) -> Conversation:
    """``asked`` with the answer of ``other``."""
    assert asked.plain is not None  # accuracy refuses chats
    assert other.plain is not None
    return replace(
        asked,
        messages=(*asked.messages[:-1], other.messages[-1]),
        plain=(asked.plain[0], other.plain[1]),
    )


def _nll(model: Any, batch: dict[str, Tensor]) -> list[float]:
    """Σ -log p of the labels that are not -100, in nats, for each row of the batch."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    with read_out(model) as readout:
        model(**inputs, use_cache=False)
    sums: list[float] = token_losses(readout, batch["labels"]).sum(1).tolist()
    return sums
