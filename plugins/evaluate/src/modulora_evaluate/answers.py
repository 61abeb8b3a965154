"""Generate a model's answers, and compare them with the data's: ROUGE and exact match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modulora_core.data.examples import longest_first
from modulora_core.data.formats import Conversation
from modulora_core.data.rendering import Renderer
from modulora_core.errors import MissingExtraError
from modulora_core.models.generation import Sampling, continuations
from modulora_core.progress import Progress, no_progress
from modulora_evaluate.passes import batches, check_examples, evaluating


@dataclass(frozen=True, slots=True)
class Rouge:
    """Mean F-measures of ROUGE-1, ROUGE-2, ROUGE-L (Lin 2004), stemmed, in [0, 1]."""

    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815  the measure's own spelling
    examples: int


@dataclass(frozen=True, slots=True)
class ExactMatch:
    """The share of answers that equal the data's, without blanks around them."""

    exact_match: float
    correct: int
    examples: int


def rouge(
    model: Any, tokenizer: Any, asked: Sequence[Conversation], sampling: Sampling, **passes: Any
) -> Rouge:
    """ROUGE of the model's answers against the answers of the data.

    Prompts are rendered as in training. In a chat, the last turn of the assistant is the answer.

    Args:
        model: a transformers causal language model. It keeps its mode, training or evaluation.
        asked: prompts with their answers (:func:`modulora_evaluate.passes.asked_in`).
        passes: ``batch_size``, prompts per generation; ``progress``, called after each.

    Raises MissingExtraError, DataError, OptionError.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtraError(
            "rouge: expected the library rouge-score; pip install 'modulora-evaluate[rouge]'"
        ) from None
    texts = _texts(model, tokenizer, asked, sampling, **passes)
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    scored = [scorer.score(each.answer, text) for each, text in zip(asked, texts, strict=True)]
    means = [sum(score[kind].fmeasure for score in scored) / len(scored) for kind in kinds]
    return Rouge(means[0], means[1], means[2], len(scored))


def exact_match(
    model: Any, tokenizer: Any, asked: Sequence[Conversation], sampling: Sampling, **passes: Any
) -> ExactMatch:
    """The share of generated answers that equal the answers of the data, as :func:`rouge`."""
    texts = _texts(model, tokenizer, asked, sampling, **passes)
    correct = sum(
        text.strip() == each.answer.strip() for each, text in zip(asked, texts, strict=True)
    )
    return ExactMatch(correct / len(asked), correct, len(asked))


def _texts(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Conversation],
    sampling: Sampling,
    batch_size: int = 1,
    progress: Progress = no_progress,
) -> list[str]:
    """The model's answer to each prompt."""
    renderer = Renderer(tokenizer)
    prompts = [renderer.encode_prompt(renderer.render(each)[-1]) for each in asked]
    check_examples(model, prompts, asked, new=sampling.max_new_tokens)
    texts: dict[int, str] = {}
    with evaluating(model):
        for _, batch in batches(longest_first([*map(len, prompts)]), batch_size, progress):
            ids = continuations(model, tokenizer, [prompts[i] for i in batch], sampling)
            decoded = tokenizer.batch_decode(ids, skip_special_tokens=True)
            texts.update(zip(batch, decoded, strict=True))
    return [texts[i] for i in range(len(asked))]
