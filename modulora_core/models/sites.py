"""Find the weights of a transformers model that can be packed, and say why others stay dense.

transformers ≥ 5 has three kinds of linear weights::

    nn.Linear     [out, in]
    Conv1D        [in, out]                 GPT-2's layer, the same with its weight transposed
    experts       [experts, out, in]        all experts of a layer in one parameter, or transposed

The input embedding, [vocabulary, hidden], can be packed too.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modulora_core.errors import ModelError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["linear", "conv1d", "experts", "embedding"]


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One linear weight, or one stack of them.

    Attributes:
        name: the parameter's name in memory: ``"model.layers.0.mlp.up_proj.weight"``.
        module: the dotted path of its module.
        kind: ``"embedding"`` comes only from :func:`input_table`.
        out_features, in_features: rows and columns of each matrix, ``[out, in]``.
        experts: the number of matrices in a stack; None for one matrix.
        transposed: whether the parameter holds ``[in, out]``.
        bias: whether the module adds a bias to the product.
    """

    name: str
    module: str
    kind: Kind
    out_features: int
    in_features: int
    experts: int | None
    transposed: bool
    bias: bool

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features * (self.experts or 1)


@dataclass(frozen=True, slots=True)
class Sites:
    """Every parameter of a model: in ``linears``, or in ``dense`` with the reason."""

    linears: tuple[LinearSite, ...]
    dense: Mapping[str, str]


def outermost_lists(model: nn.Module) -> list[str]:
    """The dotted paths of the outermost module lists, whose members are the blocks of a model."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [path for path in lists if not path.startswith(tuple(f"{each}." for each in lists))]


def find_sites(
    model: PreTrainedModel, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Sites:
    """Sort every parameter of ``model`` into linear weights and parameters that stay dense.

    Args:
        model: a causal language model, on any device, the meta device too.
        include: fnmatch patterns (``*`` crosses dots) on module paths or parameter names; only
            linear weights that match one are taken. The output head is taken only by a pattern.
        exclude: patterns of linear weights that stay dense after all.

    Raises:
        OptionError: a pattern that matches nothing, or only weights that can't be taken.
    """
    linears: list[LinearSite] = []
    dense: dict[str, str] = {}
    tied = _tied(model)
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{parameter}" if path else parameter
            site = None if name in tied else _linear(model, path, module, parameter, tensor)
            if site is not None:
                linears.append(site)
            else:
                dense[name] = tied.get(name) or _reason(path, module, parameter, tensor)
    _check_patterns(include, exclude, [site.name for site in linears], dense)
    head, chosen = model.get_output_embeddings(), []
    for site in linears:
        excluded = [pattern for pattern in exclude if _matching(pattern, [site.name])]
        if include and not any(_matching(pattern, [site.name]) for pattern in include):
            dense[site.name] = "not in --include"
        elif not include and model.get_submodule(site.module) is head:
            dense[site.name] = "output head"
        elif excluded:
            dense[site.name] = f"excluded by --exclude {excluded[0]}"
        else:
            chosen.append(site)
    return Sites(tuple(chosen), MappingProxyType(dense))


def input_table(model: PreTrainedModel, stored: Iterable[str]) -> LinearSite:
    """The site of the input embedding.

    Args:
        model: on any device, the meta device too.
        stored: names of the parameters that the model's files give; only one of several tied ones.

    Raises:
        ModelError: it can't be packed.
    """
    module = model.get_input_embeddings()
    path = path_of(module, model)
    if path is None or not isinstance(module, nn.Embedding) or module.max_norm is not None:
        raise ModelError(
            f"expected an input embedding whose rows are looked up as they are, and "
            f"{type(model).__name__} has {type(module).__name__}"
        )
    name, head = f"{path}.weight", path_of(model.get_output_embeddings(), model)
    others = sorted(names_sharing(model, name) - {name, f"{head}.weight"})
    if others or name not in stored:
        shared = ", ".join(others) or "another parameter, under whose name it is stored"
        raise ModelError(
            f"expected {name} to be the embedding's own, or the output head's too; "
            f"it is shared with {shared}"
        )
    rows, width = module.weight.shape
    return LinearSite(name, path, "embedding", rows, width, None, transposed=False, bias=False)


def path_of(wanted: object, model: nn.Module) -> str | None:
    """The dotted path of a module of ``model``; None if it has no such module."""
    return next((path for path, module in model.named_modules() if module is wanted), None)


def names_sharing(model: nn.Module, name: str) -> set[str]:
    """All names of the parameter called ``name``; empty if there is none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shared = parameters.get(name)
    return {other for other, tensor in parameters.items() if tensor is shared}


def tied_to(name: str) -> str:
    """The reason why a parameter stays dense that is tied to the parameter ``name``."""
    return f"tied to {name}"


def _tied(model: nn.Module) -> dict[str, str]:
    """The reason why each parameter with several names, but the embedding, stays dense."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    reasons: dict[str, str] = {}
    for first, *others in names.values():
        reasons |= dict.fromkeys(others, tied_to(first))
        if others and not isinstance(model.get_submodule(first.rpartition(".")[0]), nn.Embedding):
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            reasons[first] = f"shared with {others[0]}{more}"
    return reasons


def _check_patterns(
    include: Sequence[str], exclude: Sequence[str], linears: list[str], dense: Mapping[str, str]
) -> None:
    for pattern in include:
        if not _matching(pattern, linears):
            found = _matching(pattern, dense)
            if not found:
                raise OptionError(_no_match("--include", pattern, linears))
            raise OptionError(
                f"--include {pattern}: expected linear weights that can be quantized, got "
                f"{found[0]} ({dense[found[0]]})"
                f"{f' and {len(found) - 1} more' if found[1:] else ''}"
            )
    for pattern in exclude:
        if not _matching(pattern, [*linears, *dense]):
            raise OptionError(_no_match("--exclude", pattern, [*linears, *dense]))


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The parameters whose name or module the pattern matches."""
    return [
        name
        for name in names
        if any(fnmatch.fnmatchcase(part, pattern) for part in (name, name.rpartition(".")[0]))
    ]


