"""Allocates the hidden states between two blocks, in memory or in a temporary file."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

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
    """
    if not _spills(math.prod(shape) * like.element_size(), spill):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    with tempfile.NamedTemporaryFile(dir=folder) as file:  # deleted here; the mapping stays valid
        size = math.prod(shape)
        return torch.from_file(file.name, shared=True, size=size, dtype=like.dtype).view(shape)


class SampleStates:
    """The hidden states of each sample before each block, in an open file.

    ``states[block, sample]`` reads one, ``[seq_len, hidden]``, on the CPU. A mapping of the file
    would count in the process's memory.

    Args:
        like: a hidden state of the dtype to store.
        shape: ``(blocks, samples, seq_len, hidden)``.
    """

    def __init__(self, file: BinaryIO, like: Tensor, shape: tuple[int, ...]) -> None:
        self._file, self._dtype, self._shape = file, like.dtype, shape
        self._nbytes = math.prod(shape[2:]) * like.element_size()

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        self._seek(place)
        data = bytearray(self._file.read(self._nbytes))
        return torch.frombuffer(data, dtype=self._dtype).view(self._shape[2:])

    def __setitem__(self, place: tuple[int, int], state: Tensor) -> None:
        self._seek(place)
        self._file.write(state.detach().cpu().contiguous().view(torch.uint8).numpy().data)

    def _seek(self, place: tuple[int, int]) -> None:
        block, sample = place
        self._file.seek((block * self._shape[1] + sample) * self._nbytes)


def spilled_bytes(
    tokens: int, config: PretrainedConfig, device: torch.device, spill: bool | None
) -> int:
    """Bytes of the file with the hidden states of ``tokens`` tokens; 0 if they stay in memory."""
    dtype = torch.float32 if device.type == "cpu" else config.dtype
    nbytes = tokens * int(config.get_text_config().hidden_size) * dtype.itemsize
    return nbytes if _spills(nbytes, spill) else 0


def _spills(nbytes: int, wish: bool | None) -> bool:
    return nbytes > SPILL_BYTES if wish is None else wish
