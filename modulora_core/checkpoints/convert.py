"""A packed checkpoint rewritten in another format: a foreign folder as one of ours, ours as a foreign one.

The packed weights keep their values: nothing is quantized again. One layer is in memory at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modulora_core.checkpoints.checkpoint import PackedCheckpoint, open_checkpoint
from modulora_core.checkpoints.outputs import (
    SMALL_FILES,
    check_disk_space,
    check_output,
    whole_or_nothing,
)
from modulora_core.checkpoints.record import QUANT_METHOD, PackedSite
from modulora_core.checkpoints.shards import MAX_SHARD_BYTES, ShardWriter, plan_shards
from modulora_core.devices.memory import PeakMemory
from modulora_core.errors import ModelError, OptionError, ShapeError
from modulora_core.models import formats
from modulora_core.models.formats import CheckpointFormat, StoredWeight
from modulora_core.models.progress import Progress
from modulora_core.spec import TensorLayout


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What was written.

    Attributes:
        format: that of ``out``; source_format: that of what was read.
        weights: how many logical weights are packed; bytes: of all tensors written.
    """

    out: str
    format: str
    source_format: str
    weights: int
    bytes: int
    seconds: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    source: str,
    out: str | Path,
    to: str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    revision: str | None = None,
    progress: Progress | None = None,
) -> ConvertResult:
    """Write the packed checkpoint ``source`` to the folder ``out`` in the format ``to``.

    Args:
        source: a folder of ours or of a format that an installed plugin reads, or a Hub id.
        out: a new or empty folder. It appears whole or not at all.
        to: ``"modulora"``, or the name of an installed format.

    Raises:
        OptionError: no such format, one that is only read, or ``source`` is of it already.
        ModelError, ShapeError: a weight that the format can't hold, by its name; or ``source`` isn't packed.
        RequestError: ``source`` can't be read, ``out`` holds something else or is too small. All before any work.
    """
    started = time.perf_counter()
    with PeakMemory("cpu") as peak:
        out = Path(out)
        check_output(out)
        written = None if to == QUANT_METHOD else formats.create_writer(to)
        checkpoint = open_checkpoint(source, revision=revision)
        if written is None and checkpoint.foreign is None:
            raise OptionError(f"--to {to}: {source} is in this format already; expected another, one of "
                              f"{', '.join(formats.specs()) or '(none is installed)'}")  # fmt: skip
        plan = dict(_plan(checkpoint, written))
        shards = plan_shards(
            {name: t for tensors in plan.values() for name, t in tensors.items()}, max_shard_bytes
        )
        nbytes = sum(shard.nbytes for shard in shards)
        check_disk_space(out, nbytes + SMALL_FILES)
        with whole_or_nothing(out) as folder:
            writer = ShardWriter(folder, shards)
            for done, name in enumerate(plan, 1):
                with torch.no_grad():
                    writer.write(name, _tensors(checkpoint, name, written))
                if progress is not None:
                    progress("converting", done, len(plan))
            writer.finish()
            _write_config(checkpoint, written, folder)
            checkpoint.copy_tokenizer(folder)
    weights = sum(site.weights for _, site in checkpoint.record.items())
    return ConvertResult(
        str(out), to, checkpoint.format, weights, nbytes, time.perf_counter() - started, peak.nbytes
    )


def _plan(
    checkpoint: PackedCheckpoint, written: CheckpointFormat | None
) -> Iterator[tuple[str, Mapping[str, TensorLayout]]]:
    """Each parameter with the tensors that it is stored as."""
    for name, stored in checkpoint.parameters.items():
        if not isinstance(stored, PackedSite):
            yield name, {name: stored}
        elif written is None:
            yield name, dict(stored.tensors(name))
        else:
            weight = _weight(checkpoint, name, stored, written)
            try:
                tensors = written.plan(weight)
            except ShapeError as error:
                raise ShapeError(f"{weight.module}: {error}") from None
            except ModelError as error:
                raise ModelError(f"{weight.module}: {error}") from None
            yield name, {f"{weight.module}.{part}": layout for part, layout in tensors.items()}


def _weight(
    checkpoint: PackedCheckpoint, name: str, site: PackedSite, written: CheckpointFormat
) -> StoredWeight:
    if site.kind == "embedding":
        raise ModelError(f"{name}: a packed input embedding; the format {written.spec.name} holds linear layers only, so this model can't "
                         "be written in it")  # fmt: skip
    if site.experts is not None or not name.endswith(".weight"):
        raise ModelError(f"{name}: a stack of {site.experts or 1} experts in one parameter; the format {written.spec.name} holds "
                         "linear layers only, so this model can't be written in it")  # fmt: skip

    def read(part: str) -> Tensor:
        return checkpoint.tensor(f"{name}.{part}")

    return StoredWeight(name.removesuffix(".weight"), checkpoint.quantizer(site), site.layout, read)


def _tensors(
    checkpoint: PackedCheckpoint, name: str, written: CheckpointFormat | None
) -> dict[str, Tensor]:
    stored = checkpoint.parameters[name]
    if not isinstance(stored, PackedSite):
        return {name: checkpoint.tensor(name)}
    if written is None:
        return {part: checkpoint.tensor(part) for part, _ in stored.tensors(name)}
    weight = _weight(checkpoint, name, stored, written)
    return {f"{weight.module}.{part}": tensor for part, tensor in written.tensors(weight).items()}


def _write_config(
    checkpoint: PackedCheckpoint, written: CheckpointFormat | None, folder: Path
) -> None:
    config = {**checkpoint.config, "quantization_config": checkpoint.record.to_json()}
    if written is not None:
        weights = [
            _weight(checkpoint, name, site, written) for name, site in checkpoint.record.items()
        ]
        kept = [name.removesuffix(".weight") for name, stored in checkpoint.parameters.items()
                if name.endswith(".weight") and isinstance(stored, TensorLayout) and len(stored.shape) == 2]  # fmt: skip
        config["quantization_config"] = written.config(weights, kept)
        for file in written.spec.config_files:
            (folder / file).write_text(json.dumps(config["quantization_config"], indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
