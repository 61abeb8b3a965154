"""The dense model's predictions of the trained tokens, in a file.

A row of the file has the :data:`TOP` most likely tokens in the place of one trained token. Examples
that no step trains have no rows. The dense model passes through memory a decoder block at a time,
once per :data:`CHUNK_TOKENS` tokens. A killed run leaves whole rows, and the next run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from modulora_core.calibration.blocks import Block, for_each_block
from modulora_core.calibration.calls import OuterModel
from modulora_core.calibration.text import BATCH_TOKENS
from modulora_core.data import Collator
from modulora_core.data.examples import DataReport, Examples
from modulora_core.data.formats import IGNORED
from modulora_core.errors import WorkError
from modulora_core.models import ModelSource
from modulora_core.models.config import vocabulary_of
from modulora_core.progress import Progress
from modulora_core.training.chunked_loss import label_logits
from modulora_core.training.readout import read_out

TOP = 64
"""Tokens in a row, of 6 bytes each. The loss counts all other tokens as one class."""

CHUNK_TOKENS = 2**16
"""Tokens whose hidden states are in memory at once: 512 MiB for 4096 values of 16 bits a token."""

TEACHER = ("teacher_tokens", "teacher_log_p")
"""Entries of a batch for the loss alone."""

Labelled = tuple[Sequence[int], Sequence[int]]
"""Tokens and labels of one sequence."""

Rows = np.ndarray[Any, Any]


class Predictions:
    """The dense model's predictions of the labels of some examples, in a file.

    Args:
        teacher: the dense model.
        examples: the training examples.
        seen: number of examples that the steps of the run take; if there are more, the run trains
            so many of them, drawn with ``seed``.
        folder: the folder of the file.

    Attributes:
        numbers: the numbers of the examples with predictions, ascending.
        ends: the number of rows up to the end of each of them.
        row: one row: the most likely tokens, and the logarithms of their probabilities.
    """

    def __init__(
        self, teacher: ModelSource, examples: Examples, seen: int, seed: int, folder: Path
    ) -> None:
        self.teacher, self.examples, self._folder = teacher, examples, folder
        count = len(examples)
        drawn = random.Random(seed).sample(range(count), min(seen, count))
        self.numbers = sorted(drawn)
        parts = (examples.parts(number) for number in self.numbers)
        self.ends = [*accumulate(sum(map(_trained, part)) for part in parts)]
        k = min(TOP, vocabulary_of(teacher.config))
        self.row = np.dtype([("token", "<i4", k), ("log_p", "<f2", k)])

    @cached_property
    def file(self) -> Path:
        """The file. Its name has a hash of the examples and of the dense model."""
        described = [self.examples.digest, self.teacher.identity(), self.numbers, self.row.itemsize]
        digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
        return self._folder / f"predictions-{digest}"

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.ends[-1] * self.row.itemsize

    def compute(self, device: torch.device, progress: Progress) -> None:
        """Write the rows that the file lacks.

        Args:
            device: the device of the blocks.
            progress: called with ``"predicting"``, the decoder blocks done, and their number.

        Raises:
            ModelError: the dense model can't run block by block.
            WorkError: its logits are NaN or Inf.
        """
        for other in self._folder.glob("predictions-*"):
            if other != self.file:  # an earlier run in this folder had other data
                other.unlink()
        with self.file.open("ab") as file:
            rows = file.tell() // self.row.itemsize
            done = sum(end <= rows for end in self.ends)
            file.truncate([0, *self.ends][done] * self.row.itemsize)
            chunks = self._chunks(done)
            for number, chunk in enumerate(chunks):

                def show(block: int, blocks: int, before: int = number) -> None:
                    progress("predicting", before * blocks + block, len(chunks) * blocks)

                for made in self._predicted(chunk, device, show):
                    file.write(made.tobytes())
                file.flush()
                os.fsync(file.fileno())

    def _chunks(self, done: int) -> list[list[Labelled]]:
        """The sequences after ``done`` examples, in chunks of about CHUNK_TOKENS tokens."""
        chunks: list[list[Labelled]] = []
        room = 0
        for number in self.numbers[done:]:
            if room <= 0:
                chunks.append([])
                room = CHUNK_TOKENS
            chunks[-1] += self.examples.parts(number)
            room -= sum(len(ids) for ids, _ in self.examples.parts(number))
        return chunks

    @torch.no_grad()
    def _predicted(
        self, sequences: Sequence[Labelled], device: torch.device, show: Callable[[int, int], None]
    ) -> list[Rows]:
        """The rows of each sequence. The dense model passes through memory once."""
        outer = OuterModel(self.teacher, device, head=True)
        batches = [*_batches([len(ids) for ids, _ in sequences])]
        # attention is causal: padding on the right needs no mask
        padded = [
            Collator(0)([{"input_ids": [*ids], "labels": [*labels]} for ids, labels in pairs])
            for pairs in ([sequences[i] for i in numbers] for numbers in batches)
        ]
        recorded = [*outer.record(batch["input_ids"] for batch in padded)]
        states, calls = [hidden for hidden, _ in recorded], [found for _, found in recorded]
        del recorded  # the hidden states before the first block
        phases = len(calls[0]) + 1
        outer.drop_first_block()

        def run(number: int, block: Block) -> None:
            for i, found in enumerate(calls):
                states[i] = found[number].run(block.module, states[i])
            show(number + 1, phases)

        for_each_block(self.teacher, (), device, run)
        rows: list[Rows] = [np.empty(0, self.row)] * len(sequences)
        for numbers, batch, found in zip(batches, padded, calls, strict=True):
            with read_out(outer.model) as readout:
                outer.logits_after(found, batch["input_ids"], states.pop(0))
            made = np.concatenate([*map(self._rows, label_logits(readout, batch["labels"]))])
            counts = [_trained(sequences[i]) for i in numbers]
            for i, part in zip(numbers, np.split(made, [*accumulate(counts)][:-1]), strict=True):
                rows[i] = part
        show(phases, phases)
        return rows

    def _rows(self, logits: Tensor) -> Rows:
        """The rows of logits, ``[n, vocabulary]``."""
        total = logits.float().logsumexp(1, keepdim=True)
        if not bool(torch.isfinite(total).all()):
            raise WorkError(
                f"original {self.teacher.location.model}: expected finite logits on the training "
                "data, got NaN or Inf"
            )
        values, tokens = logits.topk(self.row["token"].shape[0])
        rows = np.empty(len(logits), self.row)
        rows["token"], rows["log_p"] = tokens.cpu().numpy(), (values - total).cpu().numpy()
        return rows


class Distilled(Dataset[dict[str, Any]]):
    """The examples with predictions, of which each gets its ``rows``."""

    def __init__(self, predictions: Predictions) -> None:
        self._predictions = predictions

    def __len__(self) -> int:
        return len(self._predictions.numbers)

    @property
    def report(self) -> DataReport:
        """The report of all examples."""
        return self._predictions.examples.report

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        lengths = self._predictions.examples.lengths
        return [lengths[number] for number in self._predictions.numbers]

    def __getitem__(self, index: int) -> dict[str, Any]:
        found, start = self._predictions, self._predictions.ends[index - 1] if index else 0
        count, offset = found.ends[index] - start, start * found.row.itemsize
        rows = np.fromfile(found.file, found.row, count, offset=offset)
        return {**found.examples[found.numbers[index]], "rows": rows}


@dataclass(frozen=True, slots=True)
class DistilledCollator:
    """Makes a batch of :class:`Distilled`, with the rows of all examples behind each other."""

    collator: Collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of ``collator`` with ``teacher_tokens``, int64, and ``teacher_log_p``, fp32.

        Both are ``[trained tokens, k]``. Examples to evaluate have none.
        """
        batch = self.collator(examples)
        if "rows" not in examples[0]:
            return batch
        rows = np.concatenate([example["rows"] for example in examples])
        return {
            **batch,
            TEACHER[0]: torch.from_numpy(rows["token"].astype(np.int64)),
            TEACHER[1]: torch.from_numpy(rows["log_p"].astype(np.float32)),
        }


def _trained(sequence: Labelled) -> int:
    """The number of trained tokens; the first token is never predicted."""
    return sum(label != IGNORED for label in sequence[1][1:])


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The numbers of sequences of similar length, in batches of about BATCH_TOKENS tokens."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    yield batch
