"""Finds the decoder blocks of a model, and fills them with values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modulora_core.calibration.observe import Listener, observe
from modulora_core.checkpoints.packed_modules import use_eager_experts
from modulora_core.errors import ModelError
from modulora_core.models import ModelSource
from modulora_core.models.sites import LinearSite, find_sites, outermost_lists

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_blocks(model: PreTrainedModel) -> tuple[str, ...]:
    """The dotted paths of the decoder blocks, in order.

    They are the children of the outermost ``nn.ModuleList`` with most linear weights.

    Raises ModelError: no list of modules holds a linear weight.
    """
    sizes = {site.name: site.numel for site in find_sites(model).linears}
    weights = {
        path: sum(size for name, size in sizes.items() if name.startswith(f"{path}."))
        for path in outermost_lists(model)
    }
    largest = max(weights, key=weights.__getitem__, default=None)
    if largest is None or not weights[largest]:
        raise ModelError(
            f"{type(model).__name__}: expected decoder blocks in an nn.ModuleList with linear "
            "weights, found none; calibration goes block by block. Choose a quantizer that needs "
            "no calibration"
        )
    return tuple(f"{largest}.{name}" for name, _ in model.get_submodule(largest).named_children())


def block_prefixes(source: ModelSource) -> tuple[str, ...]:
    """The prefixes of all names in decoder blocks, ``model.layers.0.`` and so on.

    Raises ModelError: as :func:`find_blocks`.
    """
    return tuple(f"{path}." for path in find_blocks(source.outline))


def block_modules(source: ModelSource, paths: Sequence[str]) -> list[nn.Module]:
    """New skeletons of the decoder blocks at these paths."""
    model = _skeleton(source)
    return [model.get_submodule(path) for path in paths]


def outer_model(
    source: ModelSource, paths: Sequence[str], device: torch.device, *, head: bool
) -> PreTrainedModel:
    """The model with values for its first block and for the parts outside of its blocks.

    Args:
        paths: the paths of the decoder blocks; all but the first stay on the meta device.
        head: whether the output head gets values too.
    """
    model = _skeleton(source)
    output = model.get_output_embeddings()
    heads = [path for path, module in model.named_modules() if module is output and not head]
    left_out = tuple(f"{path}." for path in (*heads, *paths[1:]))
    names = {name for name in source.parameters if not name.startswith(left_out)}
    for name, tensor in source.tensors(names=names):
        _fill(model, name, _cast(tensor, device))
    _move_buffers(model, device)
    return model


def _skeleton(source: ModelSource) -> PreTrainedModel:
    model = source.skeleton(buffers=True).eval()  # no dropout
    use_eager_experts(model)
    return model


class Block:
    """A decoder block in memory, with observed weights in the place of its linear weights.

    Parameters are named as in the model.

    Args:
        module: its skeleton, which is changed.
        device: the block runs there, on a CPU in fp32, elsewhere in the model's dtype.
        on_dense: gets every parameter that is not packed, as the model stores it.

    Attributes:
        weights: the observed matrices of each of them: one, or one for each expert.
        vectors: the 1-dimensional parameters (norms, biases), as the model stores them.

    Raises ModelError: the files have no value for a parameter of the block.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        linears: Iterable[LinearSite],
        source: ModelSource,
        device: torch.device,
        on_dense: Callable[[str, Tensor], None] = lambda *_: None,
    ) -> None:
        self.path, self.module, self.device = path, module, device
        self.sites = {site.name: site for site in linears if site.name.startswith(f"{path}.")}
        self.vectors: dict[str, Tensor] = {}
        parameters = {name for name, _ in module.named_parameters()}  # without stored buffers
        linear: dict[str, Tensor] = {}
        names = {name for name in source.parameters if name.startswith(f"{path}.")}
        for name, tensor in source.tensors(names=names):
            if name in self.sites:
                linear[name] = self.computed(tensor)
                continue
            on_dense(name, tensor)
            is_vector = tensor.dim() == 1 and tensor.is_floating_point()
            if is_vector and self.inside(name) in parameters:
                self.vectors[name] = tensor
            self.replace_vector(name, tensor)
        _move_buffers(module, device)
        self.weights = {
            name: observe(module, self.inside(name), self.sites[name], linear.pop(name))
            for name in list(linear)
        }
        tensors = [*module.named_parameters(), *module.named_buffers()]
        if empty := [name for name, tensor in tensors if tensor.is_meta]:
            raise ModelError(
                f"{path}: expected a decoder block with weights of its own, got none for "
                f"{', '.join(empty[:3])} (shared with another block?); calibration goes block by "
                "block. Choose a quantizer that needs none"
            )

    def inside(self, name: str) -> str:
        """A parameter's name inside the block."""
        return name.removeprefix(f"{self.path}.")

    def computed(self, tensor: Tensor) -> Tensor:
        """A stored tensor on the device and in the dtype that the block computes with."""
        return _cast(tensor, self.device)

    @property
    def has_experts(self) -> bool:
        return any(site.experts is not None for site in self.sites.values())

    def listen(self, listener: Listener) -> None:
        """Pass the input of every product to ``listener``."""
        for observed in chain.from_iterable(self.weights.values()):
            observed.listener = listener

    def replace(self, name: str, values: Iterable[Tensor]) -> None:
        """Multiply by other values of a parameter's matrices from now on."""
        for observed, value in zip(self.weights[name], values, strict=True):
            observed.weight.copy_(value)

    def replace_vector(self, name: str, value: Tensor) -> None:
        """Use another value of a parameter or buffer that is not packed from now on."""
        _fill(self.module, self.inside(name), self.computed(value))


def for_each_block(
    source: ModelSource,
    linears: Iterable[LinearSite],
    device: torch.device,
    work: Callable[[int, Block], None],
    *,
    backward: bool = False,
) -> None:
    """Call ``work`` with the number of each decoder block and the dense block.

    One block is in memory at a time.

    Args:
        backward: whether the last block comes first.
    """
    paths = find_blocks(source.outline)
    modules = dict(enumerate(block_modules(source, paths)))
    for number in sorted(modules, reverse=backward):
        work(number, Block(paths[number], modules.pop(number), linears, source, device))


def _cast(tensor: Tensor, device: torch.device) -> Tensor:
    """16-bit floats become fp32 on a CPU, which is exact."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(device, torch.float32 if half and device.type == "cpu" else tensor.dtype)


def _fill(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer of a skeleton its value."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move computed buffers, such as rotary frequencies; those without a value stay on meta."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                owner._buffers[name] = buffer.to(device)
