"""Write a model with its adapter as one GGUF file, which llama.cpp runs.

    W = diag(v) Ŵ diag(u) + s · B A      in fp32, rows ordered as in the file, quantized again

Metadata and tokenizer are copied from a GGUF file of the model: MODEL itself, the packaged file
that a folder was made from, or ``base``. If the file is MODEL, tensors that the adapter doesn't
change keep their bytes. One parameter is dense at a time, with and without the adapter.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modulora_core.checkpoints.foreign.foreign_checkpoint import ForeignCheckpoint
from modulora_core.checkpoints.foreign.writers import AdapterFile, FileWriter, MergedFile, base_file
from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.outputs import SMALL_FILES, check_disk_space, new_file
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.checkpoints.record import PackedSite
from modulora_core.errors import ModelError, OptionError, WeightError
from modulora_core.hf.load_adapter import adapter_for
from modulora_core.hf.merge import delta_of, merged_parameter
from modulora_core.hf.peft_format import AdapterDelta
from modulora_core.models.locate import locate
from modulora_core.models.sites import find_sites
from modulora_core.models.source import ModelSource, open_dense
from modulora_core.progress import Display, shown
from modulora_core.spec import PackedWeight, TensorLayout
from modulora_core.tiles import tile_bytes, tile_ranges
from modulora_gguf.file.header import Header, TensorInfo
from modulora_gguf.file.lora_file import check_modelfile, write_lora_file
from modulora_gguf.file.rows import Place, places, store_of
from modulora_gguf.file.tensors import scale_of
from modulora_gguf.file.types import pack_rows, type_of, unpack_rows
from modulora_gguf.file.writer import NewTensor, TensorWriter

logger = logging.getLogger(__name__)

_TABLES = ("token_embd.weight", "output.weight")


class LlamaCppWriter(FileWriter):
    """Writes LoRA files and merged models for llama.cpp."""

    default_type = "Q8_0"

    def write_adapter(
        self, adapter: str, out: str | Path, *, model: str | None = None
    ) -> AdapterFile:
        return write_lora_file(adapter, out, model=model)

    def check_adapter_file(self, out: Path) -> None:
        super().check_adapter_file(out)
        check_modelfile(out)

    def merge(
        self,
        model: str,
        out: str | Path,
        *,
        adapter: str | None = None,
        type: str | None = None,
        base: str | None = None,
        progress: Display = True,
    ) -> MergedFile:
        """Write a merged file, as :meth:`FileWriter.merge` says.

        ``type`` is llama.cpp's name of a type; rows that it can't hold get a near type. ``base`` is
        by default ``model`` itself, or the packaged file that the folder was made from.
        """
        type = type or self.default_type
        started, out = time.perf_counter(), Path(out)
        with (
            PeakMemory("cpu") as peak,
            shown(progress, "merging", "tensors") as progress,
            new_file(out, ".gguf") as path,
        ):
            type_of(type, 256)  # refuses an unknown type first
            checkpoint = open_packed(model)
            checkpoint.check_whole()
            deltas = {} if adapter is None else adapter_for(checkpoint, adapter).deltas
            source = _base_of(checkpoint, base)
            header = store_of(source).header
            changes = _changes(checkpoint, source, deltas, header)
            tensors = [_planned(info, changes, type) for info in header.tensors]
            factors = {scale_of(name) for name in changes}  # new values have none
            nbytes = sum(tensor.nbytes for tensor in tensors)
            check_disk_space(out, nbytes + SMALL_FILES)
            values = _Values(checkpoint, deltas)
            with path.open("wb") as file:
                writer = TensorWriter(file, header, tensors)
                for done, tensor in enumerate(tensors, 1):
                    if tensor.name in changes:
                        writer.write(values.of(changes[tensor.name], tensor.type))
                    elif tensor.name in factors:
                        writer.write(
                            torch.ones(tensor.shape, dtype=torch.float32).view(torch.uint8)
                        )
                    else:
                        writer.write(store_of(source).in_file(tensor.name).blocks())
                    progress("merging", done, len(tensors))
        types = Counter(tensor.type for tensor in tensors)
        result = MergedFile(
            str(out), header.path.name, dict(types.most_common()), nbytes, len(deltas),
            time.perf_counter() - started, peak.nbytes, values.retained,
        )  # fmt: skip
        if result.erased:
            _warn_erased(result, type)
        return result

    def replace(
        self, model: PackedCheckpoint, path: Path, parameter: str, matrices: Sequence[PackedWeight]
    ) -> None:
        assert isinstance(model, ForeignCheckpoint)
        store = store_of(model.source)
        for place in places(model.source, parameter):
            info = store.in_file(place.name).info
            if info.path != store.header.path or any("blocks" not in m.tensors for m in matrices):
                raise ModelError(
                    f"{model.name}: expected a file that is not split, and {parameter} of one "
                    "type; write the file anew with `modulora merge`"
                )
            rows = torch.cat([matrix.tensors["blocks"] for matrix in matrices])
            with path.open("r+b") as file:
                file.seek(info.offset)
                file.write(rows[place.rows].contiguous().numpy().data)


def _warn_erased(result: MergedFile, type: str) -> None:
    retained = result.retained
    worst = min(retained, key=retained.__getitem__)
    logger.warning(
        "%s: type %s erases more than half of the update in %d of %d tensors, such as %s, "
        "where %.0f%% is left; choose a type of more bits",
        result.out, type, len(result.erased), len(retained), worst, 100 * retained[worst],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Change:
    """A tensor of the file that is written anew: the parameter, and its place in that."""

    parameter: str
    place: Place
    is_matrix: bool


def _base_of(checkpoint: PackedCheckpoint, base: str | None) -> ModelSource:
    """The GGUF file to take metadata from: MODEL as it was opened, or another one.

    Raises:
        OptionError: there is none.
        ModelError: ``base`` is no GGUF file.
    """
    if base is None and isinstance(checkpoint, ForeignCheckpoint) and checkpoint.path.is_file():
        return checkpoint.source
    base = base or base_file(checkpoint, checkpoint.name)
    if base is None:
        raise OptionError(
            f"{checkpoint.name}: expected a GGUF file of the same model for metadata and "
            "tokenizer, got none; name one with --base FILE, or merge to a folder and convert that "
            "with llama.cpp's convert_hf_to_gguf.py"
        )
    location = locate(base)
    if location.file is None:
        raise ModelError(f"base {base}: expected a GGUF file of the same model, got a folder")
    return open_dense(location)


def _shape(stored: PackedSite | TensorLayout) -> tuple[int, ...]:
    return stored.parameter_shape if isinstance(stored, PackedSite) else stored.shape


def _changes(
    checkpoint: PackedCheckpoint,
    source: ModelSource,
    deltas: Mapping[str, AdapterDelta],
    header: Header,
) -> dict[str, _Change]:
    """The tensors to write: every parameter, or, in its own file, the adapted ones.

    Raises:
        ModelError: the file has other tensors, or its conversion can't be undone.
    """
    is_own = checkpoint.path.samefile(header.path)
    linears = {linear.name for linear in find_sites(source.skeleton()).linears}
    found: dict[str, _Change] = {}
    for name, stored in checkpoint.parameters.items():
        if is_own and delta_of(checkpoint, name, deltas) is None:
            continue
        is_linear = isinstance(stored, PackedSite) or name in linears
        shape = _shape(stored)
        in_file = places(source, name)
        if math.prod(shape) != sum(math.prod(place.shape) for place in in_file):
            raise ModelError(
                f"{name}: expected a GGUF file of the same model, got {header.path.name}, where "
                f"its shape isn't {list(shape)}"
            )
        for place in in_file:
            found[place.name] = _Change(name, place, is_linear or place.name in _TABLES)
    return found


def _planned(info: TensorInfo, changes: Mapping[str, _Change], type: str) -> NewTensor:
    """A tensor with its new type. Vectors, routers and convolutions are F32, as llama.cpp's."""
    change = changes.get(info.name)
    if change is None:
        return NewTensor(info.name, info.type, info.shape)
    chosen = type_of(type, info.shape[-1]) if change.is_matrix else "F32"
    return NewTensor(info.name, chosen, info.shape)


