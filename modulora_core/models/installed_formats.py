"""Find the installed format of a folder or a file, by its config or its name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from modulora_core import registry
from modulora_core.errors import ModelError, OptionError, PluginError
from modulora_core.hookspecs import QUANTIZATION_KEYS, FormatSpec
from modulora_core.models.json_files import read_json

if TYPE_CHECKING:
    from modulora_core.models.formats import CheckpointFormat, FormatReader

Class = TypeVar("Class")


@dataclass(frozen=True, slots=True)
class InstalledFormat:
    """A format of a usable plugin, which has an ``entry`` in the registry."""

    spec: FormatSpec
    entry: registry.Entry[FormatSpec]

    def create(self, location: str, base: type[Class]) -> Class:
        """An object of the class at ``location``. Raises PluginError if the plugin is broken."""
        made: Any = registry.import_class(self.entry, location, base)
        return made(self.spec)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Recognised:
    """A foreign format that a folder has, and the config in ``file`` that says so."""

    spec: FormatSpec
    config: Mapping[str, Any]
    file: str

    def reader(self) -> FormatReader:
        """The reader of the format. Raises PluginError if the plugin can't be used."""
        return create(self.spec.name)  # which refuses a format that two plugins have


def specs() -> dict[str, FormatSpec]:
    """Every installed format by its name, sorted by name."""
    found = {each.spec.name: each.spec for each in installed()}
    return {name: found[name] for name in sorted(found)}


def find(name: str) -> InstalledFormat:
    """The installed format called ``name``, whose class is not imported.

    Raises:
        OptionError: no installed plugin has it.
        PluginError: several plugins have it, or its plugin can't be used.
    """
    named = [entry for entry in registry.formats() if entry.name == name]
    if not named:
        sentence = f"format {name!r}: expected one of {', '.join(['modulora', *specs()])}"
        provider = registry.providers().get(f"format-{name}")
        raise OptionError(
            sentence + (f"; it is of {registry.absence(provider)}" if provider else "")
        )
    entry = registry.usable(named)
    assert entry.spec is not None  # usable() returns usable entries only
    return InstalledFormat(entry.spec, entry)


def create(name: str) -> FormatReader:
    """The installed format called ``name``.

    Raises:
        OptionError: no installed plugin has it, or it is a format of files.
        PluginError: several plugins have it, or its class can't be used.
    """
    from modulora_core.models.formats import FormatReader  # torch

    found = find(name)
    if found.spec.adapters:
        raise OptionError(f"format {name!r}: expected a format of models, got one of adapters")
    if suffix := found.spec.file_suffix:
        raise OptionError(
            f"format {name!r}: expected a format of folders, got one of files *{suffix}, "
            "which merge writes"
        )
    return found.create(found.spec.location, FormatReader)  # type: ignore[type-abstract]


def create_writer(name: str) -> CheckpointFormat:
    """As :func:`create`, for writing. Raises OptionError also for a format that is only read."""
    from modulora_core.models.formats import CheckpointFormat

    found = create(name)
    if not isinstance(found, CheckpointFormat):
        raise OptionError(
            f"format {name!r}: it is only read, not written; expected one of "
            f"{', '.join(['modulora', *_written()])}"
        )
    return found


def _written() -> Iterator[str]:
    """The formats of folders that plugins write too."""
    from modulora_core.models.formats import CheckpointFormat

    for name in specs():
        with suppress(OptionError, PluginError):  # of files, or broken
            if isinstance(create(name), CheckpointFormat):
                yield name


def config_files() -> list[str]:
    """The files beside config.json that mark a folder of an installed format."""
    return sorted({file for each in installed() for file in each.spec.config_files})


