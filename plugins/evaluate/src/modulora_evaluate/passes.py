"""The prompts and answers of a source, and passes over them in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from modulora_core.data.files import Record
from modulora_core.data.formats import FIELDS, Conversation, conversations, detect
from modulora_core.data.rendering import check_ids
from modulora_core.data.sources import Source, load_records
from modulora_core.data.templates import Template
from modulora_core.errors import DataError, OptionError
from modulora_core.models.config import vocabulary_of, window_of
from modulora_core.progress import Progress, no_progress


def asked_in(source: Source, template: Template | None = None) -> list[Conversation]:
    """The conversations of a source that have an answer. Raises DataError."""

    def converted(records: Sequence[Record]) -> list[Conversation]:
        filled = records if template is None else template.fill(records)
        format_ = detect(filled, answers=True)
        if format_ == "text":
            raise DataError(f"{records[0].place}: expected prompts and answers, got text")
        return conversations(filled, format_)

    columns = FIELDS if template is None else template.columns
    records = load_records(source, converted, columns)
    read = converted(records)
    asked = [each for each in read if not each.is_blank]
    if not asked:
        raise DataError(f"{records[0].place}: expected answers, got an empty one in every record")
    return asked


def check_examples(
    model: Any, examples: Sequence[Sequence[int]], asked: Sequence[Conversation], *, new: int = 0
) -> None:
    """Refuse token ids that exceed the model's window or vocabulary, with their place.

    Args:
        new: the most tokens that will follow.
    """
    window, vocabulary = window_of(model.config), vocabulary_of(model.config)
    for ids, each in zip(examples, asked, strict=True):
        check_ids(ids, vocabulary, each.place)
        if window is not None and len(ids) + new > window:
            raise DataError(
                f"{each.place}: expected at most the model's window of {window} tokens, got "
                f"{len(ids) + new} with the answer"
            )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
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


def batches(items: Any, size: int, progress: Progress = no_progress) -> Iterator[tuple[int, Any]]:
    """The number of each batch's first item, and the batch; shows progress after it."""
    if size < 1:
        raise OptionError(f"batch_size: expected at least 1, got {size}")
    for start in range(0, len(items), size):
        yield start, items[start : start + size]
        progress("evaluating", min(start + size, len(items)), len(items))
