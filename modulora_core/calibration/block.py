"""One decoder block in memory: its parameters filled in, its linear weights observed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modulora_core.calibration.observe import Key, Listener, ObservedWeight, ignore, observe
from modulora_core.calibration.order import Order, OrderRecorder
from modulora_core.checkpoints.hf_quantizer import use_eager_experts
from modulora_core.errors import ModelError
from modulora_core.models import ModelSource
from modulora_core.models.sites import LinearSite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cast(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` where and in what blocks are computed: on a CPU 16-bit floats become fp32, which is exact."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(device, torch.float32 if half and device.type == "cpu" else tensor.dtype)


def fill(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer of a skeleton its value."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Computed buffers, such as rotary frequencies, to ``device``; what is on the meta device stays there."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                owner._buffers[name] = buffer.to(device)


def fill_outside(
    model: PreTrainedModel,
    blocks: Sequence[str],
    source: ModelSource,
    device: torch.device,
    *,
    head: bool,
) -> None:
    """Fill in what is outside of the blocks of a skeleton: with the output head, or only what runs before the first block.

    Args:
        blocks: their dotted paths.
    """
    output = model.get_output_embeddings()
    left_out = [path for path, module in model.named_modules() if module is output and not head]
    prefixes = tuple(f"{path}." for path in (*left_out, *blocks))
    names = {name for name in source.parameters if not name.startswith(prefixes)}
    for name, tensor in source.tensors(names=names):
        fill(model, name, cast(tensor, device))
    move_buffers(model, device)


def sites_within(path: str, linears: Iterable[LinearSite]) -> dict[str, LinearSite]:
    """Those of ``linears`` that the block at ``path`` has, by their names in the block."""
    prefix = f"{path}."
    return {
        site.name.removeprefix(prefix): site for site in linears if site.name.startswith(prefix)
    }


class Block:
    """A decoder block, filled in.

    Args:
        path: its dotted path in the model.
        module: its skeleton; it is changed.
        sites: of the parameters that will be packed, by their names in the block.
        source: where the values come from.
        device: where it runs.
        keep: takes every parameter that isn't packed, as the model stores it.

    Attributes:
        weights: the observed matrices of each site: one, or one for each expert.
        vectors: the one-dimensional parameters that aren't packed (norms, biases), as the model stores them.
        listener: told of every product (:data:`modulora_core.calibration.observe.Listener`); exchange it at will.

    Raises:
        ModelError: a parameter of the block isn't in the files under the block's name.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        sites: Mapping[str, LinearSite],
        source: ModelSource,
        device: torch.device,
        keep: Callable[[str, Tensor], None],
    ) -> None:
        self.path, self.module, self.sites, self._device = path, module, sites, device
        self.listener: Listener = ignore
        self.weights: dict[str, list[ObservedWeight]] = {}
        self.vectors: dict[str, Tensor] = {}
        parameters = {name for name, _ in module.named_parameters()}  # a stored buffer isn't one
        linear: dict[str, Tensor] = {}
        prefix = path + "."
        names = {name for name in source.parameters if name.startswith(prefix)}
        for name, tensor in source.tensors(names=names):
            inside = name.removeprefix(prefix)
            if inside in sites:
                linear[inside] = cast(tensor, device)
            else:
                keep(name, tensor)
                if tensor.dim() == 1 and tensor.is_floating_point() and inside in parameters:
                    self.vectors[inside] = tensor
                fill(module, inside, cast(tensor, device))
        move_buffers(module, device)
        for inside in list(linear):  # now that biases are there
            self.weights[inside] = observe(
                module, inside, sites[inside], linear.pop(inside), self._tell
            )
        if self.has_experts:
            use_eager_experts(module)
        self._check_filled()

    def _tell(self, key: Key, x: Tensor) -> None:
        self.listener(key, x)

    def _check_filled(self) -> None:
        tensors = [*self.module.named_parameters(), *self.module.named_buffers()]
        empty = [name for name, tensor in tensors if tensor.is_meta]
        if empty:
            raise ModelError(
                f"{self.path}: expected a decoder block with weights of its own, got none for {', '.join(empty[:3])} (shared with another "
                "block?); calibration goes block by block. Choose a quantizer that needs none"
            )

    @property
    def has_experts(self) -> bool:
        return any(site.experts is not None for site in self.sites.values())

    @property
    def structure(self) -> tuple[object, ...]:
        """Blocks of equal structure use their weights in the same order."""
        return (type(self.module), *self.sites)

    def order(self, run: Callable[[], object]) -> Order:
        """The order in which ``run``, which runs this block, uses the weights."""
        recorder = OrderRecorder()
        self.listener = recorder
        run()
        self.listener = ignore
        return recorder.order(self.sites)

    def replace(self, name: str, values: Iterable[Tensor]) -> None:
        """From now on multiply by these values of a parameter's matrices."""
        for observed, value in zip(self.weights[name], values, strict=True):
            observed.weight.copy_(value)

    def replace_vector(self, name: str, value: Tensor) -> None:
        """From now on use this value of one of :attr:`vectors`, ``[n]``, in the dtype that the model stores it in."""
        fill(self.module, name, cast(value, self._device))

    def close(self) -> None:
        """Let the weights go at once: module and listener know each other, which only a garbage collection would see."""
        self.weights.clear()
        del self.module
