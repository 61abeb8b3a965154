"""The kernel of ``devices.py``. Triton decides when it is imported whether kernels are
interpreted."""

import triton
import triton.language as tl

BLOCK = 16


def decode(codes, scale, zero, out, group_size, *, masked):
    """Write (code - zero) scale to ``out``, fp32 ``[rows, in]``."""
    rows, columns = out.shape
    blocks = triton.cdiv(columns, BLOCK) if masked else columns // BLOCK
    if rows and blocks:
        groups = scale.shape[1]
        _decode[(rows, blocks)](codes, scale, zero, out, columns, groups, group_size, BLOCK=BLOCK)


@triton.jit
def _decode(codes, scale, zero, out, columns, groups, group_size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    byte = tl.load(codes + row * (columns // 2) + column // 2, mask=inside, other=0).to(tl.int32)
    code = (byte >> (column % 2 * 4)) & 15
    group = row * groups + column // group_size
    s = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(zero + group, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, (code.to(tl.float32) - z) * s, mask=inside)
