"""Read a quantized model in one file, a GGUF file, under the names of a checkpoint of ours.

The core finds the rows of each parameter; a plugin's
:class:`~modulora_core.models.formats.FormatReader` says which types it reads. Blocks stay packed.
Rows of several types, such as gates and ups of experts, are joined
(:mod:`modulora_core.checkpoints.joined_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modulora_core.checkpoints.foreign import ForeignModel, ForeignStore, Placed, record_of
from modulora_core.checkpoints.joined_rows import join
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.ends import find_table
from modulora_core.models.formats import recognise_file
from modulora_core.models.gguf_places import places, store_of
from modulora_core.models.locate import Location
from modulora_core.models.quiet import quiet
from modulora_core.models.sites import LinearSite, find_sites
from modulora_core.models.source import ModelSource, open_model
from modulora_core.spec import TensorLayout


def open_file(location: Location) -> ForeignModel | None:
    """Open a file of packed weights; None if it has none, or no installed plugin reads it.

    Only the header is read.

    Raises:
        ModelError: transformers can't use the model.
        CheckpointError: the file is truncated or damaged, or its tensors don't fit its config.
        PluginError: the plugin can't be used.
    """
    known = recognise_file(location.gguf)
    if known is None:
        return None
    source = open_model(location.model)
    with quiet():
        source.validate()
        found: dict[str, tuple[LinearSite, list[str]]] = {}
        kinds, layouts = dict[str, str](), dict[str, TensorLayout]()
        for site in _sites(source):
            rows = _rows_of(source, site)
            kinds |= {one.name: one.kind for one in rows}
            layouts |= {one.name: one.layout for one in rows}
            layouts |= {one.scale: _SCALE for one in rows if one.is_scaled}
            if rows:
                found[site.name] = site, [one.name for one in rows]
        weights = known.reader().weights({"types": kinds}, layouts, _unread)
        placed: Placed = {}
        for parameter, (site, names) in found.items():
            parts = [weights[name] for name in names if name in weights]
            if len(parts) == len(names):
                placed[parameter] = site, (join(parts) if len(parts) > 1 else parts[0],)
        record = record_of(source, placed, known.spec.name) if placed else None
    if record is None:
        return None
    return ForeignModel(source, record, _BlockStore(source, source.store, record, placed))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of each matrix of a parameter that tensors of one type have.

    Attributes:
        tensors: their names in the file; kind: their type; row_bytes: the size of each row.
        order: for each matrix its rows, counted through all the tensors: ``[matrices, rows]``.
        is_scaled: each matrix has a factor, which a plugin reads as ``NAME.scale``.
    """

    tensors: tuple[str, ...]
    kind: str
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
    def layout(self) -> TensorLayout:
        """The layout of the blocks of one matrix."""
        return TensorLayout("uint8", (self.order.shape[1], self.row_bytes))

    def of(self, matrix: int, blocks: list[Tensor]) -> Tensor:
        """The blocks of a matrix, out of all the tensors' ``[rows, row bytes]``.

        Neighbours stay a view of one tensor, which is mapped from the file.
        """
        rows = self.order[matrix]
        first = int(rows[0])
        if len(blocks) == 1 and torch.equal(rows, torch.arange(first, first + len(rows))):
            return blocks[0][first : first + len(rows)]
        made, start = torch.empty(self.layout.shape, dtype=torch.uint8), 0
        for tensor in blocks:
            mine = (rows >= start) & (rows < start + len(tensor))
            made[mine] = tensor[rows[mine] - start]
            start += len(tensor)
        return made


def _sites(source: ModelSource) -> list[LinearSite]:
    """The weights that blocks might hold: linear layers, the head, and the input embedding."""
    skeleton = source.skeleton()
    table = find_table(skeleton, source.parameters)
    linears = find_sites(skeleton, include=["*"]).linears
    return [*linears, *([] if table is None else [table])]


def _rows_of(source: ModelSource, site: LinearSite) -> list[_Rows]:
    """The rows of a parameter by their types; none if it is floats, or not made of whole rows."""
    try:
        found = places(source, site.name)
    except (ModelError, ValueError, RuntimeError, IndexError):  # of numpy or torch: no rows move
        return []
    tensors = {place.name: store_of(source).in_file(place.name) for place in found}
    kinds = {tensor.kind for tensor in tensors.values() if not tensor.is_float}
    fits = all(
        (place.shape[-1], place.transposed, place.shift) == (site.in_features, site.transposed, 0)
        for place in found
    )
    if not kinds or not fits:
        return []
    is_one = len({(tensor.kind, tensor.scale) for tensor in tensors.values()}) == 1
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
        row_bytes = one.nbytes * one.shape[-1] // one.numel
        names = tuple(place.name for place in group)
        scaled = one.scale is not None
        made[first] = _Rows(names, one.kind, row_bytes, order.view(-1, count), scaled)
    return [made[first] for first in sorted(made)]


_SCALE = TensorLayout("float32", (1,))


def _unread(name: str) -> Tensor:
    raise CheckpointError(f"{name}: expected a reader that needs no values, got one that reads it")


class _BlockStore(ForeignStore):
    """The tensors of the file: packed weights as blocks, and dense tensors converted."""

    _parameter = ""
    _rows: Mapping[str, tuple[_Rows, list[Tensor]]] = {}

    def file_of(self, parameter: str) -> str:
        del parameter
        return str(self._source.location.gguf)

    def reader(self, parameter: str, index: int) -> Callable[[str], Tensor]:
        if self._parameter != parameter:  # pages of rows that were copied are given back
            store, site = store_of(self._source), self._placed[parameter][0]
            self._parameter = parameter
            self._rows = {
                rows.name: (rows, [store.in_file(name).blocks() for name in rows.tensors])
                for rows in _rows_of(self._source, site)
            }

        def read(name: str) -> Tensor:
            if name in self._rows:
                rows, blocks = self._rows[name]
                return rows.of(index, blocks)
            scale = store_of(self._source).in_file(name.removesuffix(".scale")).scale
            assert scale is not None
            return scale.read(as_stored=False).flatten()[index : index + 1]

        return read
