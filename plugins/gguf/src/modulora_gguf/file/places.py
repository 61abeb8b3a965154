"""Say where a GGUF file has the rows of a parameter.

The files have another order of some rows, such as Llama's q and k, and keep gates and ups of
experts apart. Row numbers, converted as transformers converts the file, tell the order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modulora_core.errors import ModelError
from modulora_core.models.weights import Weights
from modulora_gguf.file.store import GGUFStore


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of the file that has rows of a parameter; the values of a vector are rows too.

    Attributes:
        name, shape: of the tensor in the file.
        rows: for each row of the tensor its row in the parameter, int64 ``[rows]``. The rows of a
            stack of experts are counted through all its matrices.
        transposed: the parameter has the rows as columns.
        shift: the number that the conversion adds to each value, such as -1 for Gemma's norms.
    """

    name: str
    shape: tuple[int, ...]
    rows: Tensor
    transposed: bool = False
    shift: float = 0.0

    def take(self, rows: Tensor) -> Tensor:
        """The tensor's rows, of a parameter's ``[rows, columns]``."""
        return rows[self.rows] - self.shift


def store_of(source: Weights) -> GGUFStore:
    """The store of a model that is a GGUF file."""
    assert isinstance(source.store, GGUFStore)
    return source.store


def places(source: Weights, parameter: str) -> list[Place]:
    """The tensors of a GGUF file that become ``parameter``.

    Raises:
        ModelError: the file has no such parameter, or its conversion does more than move rows.
    """
    store = store_of(source)
    stored = source.stored_names(parameter) if parameter in source.parameters else []
    shapes = {n: store.in_file(n).shape for one in stored for n in store.names_in_file(one)}
    counts = {name: math.prod(shape[:-1] or shape) for name, shape in shapes.items()}
    firsts, total = dict[str, int](), 0
    for name, count in counts.items():
        firsts[name], total = total, total + count
    if not shapes:
        raise ModelError(f"{parameter}: {store.file.path.name} has no tensor of it")
    found = source.converted(parameter, lambda name: store.row_numbers(name, firsts))
    transposed = found.dim() > 1 and found.shape[-1] > 1
    found = found.flatten()
    shift = float(found.min()) if len(found) else 0.0
    numbers = (found - shift).to(torch.int64)
    in_memory = torch.full((total,), -1)  # for each row of the file its row in memory
    if len(numbers) == total and int(numbers.max()) < total:
        in_memory[numbers] = torch.arange(total)
    if bool((in_memory < 0).any()):
        raise ModelError(
            f"{parameter}: expected whole rows of {', '.join(shapes)} in "
            f"{store.file.path.name}, got values that transformers computes of them"
        )
    return [
        Place(name, shapes[name], in_memory[first : first + counts[name]], transposed, shift)
        for name, first in firsts.items()
    ]
