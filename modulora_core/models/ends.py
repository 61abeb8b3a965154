"""The two ends of a language model, which stay dense unless asked for: the input embedding, and the output head.

A head that the config ties to the embedding is the same table: it is packed once, and both use it.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    """One parameter to pack, and by what.

    Attributes:
        site: the head's weight, of kind ``"linear"``, or the embedding's, of kind ``"embedding"``.
        option: the option that asked for it.
    """

    site: LinearSite
    choice: Choice
    option: str


def find_ends(
    model: PreTrainedModel, head: Choice | None, embeddings: Choice | None, stored: Iterable[str]
) -> list[End]:
    """The ends that are asked for.

    Args:
        model: on any device, the meta device too.
        head, embeddings: None leaves an end as it is. For a tied model each of them means both.
        stored: names of the parameters that the model's files give; of tied ones one is there.

    Raises:
        OptionError: the model has no such end, or one that can't be packed; a tied model, and two different choices.
    """
    if head is None and embeddings is None:
        return []
    table, output = _input_weight(model), _output_path(model)
    if output is not None and f"{output}.weight" in _sharing(model, table):
        return [_tied_end(model, head, embeddings, stored)]
    ends = []
    if head is not None:
        ends.append(End(_head(model, output), head, HEAD))
    if embeddings is not None:
        ends.append(End(_table(model, output, EMBEDDINGS, stored), embeddings, EMBEDDINGS))
    return ends


def _tied_end(
    model: PreTrainedModel, head: Choice | None, embeddings: Choice | None, stored: Iterable[str]
) -> End:
    if head is not None and embeddings is not None and head != embeddings:
        raise OptionError(
            f"--{HEAD}, --{EMBEDDINGS}: head and embedding of this model are one table; expected one choice, got "
            f"{head.label} and {embeddings.label}"
        )
    choice, option = (head, HEAD) if embeddings is None else (embeddings, EMBEDDINGS)
    assert choice is not None
    return End(_table(model, _output_path(model), option, stored), choice, option)


def _head(model: PreTrainedModel, path: str | None) -> LinearSite:
    reason = (
        None
        if path is None
        else find_sites(model).kept.get(f"{path}.weight", type(model.get_submodule(path)).__name__)
    )
    if path is None or reason != "output head":
        raise OptionError(f"--{HEAD}: expected an output head that is a linear layer, and {type(model).__name__} has "
                          f"{'none' if path is None else f'{path} ({reason})'}")  # fmt: skip
    # named by its path, it is among the linear weights
    return find_sites(model, include=[path]).linears[0]


def _table(
    model: PreTrainedModel, head: str | None, option: str, stored: Iterable[str]
) -> LinearSite:
    name = _input_weight(model)
    module = model.get_input_embeddings()
    if name is None or not isinstance(module, nn.Embedding) or module.max_norm is not None:
        raise OptionError(f"--{option}: expected an input embedding whose rows are looked up as they are, and {type(model).__name__} has "
                          f"{type(module).__name__}")  # fmt: skip
    others = sorted(_sharing(model, name) - {name, f"{head}.weight"})
    if others or name not in stored:
        raise OptionError(
            f"--{option}: {name} is shared with {', '.join(others) or 'another parameter, under whose name it is stored'}; expected it "
            "to be the embedding's own, or the output head's too"
        )
    rows, width = module.weight.shape
    path = name.rpartition(".")[0]
    return LinearSite(name, path, "embedding", rows, width, None, transposed=False, bias=False)


def _input_weight(model: PreTrainedModel) -> str | None:
    path = _path_of(model, model.get_input_embeddings())
    return None if path is None else f"{path}.weight"


def _output_path(model: PreTrainedModel) -> str | None:
    return _path_of(model, model.get_output_embeddings())


def _path_of(model: nn.Module, wanted: object) -> str | None:
    return next((path for path, module in model.named_modules() if module is wanted), None)


def _sharing(model: nn.Module, name: str | None) -> set[str]:
    """All names of the parameter that ``name`` is one of."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        other
        for other, tensor in parameters.items()
        if name is not None and tensor is parameters.get(name)
    }
