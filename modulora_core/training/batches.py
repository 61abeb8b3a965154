"""Put examples of similar length into a batch, so that little of it is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

WINDOW = 256
"""Examples that are sorted together. More need less padding, and mix lengths less."""


class SimilarLengths(Sampler[int]):
    """The examples of an epoch: shuffled, sorted by length within windows, and steps shuffled.

    transformers' own sampler leaves the batches of a window sorted, so a run of few steps would see
    the longest examples only. The order depends on the seed, the epoch and the examples of an
    optimizer step, so a run can be resumed, with another division of a step too.

    Args:
        lengths: of the examples, in tokens.
        step_size: examples in an optimizer step; the last step of an epoch may have fewer.
    """

    def __init__(self, lengths: Sequence[int], step_size: int, seed: int) -> None:
        self._lengths, self._step_size, self._seed, self._epoch = lengths, step_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of another epoch; the Trainer calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self._seed << 20) + self._epoch)
        drawn = torch.randperm(len(self._lengths), generator=generator).tolist()
        size, whole = self._step_size, len(drawn) // self._step_size * self._step_size
        window = max(1, WINDOW // size) * size
        steps = []
        for start in range(0, whole, window):
            part = sorted(drawn[start : min(start + window, whole)], key=self._lengths.__getitem__)
            steps += [part[first : first + size] for first in range(0, len(part), size)]
        for number in torch.randperm(len(steps), generator=generator).tolist():
            yield from steps[number]
        yield from sorted(drawn[whole:], key=self._lengths.__getitem__)
