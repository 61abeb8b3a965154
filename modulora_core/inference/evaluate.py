"""Measure a model: perplexity of text, accuracy on labels, ROUGE of its answers.

    perplexity = exp(nll)      nll = -1/N Σ log p(xₜ | x₍<t₎)      N predicted tokens, in nats

The log-softmax is computed in fp32, for a few rows of logits at a time
(:mod:`modulora_core.training.chunked_loss`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from modulora_core.data import token_segments
from modulora_core.data.examples import Collator
from modulora_core.data.formats import Conversation, conversations, detect
from modulora_core.data.rendering import Encoded, Renderer
from modulora_core.data.sources import Source, load_records, source_name
from modulora_core.errors import DataError, MissingExtraError, OptionError, WorkError
from modulora_core.inference.generate import Sampling, continuations
from modulora_core.inference.loading import Runnable, opened
from modulora_core.models.progress import Progress
from modulora_core.training.chunked_loss import deferred_logits, token_losses

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


@dataclass(frozen=True, slots=True)
class Rouge:
    """Mean F-measures of ROUGE-1, ROUGE-2, ROUGE-L (Lin 2004), stemmed, in [0, 1]."""

    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815  the measure's own spelling
    examples: int


def evaluate(
    model: Runnable,
    data: Source = "pydoc",
    *,
    metric: Literal["perplexity", "accuracy", "rouge"] = "perplexity",
    seq_len: int = 512,
    segments: int | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 128,
    adapter: str | None = None,
    progress: Progress | None = None,
) -> Perplexity | Accuracy | Rouge:
    """Measure a model on data, as ``modulora evaluate`` does.

    Args:
        model: MODEL as on the command line, the result of ``open_to_run``, or a loaded model with
            its tokenizer, ``(model, tokenizer)``.
        data: files, a Hub dataset, or pydoc.
        metric: the metric, and so the class of the result.
        seq_len: tokens per segment; segments: limit of their number; both for perplexity.
        batch_size: segments, answers or prompts per forward pass.
        max_new_tokens: limit of an answer, for rouge.
        adapter: a LoRA adapter in PEFT's format, if ``model`` is a name.
        progress: called as ``progress("evaluating", done, total)`` after each pass.

    Raises:
        OptionError: an unknown metric, or a value out of range.
        DataError: the data is missing or malformed, or does not fit the metric.
        RequestError: the model cannot be opened.
        WorkError: the model's logits are NaN or infinite.
    """
    if metric not in ("perplexity", "accuracy", "rouge"):
        raise OptionError(f"metric: expected perplexity, accuracy or rouge, got {metric!r}")
    source = opened(model, adapter)
    tokenizer = source.tokenizer
    if metric == "perplexity":
        ids = token_segments(data, tokenizer, seq_len, segments)
        return perplexity(source.load(), ids, batch_size=batch_size, progress=progress)
    load_records(data)  # a bad source is refused before the model is loaded
    if metric == "accuracy":
        return accuracy(source.load(), tokenizer, data, batch_size=batch_size, progress=progress)
    return rouge(
        source.load(), tokenizer, data, max_new_tokens, batch_size=batch_size, progress=progress
    )


def perplexity(
    model: Any, segments: Tensor, *, batch_size: int = 1, progress: Progress | None = None
) -> Perplexity:
    """The perplexity of ``segments``, each by itself: all tokens but the first are predicted.

    Args:
        model: a transformers causal language model. It keeps its mode, training or evaluation.
        segments: token ids, int64 ``[n, seq_len]`` (:func:`modulora_core.data.token_segments`).
        batch_size: segments per forward pass.
        progress: called after each forward pass.

    Raises:
        DataError: ``segments`` is not ``[n >= 1, seq_len >= 2]``.
        OptionError: ``batch_size`` is below 1, or ``seq_len`` above the model's window.
        WorkError: the model's logits are NaN or infinite.
    """
    if segments.dim() != 2 or segments.shape[0] < 1 or segments.shape[1] < 2:
        raise DataError(
            f"segments: expected shape [n >= 1, seq_len >= 2], got {list(segments.shape)}"
        )
    window = _window(model)
    if window is not None and segments.shape[1] > window:
        raise OptionError(
            f"seq_len {segments.shape[1]}: expected at most the model's window of {window} tokens"
        )
    total = 0.0
    with _evaluating(model):
        for start, batch in _batches(segments, batch_size, progress):
            sums = _nll(model, {"input_ids": batch, "labels": batch})
            if not all(map(math.isfinite, sums)):
                raise WorkError(
                    "perplexity: expected finite logits, got NaN or Inf in segments from "
                    f"{start} on"
                )
            total += sum(sums)
    tokens = segments.shape[0] * (segments.shape[1] - 1)
    nll = total / tokens
    return Perplexity(math.exp(nll) if nll < 700 else math.inf, nll, tokens, segments.shape[0])


def accuracy(
    model: Any,
    tokenizer: Any,
    source: Source,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Accuracy:
    """The fraction of examples whose own answer is the most likely of all distinct answers.

    The score of an answer is the log-likelihood of its tokens and of the token that closes it. So a
    label that is the beginning of another has no advantage. Prompts and answers are rendered as in
    training (:func:`modulora_core.data.load_examples`).

    Args:
        model: a transformers causal language model. It keeps its mode, training or evaluation.
        tokenizer: its tokenizer.
        source: records of text and label, prompt and completion, or instruction and output.
        batch_size: answers per forward pass.
        progress: called after each forward pass.

    Raises:
        DataError: the source is malformed, is text or a chat, or has too few or too many distinct
            answers; or an example exceeds the model's window.
        OptionError: ``batch_size`` is below 1.
        WorkError: the model's logits are NaN or infinite.
    """
    asked = _conversations(source)
    if asked[0].plain is None:
        raise DataError(f"{asked[0].place}: accuracy: expected a prompt and a label, got a chat")
    examples = {each.answer: each for each in asked}  # an example of each answer
    labels = tuple(sorted(examples))
    if not 2 <= len(labels) <= MAX_LABELS:
        raise DataError(
            f"{source_name(source)}: accuracy: expected 2 to {MAX_LABELS} distinct labels, "
            f"got {len(labels)}"
        )
    renderer = Renderer(tokenizer)
    pairs = [(each, examples[label]) for each in asked for label in labels]

    def encoded(batch: Sequence[tuple[Conversation, Conversation]]) -> list[Encoded]:
        return renderer.encode([renderer.render(_answered(*pair))[-1] for pair in batch])

    for _, batch in _batches(pairs, 256, None):
        _check_window(model, [len(ids) for ids, _ in encoded(batch)], [each for each, _ in batch])
    collate, scores = Collator(0), list[float]()
    with _evaluating(model):
        for _, batch in _batches(pairs, batch_size, progress):
            rows = [{"input_ids": ids, "labels": goals} for ids, goals in encoded(batch)]
            scores += _nll(model, collate(rows))
    if not all(map(math.isfinite, scores)):
        raise WorkError("accuracy: expected finite logits, got NaN or Inf")
    correct = 0
    for i, each in enumerate(asked):
        own = scores[i * len(labels) : (i + 1) * len(labels)]
        correct += labels[own.index(min(own))] == each.answer
    return Accuracy(correct / len(asked), correct, len(asked), labels)


def rouge(
    model: Any,
    tokenizer: Any,
    source: Source,
    max_new_tokens: int = 128,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Rouge:
    """ROUGE of the model's greedy answers against the answers in ``source``.

    Prompts are rendered as in training. In a chat, the last turn of the assistant is the answer.

    Args:
        model: a transformers causal language model. It keeps its mode, training or evaluation.
        tokenizer: its tokenizer.
        source: instructions, chats or completions.
        max_new_tokens: limit of an answer.
        batch_size: prompts per generation.
        progress: called after each generation.

    Raises:
        MissingExtraError: rouge-score is not installed.
        DataError: the source is malformed or is text, or a prompt with its answer exceeds the
            model's window.
        OptionError: ``max_new_tokens`` or ``batch_size`` is below 1.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtraError(
            "rouge: expected the library rouge-score; pip install 'modulora-core[evaluation]'"
        ) from None
    sampling = Sampling(max_new_tokens)
    asked = _conversations(source)
    renderer = Renderer(tokenizer)
    prompts = [renderer.encode_prompt(renderer.render(each)[-1]) for each in asked]
    _check_window(model, [len(ids) + max_new_tokens for ids in prompts], asked)
    texts: list[str] = []
    with _evaluating(model):
        for _, batch in _batches(prompts, batch_size, progress):
            ids = continuations(model, tokenizer, batch, sampling)
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    scored = [scorer.score(each.answer, text) for each, text in zip(asked, texts, strict=True)]
    means = [sum(score[kind].fmeasure for score in scored) / len(scored) for kind in kinds]
    return Rouge(means[0], means[1], means[2], len(scored))


