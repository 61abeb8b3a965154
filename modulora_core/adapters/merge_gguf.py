"""Write a model with its adapter as one GGUF file, which llama.cpp runs.

    W = diag(v) Ŵ diag(u) + s · B A      in fp32, rows ordered as in the file, quantized again

Metadata and tokenizer are copied from a GGUF file of the model: MODEL itself, the packaged file
that a folder was made from, or ``base``. Without one they are made from a folder, for some
architectures. If the file is MODEL, tensors that the adapter doesn't change keep their bytes. One
parameter is dense at a time, with and without the adapter.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from modulora_core.adapters.llama_cpp import base_file
from modulora_core.adapters.merge import adapter_deltas, delta_of, merged_parameter
from modulora_core.adapters.peft_format import AdapterDelta
from modulora_core.checkpoints.checkpoint import PackedCheckpoint, open_checkpoint
from modulora_core.checkpoints.outputs import SMALL_FILES, check_disk_space, new_file
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.checkpoints.record import PackedSite
from modulora_core.checkpoints.whole import check_whole, packed_skeleton
from modulora_core.errors import ModelError, WeightError, full_disk_named
from modulora_core.models.file_formats import FileFormat, create_file_format
from modulora_core.models.gguf_header import TensorInfo, read_header
from modulora_core.models.gguf_places import Place, places, store_of
from modulora_core.models.gguf_store import scale_of
from modulora_core.models.gguf_template import write_template
from modulora_core.models.gguf_writer import GGUFFileWriter, NewTensor
from modulora_core.models.locate import locate
from modulora_core.models.source import ModelSource, open_model
from modulora_core.progress import Progress, shows_progress
from modulora_core.spec import TensorLayout
from modulora_core.tiles import tile_bytes, tile_ranges

logger = logging.getLogger(__name__)

DEFAULT_TYPE = "Q8_0"
_TABLES = ("token_embd.weight", "output.weight")

KEPT = 0.5
"""An update of which less is left in the quantized weight counts as erased."""


@dataclass(frozen=True, slots=True)
class GGUFMergeResult:
    """The file that was written.

    Attributes:
        types: the number of tensors of each type; adapted: of parameters that the adapter changed.
        kept: the part of the update that quantizing leaves in each changed tensor, the projection
            ⟨Q(W + ΔW) - W, ΔW⟩ / ‖ΔW‖². 1 is all, 0 is nothing.
    """

    out: str
    base: str
    types: dict[str, int]
    bytes: int
    adapted: int
    seconds: float
    peak_memory_bytes: int
    kept: dict[str, float] = field(repr=False)

    @property
    def erased(self) -> list[str]:
        """The tensors that lost more than half of their update."""
        return [name for name, part in self.kept.items() if part < KEPT]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "erased": self.erased}


@shows_progress("merging", "tensors")
def merge_to_gguf(
    model: str,
    out: str | Path,
    *,
    adapter: str | None = None,
    type: str = DEFAULT_TYPE,
    base: str | None = None,
    progress: Progress | Literal[False] | None = None,
) -> GGUFMergeResult:
    """Write ``model``, with ``adapter`` merged in, as the GGUF file ``out``.

    Args:
        model: a GGUF file of packed weights, a packed folder or Hub id.
        out: a new file, ``*.gguf``.
        adapter: a LoRA adapter in PEFT's format, a folder or Hub id.
        type: llama.cpp's name of the type that changed matrices get, such as ``"Q8_0"``. Rows
            that the type can't hold get a near type.
        base: a GGUF file of the same model, for metadata, tokenizer and names. By default ``model``
            itself, the packaged file that the folder was made from, or else the folder's config
            and tokenizer.
        progress: called as ``progress("merging", done, total)`` after each tensor; by default a bar
            on a terminal, and False shows none.

    Raises:
        OptionError: no such type, or no installed plugin writes the file.
        OutputError: ``out`` exists, or isn't called ``*.gguf``.
        ModelError: the architecture or the tokenizer can't be written, or a parameter has no place.
        AdapterError: the adapter does not fit the model.
        RequestError: the model is not packed or cannot be read.
    """
    started, progress, out = time.perf_counter(), progress or None, Path(out)
    with PeakMemory("cpu") as peak, new_file(out, ".gguf") as path, TemporaryDirectory() as scratch:
        format_ = create_file_format(out.name)
        format_.type_of(type, 256)  # refuses an unknown type first
        checkpoint = open_checkpoint(model)
        check_whole(checkpoint)
        deltas = {} if adapter is None else adapter_deltas(checkpoint, adapter)
        like = _base_of(checkpoint, base, Path(scratch))
        source, header = open_model(str(like)), read_header(like)
        changes = _changes(checkpoint, source, deltas, like)
        tensors = [_planned(info, changes, format_, type) for info in header.tensors]
        factors = {scale_of(name) for name in changes}  # new values have none
        nbytes = sum(tensor.nbytes for tensor in tensors)
        check_disk_space(out, nbytes + SMALL_FILES)
        values = _Values(checkpoint, deltas, format_)
        with path.open("wb") as file:
            writer = GGUFFileWriter(file, like, header, tensors)
            for done, tensor in enumerate(tensors, 1):
                if tensor.name in changes:
                    writer.write(values.of(changes[tensor.name], tensor.kind))
                elif tensor.name in factors:
                    writer.write(torch.ones(tensor.shape, dtype=torch.float32).view(torch.uint8))
                else:
                    writer.write(store_of(source).in_file(tensor.name).blocks())
                if progress is not None:
                    progress("merging", done, len(tensors))
    types = Counter(tensor.kind for tensor in tensors)
    result = GGUFMergeResult(
        str(out), like.name, dict(types.most_common()), nbytes, len(deltas),
        time.perf_counter() - started, peak.nbytes, values.kept,
    )  # fmt: skip
    if result.erased:
        worst = min(values.kept, key=values.kept.__getitem__)
        logger.warning(
            "%s: type %s erases more than half of the update in %d of %d tensors, such as %s, "
            "where %.0f%% is left; choose a type of more bits",
            out, type, len(result.erased), len(values.kept), worst, 100 * values.kept[worst],
        )  # fmt: skip
    return result


@dataclass(frozen=True, slots=True)
class _Change:
    """A tensor of the file that is written anew: the parameter, and its place in that."""

    parameter: str
    place: Place
    is_matrix: bool


def _base_of(checkpoint: PackedCheckpoint, base: str | None, scratch: Path) -> Path:
    """The GGUF file to take metadata from; from a config it is made in ``scratch``.

    Raises:
        ModelError: ``base`` is no GGUF file, or none can be made.
    """
    if base is None and checkpoint.folder.suffix.lower() == ".gguf":
        return checkpoint.folder
    base = base or base_file(checkpoint, checkpoint.name)
    if base is None:
        made = scratch / f"{checkpoint.name}.gguf"
        config = packed_skeleton(checkpoint).config
        shapes = {name: _shape(stored) for name, stored in checkpoint.parameters.items()}
        with full_disk_named(scratch):
            write_template(made, config, checkpoint.tokenizer(), shapes)
        return made
    location = locate(base)
    if location.gguf is None:
        raise ModelError(f"base {base}: expected a GGUF file of the same model, got a folder")
    return location.folder / location.gguf


def _shape(stored: PackedSite | TensorLayout) -> tuple[int, ...]:
    return stored.parameter_shape if isinstance(stored, PackedSite) else stored.shape


def _changes(
    checkpoint: PackedCheckpoint,
    source: ModelSource,
    deltas: Mapping[str, AdapterDelta],
    like: Path,
) -> dict[str, _Change]:
    """The tensors to write: every parameter, or, in its own file, the adapted ones.

    Raises:
        ModelError: the file has other tensors, or its conversion can't be undone.
    """
    is_own = checkpoint.folder == like
    found: dict[str, _Change] = {}
    for name, stored in checkpoint.parameters.items():
        if is_own and not deltas.keys() & {name, name.removesuffix(".weight")}:
            continue
        packed = isinstance(stored, PackedSite)
        shape = _shape(stored)
        in_file = places(source, name)
        if math.prod(shape) != sum(math.prod(place.shape) for place in in_file):
            raise ModelError(
                f"{name}: expected a GGUF file of the same model, got {like.name}, where its shape "
                f"isn't {list(shape)}"
            )
        for place in in_file:
            found[place.name] = _Change(name, place, packed or place.name in _TABLES)
    return found


def _planned(
    info: TensorInfo, changes: Mapping[str, _Change], format_: FileFormat, kind: str
) -> NewTensor:
    """A tensor with its new type. Vectors, routers and convolutions are F32, as llama.cpp's."""
    change = changes.get(info.name)
    if change is None:
        return NewTensor(info.name, info.kind, info.shape)
    chosen = format_.type_of(kind, info.shape[-1]) if change.is_matrix else "F32"
    return NewTensor(info.name, chosen, info.shape)


