"""One decoder block's packed weights in memory at a time, of a model that is mapped from its files.

A step goes through the blocks in order, and back. So one rule is enough: *entering a block drops the pages of the block before*, and
begins to read those of the next one in the same direction. A block is entered when its forward begins, in the second forward of
gradient checkpointing too, and when a gradient reaches its output. What was dropped is found in the kernel's cache of the file where
there is memory for it, else it is read from the disk again: twice a step, in the forward, and in the backward together with
the second forward.

What stands outside of the blocks, and what isn't packed (embeddings, the output head, norms), stays: it may be trained, and
dropping pages would lose that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from modulora_core.checkpoints.mapped_files import MappedFiles, PageRange
from modulora_core.layers import PackedParameter


class BlockWindow:
    """Keeps the pages of the packed weights of one block at a time in memory.

    Args:
        blocks: the pages of each block's packed weights, the blocks in order.

    Attributes:
        inside: the number of the block that was entered last; None before the first.
    """

    def __init__(self, blocks: Sequence[Sequence[PageRange]]) -> None:
        self._blocks = blocks
        self.inside: int | None = None

    def enter(self, block: int) -> None:
        """Drop the block that was entered before, if it is another, and let the kernel read on in the same direction."""
        before, self.inside = self.inside, block
        if before in (None, block):
            return
        for pages in self._blocks[before]:
            pages.drop()
        following = block + (1 if block > before else -1)
        if 0 <= following < len(self._blocks):
            for pages in self._blocks[following]:
                pages.prefetch()


def keep_one_block(model: nn.Module, files: MappedFiles) -> BlockWindow:
    """From now on, let ``model`` hold the packed weights of one block at a time.

    Args:
        model: its packed tensors are views of ``files``, under the names that they have in the model.
        files: where they are.
    """
    tensors = _tensors_of_blocks(model)
    window = BlockWindow([files.ranges(names) for names in tensors.values()])
    for number, path in enumerate(tensors):
        block = model.get_submodule(path)
        block.register_forward_pre_hook(partial(_on_entry, window, number))
        block.register_forward_hook(partial(_on_output, window, number))
    return window


def _tensors_of_blocks(model: nn.Module) -> Mapping[str, list[str]]:
    """The paths of the blocks, which are what the outermost lists of modules hold, and the names of each one's packed tensors."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    blocks: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, PackedParameter):
            continue
        for outer in outermost:
            if path.startswith(f"{outer}."):
                number = path.removeprefix(f"{outer}.").partition(".")[0]
                names = [f"{path}.{name}" for name in module.layout.tensors]
                blocks.setdefault(f"{outer}.{number}", []).extend(names)
    return blocks


def _on_entry(window: BlockWindow, block: int, *_: Any) -> None:
    window.enter(block)


def _on_output(window: BlockWindow, block: int, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001  # torch's signature
    for tensor in _tensors(output):
        if tensor.requires_grad:  # its gradient comes when the block's backward begins
            tensor.register_hook(partial(_on_entry, window, block))


def _tensors(output: Any) -> Iterable[Tensor]:
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    return (value for value in outputs if isinstance(value, Tensor))
