"""A packed checkpoint, opened: config, record and headers are read, tensors on request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from modulora_core.checkpoints.mapped import MappedFiles
from modulora_core.checkpoints.record import QUANT_METHOD, PackedSite, QuantizationRecord
from modulora_core.errors import CheckpointError
from modulora_core.hookspecs import QUANTIZATION_KEYS
from modulora_core.models import tokenizer
from modulora_core.models.config import transformers_config
from modulora_core.models.locate import Location
from modulora_core.models.safetensors_store import SafetensorsStore
from modulora_core.models.skeleton import build_skeleton
from modulora_core.models.store import StoredTensor, check_finite
from modulora_core.progress import quiet
from modulora_core.spec import PackedWeight, Quantizer, TensorLayout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class PackedStore(Protocol):
    """The tensors of a packed model, by the names that our format has."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor | TensorLayout]:
        """Every tensor, by its name."""

    def read(self, name: str) -> Tensor:
        """Read a tensor into new memory. Raises CheckpointError if it can't."""


class PackedCheckpoint:
    """A model of packed weights, known from headers.

    Attributes:
        path: its folder on this machine, or its file, of a model in one.
        name: its name without this machine's folders.
        base_name: the name by which an adapter remembers its base.
        parameters: every stored parameter → its :class:`PackedSite`, or its layout if it is dense.
    """

    def __init__(
        self,
        location: Location,
        config: Mapping[str, Any],
        record: QuantizationRecord,
        store: PackedStore,
    ) -> None:
        self.path = location.folder if location.file is None else location.file.path
        self.name, self.base_name = location.name, location.path
        self.config, self.record, self._store = dict(config), record, store
        self.format: str = QUANT_METHOD
        self._quantizers: dict[int, Quantizer] = {}
        self.parameters: dict[str, PackedSite | TensorLayout] = {
            name: TensorLayout.of(tensor) for name, tensor in store.tensors.items()
        }
        for parameter, site in self.record.items():
            for name, expected in site.tensors(parameter):
                found = self.parameters.pop(name, None)
                if found != expected:
                    raise CheckpointError(
                        f"{self.path}: {name}: expected {expected} by config.json, got "
                        f"{found or 'none'} in the files; download or quantize the model again"
                    )
        for name, expected in self.record.guard.items():
            found = self.parameters.pop(name, expected)
            if found != expected:
                raise CheckpointError(
                    f"{self.path}: {name}: expected it packed by config.json, got {found} in the "
                    "files; download or quantize the model again"
                )
        self.parameters |= dict(self.record.items())

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, packed or not."""
        return sum(tensor.nbytes for tensor in self._store.tensors.values())

    def quantizer(self, site: PackedSite) -> Quantizer:
        """The quantizer that reads ``site``. Raises PluginError, CheckpointError."""
        if site.recipe not in self._quantizers:
            self._quantizers[site.recipe] = self.record.recipes[site.recipe].create()
        self._quantizers[site.recipe].check_format(site.layout)
        return self._quantizers[site.recipe]

    def check_plugins(self) -> None:
        """Refuse weights that no installed plugin reads. Raises as :meth:`quantizer`."""
        for site in self.record.sites:
            self.quantizer(site)

    def tensor(self, name: str) -> Tensor:
        """Read a stored tensor: a dense parameter, or one tensor of a packed one.

        Raises CheckpointError: it has NaN or Inf.
        """
        return check_finite(self._store.read(name), name, self.path)

    def tensors(self) -> dict[str, Tensor]:
        """Read all stored tensors into memory."""
        return {name: self.tensor(name) for name in self._store.tensors}

    def map_files(self) -> MappedFiles | None:
        """Map all stored tensors from their files; None if reading converts them."""
        store = self._store
        return MappedFiles(store, self.path) if isinstance(store, SafetensorsStore) else None

    def packed(self, parameter: str) -> Iterator[PackedWeight]:
        """Read the packed matrices of a parameter: one, or one for each expert.

        Raises CheckpointError: a scale is NaN or infinite.
        """
        site = self.record.site(parameter)
        for prefix in site.prefixes(parameter):
            weight = site.layout.fill(
                {name: self.tensor(f"{prefix}.{name}") for name in site.layout.tensors}
            )
            self.quantizer(site).check_values(weight, f"{self.path}: {prefix}")
            yield weight

    def transformers_config(self) -> PretrainedConfig:
        """The config as transformers makes it, a new one. Raises ModelError if it can't."""
        return transformers_config(self.path)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load its tokenizer. Raises ModelError if there is none that transformers can read."""
        return tokenizer.load_tokenizer(str(self.path), self.path)

    def copy_tokenizer(self, out: Path) -> list[str]:
        """Copy tokenizer, chat template and generation config."""
        return tokenizer.copy_tokenizer(self.path, out)

    def write_dense_config(
        self, out: Path, dtype: str, task: PreTrainedModel | None = None
    ) -> None:
        """Write config.json of the dense model, or of ``task``, its class with a head of a task."""
        dropped = (*QUANTIZATION_KEYS, "torch_dtype")
        config = {key: value for key, value in self.config.items() if key not in dropped}
        if task is not None:
            labels = {key: getattr(task.config, key) for key in ("id2label", "label2id")}
            config |= {"architectures": [type(task).__name__], **labels}
        (out / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")

    @cached_property
    def outline(self) -> PreTrainedModel:
        """The model with packed weights on the meta device, built once. Do not change it.

        Raises ModelError, CheckpointError, PluginError.
        """
        from modulora_core.checkpoints.packed_modules import install  # slow to import

        with quiet():
            model = self._dense_outline()
        install(model, self.record)
        return model

    def _dense_outline(self) -> PreTrainedModel:
        return build_skeleton(self.transformers_config(), torch.float32)

    def check_whole(self) -> None:
        """Refuse what :func:`modulora_core.load_model` would refuse. Only headers are read.

        Raises CheckpointError, ModelError, PluginError.
        """
        model = self.outline
        wanted = {name: _kind(TensorLayout.of(t)) for name, t in model.state_dict().items()}
        stored = {name: _kind(layout) for name, layout in self._layouts()}
        tied = set(model.all_tied_weights_keys) - stored.keys()
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        for name in sorted(wanted.keys() | stored.keys()):
            unused = name not in wanted and any(re.search(pattern, name) for pattern in ignored)
            if name not in tied and not unused and wanted.get(name) != stored.get(name):
                raise CheckpointError(
                    f"{self.path}: {name}: expected {wanted.get(name, 'none')} by config.json, "
                    f"got {stored.get(name, 'none')} in the files, which don't belong together; "
                    "download or quantize the model again"
                )

    def _layouts(self) -> Iterator[tuple[str, TensorLayout]]:
        """The name and layout of each stored tensor."""
        for name, stored in self.parameters.items():
            if isinstance(stored, TensorLayout):
                yield name, stored
            else:
                yield from stored.tensors(name)


def _kind(layout: TensorLayout) -> str:
    """``"floats [out, in]"``: a model casts floats to its dtype, and would cast integers too."""
    kind = "floats" if getattr(torch, layout.dtype).is_floating_point else "integers"
    return f"{kind} {list(layout.shape)}"
