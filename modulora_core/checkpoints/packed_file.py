"""Read a quantized model in one file, a GGUF file, under the names of a checkpoint of ours.

The core finds the tensors and their places in the model; a plugin's
:class:`~modulora_core.models.formats.FormatReader` says which types it reads. Blocks stay packed.
transformers' own conversion orders their rows, since it moves rows of bytes as rows of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from modulora_core.checkpoints.foreign import ForeignModel, ForeignStore, Placed, record_of
from modulora_core.errors import CheckpointError
from modulora_core.models.ends import find_table
from modulora_core.models.formats import recognise_file
from modulora_core.models.gguf_store import GGUFStore
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
        found = {site.name: (site, kind) for site, kind in _packed_sites(source)}
        kinds = {name: kind for name, (_, kind) in found.items()}
        layouts = {name: _layout(source, site) for name, (site, _) in found.items()}
        weights = known.reader().weights({"types": kinds}, layouts, _unread)
        placed: Placed = {name: (found[name][0], (weight,)) for name, weight in weights.items()}
        record = record_of(source, placed, known.spec.name) if placed else None
    if record is None:
        return None
    return ForeignModel(source, record, _BlockStore(source, source.store, record, placed))


def _packed_sites(source: ModelSource) -> Iterator[tuple[LinearSite, str]]:
    """The weights that blocks can hold as they are, each with the type of its blocks."""
    skeleton = source.skeleton()
    table = find_table(skeleton, source.parameters)
    linears = find_sites(skeleton, include=["*"]).linears
    for site in linears if table is None else (*linears, table):
        names = source.stored_names(site.name) if site.name in source.parameters else []
        kinds = {_store(source).kind(name) for name in names}
        kind = kinds.pop() if len(kinds) == 1 else None
        if kind is not None and _keeps_rows(source, site):
            yield site, kind


def _keeps_rows(source: ModelSource, site: LinearSite) -> bool:
    """Whether the conversion only moves whole rows, so that it can move rows of bytes."""
    try:
        outline = _matrices(source.converted(site.name, _store(source).outline), site)
    except (ValueError, RuntimeError, IndexError):  # of numpy or torch: it isn't rows that it moves
        return False
    return outline.dtype == torch.uint8 and list(outline.shape) == [
        site.experts or 1,
        site.out_features,
        1,
    ]


def _store(source: ModelSource) -> GGUFStore:
    assert isinstance(source.store, GGUFStore)
    return source.store


def _matrices(blocks: Tensor, site: LinearSite) -> Tensor:
    """Blocks as ``[experts or 1, out, row bytes]``."""
    stack = blocks[None] if site.experts is None else blocks
    return stack.transpose(1, 2) if site.transposed else stack


def _layout(source: ModelSource, site: LinearSite) -> TensorLayout:
    """The layout of the blocks of one matrix."""
    stored = [source.store.tensors[name] for name in source.stored_names(site.name)]
    nbytes, rows = sum(tensor.nbytes for tensor in stored), site.out_features * (site.experts or 1)
    return TensorLayout("uint8", (site.out_features, nbytes // max(1, rows)))


def _unread(name: str) -> Tensor:
    raise CheckpointError(f"{name}: expected a reader that needs no values, got one that reads it")


class _BlockStore(ForeignStore):
    """The tensors of the file: packed weights as blocks, and dense tensors converted."""

    _read: tuple[str, Tensor] | None = None

    def file_of(self, parameter: str) -> str:
        del parameter
        return str(self._source.location.gguf)

    def reader(self, parameter: str, index: int) -> Callable[[str], Tensor]:
        site, _ = self._placed[parameter]
        if self._read is None or self._read[0] != parameter:
            self._read = None  # two layers never exist together
            blocks = self._source.converted(parameter, _store(self._source).blocks)
            self._read = parameter, _matrices(blocks, site)
        blocks = self._read[1][index]
        return lambda _: blocks
