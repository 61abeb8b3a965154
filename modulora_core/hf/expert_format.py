"""PEFT's file layout of adapters on fused experts, its ``target_parameters``.

    <module>.lora_A.weight                 [experts · r, in]   the module's last adapted parameter
    <module>.lora_B.weight                 [out, r · experts]
    <module>.base_layer.lora_A.weight      of the parameter before it, and so on
    <module>.base_layer.lora_B.weight

``<module>`` holds the stacks of experts. The rows of A are ordered by expert, the columns of B by
rank. PEFT reads a stack as ``[experts, out, in]`` unless the module has ``is_transposed``. Llama 4
stores ``[experts, in, out]`` without that attribute, so its A and B trade places.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from modulora_core.errors import AdapterError
from modulora_core.packed_parameters import PackedStack

Factors = tuple[Tensor, Tensor]
"""A and B."""

_BASE = ".base_layer"


@dataclass(frozen=True, slots=True)
class Stack:
    """A packed stack of experts in a model.

    Attributes:
        shape: ``(experts, out, in)``.
        swapped: in PEFT's files A and B trade places.
    """

    shape: tuple[int, int, int]
    swapped: bool = False


def stacks_of(model: nn.Module) -> dict[str, Stack]:
    """The packed stacks of a model by path; within a module, in the order of its parameters."""
    found = {}
    for path, owner in model.named_modules():
        stacks = [
            (n, child) for n, child in owner.named_children() if isinstance(child, PackedStack)
        ]
        for name, stack in sorted(stacks, key=lambda named: named[1].position):
            swapped = stack.first.transposed and not getattr(owner, "is_transposed", False)
            found[f"{path}.{name}"] = Stack((len(stack), *stack.first.layout.shape), swapped)
    return found


def to_file(factors: Mapping[str, Factors], stacks: Mapping[str, Stack]) -> dict[str, Factors]:
    """Lay factors out as PEFT's file has them, by the file's path of the module.

    Args:
        factors: A and B by path; of experts ``[experts, r, in]`` and ``[experts, out, r]``.
    """
    laid: dict[str, Factors] = {}
    for path, names in _by_module(factors, stacks):
        for depth, name in enumerate(reversed(names)):
            A, B = factors[name]
            if name in stacks:
                if stacks[name].swapped:
                    A, B = B.mT, A.mT
                A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
            laid[path + depth * _BASE] = A, B
    return laid


def from_file(
    laid: Mapping[str, Factors], stacks: Mapping[str, Stack], targets: Iterable[str], where: str
) -> dict[str, Factors]:
    """Undo :func:`to_file`.

    Args:
        laid: A ``[rows, in]`` and B ``[out, columns]``, by the file's path of the module.
        targets: ``target_parameters`` of the adapter's config, which name the adapted stacks.

    Raises AdapterError: an adapted parameter is no packed stack, or has another number of experts.
    """
    chosen = [name for name in stacks if any(f".{name}".endswith(f".{t}") for t in targets)]
    expected = {
        path + depth * _BASE: name
        for path, names in _by_module(chosen, stacks)
        for depth, name in enumerate(reversed(names))
    }
    factors: dict[str, Factors] = {}
    for path, (A, B) in laid.items():
        name = expected.pop(path, path)
        if name in stacks:
            experts = stacks[name].shape[0]
            if A.shape[0] % experts:
                raise AdapterError(
                    f"{where}: {name}: expected lora_A with a multiple of {experts} rows, the "
                    f"number of experts, got {A.shape[0]}"
                )
            A, B = A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)
            if stacks[name].swapped:
                A, B = B.mT, A.mT
        elif path.endswith(_BASE):
            raise AdapterError(
                f"{where}: {path}: expected adapters of packed experts only, got one of a "
                "parameter that is not packed here"
            )
        factors[name] = A, B
    for path, name in expected.items():
        raise AdapterError(f"{where}: expected {path}, the adapter of {name}, found none")
    return factors


def _by_module(paths: Collection[str], stacks: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Group adapted paths: the stacks of a module together, and each linear layer alone."""
    of_modules: dict[str, list[str]] = {}
    for path in stacks:
        if path in paths:
            of_modules.setdefault(path.rpartition(".")[0], []).append(path)
    yield from of_modules.items()
    yield from ((path, [path]) for path in paths if path not in stacks)