class _Values:
    """Gives the new values of tensors. The tensors of one parameter come one after another."""

    def __init__(self, checkpoint: PackedCheckpoint, deltas: Mapping[str, AdapterDelta]) -> None:
        self._checkpoint, self._deltas = checkpoint, deltas
        self._last: tuple[str, bool, Tensor, Tensor | None] | None = None
        self.retained: dict[str, float] = {}

    def of(self, change: _Change, type: str) -> Tensor:
        """The bytes of a tensor, in llama.cpp's ``type``."""
        merged, before = self._rows(change)
        place = change.place
        wanted = place.take(merged)
        try:
            packed = pack_rows(wanted.view(-1, place.shape[-1]), type)
        except WeightError as error:
            raise WeightError(f"{place.name}: {error}") from None
        if before is not None:
            self.retained[place.name] = self._part_kept(wanted, before[place.rows], packed, type)
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

    def _part_kept(self, wanted: Tensor, before: Tensor, packed: Tensor, type: str) -> float:
        """⟨Q(W + ΔW) - W, ΔW⟩ / ‖ΔW‖², a few rows at a time."""
        kept = total = 0.0
        for start, stop in tile_ranges(len(wanted), 4 * wanted.shape[1], tile_bytes(wanted.device)):
            W, update = before[start:stop], wanted[start:stop] - before[start:stop]
            quantized = unpack_rows(packed[start:stop], type)
            kept += float(((quantized - W) * update).sum())
            total += float(update.square().sum())
        return kept / total if total > 0 else 1.0
