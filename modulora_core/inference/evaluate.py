"""How good a loaded model is: perplexity of text, accuracy on labels, ROUGE of what it writes.

    perplexity = exp(nll)        nll = -1/N Σ log p(xₜ | x₍<t₎)      N predicted tokens, in nats

Each function takes a model and leaves it in the mode (training or evaluation) that it had. The log-softmax is
taken in fp32, a few rows of logits at a time (:mod:`modulora_core.training.chunked_loss`), and the other rows don't exist meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modulora_core.data.examples import Collator
from modulora_core.data.formats import Conversation, conversations, detect
from modulora_core.data.rendering import Encoded, Renderer
from modulora_core.data.sources import Source, load_records, source_name
from modulora_core.errors import DataError, MissingExtraError, OptionError, WorkError
from modulora_core.models.progress import Progress
from modulora_core.training.chunked_loss import deferred_logits, token_losses

MAX_LABELS = 64
"""Accuracy scores every label for every example; more distinct answers than this are not labels."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Attributes:
    perplexity: ``exp(nll)``.
    nll: the mean negative log-likelihood of a predicted token, in nats.
    tokens: how many were predicted: ``seq_len - 1`` in each segment.
    segments: how many segments.
    """

    perplexity: float
    nll: float
    tokens: int
    segments: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Attributes:
    accuracy: ``correct / examples``, in [0, 1].
    correct: examples whose own answer was the likeliest.
    examples: how many were asked.
    labels: the distinct answers that were compared, sorted.
    """

    accuracy: float
    correct: int
    examples: int
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rouge:
    """Mean F-measures of ROUGE-1, ROUGE-2, ROUGE-L (Lin 2004), stemmed, in [0, 1]; papers print percent."""

    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815  the measure's own spelling
    examples: int


def perplexity(
    model: Any, segments: Tensor, *, batch_size: int = 1, progress: Progress | None = None
) -> Perplexity:
    """The perplexity of ``segments``, each on its own: its first token is given, the others are predicted.

    Args:
        model: a transformers causal language model.
        segments: token ids, int64 ``[n, seq_len]`` (:func:`modulora_core.data.token_segments`).
        batch_size: segments in a forward pass.
        progress: called after each pass with segments done and ``n``.

    Raises:
        DataError: ``segments`` isn't ``[n >= 1, seq_len >= 2]``.
        OptionError: ``batch_size`` is less than 1, or ``seq_len`` is more than the model's window.
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
                    f"perplexity: expected finite logits, got NaN or Inf in segments from {start} on"
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
    """How often the example's own answer is the likeliest of all distinct answers in ``source``.

    Each answer is scored by the log-likelihood of its tokens and of the one that closes it: the probability
    that the model says this and nothing more, so a label that another one starts with has no advantage. It is
    rendered as in training (:func:`modulora_core.data.load_examples`).

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        source: records of text and label, prompt and completion, or instruction and output.
        batch_size: answers in a forward pass.
        progress: called after each pass with answers done and their number.

    Raises:
        DataError: the source is missing or malformed, is text or a chat, has fewer than 2 or more than
            :data:`MAX_LABELS` distinct answers, or an example is longer than the model's window.
        OptionError: ``batch_size`` is less than 1.
        WorkError: the model's logits are NaN or infinite.
    """
    asked = _conversations(source)
    if asked[0].plain is None:
        raise DataError(f"{asked[0].place}: accuracy: expected a prompt and a label, got a chat")
    answers = {each.answer: each for each in asked}  # the answer, and one example that has it
    labels = tuple(sorted(answers))
    if not 2 <= len(labels) <= MAX_LABELS:
        raise DataError(
            f"{source_name(source)}: accuracy: expected 2 to {MAX_LABELS} distinct labels, got {len(labels)}"
        )
    renderer = Renderer(tokenizer)
    choices = range(len(asked) * len(labels))  # choice i: example i // labels, label i % labels

    def encoded(chosen: Sequence[int]) -> list[Encoded]:
        pairs = [(asked[i // len(labels)], answers[labels[i % len(labels)]]) for i in chosen]
        return renderer.encode([renderer.render(_answered(*pair))[-1] for pair in pairs])

    for _, chosen in _batches(choices, 256, None):
        lengths = [len(ids) for ids, _ in encoded(chosen)]
        _check_window(model, lengths, [asked[i // len(labels)] for i in chosen])
    collate, scores = Collator(0), list[float]()
    with _evaluating(model):
        for _, chosen in _batches(choices, batch_size, progress):
            rows = [{"input_ids": ids, "labels": goal} for ids, goal in encoded(chosen)]
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
    """ROUGE of what the model writes, greedily, against the answers in ``source``.

    The model is asked as in training; of a chat the assistant's last turn is what it is asked for.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        source: instructions, chats or completions.
        max_new_tokens: where an answer is cut off.
        batch_size: prompts in a generation.
        progress: called after each generation with prompts done and their number.

    Raises:
        MissingExtraError: rouge-score isn't installed.
        DataError: the source is missing or malformed, is text, or a prompt and its answer don't fit the
            model's window.
        OptionError: ``max_new_tokens`` or ``batch_size`` is less than 1.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtraError(
            "rouge needs the library rouge-score, which is missing; pip install 'modulora-core[evaluation]'"
        ) from None
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    asked = _conversations(source)
    renderer = Renderer(tokenizer)
    prompts = [renderer.encode_prompt(renderer.render(each)[-1]) for each in asked]
    _check_window(model, [len(ids) + max_new_tokens for ids in prompts], asked)
    written: list[str] = []
    with _evaluating(model):
        for _, batch in _batches(prompts, batch_size, progress):
            written += _greedy(model, tokenizer, batch, max_new_tokens)
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    scored = [scorer.score(each.answer, text) for each, text in zip(asked, written, strict=True)]
    mean = {kind: sum(score[kind].fmeasure for score in scored) / len(scored) for kind in kinds}
    return Rouge(mean["rouge1"], mean["rouge2"], mean["rougeL"], len(scored))


