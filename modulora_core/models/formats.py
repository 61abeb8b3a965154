"""Checkpoint formats of other tools: what a plugin implements to read and write one, and how an installed one is found.

A quantizer's weights may be on the Hub in files of other tools. Its plugin names such a format in
``QuantizerSpec.formats`` and implements a :class:`CheckpointFormat`, or a :class:`FormatReader` where it doesn't write
any; the core finds the linear layers, streams a layer at a time and keeps config, tokenizer and dense tensors: so a
foreign folder is finetuned, evaluated and merged as it stands, and ``modulora convert`` rewrites it. Importing this module
does not import torch.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modulora_core import registry
from modulora_core.errors import DuplicatePluginError, ModelError, OptionError
from modulora_core.spec import FormatSpec, PackedLayout, PackedWeight, Quantizer, TensorLayout

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CheckpointFormat",
    "ForeignWeight",
    "FormatReader",
    "FormatSpec",
    "Recognised",
    "StoredWeight",
]

Read = Callable[[str], "Tensor"]
"""Gives a tensor by its name."""


@dataclass(frozen=True, slots=True)
class ForeignWeight:
    """One weight of a foreign folder, of which the large tensors haven't been read.

    Attributes:
        tensors: the names in the files of the tensors that it is made of.
        quantizer: what reads it, with the options that the folder tells.
        layout: what :attr:`unpack` gives.
        unpack: from a function that reads a tensor of the files to the packed weight. It raises CheckpointError when
            what is read makes no sense.
    """

    tensors: tuple[str, ...]
    quantizer: Quantizer
    layout: PackedLayout
    unpack: Callable[[Read], PackedWeight] = field(repr=False)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight of a checkpoint of ours that is to be written in a foreign format.

    Attributes:
        module: the dotted path of its layer: ``"model.layers.0.mlp.up_proj"``.
        quantizer: what packed it.
        layout: how.
        read: gives one of its packed tensors.
    """

    module: str
    quantizer: Quantizer
    layout: PackedLayout
    read: Read = field(repr=False)

    def packed(self) -> PackedWeight:
        """The whole of it."""
        return self.layout.fill({name: self.read(name) for name in self.layout.tensors})


class FormatReader(ABC):
    """A foreign format that is only read: subclass this in a plugin, and name it in the plugin's :class:`FormatSpec`.

    Args:
        spec: the format that is asked for, where the class implements several.
    """

    def __init__(self, spec: FormatSpec) -> None:
        self.spec = spec

    @abstractmethod
    def weights(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorLayout], read: Read
    ) -> Mapping[str, ForeignWeight]:
        """The quantized layers of a folder, by the dotted paths that its files use.

        Args:
            config: the quantization config that the folder was known by; all of config.json for a folder that was known
                by one of the spec's ``config_keys``.
            tensors: every tensor of the files, from their headers.
            read: gives one of them. Read only what is small, and needed for a layout or to refuse: this runs whenever
                the folder is opened.

        Raises:
            ModelError: the config asks for what isn't implemented; the message names it.
            CheckpointError: tensors that are missing, of other shapes, or damaged.
        """


class CheckpointFormat(FormatReader):
    """A foreign format that is read and written: subclass this in a plugin."""

    @abstractmethod
    def plan(self, weight: StoredWeight) -> dict[str, TensorLayout]:
        """The tensors that ``weight`` becomes, by their names in the files, before anything is written.

        Raises:
            ModelError, ShapeError: this format can't hold it; says why, and what to do.
        """

    @abstractmethod
    def tensors(self, weight: StoredWeight) -> dict[str, Tensor]:
        """The values of what :meth:`plan` announced."""

    @abstractmethod
    def config(self, weights: list[StoredWeight], kept: list[str]) -> dict[str, Any]:
        """The quantization config of a folder with these weights.

        Args:
            weights: all that are written in this format.
            kept: the dotted paths of the linear layers that stay dense.
        """


@dataclass(frozen=True, slots=True)
class Recognised:
    """How a folder was known to be of a foreign format."""

    spec: FormatSpec
    config: Mapping[str, Any]
    file: str

    def open(self) -> FormatReader:
        """Raises PluginError when the plugin's class can't be imported."""
        return create(self.spec.name)


def specs() -> dict[str, FormatSpec]:
    """Every installed format by its name, in the order of names."""
    return {spec.name: spec for _, spec in sorted(_installed(), key=lambda found: found[1].name)}


def create(name: str) -> FormatReader:
    """The format of that name.

    Raises:
        OptionError: no installed plugin brings it.
        PluginError: several do, or its class can't be used.
    """
    found = [(entry, spec) for entry, spec in _installed() if spec.name == name]
    if not found:
        raise OptionError(f"format {name!r}: expected one of {', '.join(['modulora', *specs()])}")
    if len(found) > 1:
        origins = " and ".join(entry.origin for entry, _ in found)
        raise DuplicatePluginError(f"format {name!r}: brought by {origins}; uninstall one")
    ((entry, spec),) = found
    # mypy's type[T] takes no abstract class, which import_class makes sure is not what comes back
    return registry.import_class(entry, spec.location, FormatReader)(spec)  # type: ignore[type-abstract]


def create_writer(name: str) -> CheckpointFormat:
    """As :func:`create`, for writing. Raises OptionError also for a format that is only read."""
    found = create(name)
    if not isinstance(found, CheckpointFormat):
        raise OptionError(f"format {name!r}: it is only read, not written; expected another one")
    return found


def config_files() -> list[str]:
    """Names of the files beside config.json that installed formats look into."""
    return sorted({file for _, spec in _installed() for file in spec.config_files})


def recognise(folder: Path, config: Mapping[str, Any]) -> Recognised | None:
    """The installed format that a folder is of, told from its config.json, else from a format's own config file.

    Raises:
        ModelError: that file isn't a JSON object.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            spec = _reader(found.get("quant_method")) if isinstance(found, Mapping) else None
            return None if spec is None else Recognised(spec, found, "config.json")
    for spec in specs().values():
        if any(config.get(key) for key in spec.config_keys):
            return Recognised(spec, config, "config.json")
        for file in spec.config_files:
            if spec.quant_methods and (folder / file).is_file():
                values = _read_json(folder / file)
                if values.get("quant_method", spec.quant_methods[0]) in spec.quant_methods:
                    return Recognised(spec, values, file)
    return None


def _installed() -> Iterator[tuple[registry.Entry, FormatSpec]]:
    for entry in registry.entries():
        if entry.status == "ok" and entry.spec is not None:
            for spec in entry.spec.formats:
                yield entry, spec


def _reader(quant_method: object) -> FormatSpec | None:
    return next((spec for spec in specs().values() if quant_method in spec.quant_methods), None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{path}: expected a JSON object: {error}; download the model again"
        ) from None