def _conversations(source: Source) -> list[Conversation]:
    records = load_records(source)
    format_ = detect(records)
    if format_ == "text":
        raise DataError(f"{records[0].place}: expected prompts and answers, got text")
    return conversations(records, format_)


def _answered(asked: Conversation, other: Conversation) -> Conversation:
    """``asked`` with the answer of ``other``."""
    assert asked.plain is not None
    assert other.plain is not None  # both come from one file, which is no chat
    return replace(
        asked,
        messages=(*asked.messages[:-1], other.messages[-1]),
        plain=(asked.plain[0], other.plain[1]),
    )


def _window(model: Any) -> int | None:
    """The limit of the model's context in tokens, or None if its config has none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _check_window(model: Any, lengths: Sequence[int], asked: Sequence[Conversation]) -> None:
    window = _window(model)
    for length, each in zip(lengths, asked, strict=True):
        if window is not None and length > window:
            raise DataError(
                f"{each.place}: expected at most the model's window of {window} tokens, got "
                f"{length} with the answer"
            )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients. Afterwards each module is in its previous mode.

    Not ``inference_mode``: tensors that a model caches in it, such as rotary tables, cannot be
    saved for a later backward.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _batches(items: Any, size: int, progress: Progress | None) -> Iterator[tuple[int, Any]]:
    if size < 1:
        raise OptionError(f"batch_size: expected at least 1, got {size}")
    for start in range(0, len(items), size):
        yield start, items[start : start + size]
        if progress is not None:
            progress("evaluating", min(start + size, len(items)), len(items))


def _nll(model: Any, batch: dict[str, Tensor]) -> list[float]:
    """Σ -log p of the labels that are not -100, in nats, for each row of the batch."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    with deferred_logits(model):
        logits = model(**inputs, use_cache=False).logits
    sums: list[float] = token_losses(logits, batch["labels"]).sum(1).tolist()
    return sums
