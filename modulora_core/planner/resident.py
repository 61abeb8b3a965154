"""What of a model's weights is in memory.

On a CPU a tensor whose stored dtype is the one that is wanted stays in its file, and a page counts once it was touched: every
page of a weight that is multiplied by, and of an embedding those of the tokens that occurred. A model that is ``mapped`` gives a
block's packed weights back when it leaves the block (:mod:`modulora_core.checkpoints.mapped_blocks`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor, nn

from modulora_core.planner.request import PlanRequest
from modulora_core.planner.subject import Subject

PIECE = 2 * 2**20
"""Bytes of a file that one touch brings into a process's memory at most: what the kernel's cache holds in one piece. Measured with
Linux 6.18 and ext4; older kernels map 64 KiB around a touch."""


def loaded(subject: Subject, request: PlanRequest, tokens: int | None) -> Mapping[str, int]:
    """Bytes of packed and dense weights that are in memory, by item.

    Args:
        subject: the model.
        request: its dtype, its device, and whether it is mapped.
        tokens: looked up in the embedding so far; None for all that there are.
    """
    found = Counter(_packed_items(subject, mapped=request.config.mapped))
    found.update(_dense(subject, request.dtype))
    if request.device == "cpu" and _stays_in_file(subject, request.dtype):
        table = _table(subject, request.dtype)
        found["embeddings_and_head"] -= table - _touched(table, tokens)
    return MappingProxyType(found)


def packed_in_memory(subject: Subject, *, mapped: bool) -> int:
    """Bytes of the packed weights that are in memory at a time."""
    return _packed_items(subject, mapped=mapped).total()


def _packed_items(subject: Subject, *, mapped: bool) -> Counter[str]:
    """Codes, and what is a number by itself: scales and vectors. Of a mapped model those outside of the blocks and the largest block's."""
    blocks: dict[str, Counter[str]] = {"": Counter()}
    for name, site in subject.record.items():
        block = subject.block_of(name) if mapped else ""
        for tensor in site.layout.tensors.values():
            item = "packed_scales" if "float" in tensor.dtype else "packed_codes"
            blocks.setdefault(block, Counter())[item] += tensor.nbytes * (site.experts or 1)
    outside = blocks.pop("")
    return outside + max(blocks.values(), key=Counter.total, default=Counter())


def _stays_in_file(subject: Subject, dtype: str) -> bool:
    return bool(getattr(torch, dtype) == _stored_dtype(subject))


def _stored_dtype(subject: Subject) -> torch.dtype:
    return subject.config.dtype or torch.float32


def _touched(table: int, rows: int | None) -> int:
    """Bytes of the pieces of a table that hold ``rows`` rows, drawn at random: each misses a piece with the same probability."""
    if rows is None or table == 0:
        return table
    share = min(1.0, PIECE / table)
    return round(table * (1 - (1 - share) ** rows))


@lru_cache(maxsize=8)
def _dense(subject: Subject, dtype: str) -> Mapping[str, int]:
    """Everything that isn't packed, in ``dtype``."""
    found = {"embeddings_and_head": 0, "norms_and_biases": 0}
    model = subject.skeleton(getattr(torch, dtype))
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for module, tensor in _parameters(model):
        is_end = id(module) in ends or isinstance(module, nn.Embedding)
        found["embeddings_and_head" if is_end else "norms_and_biases"] += (
            tensor.numel() * tensor.element_size()
        )
    return MappingProxyType(found)


@lru_cache(maxsize=8)
def _table(subject: Subject, dtype: str) -> int:
    """Bytes of the input embedding where it is dense and only looked up in; 0 where it is the head's too, which reads all of it."""
    model = subject.skeleton(getattr(torch, dtype))
    table = getattr(model.get_input_embeddings(), "weight", None)
    users = [
        module
        for module in model.modules()
        for tensor in module.parameters(recurse=False)
        if tensor is table
    ]
    if not isinstance(table, nn.Parameter) or len(users) > 1:
        return 0
    return table.numel() * table.element_size()


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Each parameter once, with the first module that has it."""
    seen: set[int] = set()
    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield module, tensor
