"""A single row of inputs: the kernel of its own where rows and blocks allow it, and the one for few rows elsewhere."""

import pytest
import torch
from modulora_nf4.quantizer import NF4, Options

pytest.importorskip("numba")


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("block_size", [16, 32, 64, 4096])
@pytest.mark.parametrize("shape", [(1, 32), (33, 160), (5, 2080), (9, 48), (4, 1)], ids=str)
def test_the_product_of_one_row_is_that_of_the_decoded_weight(shape, block_size, double_quant):
    quantizer = NF4(Options(block_size=block_size, double_quant=double_quant))
    generator = torch.Generator().manual_seed(block_size)
    packed = quantizer.pack(torch.randn(shape, generator=generator))
    W = quantizer.dequantize_tile(packed, (0, shape[0]), torch.float64)
    x = torch.randn(1, shape[1], generator=generator)
    y = quantizer.matmul(x, packed)
    # a weight is rounded once more, and an fp32 sum of k products by less than k units of the last place of their magnitudes
    bound = (shape[1] + 1) * 2.0**-23 * (x.double().abs() @ W.abs().T)
    assert y.shape == (1, shape[0])
    assert bool(((y - x.double() @ W.T).abs() <= bound + 1e-30).all())


@pytest.mark.parametrize(("columns", "shift"), [(64, 6), (48, 6), (64, 4), (32, 5)])
def test_the_kernel_is_asked_only_for_rows_of_whole_vectors_of_one_block(columns, shift):
    from modulora_nf4 import cpu_one_row

    expected = columns % 32 == 0 and 2**shift % 32 == 0
    assert cpu_one_row.takes((None, None, shift, columns)) == expected
