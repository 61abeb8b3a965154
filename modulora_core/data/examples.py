"""Make training examples, token ids and labels cut to the window, and pad them to batches."""

from __future__ import annotations

import hashlib
import logging
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from modulora_core.data.files import Record
from modulora_core.data.formats import FIELDS, IGNORED, Format, conversations, detect, texts, tokens
from modulora_core.data.rendering import Encoded, Renderer, Rendering, check_ids, token_ids
from modulora_core.data.sources import Source, load_records, source_name
from modulora_core.data.templates import Template
from modulora_core.errors import DataError, OptionError

_LOG = logging.getLogger(__name__)
_BATCH = 256  # records tokenized in one call, which the tokenizers library spreads over the cores


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """The counts of a source.

    Attributes:
        templated: whether a chat template rendered the examples: all of them, or none.
        trained_tokens: the tokens that count in the loss.
        truncated: the examples that lost their end to the window.
        dropped: the examples that lost their whole answer to the window.
        untrained: the examples without a token to train, which are left out.
        blank: the records without text or answer, which are left out.
    """

    format: Format
    templated: bool = False
    records: int
    examples: int
    tokens: int
    trained_tokens: int
    truncated: int = 0
    dropped: int = 0
    untrained: int = 0
    blank: int


class Examples(Dataset[dict[str, list[int]]]):
    """A map-style dataset of ``{"input_ids": list[int], "labels": list[int]}``.

    Labels are -100 for tokens that aren't trained. A token takes four bytes in each array. Joined
    examples (:meth:`joined`) have ``position_ids`` too, which begin at 0 in each part.
    """

    def __init__(
        self,
        pairs: list[tuple[array[int], array[int]]],
        report: DataReport,
        parts: Sequence[Sequence[int]] = (),
    ) -> None:
        self._pairs, self.report, self._parts = pairs, report, parts

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        return [len(ids) for ids, _ in self._pairs]

    def parts(self, index: int) -> list[tuple[array[int], array[int]]]:
        """Tokens and labels of each part of a joined example, or of the whole of another one."""
        ids, labels = self._pairs[index]
        lengths = self._parts[index] if self._parts else [len(ids)]
        ends = [*accumulate(lengths)]
        return [
            (ids[end - length : end], labels[end - length : end])
            for length, end in zip(lengths, ends, strict=True)
        ]

    def joined(self, seq_len: int) -> Examples:
        """Rows of one or more examples, at most ``seq_len`` tokens each: best fit, longest first.

        A part does not predict the next part's first token.
        """
        rows: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # room and number of each row, sorted
        lengths = self.lengths
        for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            at = bisect_left(rooms, (lengths[i], 0))
            room, row = rooms.pop(at) if at < len(rooms) else (seq_len, len(rows))
            if row == len(rows):
                rows.append([])
            rows[row].append(i)
            insort(rooms, (room - lengths[i], row))
        pairs = []
        for row_of in rows:
            ids, labels = array("i"), array("i")
            for i in row_of:
                ids += self._pairs[i][0]
                labels += array("i", [IGNORED]) + self._pairs[i][1][1:]
            pairs.append((ids, labels))
        return Examples(pairs, self.report, [[lengths[i] for i in row_of] for row_of in rows])

    def check_ids(self, vocabulary: int, subject: str) -> None:
        """Refuse token ids that are not below ``vocabulary``. Raises DataError."""
        for ids, _ in self._pairs:
            check_ids(ids, vocabulary, subject)

    @property
    def digest(self) -> str:
        """A SHA-256 of all tokens and labels, in their order."""
        found = hashlib.sha256()
        for ids, labels in self._pairs:
            found.update(len(ids).to_bytes(8, "little") + ids.tobytes() + labels.tobytes())
        return found.hexdigest()

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids, labels = self._pairs[index]
        found = {"input_ids": ids.tolist(), "labels": labels.tolist()}
        if self._parts:
            found["position_ids"] = [i for length in self._parts[index] for i in range(length)]
        return found


def load_examples(
    source: Source,
    tokenizer: Any,
    *,
    format: str = "auto",
    seq_len: int,
    template: Template | None = None,
) -> Examples:
    """Read ``source`` and make training examples of at most ``seq_len`` tokens.

    EOS joins the documents of a text, and the tokens are cut into windows of ``seq_len``. Of
    instructions, chats and completions only the answers are trained. Each record is an example, or
    each answer if a chat template rewrites earlier turns. Tokens beyond the window are cut off,
    counted in the report, and logged.

    Args:
        tokenizer: a transformers tokenizer. All formats but text use its chat template, if any.
        seq_len: the window, in tokens; at least 2.

    Raises OptionError, DataError, MissingExtraError.
    """
    if seq_len < 2:
        raise OptionError(f"seq_len: expected at least 2 tokens, got {seq_len}")

    def read(records: Sequence[Record]) -> tuple[Sequence[Record], Format]:
        filled = records if template is None else template.fill(records)
        return filled, detect(filled, format)

    read_columns = FIELDS if template is None else template.columns
    records, chosen = read(load_records(source, read, read_columns))
    name = source_name(source)
    if chosen == "text":
        return _windows(records, tokenizer, seq_len, name)
    if chosen == "tokens":
        counts = {"format": "tokens", "records": len(records), "blank": 0}
        return _cut(map(tokens, records), seq_len, name, counts)
    return _answers(records, chosen, tokenizer, seq_len, name)


