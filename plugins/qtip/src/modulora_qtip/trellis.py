"""Walks on the trellis as bits, and 16 × 16 tiles as sequences of 256 weights.

A tile of K bits a weight is a circular string of 256 K bits. Weight t ends at bit ⌊(t + 1) K⌋, and
its state is the L bits that end there. A step shifts K new bits in (section 2.3, bitshift trellis),
so any weight is decoded alone. K may be k + ½: weights of even t then have k new bits, of odd t
k + 1, as ExLlamaV3 1.6 writes them.

The string and the order of weights are EXL3's. Two int16 are a word of 32 bits, the low half
first, and a word's bits count from its most significant one. Weight t = 8 l + i of a tile, whose
rows are inputs and whose columns are outputs, has::

    row     2 (l mod 4) + (0, 1, 8, 9)[i mod 4]
    column  l div 4 + 8 (i div 4)
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from modulora_qtip.codes import values

TILE = 16
"""Rows and columns of a tile."""

T = TILE * TILE
"""Weights of a sequence."""

BLOCKS = {"full": None, "128": 128}
"""The order of the Hadamard matrices by the metadata's name; None for the dimension's."""

LARGEST_STATE = 16
"""Bits of a state, at most."""


def _position() -> Tensor:
    t = torch.arange(T)
    lane, i = t // 8, t % 8
    row = 2 * (lane % 4) + torch.tensor([0, 1, 8, 9])[i % 4]
    return row * TILE + lane // 4 + 8 * (i // 4)


POSITION = _position()
"""Weight t is at row ``POSITION[t] // 16`` of a tile, and at column ``POSITION[t] % 16``."""


@cache
def _time(device: torch.device) -> Tensor:
    """The t of each place in a tile, on a device: no product sends it there again."""
    return torch.argsort(POSITION).to(device)


def new_bits(bits: float) -> tuple[int, int]:
    """The new bits of weights of even t, and of odd t."""
    return int(bits), int(2 * bits) - int(bits)


def units(bits: float) -> int:
    """The int16 of a tile."""
    return int(TILE * bits)


def states(trellis: Tensor, bits: float, L: int) -> Tensor:
    """The states of all weights: int64 ``[..., 256]`` for ``trellis``, int16 ``[..., 16 bits]``."""
    units = trellis.to(torch.int64).unflatten(-1, (-1, 2)).flip(-1).flatten(-2) & 0xFFFF
    ends = (torch.arange(T, device=trellis.device) + 1) * int(2 * bits) // 2
    first = (ends - L) % int(T * bits)
    unit = first // 16
    two = units[..., unit] << 16 | units[..., (unit + 1) % units.shape[-1]]
    found: Tensor = two >> (32 - first % 16 - L) & ((1 << L) - 1)
    return found


def pack(states: Tensor, bits: float) -> Tensor:
    """The bit string of a circular walk: int16 ``[..., 16 bits]`` of states ``[..., 256]``."""
    two = states.unflatten(-1, (-1, 2)).unbind(-1)  # of even and of odd t
    parts = [
        each[..., None] >> torch.arange(k - 1, -1, -1, device=states.device) & 1
        for each, k in zip(two, new_bits(bits), strict=True)
    ]
    string = torch.cat(parts, -1).flatten(-2).unflatten(-1, (-1, 16))
    powers = 1 << torch.arange(15, -1, -1, device=states.device)
    units = (string * powers).sum(-1)
    units = units - (units >> 15 << 16)
    packed: Tensor = units.to(torch.int16).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return packed


def decode(trellis: Tensor, bits: float, L: int, code: str) -> Tensor:
    """C, the values that a packed weight means, ``[outputs, inputs]``, fp32.

    Args:
        trellis: int16 ``[inputs / 16, outputs / 16, 16 bits]``.
        bits: K, from 1 to 8, a multiple of ½.
        L: bits of a state, from ``bits`` to 16.
        code: a name in :data:`modulora_qtip.codes.CODES`.
    """
    return from_sequences(values(states(trellis, bits, L), code))


def from_sequences(sequences: Tensor) -> Tensor:
    """``[outputs, inputs]`` of sequences ``[inputs / 16, outputs / 16, 256]``."""
    tiles = sequences[..., _time(sequences.device)].unflatten(-1, (TILE, TILE))
    C: Tensor = tiles.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)
    return C


def to_sequences(C: Tensor) -> Tensor:
    """Sequences ``[inputs / 16, outputs / 16, 256]`` of ``[outputs, inputs]``."""
    tiles = C.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).permute(2, 0, 3, 1)
    sequences: Tensor = tiles.flatten(-2)[..., POSITION.to(C.device)]
    return sequences
