"""Allocates the hidden states between two blocks, in memory or in a temporary file."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SPILL_BYTES = 4 * 2**30
"""Larger hidden states go to a file unless the user decides.

128 samples of 2048 tokens of a 7B model take 4 GiB in fp32."""


def empty_states(like: Tensor, shape: tuple[int, ...], folder: Path, spill: bool | None) -> Tensor:
    """Allocate hidden states of the dtype and on the device of ``like``.

    Large ones are a mapped file on the CPU. It has no name and disappears with the tensor.

    Args:
        shape: ``[..., seq_len, hidden]``.
        folder: the folder of the file.
        spill: whether to use a file; None decides by size.
    """
    if not _spills(math.prod(shape) * like.element_size(), spill):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    with tempfile.NamedTemporaryFile(dir=folder) as file:  # deleted here; the mapping stays valid
        size = math.prod(shape)
        return torch.from_file(file.name, shared=True, size=size, dtype=like.dtype).view(shape)


def spilled_bytes(
    tokens: int, config: PretrainedConfig, device: torch.device, spill: bool | None
) -> int:
    """Bytes of the file with the hidden states of ``tokens`` tokens; 0 if they stay in memory."""
    dtype = torch.float32 if device.type == "cpu" else config.dtype
    nbytes = tokens * int(config.get_text_config().hidden_size) * dtype.itemsize
    return nbytes if _spills(nbytes, spill) else 0


def _spills(nbytes: int, wish: bool | None) -> bool:
    return nbytes > SPILL_BYTES if wish is None else wish
