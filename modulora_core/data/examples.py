"""Training examples: token ids and labels, cut to the window; and the collator that pads them."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from modulora_core.data.files import Record
from modulora_core.data.formats import Format, conversations, detect, documents
from modulora_core.data.rendering import IGNORED, Renderer, token_ids
from modulora_core.data.sources import Source, load_records, source_name
from modulora_core.errors import DataError, OptionError

_LOG = logging.getLogger(__name__)
_BATCH = 256  # records tokenized in one call, which the tokenizers library spreads over the cores


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of a source.

    Attributes:
        format: the format of its records.
        templated: whether the tokenizer's chat template wrote the examples.
        records: how many it holds.
        examples: how many are trained on.
        tokens: in all examples.
        trained_tokens: those that are predicted and count in the loss.
        truncated: examples that were longer than the window and lost their end.
        dropped: examples whose answer lay entirely beyond the window.
        blank: records without a text or an answer, left out.
    """

    format: Format
    templated: bool
    records: int
    examples: int
    tokens: int
    trained_tokens: int
    truncated: int
    dropped: int
    blank: int


class Examples(Dataset[dict[str, list[int]]]):
    """A map-style dataset of ``{"input_ids": list[int], "labels": list[int]}``.

    Labels are -100 where a token isn't trained. All tokens lie in one flat buffer, four bytes for each.
    """

    def __init__(
        self, ids: array[int], labels: array[int], offsets: Sequence[int], report: DataReport
    ) -> None:
        self._ids, self._labels, self._offsets, self.report = ids, labels, offsets, report

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        first, end = self._offsets[index % len(self)], self._offsets[index % len(self) + 1]
        return {
            "input_ids": self._ids[first:end].tolist(),
            "labels": self._labels[first:end].tolist(),
        }


def load_examples(
    source: Source, tokenizer: Any, *, format: str = "auto", seq_len: int
) -> Examples:
    """Read ``source`` and make training examples of at most ``seq_len`` tokens.

    Text is packed: documents are joined by EOS and cut into windows of ``seq_len``, of which the last may be
    shorter. Of instructions, chats and completions only the answers are trained; each record is an example
    (each answer, where a chat template rewrites earlier turns). What doesn't fit is cut off, counted in the
    report, and logged.

    Args:
        source: see :mod:`modulora_core.data.sources`.
        tokenizer: a transformers tokenizer. Where it has a chat template, every format but text uses it.
        format: ``"auto"`` or one of :data:`~modulora_core.data.formats.FORMATS`.
        seq_len: the window, in tokens; at least 2.

    Raises:
        OptionError: ``format`` or ``seq_len`` is out of range.
        DataError: the source is missing, malformed, mixed or ambiguous (with file and line), or nothing is
            left to train on.
        MissingExtraError: the source takes an optional library that isn't installed.
    """
    if seq_len < 2:
        raise OptionError(f"seq_len: expected at least 2 tokens, got {seq_len}")
    records = load_records(source)
    chosen = detect(records, format)
    name = source_name(source)
    if chosen == "text":
        return _packed(records, tokenizer, seq_len, name)
    return _answers(records, chosen, tokenizer, seq_len, name)


def _packed(records: Sequence[Record], tokenizer: Any, seq_len: int, name: str) -> Examples:
    texts = [document.text for document in documents(records) if document.text.strip()]
    eos = tokenizer.eos_token_id
    joint = token_ids(tokenizer, ["\n\n"])[0] if eos is None else [eos]
    ids = array("i")
    for start in range(0, len(texts), _BATCH):
        for document_ids in token_ids(tokenizer, texts[start : start + _BATCH]):
            ids.extend([*joint, *document_ids] if ids else document_ids)
    if len(ids) < 2:
        raise DataError(f"{name}: expected a text of 2 tokens or more, got {len(ids)}")
    end = (
        len(ids) - 1 if len(ids) % seq_len == 1 else len(ids)
    )  # a window of one token has nothing to predict
    offsets = [*range(0, end, seq_len), end]
    report = DataReport(
        format="text", templated=False, records=len(records), examples=len(offsets) - 1, tokens=end,
        trained_tokens=end - (len(offsets) - 1), truncated=0, dropped=0, blank=len(records) - len(texts),
    )  # fmt: skip
    return Examples(ids, ids, offsets, report)


def _answers(
    records: Sequence[Record], format: Format, tokenizer: Any, seq_len: int, name: str
) -> Examples:
    read = conversations(records, format)
    kept = [conversation for conversation in read if not conversation.is_blank]
    if not kept:
        raise DataError(
            f"{read[0].place}: expected an answer to train on, got an empty one, as in every record"
        )
    renderer = Renderer(tokenizer)
    renderings = [rendering for conversation in kept for rendering in renderer.render(conversation)]
    ids, labels, offsets = array("i"), array("i"), [0]
    truncated = dropped = trained = 0
    for all_ids, all_labels in _batched(renderer, renderings):
        answer = sum(
            label != IGNORED for label in all_labels[1:seq_len]
        )  # the first token is never predicted
        if answer == 0:
            dropped += 1
            continue
        truncated += len(all_ids) > seq_len
        trained += answer
        ids.extend(all_ids[:seq_len])
        labels.extend(all_labels[:seq_len])
        offsets.append(len(ids))
    report = DataReport(
        format=format, templated=renderer.has_template, records=len(records), examples=len(offsets) - 1,
        tokens=len(ids), trained_tokens=trained, truncated=truncated, dropped=dropped,
        blank=len(read) - len(kept),
    )  # fmt: skip
    if report.examples == 0:
        raise DataError(
            f"{name}: expected examples whose answer starts within seq_len {seq_len}, got none of "
            f"{len(renderings)}; raise seq_len"
        )
    _warn(report, seq_len, name)
    return Examples(ids, labels, offsets, report)


def _batched(
    renderer: Renderer, renderings: Sequence[Any]
) -> Iterator[tuple[list[int], list[int]]]:
    for start in range(0, len(renderings), _BATCH):
        yield from renderer.encode(renderings[start : start + _BATCH])


def _warn(report: DataReport, seq_len: int, name: str) -> None:
    lost = []
    if report.truncated or report.dropped:
        longer, of = report.truncated + report.dropped, report.examples + report.dropped
        lost.append(
            f"{longer} of {of} examples are longer than seq_len {seq_len}: {report.truncated} truncated, "
            f"{report.dropped} dropped because no token of their answer fits"
        )
    if report.blank:
        lost.append(
            f"{report.blank} of {report.records} records have an empty answer and are left out"
        )
    if lost:
        _LOG.warning("%s: %s", name, "; ".join(lost))


@dataclass(frozen=True, slots=True)
class Collator:
    """Pad examples on the right to the longest of the batch.

    Attributes:
        pad_token_id: any id of the vocabulary; attention and labels mask it.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """``{"input_ids", "attention_mask", "labels"}``, each int64 ``[batch, longest]``."""
        longest = max(len(example["input_ids"]) for example in examples)

        def padded(rows: Sequence[list[int]], value: int) -> Tensor:
            return torch.tensor(
                [[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64
            )

        return {
            "input_ids": padded([example["input_ids"] for example in examples], self.pad_token_id),
            "attention_mask": padded([[1] * len(example["input_ids"]) for example in examples], 0),
            "labels": padded([example["labels"] for example in examples], IGNORED),
        }
