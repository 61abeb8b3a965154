"""Packed checkpoints: opening, checking and loading what ``modulora quantize`` wrote, and what other tools wrote.

:func:`open_checkpoint` reads config.json and the files' headers, and gives tensors one at a time;
:func:`load_model` gives the transformers model, with packed weights and no dense one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modulora_core.checkpoints.foreign import ForeignModel, ForeignStore, open_foreign
from modulora_core.checkpoints.mapped_blocks import keep_one_block
from modulora_core.checkpoints.mapped_files import MappedFiles
from modulora_core.checkpoints.record import QUANT_METHOD, PackedSite, QuantizationRecord
from modulora_core.devices import pick_device
from modulora_core.errors import CheckpointError, ModelError, OptionError
from modulora_core.models.config import no_config, unread_method
from modulora_core.models.conversion import build_skeleton
from modulora_core.models.formats import recognise
from modulora_core.models.locate import fetch_weights, locate
from modulora_core.models.quiet import quiet
from modulora_core.models.safetensors_store import SafetensorsStore
from modulora_core.models.tokenizer_files import copy_files
from modulora_core.spec import PackedWeight, Quantizer, TensorLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOAD_DTYPES = ("auto", "float32", "bfloat16", "float16")


class PackedCheckpoint:
    """A folder of packed weights, known from config.json and headers. Make one with :func:`open_checkpoint`.

    Args:
        foreign: what :func:`~modulora_core.checkpoints.foreign.open_foreign` gave, if the folder isn't of ours.

    Attributes:
        folder: where it is on this machine.
        format: ``"modulora"``, or the name of the foreign format.
        config: its config.json; of a foreign folder, what config.json would be if it were ours.
        record: its ``quantization_config``.
        parameters: every stored parameter → its :class:`PackedSite` if it is packed, else its layout.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        name: str,
        foreign: ForeignModel | None = None,
    ) -> None:
        self.folder = folder
        self.name = name
        self.config = dict(config)
        self.record = QuantizationRecord.from_json(config["quantization_config"])
        self.foreign = foreign
        self.format = QUANT_METHOD if foreign is None else str(self.record.source["format"])
        self._store: SafetensorsStore | ForeignStore = (
            SafetensorsStore(folder) if foreign is None else foreign.store
        )
        self._quantizers: dict[int, Quantizer] = {}
        packed = self._check_packed()
        dense = {name: TensorLayout(str(t.dtype).removeprefix("torch."), t.shape)
                 for name, t in self._store.tensors.items() if name not in packed}  # fmt: skip
        self.parameters: dict[str, PackedSite | TensorLayout] = {
            **dense,
            **dict(self.record.items()),
        }

    def _check_packed(self) -> set[str]:
        """Names of all packed tensors. Raises CheckpointError where a file differs from what config.json says."""
        names: set[str] = set()
        for parameter, site in self.record.items():
            for name, expected in site.tensors(parameter):
                stored = self._store.tensors.get(name)
                if stored is None:
                    raise CheckpointError(f"{self.folder}: {name}: config.json names it, the files don't have it; "
                                          "download or quantize the model again")  # fmt: skip
                found = TensorLayout(str(stored.dtype).removeprefix("torch."), stored.shape)
                if found != expected:
                    raise CheckpointError(f"{self.folder / stored.file}: {name}: config.json says {expected.dtype} {list(expected.shape)}, "
                                          f"the file has {found.dtype} {list(found.shape)}")  # fmt: skip
                names.add(name)
        return names

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, packed or not."""
        return sum(t.nbytes for t in self._store.tensors.values())

    def quantizer(self, site: PackedSite) -> Quantizer:
        """The quantizer that can read ``site``. Raises PluginError with what to install, CheckpointError for another packed format."""
        if site.recipe not in self._quantizers:
            self._quantizers[site.recipe] = self.record.recipes[site.recipe].create()
        self._quantizers[site.recipe].check_format(site.layout)
        return self._quantizers[site.recipe]

    def tensor(self, name: str) -> Tensor:
        """A stored tensor: a parameter that isn't packed, or one tensor of one that is."""
        return self._store.read(name)

    def tensors(self) -> dict[str, Tensor]:
        """All stored tensors, in memory."""
        return {name: self._store.read(name) for name in self._store.tensors}

    def mapped(self) -> MappedFiles:
        """All stored tensors, on their files. Raises OptionError: another tool's, whose tensors must be converted."""
        if isinstance(self._store, ForeignStore):
            raise OptionError(f"mapped: expected a checkpoint of modulora's own format, got {self.format} in {self.folder}; write it as "
                              f"one with `modulora convert {self.name} OUT --to {QUANT_METHOD}`, or leave mapped out")  # fmt: skip
        return MappedFiles(self._store, self.folder)

    def packed(self, parameter: str) -> Iterator[PackedWeight]:
        """The packed matrices of a parameter: one, or one for each expert."""
        site = self.record.sites[self.record.weights[parameter]]
        for prefix in site.prefixes(parameter):
            yield site.layout.fill(
                {name: self._store.read(f"{prefix}.{name}") for name in site.layout.tensors}
            )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.folder}: its tokenizer can't be loaded ({str(error).splitlines()[0]}); "
                             "copy the tokenizer's files of the model that it was made from there") from None  # fmt: skip

    def copy_tokenizer(self, out: Path) -> list[str]:
        """Copy tokenizer, chat template and generation config."""
        return copy_files(self.folder, out)

    def write_dense_config(self, out: Path, dtype: str) -> None:
        """config.json of the dense model."""
        config = {
            key: value
            for key, value in self.config.items()
            if key not in ("quantization_config", "torch_dtype")
        }
        (out / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")


def is_packed(folder: Path) -> bool:
    """Whether :func:`open_checkpoint` opens a folder: one of ours, or of a format that a plugin reads."""
    config = read_config(folder)
    return _is_ours(config) or recognise(folder, config) is not None


def _is_ours(config: Mapping[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == QUANT_METHOD


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; empty when there is none. Raises CheckpointError when it isn't JSON."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected a JSON object: {error}; download or quantize the model again"
        ) from None


def open_checkpoint(model: str | Path, *, revision: str | None = None) -> PackedCheckpoint:
    """Open a folder, or a Hub repository, that ``modulora quantize`` wrote, or another tool in a format that an installed
    plugin reads. Reads headers, no weights.

    Raises:
        ModelError: nothing is there, or it isn't a packed checkpoint; says what to do.
        CheckpointError: it is one, and a file is missing, truncated, or differs from config.json.
    """
    location = locate(str(model), revision)
    config = {} if location.gguf is not None else read_config(location.folder)
    known = (
        None
        if location.gguf is not None or _is_ours(config)
        else recognise(location.folder, config)
    )
    if known is not None:
        location = fetch_weights(location)
        foreign = open_foreign(location, known)
        return PackedCheckpoint(location.folder, foreign.config(), location.name, foreign)
    other = config.get("quantization_config")
    if not _is_ours(config) and isinstance(other, Mapping):
        raise ModelError(unread_method(str(model), other.get("quant_method", "an unnamed method")))
    if location.gguf is None and not (location.folder / "config.json").is_file():
        raise ModelError(no_config(location.folder))
    if not _is_ours(config):
        raise ModelError(
            f"model {model}: it isn't quantized by modulora; quantize it first: modulora quantize {model} OUT -q NAME"
        )
    return PackedCheckpoint(fetch_weights(location).folder, config, location.name)


def check_mapped(checkpoint: PackedCheckpoint, device: str) -> None:
    """Refuse what :func:`load_model` couldn't map.

    Raises:
        OptionError: the model isn't for a CPU, or isn't in our format.
    """
    if torch.device(device).type != "cpu":
        raise OptionError(
            f"mapped: expected the device cpu, got {device}, to which weights are copied; leave mapped out"
        )
    checkpoint.mapped()


def load_model(
    model: str | Path | PackedCheckpoint,
    *,
    dtype: str = "auto",
    device: str | None = None,
    mapped: bool = False,
) -> PreTrainedModel:
    """Load a packed checkpoint as a transformers model, in evaluation mode.

    On a CPU the packed weights of our own format stay in their files, mapped into memory, and so does what else is stored in ``dtype``:
    the files must stay as they are while the model lives.

    Args:
        model: a folder, a Hub id, or an opened checkpoint.
        dtype: of everything that isn't packed, and so of the activations. ``"auto"`` is float32 on a CPU and
            bfloat16 elsewhere. Packed tensors keep their own.
        device: see :func:`modulora_core.devices.pick_device`.
        mapped: have the packed weights of one decoder block in memory at a time (:mod:`modulora_core.checkpoints.mapped_blocks`). On a CPU only.

    Raises:
        OptionError: ``mapped`` on another device, or of another tool's format.
        PluginError: the plugin that packed it isn't installed, or can't be used.
        ModelError, CheckpointError: as :func:`open_checkpoint`; also when files and model don't fit together.
    """
    from modulora_core.checkpoints import hf_quantizer as integration

    device = str(pick_device(device))
    checkpoint = model if isinstance(model, PackedCheckpoint) else open_checkpoint(model)
    for site in checkpoint.record.sites:
        checkpoint.quantizer(site)  # a missing plugin is told before any work
    if mapped:
        check_mapped(checkpoint, device)
    stays = torch.device(device).type == "cpu" and checkpoint.foreign is None
    files = checkpoint.mapped() if stays else None
    integration.register()
    with quiet():
        loaded, info = _from_pretrained(
            checkpoint, files, dtype=load_dtype(dtype, device), device_map={"": device}, output_loading_info=True,
            trust_remote_code=False,
        )  # fmt: skip
    _check_loaded(checkpoint, info)
    if files is not None:
        if mapped:
            keep_one_block(loaded, files)
        _hand_back_cast(checkpoint, files, load_dtype(dtype, device))
    loaded.eval()
    return loaded


def _from_pretrained(
    checkpoint: PackedCheckpoint, files: MappedFiles | None, **options: Any
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if checkpoint.foreign is not None:
        source = checkpoint.foreign.source
        config, skeleton, tensors = (
            copy.deepcopy(source.config),
            source.skeleton(),
            checkpoint.tensors(),
        )
    elif files is not None:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        skeleton, tensors = build_skeleton(config, options["dtype"]), files.views()
    else:
        return AutoModelForCausalLM.from_pretrained(checkpoint.folder, **options)  # type: ignore[no-any-return]
    config.quantization_config = checkpoint.record.to_json()
    model, info = type(skeleton).from_pretrained(None, config=config, state_dict=tensors, **options)
    model.name_or_path = model.config.name_or_path = str(checkpoint.folder)
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model, info


def _hand_back_cast(checkpoint: PackedCheckpoint, files: MappedFiles, dtype: torch.dtype) -> None:
    """Drop the pages of what isn't packed and is stored in another dtype: the model has a copy in its own."""
    wanted = str(dtype).removeprefix("torch.")
    cast = [
        name
        for name, kept in checkpoint.parameters.items()
        if isinstance(kept, TensorLayout) and kept.dtype != wanted
    ]
    for pages in files.ranges(cast):
        pages.drop()


def load_dtype(dtype: str, device: str) -> torch.dtype:
    """What ``"auto"`` means on ``device``; else the dtype of that name. Raises OptionError for another name."""
    if dtype not in LOAD_DTYPES:
        raise OptionError(f"dtype: expected one of {', '.join(LOAD_DTYPES)}, got {dtype!r}")
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return getattr(torch, dtype)  # type: ignore[no-any-return]


def _check_loaded(checkpoint: PackedCheckpoint, info: Mapping[str, Any]) -> None:
    """Transformers fills what is missing with noise and goes on: refuse it here."""
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(name) for name in info[what])
        if names:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointError(f"{checkpoint.folder}: {len(names)} {what.replace('_', ' ')} ({some}); the files and config.json "
                                  "don't belong together: download or quantize the model again")  # fmt: skip
