"""Where the linear weights of a transformers model are, and what is kept dense and why.

transformers ≥ 5 has three kinds: ``nn.Linear`` with ``[out, in]``; GPT-2's ``Conv1D``, the same layer with
its weight transposed, ``[in, out]``; and the experts of a layer fused in one 3-D parameter, ``[experts,
out, in]``, or ``[experts, in, out]`` where the module says ``is_transposed``.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modulora_core.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One linear weight, or one stack of them.

    Attributes:
        name: the parameter's name in memory: ``"model.layers.0.mlp.up_proj.weight"``.
        module: the dotted path of the module that owns it.
        kind: ``"linear"``, ``"conv1d"`` or ``"experts"``; ``"embedding"`` only from :mod:`modulora_core.models.ends`.
        out_features: rows of each matrix as a quantizer sees it, ``[out, in]``.
        in_features: columns of each matrix as a quantizer sees it.
        experts: the number of matrices in the stack; None where there is one matrix.
        transposed: whether the parameter holds ``[in, out]``.
        bias: whether the module adds a bias to the product.
    """

    name: str
    module: str
    kind: Literal["linear", "conv1d", "experts", "embedding"]
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
    """Every parameter of a model, in exactly one of two lists: ``linears``, and ``kept`` as name → reason."""

    linears: tuple[LinearSite, ...]
    kept: Mapping[str, str]


def decoder_linears(model: PreTrainedModel) -> list[LinearSite]:
    """The linear weights of a model that are quantized by default: all but the output head and tied ones."""
    return list(find_sites(model).linears)


def find_sites(
    model: PreTrainedModel, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Sites:
    """Sort every parameter of ``model`` into linear weights and what is kept dense.

    Args:
        model: a causal language model, on any device, the meta device too.
        include: glob patterns (:mod:`fnmatch`: ``*`` crosses dots) on module paths or parameter names. Only
            the linear weights that match one are taken; the output head too, if it is named and not tied.
            None given: all but the head.
        exclude: patterns of linear weights that are kept dense after all.

    Raises:
        OptionError: a pattern that matches nothing, or only weights that can't be taken.
    """
    linears: list[LinearSite] = []
    kept: dict[str, str] = {}
    tied = _tied(model)
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{parameter}" if path else parameter
            site = _linear(model, path, module, parameter, tensor)
            if site is not None and name not in tied:
                linears.append(site)
            else:
                kept[name] = tied.get(name) or _reason(path, module, parameter, tensor)
    _check_patterns(include, exclude, linears, kept)
    head = _head_weight(model)
    chosen = []
    for site in linears:
        reason = _left_out(site, include, exclude, is_head=site.name == head)
        if reason is None:
            chosen.append(site)
        else:
            kept[site.name] = reason
    return Sites(tuple(chosen), MappingProxyType(kept))


def tied_to(name: str) -> str:
    """Why a parameter is kept that is the one called ``name``."""
    return f"tied to {name}"


def _tied(model: nn.Module) -> dict[str, str]:
    """Why parameters that several names share are kept; an embedding that comes first has its own reason."""
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


def _head_weight(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next(
        (f"{path}.weight" for path, module in model.named_modules() if module is head), None
    )


def _left_out(
    site: LinearSite, include: Sequence[str], exclude: Sequence[str], *, is_head: bool
) -> str | None:
    if include and not _matches(site, include):
        return "not in --include"
    if is_head and not include:
        return "output head"
    pattern = next((pattern for pattern in exclude if _matches(site, [pattern])), None)
    return None if pattern is None else f"excluded by --exclude {pattern}"


def _matches(site: LinearSite, patterns: Iterable[str]) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern)
        for name in (site.module, site.name)
        for pattern in patterns
    )


