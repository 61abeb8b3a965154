"""Packed bits, and the CPU kernels that read them, beside a definition in numpy."""

import modulora_kernels as kernels
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modulora_conformance.fixtures import without_kernels
from modulora_optq import packing
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ, from_solution

pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("one_thread")

BITS = (2, 3, 4, 8)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

ODD = [
    (2, 16, False, True, (5, 130)),
    (3, -1, True, False, (1, 1)),
    (3, 64, False, True, (19, 2113)),  # decoded in pieces, which end inside a group
    (4, 100, False, False, (37, 257)),
    (8, 64, True, True, (5, 6144)),  # each part has whole groups
    (8, 16, False, False, (7, 33)),
]
"""Bits, group size, symmetric, permuted, shape."""

some_options = st.builds(
    Options,
    bits=st.sampled_from(BITS),
    group_size=st.just(-1) | st.integers(16, 200),
    symmetric=st.booleans(),
    damping=st.just(0.1),
)


def by_definition(solution, options):
    """Ŵ, fp32, in numpy: float(code − zero) · float(scale), each column in its own place."""
    columns = np.arange(solution.codes.shape[1])
    group = columns // (len(columns) if options.group_size == -1 else options.group_size)
    codes, zeros = (t.numpy().astype(np.int32) for t in (solution.codes, solution.zeros))
    steps = (codes - zeros[:, group]).astype(np.float32)
    stored = steps * solution.scales.numpy().astype(np.float32)[:, group]
    W = np.empty_like(stored)
    W[:, columns if solution.permutation is None else solution.permutation.numpy()] = stored
    return torch.from_numpy(W)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 5), st.integers(0, 300))
def test_unpacking_gives_the_codes_that_were_packed(bits, rows, n):
    numbers = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 2**bits, (rows, n), dtype=torch.uint8, generator=numbers)
    packed = packing.pack(codes, bits)
    assert packed.shape == (rows, packing.row_bytes(n, bits))
    assert n % 8 or 8 * packing.row_bytes(n, bits) == bits * n
    assert torch.equal(packing.unpack(packed, bits, n), codes)


@pytest.fixture(params=ODD, ids=str)
def odd(request, random_solution):
    """Quantizer, packed weight, Ŵ."""
    bits, size, symmetric, permuted, shape = request.param
    options = Options(bits=bits, group_size=size, symmetric=symmetric)
    solution = random_solution(shape, options, permuted)
    return OPTQ(options), from_solution(solution, options), by_definition(solution, options)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "plain torch"])
def test_tiles_have_the_bits_of_the_definition(odd, compiled, monkeypatch):
    if not compiled:
        without_kernels(monkeypatch)
    quantizer, packed, W = odd
    out_features = len(W)
    for start, stop in ((0, out_features), (out_features // 3, out_features - out_features // 4)):
        for dtype in DTYPES:
            tile = quantizer.dequantize_tile(packed, (start, stop), dtype)
            assert torch.equal(tile, W[start:stop].to(dtype)), (start, dtype)


@settings(max_examples=60, deadline=None)
@given(some_options, st.sampled_from((130, 512, 576, 1027)), st.data())
def test_any_columns_of_some_rows_are_decoded(random_solution, options, columns, data):
    """Products decode pieces of rows."""
    from modulora_optq.kernels.cpu import decode, operands

    solution = random_solution((4, columns), options)
    weight = kernels.operands(from_solution(solution, options), operands)
    row, start = data.draw(st.integers(0, 3)), data.draw(st.integers(0, columns - 1))
    count = data.draw(st.integers(1, columns - start))
    wanted = by_definition(solution, options)[row:, start : start + count]
    for dtype, number in ((torch.float32, np.float32), (torch.bfloat16, np.int16)):
        out = np.full((4 - row, count + 5), 77, number)
        decode(weight, row, start, count, out)
        assert torch.equal(torch.from_numpy(out[:, :count]).view(dtype), wanted.to(dtype))
        assert (out[:, count:] == 77).all()
