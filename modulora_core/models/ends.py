"""Find the ends of a language model, the input embedding and the output head, to pack on request.

A head that the config ties to the embedding is the same table. It is packed once, and both use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from modulora_core.errors import OptionError
from modulora_core.models.sites import LinearSite, find_sites
from modulora_core.registry import Choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD, EMBEDDINGS = "quantize-head", "quantize-embeddings"
"""The options of the command line, by which messages name an end."""


@dataclass(frozen=True, slots=True)
class End:
    """One parameter to pack, its quantizer, and the option that asked for it."""

    site: LinearSite
    choice: Choice
    option: str


def find_ends(
    model: PreTrainedModel, head: Choice | None, embeddings: Choice | None, stored: Iterable[str]
) -> list[End]:
    """Find the ends that are asked for.

    Args:
        model: on any device, the meta device too.
        head, embeddings: None leaves an end dense. For a tied model each of them means both.
        stored: names of the parameters that the model's files give; only one of several tied ones.

    Raises:
        OptionError: the model has no such end, it can't be packed, or a tied one has two choices.
    """
    table, output = _path_of(model.get_input_embeddings(), model), _output_path(model)
    tied = output is not None and f"{output}.weight" in _sharing(model, f"{table}.weight")
    if tied and head is not None and embeddings is not None and head != embeddings:
        raise OptionError(
            f"--{HEAD}, --{EMBEDDINGS}: head and embedding of this model are one table; expected "
            f"one choice, got {head.label} and {embeddings.label}"
        )
    ends = []
    if tied and head is not None:
        ends.append(End(_table(model, HEAD, stored), head, HEAD))
    elif head is not None:
        ends.append(End(_head(model, output), head, HEAD))
    if embeddings is not None and not (tied and ends):
        ends.append(End(_table(model, EMBEDDINGS, stored), embeddings, EMBEDDINGS))
    return ends


def find_table(model: PreTrainedModel, stored: Iterable[str]) -> LinearSite | None:
    """The input embedding if it can be packed, else None; arguments as of :func:`find_ends`."""
    with suppress(OptionError):
        return _table(model, EMBEDDINGS, stored)
    return None


def _head(model: PreTrainedModel, path: str | None) -> LinearSite:
    name = type(model).__name__
    expected = f"--{HEAD}: expected an output head that is a linear layer, and {name} has"
    if path is None:
        raise OptionError(f"{expected} none")
    kind = type(model.get_submodule(path)).__name__
    reason = find_sites(model).dense.get(f"{path}.weight", kind)
    if reason != "output head":
        raise OptionError(f"{expected} {path} ({reason})")
    (site,) = find_sites(model, include=[path]).linears  # a head is linear only if it is named
    return site


def _table(model: PreTrainedModel, option: str, stored: Iterable[str]) -> LinearSite:
    module = model.get_input_embeddings()
    path = _path_of(module, model)
    if path is None or not isinstance(module, nn.Embedding) or module.max_norm is not None:
        raise OptionError(
            f"--{option}: expected an input embedding whose rows are looked up as they are, and "
            f"{type(model).__name__} has {type(module).__name__}"
        )
    name = f"{path}.weight"
    others = sorted(_sharing(model, name) - {name, f"{_output_path(model)}.weight"})
    if others or name not in stored:
        shared = ", ".join(others) or "another parameter, under whose name it is stored"
        raise OptionError(
            f"--{option}: expected {name} to be the embedding's own, or the output head's too; "
            f"it is shared with {shared}"
        )
    rows, width = module.weight.shape
    return LinearSite(name, path, "embedding", rows, width, None, transposed=False, bias=False)


def _output_path(model: PreTrainedModel) -> str | None:
    return _path_of(model.get_output_embeddings(), model)


def _path_of(wanted: object, model: nn.Module) -> str | None:
    return next((path for path, module in model.named_modules() if module is wanted), None)


def _sharing(model: nn.Module, name: str) -> set[str]:
    """All names of the parameter called ``name``; empty if there is none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shared = parameters.get(name)
    return {other for other, tensor in parameters.items() if tensor is shared}