def _conversations(source: Source) -> list[Conversation]:
    records = load_records(source)
    format_ = detect(records)
    if format_ == "text":
        raise DataError(f"{records[0].place}: expected prompts and answers, got text")
    return conversations(records, format_)


def _answered(asked: Conversation, other: Conversation) -> Conversation:
    """``asked`` with the answer of ``other``."""
    assert asked.plain is not None
    assert other.plain is not None  # both come from one file that isn't a chat
    return replace(
        asked,
        messages=(*asked.messages[:-1], other.messages[-1]),
        plain=(asked.plain[0], other.plain[1]),
    )


def _window(model: Any) -> int | None:
    """The most tokens that the model was made for, where its configuration says so."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _check_window(model: Any, lengths: Sequence[int], asked: Sequence[Conversation]) -> None:
    window = _window(model)
    for length, each in zip(lengths, asked, strict=True):
        if window is not None and length > window:
            raise DataError(
                f"{each.place}: expected at most the model's window of {window} tokens, got {length} with "
                "the answer"
            )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode that it was in.

    Not ``inference_mode``: what a model or a quantizer caches in here (rotary tables, a rotation) could never
    be saved for a later backward.
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
        logits = model(
            **inputs, use_cache=False
        ).logits  # [batch, length, vocabulary], not there yet
    sums: list[float] = token_losses(logits, batch["labels"]).sum(1).tolist()
    return sums


def _greedy(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[str]:
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    longest = max(map(len, prompts))
    # padded on the left: generation continues at the right end
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0), repetition_penalty=1.0, no_repeat_ngram_size=0,
        temperature=1.0, top_p=1.0, top_k=50,  # or the model's own would come in, and a warning with them
    )  # fmt: skip
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
    )
    return [
        text.strip() for text in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    ]
