"""Batches with little padding: examples of similar length, or joined examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel

from modulora_core.errors import OptionError

WINDOW = 256
"""Examples that are sorted together. More need less padding, and mix lengths less."""


class SimilarLengths(Sampler[int]):
    """The examples of an epoch: shuffled, sorted by length within windows, and steps shuffled.

    transformers' own sampler leaves the batches of a window sorted, so a run of few steps would see
    the longest examples only. The order depends on the seed, the epoch and the examples of an
    optimizer step, so a run can be resumed, with another division of a step too.

    Args:
        lengths: the length of each example, in tokens.
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


def attending_within_parts(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a batch, without ``attention_mask`` if its rows are joined examples.

    A mask would hide their ``position_ids`` from transformers' attention, and mix the parts.
    """
    dropped = "attention_mask" if "position_ids" in inputs else None
    return {name: value for name, value in inputs.items() if name != dropped}


def check_joined(model: PreTrainedModel, batch_size: int) -> None:
    """Refuse a model that mixes the parts of joined examples, as recurrent layers do.

    transformers restricts attention to a part by ``position_ids``, if there is no attention mask;
    flash attention does so for one row alone. A part's logits must be nearer to its logits alone
    than to a continued text's. Raises OptionError: they are not.
    """
    training, first, second = model.training, torch.arange(3, 8), torch.arange(9, 2, -1)
    both, apart = torch.cat([first, second]), [torch.arange(5), torch.arange(7)]

    def logits(ids: Tensor, positions: Tensor | None = None) -> Tensor:
        rows = (min(batch_size, 2), len(ids))
        given = {"input_ids": ids, **({} if positions is None else {"position_ids": positions})}
        expanded = {name: value.expand(rows).to(model.device) for name, value in given.items()}
        output = model(**expanded, use_cache=False)
        return output.logits[0, -len(second) :].float()  # type: ignore[no-any-return]

    with torch.no_grad():
        model.eval()
        alone, continued = logits(second), logits(both)
        joined = logits(both, torch.cat(apart))
        model.train(training)
    if not float((joined - alone).norm()) < 0.2 * float((continued - alone).norm()):
        raise OptionError(
            f"packing: expected a model whose attention keeps joined examples apart, and "
            f"{type(model).__name__} mixes them with batch_size {batch_size}; leave --packing out"
        )
