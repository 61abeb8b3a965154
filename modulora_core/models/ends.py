"""Find the ends of a language model, the input embedding and the output head, to pack on request.

A head that the config ties to the embedding is the same table. It is packed once, and both use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modulora_core.errors import ModelError, OptionError
from modulora_core.models.sites import LinearSite, find_sites, input_table, names_sharing, path_of
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
        head, embeddings: None leaves an end dense. For a tied model each of them means both.
        stored: names of the parameters that the model's files give; only one of several tied ones.

    Raises OptionError.
    """
    table = path_of(model.get_input_embeddings(), model)
    output = path_of(model.get_output_embeddings(), model)
    tied = output is not None and f"{output}.weight" in names_sharing(model, f"{table}.weight")
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
    try:
        return input_table(model, stored)
    except ModelError as error:
        raise OptionError(f"--{option}: {error}") from None