def _check_patterns(
    include: Sequence[str],
    exclude: Sequence[str],
    linears: Sequence[LinearSite],
    kept: Mapping[str, str],
) -> None:
    for pattern in include:
        if any(_matches(site, [pattern]) for site in linears):
            continue
        found = _matching_names(pattern, kept)
        if found:
            raise OptionError(
                f"--include {pattern}: expected linear weights that can be quantized, got {found[0]} "
                f"({kept[found[0]]}){f' and {len(found) - 1} more' if found[1:] else ''}"
            )
        raise OptionError(_no_match("--include", pattern, [site.name for site in linears]))
    names = [*(site.name for site in linears), *kept]
    for pattern in exclude:
        if not _matching_names(pattern, names):
            raise OptionError(_no_match("--exclude", pattern, names))


def _matching_names(pattern: str, names: Iterable[str]) -> list[str]:
    return [
        name
        for name in names
        if any(fnmatch.fnmatchcase(n, pattern) for n in (name, name.rpartition(".")[0]))
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
    """The site of a parameter, None where it isn't a linear weight that stands for itself."""
    from transformers.pytorch_utils import Conv1D

    name = f"{path}.{parameter}" if path else parameter
    if not tensor.is_floating_point():
        return None
    if parameter == "weight" and isinstance(module, Conv1D):
        in_features, out_features = tensor.shape
        return LinearSite(
            name, path, "conv1d", out_features, in_features, None, transposed=True, bias=True
        )
    if parameter == "weight" and isinstance(module, nn.Linear) and _computes_linear(module):
        out_features, in_features = tensor.shape
        bias = module.bias is not None
        return LinearSite(
            name, path, "linear", out_features, in_features, None, transposed=False, bias=bias
        )
    transposed = _experts_transposed(model, path, module, parameter, tensor)
    if transposed is None:
        return None
    experts, rows, columns = tensor.shape
    out_features, in_features = (columns, rows) if transposed else (rows, columns)
    bias = getattr(module, f"{parameter}_bias", None) is not None
    return LinearSite(
        name, path, "experts", out_features, in_features, experts, transposed=transposed, bias=bias
    )


def _computes_linear(module: nn.Linear) -> bool:
    """Whether calling ``module`` gives x Wᵀ + b, so that a quantized layer can stand in for it.

    Subclasses may do the same in their own words (Falcon), or something else (routers, grouped
    projections): a small product tells. ``nn.MultiheadAttention`` never calls its projection, it reads the
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
    try:
        with torch.no_grad():
            y = functional_call(module, weights, (x,))
    except Exception:  # it wants other arguments or another shape: not a plain linear layer
        return False
    expected = nn.functional.linear(x, weights["weight"], weights.get("bias"))
    return (
        isinstance(y, Tensor)
        and y.shape == expected.shape
        and torch.allclose(y, expected, atol=1e-6)
    )


def _experts_transposed(
    model: PreTrainedModel, path: str, module: nn.Module, parameter: str, tensor: Tensor
) -> bool | None:
    """Whether a stack of experts is ``[experts, in, out]``; None where it isn't a stack or can't be told."""
    if tensor.dim() != 3 or parameter.endswith("bias"):
        return None
    if hasattr(module, "is_transposed"):  # set by transformers' use_experts_implementation
        return bool(module.is_transposed)
    if not type(module).__name__.endswith("Experts"):
        return None
    # classes without that decorator (Llama 4, JetMoE): a projection down gives hidden_size, others take it
    hidden_size = model.config.get_text_config().hidden_size
    _, rows, columns = tensor.shape
    if (rows == hidden_size) == (columns == hidden_size):
        return None
    leaf = f"{path.rpartition('.')[2]}.{parameter}"
    gives_hidden = any(word in leaf for word in ("down", "output", "w2"))
    return bool((columns if gives_hidden else rows) == hidden_size)


def _reason(path: str, module: nn.Module, parameter: str, tensor: Tensor) -> str:
    """Why a parameter that is no linear site is kept dense, in few enough words to group by."""
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