def _no_match(option: str, pattern: str, names: Sequence[str]) -> str:
    modules = {name.rpartition(".")[0]: None for name in names}
    words = [*modules, *{module.rpartition(".")[2]: None for module in modules}]
    near = difflib.get_close_matches(pattern, words, n=3, cutoff=0.5) or list(modules)[:3]
    return (
        f"{option} {pattern}: matches none of the {len(modules)} modules; near: {', '.join(near)}"
    )


def _linear(
    model: PreTrainedModel, path: str, module: nn.Module, parameter: str, tensor: Tensor
) -> LinearSite | None:
    """The site of a parameter; None if it isn't a linear weight."""
    from transformers.pytorch_utils import Conv1D

    if not tensor.is_floating_point() or _is_read(model, path):
        return None
    kind: Kind
    experts, bias = None, "bias"
    if parameter == "weight" and isinstance(module, Conv1D):
        kind, transposed = "conv1d", True
    elif parameter == "weight" and isinstance(module, nn.Linear) and _computes_linear(module):
        kind, transposed = "linear", False
    else:
        turned = _experts_transposed(model, path, module, parameter, tensor)
        if turned is None:
            return None
        kind, transposed, experts, bias = "experts", turned, len(tensor), f"{parameter}_bias"
    rows, columns = tensor.shape[-2:]
    shape = (columns, rows) if transposed else (rows, columns)
    has_bias = getattr(module, bias, None) is not None
    return LinearSite(f"{path}.{parameter}", path, kind, *shape, experts, transposed, has_bias)


_READ = re.compile(r"\b(\w+)\.(\w+)\.weight\s*(?:@|\.(?!dtype|device|shape|size|requires_grad))")
"""A line such as ``self.dt_proj.weight @ x`` (Mamba), ``attention.output.weight.div_`` (RWKV)."""


def _is_read(model: PreTrainedModel, path: str) -> bool:
    """Whether the model's code reads a layer's weight, so that calling the layer is not all."""
    parent, _, leaf = path.rpartition(".")
    names = {("self", leaf), (parent.rpartition(".")[2], leaf)}
    return not names.isdisjoint(_weights_read(type(model.get_submodule(parent))))


@cache
def _weights_read(kind: type[nn.Module]) -> set[tuple[str, str]]:
    """The last two names of each layer whose weight is read in the file of a module's class."""
    try:
        return {*_READ.findall(inspect.getsource(inspect.getmodule(kind)))}  # type: ignore[arg-type]
    except (OSError, TypeError):  # a class without a file
        return set()


def _computes_linear(module: nn.Linear) -> bool:
    """Whether calling ``module`` gives x Wᵀ + b, so that a quantized layer can replace it.

    Subclasses may compute the same (Falcon), or something else (routers, grouped projections): a
    small product shows it. ``nn.MultiheadAttention`` never calls its projection, it reads the
    weight.
    """
    if type(module) is nn.Linear:
        return True
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    x = torch.linspace(-1, 1, 10, device="cpu").view(2, 5)
    weights = {"weight": torch.linspace(-2, 1, 15, device="cpu").view(3, 5)}
    if module.bias is not None:
        weights["bias"] = torch.linspace(-1, 2, 3, device="cpu")
    expected = nn.functional.linear(x, **weights)
    try:
        with torch.no_grad():
            y = functional_call(module, weights, (x,))
        return y.shape == expected.shape and torch.allclose(y, expected, atol=1e-6)
    except Exception:  # it wants other arguments or another shape: not a plain linear layer
        return False


def _experts_transposed(
    model: PreTrainedModel, path: str, module: nn.Module, parameter: str, tensor: Tensor
) -> bool | None:
    """Whether a parameter is a stack ``[experts, in, out]``; None if it is no stack, or unclear."""
    if tensor.dim() != 3 or parameter.endswith("bias"):
        return None
    if hasattr(module, "is_transposed"):  # set by transformers' use_experts_implementation
        return bool(module.is_transposed)
    if not type(module).__name__.endswith("Experts"):
        return None
    # Llama 4, JetMoE: a down projection gives hidden_size, others take it
    hidden_size = model.config.get_text_config().hidden_size
    _, rows, columns = tensor.shape
    if (rows == hidden_size) == (columns == hidden_size):
        return None
    leaf = f"{path.rpartition('.')[2]}.{parameter}"
    gives_hidden = any(word in leaf for word in ("down", "output", "w2"))
    return bool((columns if gives_hidden else rows) == hidden_size)


def _reason(path: str, module: nn.Module, parameter: str, tensor: Tensor) -> str:
    """Why a parameter that is no linear weight stays dense, in few words, for a table."""
    kind = type(module).__name__
    if isinstance(module, nn.Embedding) or "Embedding" in kind:
        return "embedding"
    if "Norm" in kind:
        return "norm"
    if parameter.endswith("bias"):
        return "bias"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution kernel"
    if "Router" in kind or path.rpartition(".")[2] in ("router", "gate"):
        return "router"
    if isinstance(module, nn.Linear):
        return f"{kind} isn't called as a linear layer"
    if tensor.dim() < 2:
        return "vector or scalar"
    return f"{tensor.dim()}-D parameter of {kind}, not a linear weight"
