"""Arrange codes as GPTQ files do: one little-endian bit stream down each column, in 32-bit words.

Code i of a column has its lowest bit at bit ``bits · i`` of the column. Bit j of the column is bit
``j % 32`` of word ``j // 32``. 32 codes of 3 bits take three words, and some of them lie in two.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


def words_for(n: int, bits: int) -> int | None:
    """The number of words of ``n`` codes; None if they don't fill whole words."""
    return None if n * bits % WORD_BITS else n * bits // WORD_BITS


def _block(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole words, and their words."""
    return (32, 3) if bits == 3 else (WORD_BITS // bits, 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 ``[n, m]``, to words, int32 ``[n · bits / 32, m]``: a whole number of them."""
    size, words = _block(bits)
    blocks = codes.reshape(-1, size, codes.shape[1])
    packed = codes.new_zeros(len(blocks), words, codes.shape[1], dtype=torch.int32)
    for i, code in enumerate(blocks.unbind(1)):
        word, shift = divmod(bits * i, WORD_BITS)
        packed[:, word] |= code.to(torch.int32) << shift
        if shift + bits > WORD_BITS:
            packed[:, word + 1] |= code.to(torch.int32) >> (WORD_BITS - shift)
    return packed.reshape(-1, codes.shape[1])


def unpack(words: Tensor, bits: int) -> Tensor:
    """Words, int32 ``[k, m]``, to codes, uint8 ``[32 k / bits, m]``."""
    size, count = _block(bits)
    blocks = words.reshape(-1, count, words.shape[1])
    codes = []
    for i in range(size):
        word, shift = divmod(bits * i, WORD_BITS)
        code, low = blocks[:, word] >> shift, WORD_BITS - shift
        if low < bits:
            code = (code & (2**low - 1)) | (blocks[:, word + 1] << low)
        codes.append((code & (2**bits - 1)).to(torch.uint8))
    return torch.stack(codes, dim=1).reshape(-1, words.shape[1])


def add_one(words: Tensor, bits: int) -> Tensor:
    """Add one to each zero, int32 ``[rows, k]`` with words along rows, as GPTQModel does.

    It subtracts one from whole words, so that a 0 borrows from its neighbours, and this addition
    gives all of them back. 3-bit zeros are counted one by one, modulo 8.
    """
    if bits == 3:
        return pack((unpack(words.t(), bits) + 1) & 7, bits).t()
    return words + sum(1 << i for i in range(0, WORD_BITS, bits))  # modulo 2^32