def _windows(records: Sequence[Record], tokenizer: Any, seq_len: int, name: str) -> Examples:
    documents = [text for text in texts(records) if text.strip()]
    eos = tokenizer.eos_token_id
    joint = token_ids(tokenizer, ["\n\n"])[0] if eos is None else [eos]
    ids = array("i")
    for start in range(0, len(documents), _BATCH):
        for document in token_ids(tokenizer, documents[start : start + _BATCH]):
            ids.extend([*joint, *document] if ids else document)
    if len(ids) < 2:
        raise DataError(f"{name}: expected a text of 2 tokens or more, got {len(ids)}")
    # a last window of one token has nothing to predict
    end = len(ids) - 1 if len(ids) % seq_len == 1 else len(ids)
    windows = [ids[start : min(start + seq_len, end)] for start in range(0, end, seq_len)]
    report = DataReport(
        format="text", records=len(records), examples=len(windows), tokens=end,
        trained_tokens=end - len(windows), blank=len(records) - len(documents),
    )  # fmt: skip
    return Examples([(window, window) for window in windows], report)


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
    counts = {"format": format, "templated": renderer.has_template, "records": len(records),
              "blank": len(read) - len(kept)}  # fmt: skip
    return _cut(_batched(renderer, renderings), seq_len, name, counts)


def _cut(
    encoded: Iterable[Encoded], seq_len: int, name: str, counts: Mapping[str, Any]
) -> Examples:
    """Cut examples to the window, and leave out those without a trained token in it."""
    pairs: list[tuple[array[int], array[int]]] = []
    truncated = trained = dropped = untrained = given = kept = 0
    for ids, labels in encoded:
        # the first token is never predicted
        if all(label == IGNORED for label in labels[1:]):
            untrained += 1
            continue
        given += len(ids)
        answer = sum(label != IGNORED for label in labels[1:seq_len])
        dropped += not answer
        if answer:
            truncated += len(ids) > seq_len
            trained += answer
            kept += min(len(ids), seq_len)
            pairs.append((array("i", ids[:seq_len]), array("i", labels[:seq_len])))
    report = DataReport(
        **counts, examples=len(pairs), tokens=kept,
        trained_tokens=trained, truncated=truncated, dropped=dropped, untrained=untrained,
    )  # fmt: skip
    if not pairs and not dropped:
        raise DataError(
            f"{name}: expected a token to train after an example's first one, got none in "
            f"{untrained} examples; check their labels or masks"
        )
    if not pairs:
        raise DataError(
            f"{name}: expected examples whose answer starts within seq_len {seq_len}, got none of "
            f"{dropped}; raise seq_len"
        )
    _warn(report, seq_len, name, 1 - kept / given)
    return Examples(pairs, report)


def _batched(renderer: Renderer, renderings: Sequence[Rendering]) -> Iterator[Encoded]:
    for start in range(0, len(renderings), _BATCH):
        yield from renderer.encode(renderings[start : start + _BATCH])


def _warn(report: DataReport, seq_len: int, name: str, lost_share: float) -> None:
    lost = []
    longer = report.truncated + report.dropped
    if longer:
        lost.append(
            f"{longer} of {report.examples + report.dropped} examples are longer than seq_len "
            f"{seq_len}: {report.truncated} truncated, {report.dropped} dropped because no token "
            f"of their answer fits; {lost_share:.1%} of all tokens are lost"
        )
    if report.untrained:
        lost.append(
            f"{report.untrained} of {report.examples + report.dropped + report.untrained} examples "
            "have no token to train and are left out"
        )
    if report.blank:
        lost.append(
            f"{report.blank} of {report.records} records have an empty answer and are left out"
        )
    if lost:
        _LOG.warning("%s: %s", name, "; ".join(lost))


def longest_first(lengths: Sequence[int]) -> list[int]:
    """The numbers of examples by length. Batches of similar lengths have little padding."""
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


@dataclass(frozen=True, slots=True)
class Collator:
    """Pad examples on the right to the longest of the batch.

    Attributes:
        pad_token_id: any id of the vocabulary; attention and labels mask it.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """``{"input_ids", "attention_mask", "labels"}``, each int64 ``[batch, longest]``.

        Joined examples have ``position_ids`` too; padding is a part of its own.
        """
        longest = max(len(example["input_ids"]) for example in examples)

        def padded(rows: Sequence[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

        ids = [example["input_ids"] for example in examples]
        positions = [example["position_ids"] for example in examples if "position_ids" in example]
        more = [[*row, *range(longest - len(row))] for row in positions]
        return {
            **({"position_ids": torch.tensor(more)} if more else {}),
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded([example["labels"] for example in examples], IGNORED),
        }
