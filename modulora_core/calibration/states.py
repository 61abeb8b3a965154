"""The hidden states of all samples between two blocks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modulora_core.calibration.text import CalibrationText

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SPILL_BYTES = 4 * 2**30
"""Hidden states larger than this go to a file, unless the caller decides: 128 samples of 2048 tokens of a 7B model in
fp32 just fit into memory."""

FILE = "hidden_states.bin"
DENSE_FILE = "dense_states.bin"
"""Of the unquantized model, where blocks are tuned towards it."""


def spill_bytes(text: CalibrationText, config: PretrainedConfig, device: torch.device) -> int:
    """How large the files of the hidden states will be; 0 where they stay in memory."""
    dtype = torch.float32 if device.type == "cpu" else config.dtype
    nbytes = text.ids.numel() * config.get_text_config().hidden_size * dtype.itemsize
    files = 1 if text.config.tuning is None else 2
    return files * nbytes if spills(nbytes, text.config.spill) else 0


def spills(nbytes: int, wish: bool | None) -> bool:
    """Whether hidden states of this size go to a file; ``wish`` is the user's."""
    return nbytes > SPILL_BYTES if wish is None else wish


class HiddenStates:
    """``[samples, seq_len, hidden]``, written and read a batch at a time.

    Args:
        shape: of the whole.
        dtype: of the values.
        folder: where the mapped file is put, if there is one.
        device: where batches are wanted.
        spill: use a file; None does for more than :data:`SPILL_BYTES`.
        file: its name.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        folder: Path,
        *,
        device: torch.device,
        spill: bool | None = None,
        file: str = FILE,
    ) -> None:
        self._device = device
        nbytes = math.prod(shape) * dtype.itemsize
        self.spilled = spills(nbytes, spill)
        self._path = folder / file
        if self.spilled:
            self._path.unlink(missing_ok=True)
            mapped = torch.from_file(
                str(self._path), shared=True, size=math.prod(shape), dtype=dtype
            )
            self._values = mapped.view(shape)
        else:
            self._values = torch.empty(shape, dtype=dtype, device=device)

    def __getitem__(self, samples: slice) -> Tensor:
        return self._values[samples].to(self._device)

    def __setitem__(self, samples: slice, values: Tensor) -> None:
        self._values[samples] = values

    def copy_(self, other: HiddenStates) -> None:
        """Take ``other``'s values, which has the same shape, a sample at a time."""
        for sample in range(len(self._values)):
            self._values[sample] = other._values[sample]

    def close(self) -> None:
        """Give memory and file back."""
        del self._values
        self._path.unlink(missing_ok=True)
