"""Distills a dense model into the adapter: its predictions of the trained tokens, in a file.

    loss = 1/N Σ (1 - x) (-log p(y)) + x KL(t ‖ p)      x : distill_weight

p is the prediction of the model with its adapter, and t the dense model's (Hinton et al. 2015,
arXiv 1503.02531; :mod:`modulora_core.training.chunked_loss`).

A row of the file has the :data:`TOP` most likely tokens in the place of one trained token. Examples
that no step trains have no rows. The dense model passes through memory a decoder block at a time,
once per :data:`CHUNK_TOKENS` tokens. A killed run leaves whole rows, and the next run goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
from transformers import PreTrainedTokenizerBase

from modulora_core.calibration.blocks import Block, for_each_block
from modulora_core.calibration.calls import OuterModel
from modulora_core.calibration.text import BATCH_TOKENS
from modulora_core.data import Collator
from modulora_core.data.examples import Examples
from modulora_core.data.rendering import IGNORED
from modulora_core.distributed import world_size
from modulora_core.errors import OptionError, WorkError
from modulora_core.models import ModelSource, open_dense
from modulora_core.models.config import vocabulary_of, window_of
from modulora_core.progress import Progress
from modulora_core.training.chunked_loss import deferred_logits, label_logits
from modulora_core.training.config import FinetuneConfig

TOP = 64
"""Tokens in a row, of 6 bytes each. The loss counts all other tokens as one class."""

CHUNK_TOKENS = 2**16
"""Tokens whose hidden states are in memory at once: 512 MiB for 4096 values of 16 bits a token."""

TEACHER = ("teacher_tokens", "teacher_log_p")
"""Entries of a batch for the loss alone."""

Labelled = tuple[Sequence[int], Sequence[int]]
"""Tokens and labels of one sequence."""

Rows = np.ndarray[Any, Any]

logger = logging.getLogger(__name__)


def predictions_of(
    config: FinetuneConfig,
    examples: Examples,
    steps: int,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    folder: Path,
) -> Predictions | None:
    """Open the dense model of ``distill``, if there is one, and log the size of its predictions.

    Args:
        examples: the training examples; steps: the optimizer steps of the run.
        tokenizer: the quantized model's tokenizer; vocabulary: the number of its tokens.
        folder: the folder of the predictions.

    Raises:
        OptionError: the dense model has another tokenizer or vocabulary, or too short a context.
        ModelError, CheckpointError: it cannot be opened.
    """
    if config.distill is None:
        return None
    teacher = open_dense(config.distill)
    _check_teacher(teacher, tokenizer, vocabulary, config.seq_len)
    seen = steps * config.batch_size * config.grad_accum * world_size()
    predictions = Predictions(teacher, examples, seen, config.seed, folder)
    logger.info(
        "distill: the predictions of %s for %s trained tokens take %s MiB in %s",
        config.distill, f"{predictions.ends[-1]:,}", f"{predictions.nbytes / 2**20:,.1f}", folder,
    )  # fmt: skip
    return predictions


def _check_teacher(teacher: ModelSource, tokenizer: Any, vocabulary: int, seq_len: int) -> None:
    name, config = teacher.location.model, teacher.config.get_text_config()
    if config.vocab_size != vocabulary or teacher.tokenizer().get_vocab() != tokenizer.get_vocab():
        raise OptionError(
            f"distill {name}: expected the tokenizer of the quantized model and its {vocabulary} "
            f"tokens, got another one, with {config.vocab_size}; give the model that it was "
            "quantized from"
        )
    longest = window_of(config)
    if longest is not None and longest < seq_len:
        raise OptionError(
            f"distill {name}: expected a context of seq_len {seq_len}, got {longest} tokens"
        )


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
            with deferred_logits(outer.model):
                logits = outer.logits_after(found, batch["input_ids"], states.pop(0))
            made = np.concatenate([*map(self._rows, label_logits(logits, batch["labels"]))])
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
                f"distill {self.teacher.location.model}: expected finite logits on the training "
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