class _Values:
    """Gives the new values of tensors. The tensors of one parameter come one after another."""

    def __init__(
        self, checkpoint: PackedCheckpoint, deltas: Mapping[str, AdapterDelta], format_: FileFormat
    ) -> None:
        self._checkpoint, self._deltas, self._format = checkpoint, deltas, format_
        self._last: tuple[str, bool, Tensor, Tensor | None] | None = None
        self.kept: dict[str, float] = {}

    def of(self, change: _Change, kind: str) -> Tensor:
        """The bytes of a tensor, in type ``kind``."""
        merged, before = self._rows(change)
        place = change.place
        wanted = place.take(merged)
        try:
            packed = self._format.pack(wanted.view(-1, place.shape[-1]), kind)
        except WeightError as error:
            raise WeightError(f"{place.name}: {error}") from None
        if before is not None:
            self.kept[place.name] = self._part_kept(wanted, before[place.rows], packed, kind)
        return packed

    def _rows(self, change: _Change) -> tuple[Tensor, Tensor | None]:
        """The parameter's rows, fp32, and the rows before the adapter if it changes them."""
        name, transposed = change.parameter, change.place.transposed
        if self._last is None or self._last[:2] != (name, transposed):
            self._last = None  # two parameters never exist together
            delta = delta_of(self._checkpoint, name, self._deltas)
            merged = merged_parameter(self._checkpoint, name, delta, torch.float32)
            before = None
            if delta is not None:
                before = merged_parameter(self._checkpoint, name, None, torch.float32)
            columns = change.place.shape[-1] if merged.dim() > 1 else 1
            rows = [
                None if one is None else (one.mT if transposed else one).reshape(-1, columns)
                for one in (merged, before)
            ]
            assert rows[0] is not None
            self._last = name, transposed, rows[0], rows[1]
        return self._last[2:]

    def _part_kept(self, wanted: Tensor, before: Tensor, packed: Tensor, kind: str) -> float:
        """⟨Q(W + ΔW) - W, ΔW⟩ / ‖ΔW‖², a few rows at a time."""
        kept = total = 0.0
        for start, stop in tile_ranges(len(wanted), 4 * wanted.shape[1], tile_bytes(wanted.device)):
            W, update = before[start:stop], wanted[start:stop] - before[start:stop]
            quantized = self._format.unpack(packed[start:stop], kind)
            kept += float(((quantized - W) * update).sum())
            total += float(update.square().sum())
        return kept / total if total > 0 else 1.0
