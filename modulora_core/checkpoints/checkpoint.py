"""Open, check and load packed checkpoints, written by ``modulora quantize`` or by other tools.

:func:`open_checkpoint` reads config.json and the files' headers; a checkpoint then gives tensors
one at a time. :func:`load_model` makes the transformers model; its weights stay packed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modulora_core.arguments import checked
from modulora_core.checkpoints.foreign import (
    ForeignModel,
    ForeignStore,
    layout_of,
    open_foreign,
    open_packed_file,
)
from modulora_core.checkpoints.mapped import MappedFiles, keep_one_block
from modulora_core.checkpoints.record import QUANT_METHOD, PackedSite, QuantizationRecord
from modulora_core.distributed import pick_device
from modulora_core.errors import CheckpointError, ModelError, OptionError
from modulora_core.models import tokenizer
from modulora_core.models.config import config_values, transformers_config
from modulora_core.models.conversion import build_skeleton
from modulora_core.models.folders import no_config
from modulora_core.models.formats import (
    method_of,
    recognise,
    unread_method,
)
from modulora_core.models.locate import Location, fetch_weights, locate
from modulora_core.models.quiet import quiet
from modulora_core.models.safetensors_store import SafetensorsStore
from modulora_core.models.store import check_finite
from modulora_core.spec import PackedWeight, Quantizer, TensorLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOAD_DTYPES = ("auto", "float32", "bfloat16", "float16")


class PackedCheckpoint:
    """A folder of packed weights, known from headers; :func:`open_checkpoint` makes one.

    Attributes:
        folder: its path on this machine.
        name: its name without this machine's folders.
        foreign: the opened folder of another tool, else None.
        format: ``"modulora"``, or the name of the foreign format.
        config: its config.json; of a foreign folder, config.json as ours would be.
        record: its ``quantization_config``.
        parameters: every stored parameter → its :class:`PackedSite`, or its layout if it is dense.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        name: str,
        foreign: ForeignModel | None = None,
    ) -> None:
        self.folder, self.name, self.foreign = folder, name, foreign
        self.config = dict(config)
        self.record = QuantizationRecord.from_json(
            config["quantization_config"], folder / "config.json"
        )
        self.format = QUANT_METHOD if foreign is None else str(self.record.source["format"])
        self._store: SafetensorsStore | ForeignStore = (
            SafetensorsStore(folder) if foreign is None else foreign.store
        )
        self._quantizers: dict[int, Quantizer] = {}
        self.parameters: dict[str, PackedSite | TensorLayout] = {
            name: layout_of(tensor) for name, tensor in self._store.tensors.items()
        }
        for parameter, site in self.record.items():
            for name, expected in site.tensors(parameter):
                found = self.parameters.pop(name, None)
                if found != expected:
                    raise CheckpointError(
                        f"{folder}: {name}: expected {expected} by config.json, got "
                        f"{found or 'none'} in the files; download or quantize the model again"
                    )
        for name, expected in self.record.guard.items():
            found = self.parameters.pop(name, expected)
            if found != expected:
                raise CheckpointError(
                    f"{folder}: {name}: expected it packed by config.json, got {found} in the "
                    "files; download or quantize the model again"
                )
        self.parameters |= dict(self.record.items())

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, packed or not."""
        return sum(tensor.nbytes for tensor in self._store.tensors.values())

    def quantizer(self, site: PackedSite) -> Quantizer:
        """The quantizer that reads ``site``.

        Raises:
            PluginError: it isn't installed; says what to install.
            CheckpointError: it doesn't read this packed format.
        """
        if site.recipe not in self._quantizers:
            self._quantizers[site.recipe] = self.record.recipes[site.recipe].create()
        self._quantizers[site.recipe].check_format(site.layout)
        return self._quantizers[site.recipe]

    def tensor(self, name: str) -> Tensor:
        """Read a stored tensor: a dense parameter, or one tensor of a packed one.

        Raises:
            CheckpointError: it has NaN or Inf.
        """
        return check_finite(self._store.read(name), name, self.folder)

    def tensors(self) -> dict[str, Tensor]:
        """Read all stored tensors into memory."""
        return {name: self.tensor(name) for name in self._store.tensors}

    def mapped(self) -> MappedFiles:
        """Map all stored tensors from their files.

        Raises:
            OptionError: it is another tool's, whose tensors must be converted.
        """
        if isinstance(self._store, ForeignStore):
            raise OptionError(
                f"mapped: expected a checkpoint of modulora's own format, got {self.format} in "
                f"{self.folder}; write it as one with `modulora convert {self.name} OUT --to "
                f"{QUANT_METHOD}`, or leave mapped out"
            )
        return MappedFiles(self._store, self.folder)

    def packed(self, parameter: str) -> Iterator[PackedWeight]:
        """Read the packed matrices of a parameter: one, or one for each expert."""
        site = self.record.sites[self.record.weights[parameter]]
        for prefix in site.prefixes(parameter):
            yield site.layout.fill(
                {name: self.tensor(f"{prefix}.{name}") for name in site.layout.tensors}
            )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load its tokenizer. Raises ModelError if there is none that transformers can read."""
        if self.foreign is not None:
            return self.foreign.source.tokenizer()
        return tokenizer.load_tokenizer(str(self.folder), self.folder)

    def copy_tokenizer(self, out: Path) -> list[str]:
        """Copy tokenizer, chat template and generation config."""
        if self.foreign is not None:
            return self.foreign.source.copy_tokenizer(out)
        return tokenizer.copy_tokenizer(self.folder, out)

    def write_dense_config(self, out: Path, dtype: str) -> None:
        """Write config.json of the dense model."""
        dropped = ("quantization_config", "torch_dtype")
        config = {key: value for key, value in self.config.items() if key not in dropped}
        (out / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")


def is_packed(folder: Path) -> bool:
    """Whether a folder is a packed checkpoint: ours, or of a format that a plugin reads."""
    config = config_values(folder)
    return is_ours(config) or recognise(folder, config) is not None


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that this package wrote the weights."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == QUANT_METHOD


def open_checkpoint(model: str | Path, *, revision: str | None = None) -> PackedCheckpoint:
    """Open a folder, file or Hub repository of packed weights: ours, or of a plugin's format.

    Only headers are read.

    Raises:
        ModelError: nothing is there, or it isn't a packed checkpoint; says what to do.
        CheckpointError: a file is missing, truncated, or differs from config.json.
    """
    location = locate(str(model), revision)
    config = {} if location.file is not None else config_values(location.folder)
    if is_ours(config):
        return PackedCheckpoint(fetch_weights(location).folder, config, location.name)
    if (file := _packed_file(location)) is not None:
        return file
    known = None if location.file is not None else recognise(location.folder, config)
    if known is None:
        raise ModelError(_not_packed(location, config))
    known.reader().check(known.config)
    location = fetch_weights(location)
    foreign = open_foreign(location, known)
    return PackedCheckpoint(location.folder, foreign.config(), location.name, foreign)


def open_if_packed(model: str, *, revision: str | None = None) -> PackedCheckpoint | None:
    """As :func:`open_checkpoint`; None for a model whose weights are floats."""
    location = locate(model, revision)
    if location.file is not None:
        return _packed_file(location)
    return open_checkpoint(model, revision=revision) if is_packed(location.folder) else None


def _packed_file(location: Location) -> PackedCheckpoint | None:
    file = None if location.file is None else open_packed_file(location)
    if file is None:
        return None
    path = location.folder / str(location.file)
    return PackedCheckpoint(path, file.config(), location.name, file)


def _not_packed(location: Location, config: Mapping[str, Any]) -> str:
    method = method_of(config)
    if method is not None:
        return unread_method(location.model, method)
    if location.file is None and not config:
        return no_config(location.folder)
    return (
        f"model {location.model}: it isn't quantized; quantize it first: "
        f"modulora quantize {location.model} OUT -q NAME (finetune -q NAME does both)"
    )


def check_mapped(checkpoint: PackedCheckpoint, device: str) -> None:
    """Refuse a checkpoint that :func:`load_model` can't map.

    Raises:
        OptionError: the model isn't for a CPU, or isn't in our format.
    """
    if torch.device(device).type != "cpu":
        raise OptionError(
            f"mapped: expected the device cpu, got {device}, to which weights are copied; "
            "leave mapped out"
        )
    checkpoint.mapped()


def load_dtype(dtype: str | torch.dtype, device: str) -> torch.dtype:
    """``dtype`` or the dtype of that name; ``"auto"`` depends on ``device``. Raises OptionError."""
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in LOAD_DTYPES:
        raise OptionError(f"dtype: expected one of {', '.join(LOAD_DTYPES)}, got {dtype!r}")
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return getattr(torch, dtype)  # type: ignore[no-any-return]


@checked
def load_model(
    model: str | Path | PackedCheckpoint,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    mapped: bool = False,
) -> PreTrainedModel:
    """Load a quantized model, with its weights packed, as a transformers model in evaluation mode.

    ::

        model = modulora_core.load_model("smollm2-packed")

    On a CPU the weights stay in their files, mapped into memory, if the folder is in our format and
    they need no cast. The files must not change while the model lives.

    Args:
        model: a folder, a Hub id, a file, or an opened checkpoint.
        dtype: the dtype of the activations and of all dense parameters, such as torch.bfloat16 or
            ``"bfloat16"``. ``"auto"`` is float32 on a CPU and bfloat16 elsewhere. Packed tensors
            keep their own.
        device: ``"cpu"``, ``"cuda"``, ...; None takes a GPU if there is one.
        mapped: hold the packed weights of one decoder block in memory at a time, on a CPU only.

    Raises:
        OptionError: no such dtype or device, or ``mapped`` on a GPU or for another tool's format.
        PluginError: the quantizer that packed it isn't installed, or can't be used.
        ModelError: nothing is there, or it isn't quantized.
        CheckpointError: a file is missing or damaged, or files and config.json don't fit together.
    """
    from modulora_core.checkpoints import hf_quantizer, whole

    device = str(pick_device(device))
    checkpoint = model if isinstance(model, PackedCheckpoint) else open_checkpoint(model)
    whole.check_whole(checkpoint)
    if mapped:
        check_mapped(checkpoint, device)
    files = None if checkpoint.foreign is not None else checkpoint.mapped()
    loaded_as = load_dtype(dtype, device)
    hf_quantizer.register()
    with quiet():
        loaded = _from_pretrained(checkpoint, files, device, loaded_as)
    if files is not None:
        if mapped:
            keep_one_block(loaded, files)
        _drop_cast(checkpoint, files, loaded_as)
    loaded.eval()
    return loaded


def _from_pretrained(
    checkpoint: PackedCheckpoint, files: MappedFiles | None, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    """Let transformers load our tensors, which are views of ``files`` or converted."""
    from transformers import GenerationConfig

    if files is not None:
        config, tensors = transformers_config(checkpoint.folder), files.views()
    else:
        assert checkpoint.foreign is not None
        config, tensors = copy.deepcopy(checkpoint.foreign.source.config), checkpoint.tensors()
    config.quantization_config = checkpoint.record.to_json()
    model: PreTrainedModel = type(build_skeleton(config, dtype)).from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, device_map={"": device},
        trust_remote_code=False,
    )  # fmt: skip
    model.name_or_path = model.config.name_or_path = str(checkpoint.folder)
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model


def _drop_cast(checkpoint: PackedCheckpoint, files: MappedFiles, dtype: torch.dtype) -> None:
    """Drop the pages of dense tensors in another dtype: the model has a copy in its own."""
    wanted = str(dtype).removeprefix("torch.")
    cast = [
        name
        for name, kept in checkpoint.parameters.items()
        if isinstance(kept, TensorLayout) and kept.dtype != wanted
    ]
    for pages in files.ranges(cast):
        pages.drop()