def recognise(folder: Path, config: Mapping[str, Any]) -> Recognised | None:
    """The installed format of a folder, by its config.json or a format's own config file.

    Raises:
        ModelError: that file isn't a JSON object.
    """
    method, quantization = _quantization(config)
    if method is not None:
        shared = (spec for spec in specs().values() if method in spec.quant_methods)
        found = next((spec for spec in shared if _flagged(spec, quantization)), None)
        return None if found is None else Recognised(found, quantization, "config.json")
    for spec in specs().values():
        if any(config.get(key) for key in spec.config_keys):
            return Recognised(spec, config, "config.json")
        for path in (folder / file for file in spec.config_files if spec.quant_methods):
            if path.is_file():
                values = read_json(path, dict[str, Any], error=ModelError)
                if values.get("quant_method", spec.quant_methods[0]) in spec.quant_methods:
                    return Recognised(spec, values, path.name)
    return None


def file_format(file: str | Path) -> InstalledFormat | None:
    """The installed format of a file that holds a whole model, or will hold one.

    The suffix of the name tells the format; of a file without a known one, its first bytes do.
    """
    of_files = [each for each in installed() if each.spec.file_suffix]
    name = str(file).lower()
    by_name = [each for each in of_files if name.endswith(each.spec.file_suffix)]
    if by_name:
        return by_name[0]
    magics = {each.spec.file_magic.encode(): each for each in of_files if each.spec.file_magic}
    start = _first_bytes(Path(file), max(map(len, magics), default=0))
    return next((each for magic, each in magics.items() if start.startswith(magic)), None)


def _first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a file; none if there is no such file."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(count)
    except (OSError, ValueError):  # a name that no file can have; a file that may not be read
        return b""


def file_suffixes() -> list[str]:
    """The suffixes of files that plugins read: installed ones, and ones that the core names."""
    found = {each.spec.file_suffix for each in installed() if each.spec.file_suffix}
    return sorted(found | _known_suffixes().keys())


def unread_file(path: str | Path) -> str:
    """Say for a message that no installed plugin reads ``path``, and which one to install."""
    suffix = Path(path).suffix.lower()
    plugin = _known_suffixes().get(suffix)
    sentence = f"expected a plugin that reads files *{suffix}, got none; "
    return sentence + (f"it is {registry.absence(plugin)}" if plugin else "install one")


def _known_suffixes() -> dict[str, str]:
    """The distribution of each file suffix that a plugin of ours reads, installed or not."""
    names, prefix = registry.providers(), "file-"
    return {f".{name[len(prefix) :]}": names[name] for name in names if name.startswith(prefix)}


def _flagged(spec: FormatSpec, quantization: Mapping[str, Any]) -> bool:
    if spec.quant_formats and quantization.get("format") not in spec.quant_formats:
        return False
    return not spec.quant_flags or any(quantization.get(key) is True for key in spec.quant_flags)


def method_of(config: Mapping[str, Any]) -> str | None:
    """The quantization method that a config.json names; None if the model isn't quantized."""
    return _quantization(config)[0]


def _quantization(config: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """Method and quantization config of a model, or of the language part of a larger one."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        found = next(filter(None, map(part.get, QUANTIZATION_KEYS)), None)
        if found:
            known = found if isinstance(found, Mapping) else {"quant_method": found}
            return str(known.get("quant_method", "an unnamed method")), known
    return None, {}


def unread_method(model: str, method: str) -> str:
    """Say that no plugin reads the quantization of ``model``, and what to do, for a message."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING  # a slow import

    instead = "give the original model"
    theirs = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if theirs is not None and "dequantize" in inspect.signature(theirs).parameters:
        config = f"quantization_config={theirs.__name__}(dequantize=True)"
        instead = (
            f"dequantize it with transformers: from_pretrained(..., {config}), save_pretrained"
        )
    if method == "auto-round":
        instead = 'save it with auto-round\'s format="auto_gptq" or "auto_awq"'
    return (
        f"model {model}: quantized with {method}, which no installed plugin reads (formats: "
        f"{', '.join(specs()) or 'none'}); install one that does, or {instead}"
    )


def installed() -> Iterator[InstalledFormat]:
    """Every format of a usable plugin. Several plugins that claim one name can't be used."""
    for entry in registry.formats():
        if entry.status in ("ok", "duplicate") and entry.spec is not None:
            yield InstalledFormat(entry.spec, entry)
