"""Find the rows of each parameter in a GGUF file, and take packed rows as they are.

The files have another order of some rows, such as Llama's q and k, and keep gates and ups of
experts apart. :func:`places` sends row numbers through transformers' conversion of the file, which
tells the order. :func:`packed_rows` moves blocks into it without a change. Rows of several types,
such as gates and ups of experts, are joined (:mod:`modulora_core.checkpoints.joined_rows`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from modulora_core.checkpoints.joined_rows import join
from modulora_core.errors import ModelError
from modulora_core.models.formats import ForeignWeight, PackedTensors, Read, read_finite
from modulora_core.models.sites import LinearSite
from modulora_core.models.weights import Weights
from modulora_core.spec import PackedWeight
from modulora_gguf import reference
from modulora_gguf.file.store import GGUFStore
from modulora_gguf.quantizer import GGUF, Options


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
    shapes = {n: store.in_file(n).info.shape for one in stored for n in store.names_in_file(one)}
    counts = {name: math.prod(shape[:-1] or shape) for name, shape in shapes.items()}
    firsts, total = dict[str, int](), 0
    for name, count in counts.items():
        firsts[name], total = total, total + count
    if not shapes:
        raise ModelError(f"{parameter}: {store.header.path.name} has no tensor of it")
    try:
        found = source.convert(parameter, lambda name: store.row_numbers(name, firsts))
    except (IndexError, ValueError, RuntimeError):
        # of numpy or torch: columns move, as in Qwen 3.5's linear attention; these rows have one
        found = torch.empty(0)
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
            f"{store.header.path.name}, got values that transformers computes of them"
        )
    return [
        Place(name, shapes[name], in_memory[first : first + counts[name]], transposed, shift)
        for name, first in firsts.items()
    ]


def packed_rows(source: Weights, sites: Iterable[LinearSite]) -> PackedTensors:
    """The weights whose rows are blocks of types that this package decodes."""
    quantizers = {
        type: GGUF(Options.model_validate({"type": type})) for type in reference.DEQUANTIZE
    }
    weights: dict[str, ForeignWeight] = {}
    found: list[_Rows] = []
    for site in sites:
        parts = _rows_of(source, site)
        if parts and all(
            part.type in quantizers and (part.type == reference.SCALED or not part.is_scaled)
            for part in parts
        ):
            made = [_weight(part, quantizers[part.type], site.experts) for part in parts]
            weights[site.name] = join(made) if len(made) > 1 else made[0]
            found += parts
    return PackedTensors(weights, _RowStore(store_of(source), found))


def _weight(rows: _Rows, quantizer: GGUF, experts: int | None) -> ForeignWeight:
    size, nbytes = reference.block_of(quantizer.options.type)
    _, count, row_bytes = rows.shape
    layout = quantizer.layout((count, row_bytes // nbytes * size))

    def unpack(read: Read) -> PackedWeight:
        tensors = {"blocks": read(rows.name).contiguous()}
        if rows.is_scaled:
            tensors["scale"] = read_finite(read, rows.scale)
        elif "scale" in layout.tensors:
            tensors["scale"] = torch.ones(1, dtype=torch.float32)
        return layout.fill(tensors)

    names = (rows.name, rows.scale) if rows.is_scaled else (rows.name,)
    return ForeignWeight(names, quantizer, layout, unpack, experts)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of each matrix of a parameter that tensors of one type have.

    Attributes:
        tensors: their names in the file; type: of them all; row_bytes: the size of each row.
        order: for each matrix its rows, counted through all the tensors: ``[matrices, rows]``.
        is_scaled: each matrix has a factor, ``NAME.scale``.
    """

    tensors: tuple[str, ...]
    type: str
    row_bytes: int
    order: Tensor
    is_scaled: bool = False

    @property
    def name(self) -> str:
        return self.tensors[0]

    @property
    def scale(self) -> str:
        return f"{self.name}.scale"

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of all blocks: ``[matrices, rows, row bytes]``."""
        matrices, rows = self.order.shape
        return matrices, rows, self.row_bytes

    def of(self, matrix: int, blocks: list[Tensor]) -> Tensor:
        """The blocks of a matrix, out of all the tensors' ``[rows, row bytes]``.

        Neighbours stay a view of one tensor, which is mapped from the file.
        """
        rows = self.order[matrix]
        first = int(rows[0])
        if len(blocks) == 1 and torch.equal(rows, torch.arange(first, first + len(rows))):
            return blocks[0][first : first + len(rows)]
        made, start = torch.empty(self.shape[1:], dtype=torch.uint8), 0
        for tensor in blocks:
            mine = (rows >= start) & (rows < start + len(tensor))
            made[mine] = tensor[rows[mine] - start]
            start += len(tensor)
        return made


def _rows_of(source: Weights, site: LinearSite) -> list[_Rows]:
    """The rows of a parameter by their types; none if it is floats, or not made of whole rows."""
    try:
        found = places(source, site.name)
    except ModelError:
        return []
    tensors = {place.name: store_of(source).in_file(place.name) for place in found}
    fits = all(
        (place.shape[-1], place.transposed, place.shift) == (site.in_features, site.transposed, 0)
        for place in found
    )
    if not fits or all(tensor.is_float for tensor in tensors.values()):
        return []
    is_one = len({(tensor.info.type, tensor.scale) for tensor in tensors.values()}) == 1
    made: dict[int, _Rows] = {}
    for group in [found] if is_one else [[place] for place in found]:
        rows = torch.cat([place.rows for place in group])
        matrices = site.experts or 1
        first, count = int(rows.min()), len(rows) // matrices
        starts = torch.arange(matrices)[:, None] * site.out_features
        in_order = (first + starts + torch.arange(count)).flatten()
        order = torch.arange(len(rows)) if torch.equal(rows, in_order) else rows.argsort()
        if not torch.equal(rows[order], in_order):
            return []  # other rows lie between them
        one = tensors[group[0].name]
        row_bytes = one.info.nbytes * one.info.shape[-1] // one.info.numel
        names = tuple(place.name for place in group)
        scaled = one.scale is not None
        made[first] = _Rows(names, one.info.type, row_bytes, order.view(-1, count), scaled)
    return [made[first] for first in sorted(made)]


class _RowStore:
    """The blocks and the factors of packed weights, as tensors of a store.

    The blocks of one parameter are mapped at a time; pages of rows that were copied are given back.
    """

    def __init__(self, store: GGUFStore, found: Iterable[_Rows]) -> None:
        self._store, self._rows = store, {rows.name: rows for rows in found}
        self._mapped: tuple[str, list[Tensor]] = ("", [])

    def read(self, name: str) -> Tensor:
        return self.read_part(name, 0)

    def read_part(self, name: str, index: int) -> Tensor:
        rows = self._rows.get(name)
        if rows is None:
            scale = self._store.in_file(name.removesuffix(".scale")).scale
            assert scale is not None
            return scale.read(as_stored=False).flatten()[index : index + 1]
        if self._mapped[0] != name:
            self._mapped = name, [self._store.in_file(one).blocks() for one in rows.tensors]
        return rows.of(index, self._mapped[1])
