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

    from modulora_core.calibration.text import CalibrationText

SPILL_BYTES = 4 * 2**30
"""Larger hidden states go to a file unless the user decides.

128 samples of 2048 tokens of a 7B model take 4 GiB in fp32."""


def empty_states(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
    spill: bool | None,
) -> Tensor:
    """Allocate hidden states, ``[samples, seq_len, hidden]``.

    Args:
        shape: the shape; dtype: the dtype.
        device: the device of hidden states that stay in memory. A file is mapped on the CPU.
        folder: the folder of the file. The file has no name and disappears with the tensor.
        spill: whether to use a file; None decides by size.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if not _spills(nbytes, spill):
        return torch.empty(shape, dtype=dtype, device=device)
    with tempfile.NamedTemporaryFile(dir=folder) as file:  # deleted here; the mapping stays valid
        mapped = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype)
    return mapped.view(shape)


def spilled_bytes(
    tokens: int, config: PretrainedConfig, device: torch.device, spill: bool | None
) -> int:
    """Bytes of the file with the hidden states of ``tokens`` tokens; 0 if they stay in memory."""
    dtype = torch.float32 if device.type == "cpu" else config.dtype
    nbytes = tokens * int(config.get_text_config().hidden_size) * dtype.itemsize
    return nbytes if _spills(nbytes, spill) else 0


def spilled_by(text: CalibrationText, config: PretrainedConfig, device: torch.device) -> int:
    """Bytes of all files of a calibration run. Tuning needs the dense model's states too."""
    files = 1 if text.config.tuning is None else 2
    return files * spilled_bytes(text.ids.numel(), config, device, text.config.spill)


def _spills(nbytes: int, wish: bool | None) -> bool:
    return nbytes > SPILL_BYTES if wish is None else wish
